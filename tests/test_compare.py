"""``bitwright compare``: a row for every target and recipe, the same bits everywhere, errors for unknown targets."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import bitwright as bw
from bitwright import cli
from bitwright.compare import Row, agreement, compare, plot
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from tests.zoo import ZOO

TARGETS = ["x86-portable", "c", "npu8"]


@pytest.fixture(scope="module")
def digits() -> tuple[Graph, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, example = ZOO["digits"]("tiny")
        return bw.capture(module, example), np.asarray(example[0])


@pytest.fixture(scope="module")
def rows(digits: tuple[Graph, np.ndarray]) -> list[Row]:
    graph, x = digits
    return compare(graph, TARGETS, ["int8", "nm-mask{pattern=2:4}, int8"], [(x,)])


def test_a_row_for_every_target_and_recipe(rows: list[Row]) -> None:
    assert [r.target for r in rows] == TARGETS * 2
    assert [r.how for r in rows[:3]] == ["measured", "at 80 MHz", "simulated"]
    assert all(r.seconds and r.seconds > 0 and r.weight_bytes > 0 for r in rows)
    assert rows[2].energy is not None
    assert all(r.error is not None and r.error < 0.1 for r in rows[:3])
    assert rows[5].weight_bytes < rows[2].weight_bytes  # the device stores the mask


def test_integer_models_have_the_same_bits(rows: list[Row]) -> None:
    assert agreement(rows[:3]) == "the same bits on x86-portable, c, npu8"
    assert agreement(rows[3:]) == "the same bits on x86-portable, c, npu8"


def test_different_results_are_told(rows: list[Row]) -> None:
    from dataclasses import replace

    assert rows[0].outputs is not None
    off = replace(rows[1], outputs=tuple(a + 1 for a in rows[0].outputs))
    assert agreement([rows[0], off]).startswith("c differs from x86-portable by")
    near = replace(rows[1], outputs=tuple(a * np.float32(1 + 1e-7) for a in rows[0].outputs))
    assert agreement([rows[0], near]).startswith("the same but for the rounding")
    assert agreement([rows[0]]) == "nothing to compare"


def test_the_plot(rows: list[Row], tmp_path: Path) -> None:
    plot(rows, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 5000


def test_unknown_targets(digits: tuple[Graph, np.ndarray]) -> None:
    graph, x = digits
    with pytest.raises(InvalidInput, match="unknown target 'npu9'"):
        compare(graph, ["npu9"], ["int8"], [(x,)])
    with pytest.raises(InvalidInput, match="at least one target"):
        compare(graph, [], ["int8"], [(x,)])


def test_the_command(
    digits: tuple[Graph, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from bitwright.ir.text import show

    graph, x = digits
    (tmp_path / "net.bw-ir").write_text(show(graph))
    graph.weights.save(tmp_path / "net.safetensors")
    named = {graph.inputs[0].name: x}
    np.savez(tmp_path / "x.npz", **named)  # type: ignore[arg-type]
    words = ["bitwright", "compare", tmp_path / "net.bw-ir", "--targets", "c,npu8", "-c", tmp_path / "x.npz"]
    monkeypatch.setattr(sys, "argv", [str(w) for w in words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "the same bits on c, npu8" in capsys.readouterr().out
