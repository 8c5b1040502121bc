"""Kernels with activations in lanes against NumPy: exact on every level, packed and back, ragged in every size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.codegen.tvm.contract import ContractSpec, Conv, Matrix, StoreAcc, pairs_are_safe
from bitwright.codegen.tvm.contract.spec import ISAS, Element, Isa
from bitwright.codegen.tvm.lanes.choose import default_knobs
from bitwright.codegen.tvm.lanes.emit import emit
from bitwright.codegen.tvm.lanes.packing import from_units, kept_of, pack, units_of, unpack
from bitwright.codegen.tvm.lanes.spec import LanesKnobs
from tests.codegen.harness import runnable
from tests.codegen.test_contract import execute, reference

Array = np.ndarray[Any, Any]
GEOMETRIES: dict[str, Matrix | Conv] = {
    "ragged": Matrix(37, 70, 52),
    "one vector": Matrix(16, 5, 8),
    "several blocks of outputs": Matrix(130, 1100, 36),
    "1x1": Conv(2, 5, 6, 20, 66, (1, 1)),
    "3x3, strided, padded": Conv(2, 9, 7, 8, 20, (3, 3), (2, 1), (1, 1), (1, 1, 1, 1)),
    "dilated, chunks and rest": Conv(1, 14, 14, 84, 68, (3, 2), (1, 1), (2, 1), (2, 1, 2, 1)),
}
LEVELS = [(isa, e) for isa in ISAS for e in ("u8s8", "f32") if (isa, e) != ("portable", "u8s8")]


def sparse(spec: ContractSpec, shared: int, share: float, seed: int, low: int = -128, high: int = 128) -> Array:
    """Weights of which ``share`` of the units is kept, the same for ``shared`` outputs; one group keeps none, the last
    one all."""
    rng = np.random.default_rng(seed)
    shape = units_of(spec, np.zeros(spec.weight_shape, spec.weight_dtype.numpy)).shape
    kept = rng.random((-(-shape[0] // shared), shape[1])) < share
    kept[0], kept[-1] = False, True
    values = rng.integers(low, high, shape) if spec.element == "u8s8" else rng.standard_normal(shape)
    values = values * np.repeat(kept, shared, 0)[: shape[0], :, None]
    return from_units(spec, values.astype(spec.weight_dtype.numpy))


def check(spec: ContractSpec, knobs: LanesKnobs, weight: Array, folder: Path, x: Array | None = None) -> None:
    """Pack, unpack, run in two ranges of tasks, compare."""
    if not runnable(knobs.isa):
        pytest.skip(f"this machine has no {knobs.isa}")
    rng = np.random.default_rng(spec.cols)
    init: Array = rng.integers(-(2**20), 2**20, spec.cols).astype(spec.acc_dtype.numpy)
    if x is None:
        codes = rng.integers(0, 256, spec.input_elements)
        x = codes.astype(np.uint8) if spec.element == "u8s8" else (codes / 128 - 1).astype(np.float32)
    packed = pack(spec, knobs, weight)
    np.testing.assert_array_equal(unpack(spec, knobs, packed), weight)
    func = emit(spec, knobs, StoreAcc(spec.rows, spec.cols, spec.acc_dtype), "kernel")
    got = execute(func, knobs.isa, folder, spec, [x, *packed, *([init] if spec.init else [])])
    want = reference(spec, x, weight, init if spec.init else None)
    if spec.element == "u8s8":
        np.testing.assert_array_equal(got, want)
    else:
        assert np.abs(got - want).max() <= 1e-5 * max(1.0, np.abs(want).max())


def knobs_of(spec: ContractSpec, isa: Isa, weight: Array, shared: int) -> LanesKnobs:
    safe = isa == "avx2" and spec.element == "u8s8" and pairs_are_safe(spec, weight)
    return default_knobs(spec, isa, kept_of(units_of(spec, weight), shared), shared, safe_pairs=safe)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize(("isa", "element"), LEVELS)
def test_against_the_reference(isa: Isa, element: Element, shared: int, name: str, tmp_path: Path) -> None:
    pad = 9 if element == "u8s8" else 0
    spec = ContractSpec(element, GEOMETRIES[name], init=shared == 2, pad_value=pad)
    weight = sparse(spec, shared, 0.3, len(name))
    check(spec, knobs_of(spec, isa, weight, shared), weight, tmp_path)


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("block", [7, 13, 26])
def test_any_cut_of_the_reduction(block: int, fixed: bool, tmp_path: Path) -> None:
    spec = ContractSpec("u8s8", Matrix(50, 21, 104))
    weight = sparse(spec, 1, 0.2, block)
    counts = (block, 26 % block) if fixed else ()
    knobs = LanesKnobs("avx512-vnni", 2, 1, block, 64, counts)
    check(spec, knobs, weight, tmp_path)


@pytest.mark.parametrize("isa", ["avx512-vnni", "avx-vnni", "avx2"])
def test_extreme_values_never_saturate(isa: Isa, tmp_path: Path) -> None:
    spec = ContractSpec("u8s8", Matrix(33, 24, 64))
    weight = np.full(spec.weight_shape, -128, np.int8)
    weight[3] = 127
    weight[4:8] = 0
    x = np.full(spec.input_elements, 255, np.uint8)
    check(spec, knobs_of(spec, isa, weight, 4), weight, tmp_path, x)


def test_proven_pairs_on_avx2(tmp_path: Path) -> None:
    spec = ContractSpec("u8s8", Matrix(40, 40, 64))
    weight = sparse(spec, 4, 0.4, 1, -60, 61)
    knobs = knobs_of(spec, "avx2", weight, 4)
    assert knobs.safe_pairs
    check(spec, knobs, weight, tmp_path)
    check(spec, replace(knobs, safe_pairs=False), weight, tmp_path)


def test_all_zeros(tmp_path: Path) -> None:
    spec = ContractSpec("f32", Matrix(20, 24, 64), init=True)
    weight = np.zeros(spec.weight_shape, np.float32)
    check(spec, knobs_of(spec, "avx512-vnni", weight, 1), weight, tmp_path)
