"""Crossbars: without faults the ideal bits, fault maps by seed and rate, and refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitwright as bw
from bitwright import cli
from bitwright.codegen.devices import library
from bitwright.codegen.devices.cells import Cells, Faults, around, stuck
from bitwright.codegen.devices.schema import parse_device
from bitwright.codegen.devices.simulate import schedule, simulate
from bitwright.ir.errors import InvalidInput, Unsupported
from bitwright.ir.interpret import evaluate, to_numpy
from tests.test_devices import captured, layer

TEXT = library.text_of("rram")
DEVICE = library.find_device("rram")
RECIPE = "observe-ranges, quantize-weights{bits=4}, quantize-int8"
CELLS = Cells(levels=8, high=0.5)


def codes(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(-8, 9, shape).astype(np.int8))


@pytest.mark.parametrize("k", [1, 100, 128, 129, 300])
def test_without_faults_random_contractions_have_the_references_bits(k: int) -> None:
    """300 rows by 9 outputs at five lengths: more than 10^4 contractions; the top codes among them."""
    rng = np.random.default_rng(k)
    w, x = rng.integers(-8, 9, (9, k)).astype(np.int8), rng.integers(0, 256, (300, k)).astype(np.uint8)
    x[0], x[1], w[0], w[1] = 0, 255, 8, -8
    graph = layer("u8", w, "s5", rows=300)
    made = schedule(graph, DEVICE)
    (got,) = simulate(made, [x], faults=Faults(0.0, 7))
    assert np.array_equal(got, to_numpy(evaluate(graph, [x])[0]))
    (faulty,) = simulate(made, [x], faults=Faults(0.5, 7))
    assert not np.array_equal(got, faulty)


def test_faulty_products_are_those_of_the_cells() -> None:
    rng = np.random.default_rng(1)
    w, x = rng.integers(-8, 9, (9, 40)).astype(np.int8), rng.integers(0, 256, (20, 40)).astype(np.uint8)
    made = schedule(layer("u8", w, "s5", rows=20), DEVICE)
    (got,) = simulate(made, [x], faults=Faults(0.2, 3))
    read = stuck(torch.from_numpy(w), CELLS, Faults(0.2, 3), "y").numpy().astype(np.int64)
    assert np.array_equal(got, x.astype(np.int64) @ read.T)


def test_maps_follow_from_seed_layer_and_rate() -> None:
    w = codes(64, 200)
    assert torch.equal(stuck(w, CELLS, Faults(0.0, 5), "a"), w)
    a = stuck(w, CELLS, Faults(0.1, 5), "a")
    assert torch.equal(a, stuck(w, CELLS, Faults(0.1, 5), "a"))
    assert not torch.equal(a, stuck(w, CELLS, Faults(0.1, 6), "a"))
    assert not torch.equal(a, stuck(w, CELLS, Faults(0.1, 5), "b"))
    assert int(a.max()) <= 8
    assert int(a.min()) >= -8


@pytest.mark.parametrize(("high", "value"), [(0.0, 0), (1.0, 8)])
def test_the_rate_is_the_share_of_stuck_cells(high: float, value: int) -> None:
    """Codes in the middle of the range: every stuck cell shows."""
    cells = Cells(levels=8, high=high)
    w = torch.full((100, 400), 4, dtype=torch.int8)
    read = stuck(w, cells, Faults(0.1, 1), "a").to(torch.int64)
    plus_stuck = ((read == value) | (read == value - 8)) if high else read == 0
    assert float(plus_stuck.float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(stuck(w, cells, Faults(1.0, 1), "a"), torch.zeros_like(w))  # both of every pair
    more = stuck(w, cells, Faults(0.3, 1), "a").to(torch.int64)
    assert bool((more != 4)[read != 4].float().mean() > 0.9)  # what was stuck is stuck still


def test_the_digits_network() -> None:
    graph, example = captured("digits")
    ideal = bw.simulate(graph, "rram", recipe=RECIPE, calibration=[example])
    assert ideal.identical
    few, many = (bw.simulate(graph, "rram", recipe=RECIPE, calibration=[example], faults=f) for f in (0.01, 0.3))
    assert ideal.error == 0 < few.error < many.error
    other = bw.simulate(graph, "rram", recipe=RECIPE, calibration=[example], faults=0.3, seed=1)
    assert other.error != many.error


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("levels = 8 ", "levels = 0 ", r"rram:\d+: options.cells.levels: .*greater than or equal to 1"),
        ("high = 0.5", "high = 1.5", r"rram:\d+: options.cells.high: .*less than or equal to 1"),
        ("levels = 8 ", "levels = 16 ", r"rram:\d+: options.cells.levels: pairs of cells read as -16 to 16: too wide"),
        ("%w: s5", "%w: bipolar", r"too wide for w of column"),
    ],
)
def test_mistakes_are_told(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(InvalidInput, match=message):
        parse_device(TEXT.replace(old, new), "rram")


def test_what_cannot_be_is_refused() -> None:
    graph, example = captured("digits")
    with pytest.raises(Unsupported, match=r"codes of up to 15, a pair of cells holds 8 \(quantize-weights"):
        schedule(layer("u8", np.full((4, 8), 15, np.int8), "s5"), DEVICE)
    with pytest.raises(InvalidInput, match="npu8 has no cells that could be faulty"):
        bw.simulate(graph, "npu8", calibration=[example], faults=0.1)
    for rate, seed, message in ((1.5, 0, "a rate of faults is 0 to 1"), (0.1, -1, "a seed is at least 0")):
        with pytest.raises(InvalidInput, match=message):
            bw.simulate(graph, "rram", recipe=RECIPE, calibration=[example], faults=rate, seed=seed)


def test_the_command_tells_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitwright.ir.text import show

    graph, example = captured("digits")
    (tmp_path / "net.bw-ir").write_text(show(graph))
    graph.weights.save(tmp_path / "net.safetensors")
    named: dict[str, Any] = {graph.inputs[0].name: example[0]}
    np.savez(tmp_path / "x.npz", **named)
    arguments = ["simulate", tmp_path / "net.bw-ir", "-t", "rram", "-c", tmp_path / "x.npz", "-r", RECIPE]
    arguments += ["--faults", "0.1", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["bitwright", *map(str, arguments)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    told = " ".join(capsys.readouterr().out.split())
    assert "from the reference with 10 % of the cells stuck (seed 3)" in told


@pytest.mark.parametrize(("plus", "minus"), [(None, None), (None, 0), (None, 8), (0, None), (8, None), (0, 8), (8, 8)])
def test_known_faults_are_programmed_around_as_well_as_can_be(plus: int | None, minus: int | None) -> None:
    """Every code, against all pairs that could be programmed."""
    codes = torch.arange(-8, 9, dtype=torch.int16)
    pair = torch.stack([codes.clamp(min=0), (-codes).clamp(min=0)])
    faulty = torch.tensor([[plus is not None], [minus is not None]]).expand(2, 17)
    held = torch.tensor([[plus or 0], [minus or 0]], dtype=torch.int16).expand(2, 17)
    read = torch.where(faulty, held, around(codes, pair, faulty, held, 8))
    assert int(read.min()) >= 0
    assert int(read.max()) <= 8
    for code, a, b in zip(codes.tolist(), *read.tolist(), strict=True):
        sides = [range(9) if v is None else [v] for v in (plus, minus)]
        assert abs(a - b - code) == min(abs(p - n - code) for p in sides[0] for n in sides[1])


def test_a_tested_chip_loses_less() -> None:
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(-7, 8, (40, 60)).astype(np.int8))
    cells = Cells(levels=8)
    for rate in (0.05, 0.3):
        blind, known = (stuck(codes, cells, Faults(rate, 1, k), "fc").to(torch.int64) for k in (False, True))
        off = [int((r - codes).square().sum()) for r in (blind, known)]
        assert off[1] < 0.6 * off[0]
    assert torch.equal(stuck(codes, cells, Faults(0.0, 1, True), "fc"), codes)
    graph, example = captured("digits")
    errors = [
        bw.simulate(graph, "rram", recipe=RECIPE, calibration=[example], faults=0.1, known_faults=k).error
        for k in (False, True)
    ]
    assert errors[1] < errors[0]
