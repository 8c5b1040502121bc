"""Every integer model has the same bits on every target that takes it: the cells of the benchmark's table."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.codegen.devices import library
from bitwright.codegen.targets import BUILTIN, CROSS

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
targets_table: Any = import_module("targets_table")

INTEGER = ["digits", "resnet18", "resnet50", "mobilenet_v2"]
"""Models without layers in f32."""
TAKES = {
    "bitword": set(targets_table.RECIPES),
    "npu8": set(targets_table.RECIPES),
    "rram": {"4 bits", "ternary", "signs"},
    "simd124": {"4 bits", "ternary", "signs"},
    "lut": {"4 bits", "ternary", "signs"},
    "bnn-riscv": {"signs"},
    "gxnor": set(),
}
"""Recipes whose layers a device has instructions for."""


def check(name: str, recipe: str, target: str) -> None:
    found = targets_table.cell(name, recipe, target)
    if found.startswith("not run"):
        pytest.skip(found)
    if recipe in TAKES.get(target, {recipe}):
        assert found == "="
    else:
        assert found.startswith("refused: ")


@pytest.mark.parametrize("target", ["x86-portable", "c:host", *TAKES])
def test_the_digits_network(target: str) -> None:
    for recipe in ("int8", "signs") if target in TAKES else ("int8",):
        check("digits", recipe, target)


@pytest.mark.nightly
@pytest.mark.parametrize("target", targets_table.TARGETS)
@pytest.mark.parametrize("recipe", targets_table.RECIPES)
@pytest.mark.parametrize("name", INTEGER)
def test_integer_models(name: str, recipe: str, target: str) -> None:
    check(name, recipe, target)


def test_all_targets_are_in_the_table() -> None:
    assert {*BUILTIN, *CROSS, *library.names()} <= {*targets_table.TARGETS, "m7e4"}
    assert set(TAKES) == set(targets_table.DEVICES)


def test_differences_are_told() -> None:
    a = np.array([3.0, 4.0], np.float32)
    assert targets_table.distance((a,), (a,)) == 0.0
    assert targets_table.distance((a + np.float32(0.5),), (a,)) == pytest.approx(np.sqrt(0.5) / 5)
    assert targets_table.distance((np.array([-0.0], np.float32),), (np.array([0.0], np.float32),)) > 0
    cells = {
        "m|int8|x86-avx2": "=",
        "m|int8|npu8": "refused: no",
        "m|int8|rram": "refused: no",
        "m|int8|c:host": "3e-07",
    }
    text = targets_table.table(cells)
    assert "4 cells: 1 the same bits, 1 up to sums in f32, 2 refused" in text
    assert "| m, int8 | = | 3e-07 | [1] | [1] |" in text
    assert text.endswith("1. refused: no")
