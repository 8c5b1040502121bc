"""Prices of layers: measured once and remembered, predicted otherwise, and fit to budget by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.codegen.targets import resolve
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.types import NM
from bitwright.prices import Prices

TWO_OF_FOUR = NM(2, 4, 1)


def graph() -> Graph:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    captured = bw.capture(net.eval(), (torch.randn(16, 64),))
    return bw.optimize(captured, "simplify")[0]


def contractions(g: Graph) -> list[str]:
    return [n.output for n in g.nodes if n.op.spelling == "linear"]


def test_predictions_follow_the_cost_model(tmp_path: Path) -> None:
    g, prices = graph(), Prices(resolve("x86-avx512-vnni"), tmp_path / "times.json")
    value = contractions(g)[0]
    dense, source = prices(g, value, 32, None, False)
    low, _ = prices(g, value, 8, None, False)
    sparse, _ = prices(g, value, 8, TWO_OF_FOUR, False)
    assert source == "predicted by the cost model"
    assert dense > low >= sparse > 0
    assert not (tmp_path / "times.json").exists()


def test_measurements_are_kept(tmp_path: Path) -> None:
    g, file = graph(), tmp_path / "times.json"
    value = contractions(g)[0]
    first = Prices(resolve("host"), file)
    found = {(bits, p): first(g, value, bits, p, True) for bits in (32, 8) for p in (None, TWO_OF_FOUR)}
    assert all(source == "measured" and 0 < seconds < 0.1 for seconds, source in found.values())
    kept = json.loads(file.read_text())
    assert sorted(kept.values()) == sorted(seconds for seconds, _ in found.values())
    file.write_text(json.dumps({k: 2 * v for k, v in kept.items()}))
    again = Prices(resolve("host"), file)
    assert again(g, value, 8, None, True)[0] == 2 * found[8, None][0]
    file.write_text("{damaged")
    anew = Prices(resolve("host"), file)
    assert anew(g, value, 8, None, True)[1] == "measured"
    assert len(json.loads(file.read_text())) == 1


def test_a_latency_budget_on_the_command_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    g = graph()
    data = [torch.randn(16, 64).numpy() for _ in range(2)]
    recipe = "observe-ranges, assign-precision{choices=f32|s8|s8+2:4 prices=measured}"
    program = bw.compile(g, recipe=recipe, calibration=data, budget="latency=0.9")
    story = next(n for x in program.report.layers for n in x.notes if n.startswith("assign-precision"))
    assert "choice" in story
    assert list(tmp_path.glob("latency-*.json"))
    with pytest.raises(InvalidInput, match="needs a recipe that assigns precision"):
        bw.compile(g, recipe="int8", calibration=data, budget="size=0.2")
