"""Advice: what it offers for which layer, what it promises, and plans that keep their budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bitwright as bw
from bitwright.advice import CAUTION, OPTIONS, advise, integer_form
from bitwright.advice_plan import GUESSED, MEASURED, guessed_loss, plan
from bitwright.advice_tables import layers, show
from bitwright.cli_show import console
from bitwright.codegen.cost import cost_of
from bitwright.codegen.targets import BUILTIN
from bitwright.errors import InvalidInput
from bitwright.ir.graph import subgraph
from bitwright.ir.text import parse
from bitwright.passes.precision._choices import Choice
from bitwright.passes.sparsity.masks import Pattern

TARGET = BUILTIN["x86-avx512-vnni"]
GRAPH = parse(
    "graph @g (%x: f32[128, 768], %m: f32[128, 768]) -> (y = %y, s = %s) level=graph {\n"
    '  %w = weight {ref="wide.weight"} : f32[3072, 768]\n'
    "  %y = linear(%x, %w) : f32[128, 3072]\n"
    "  %s = linear(%x, %m) : f32[128, 128]\n"
    "}\n"
)


class Net(torch.nn.Module):
    """Two layers, the second with a reduction that no group divides."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(256, 126)
        self.two = torch.nn.Linear(126, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.two(torch.relu(self.one(x)))
        return out


def graph() -> bw.Graph:
    torch.manual_seed(0)
    return bw.capture(Net().eval(), (torch.randn(64, 256),))


def test_every_option_with_a_kernel_is_offered() -> None:
    wide, computed = advise(GRAPH, TARGET)
    assert (wide.layer, computed.gains, computed.bytes) == ("wide", {}, {})
    assert "computed" in computed.reason
    expected = {
        o.name for o in OPTIONS if o.bits <= 8 and (o.pattern is None or TARGET.gain(TARGET.activation, o.pattern) > 1)
    }
    assert set(wide.gains) == expected
    assert wide.share + computed.share == pytest.approx(1)


def test_gains_are_cautious_and_bytes_are_as_stored() -> None:
    wide = advise(GRAPH, TARGET)[0]
    node = GRAPH.producers["y"]
    body, _ = subgraph(GRAPH, [node], node.outputs)
    low = integer_form(node, body, TARGET, None)
    assert low is not None
    predicted = cost_of(body, TARGET).seconds / cost_of(low, TARGET).seconds
    assert wide.gains["int8"] == pytest.approx(CAUTION * predicted, rel=0.02)
    assert 1.1 * wide.gains["int8"] < wide.gains["2:4"] < wide.gains["2:8"] < wide.gains["2:16"]
    size = 3072 * 768
    assert [wide.bytes[x] for x in ("float", "int8", "4 bit", "2:4")] == [4 * size, size, size / 2, size / 2 * 10 / 8]
    assert wide.best in wide.reason


def test_patterns_that_do_not_divide_the_reduction_are_left_out() -> None:
    one, two = bw.advise(graph(), TARGET)
    assert {"2:4", "1:4 4x4"} <= set(one.gains)
    assert not {o.name for o in OPTIONS if o.pattern} & set(two.gains)


def test_what_rounding_and_pruning_take() -> None:
    w = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    loss = {c: guessed_loss(w, Choice.parse(c)) for c in ("f32", "s8", "s4", "s8+2:4", "s8+2:8")}
    assert loss["f32"] == 0.0
    assert 0 < loss["s8"] < loss["s4"] < loss["s8+2:4"] < loss["s8+2:8"] < 1
    four = np.array([[3.0, 0.0, 4.0, 0.0]], np.float32)
    assert guessed_loss(four, Choice(32, Pattern(2, 4))) == 0.0
    assert guessed_loss(four, Choice(32, Pattern(1, 4))) == pytest.approx(9 / 25)


@pytest.mark.parametrize(
    ("budget", "kind"), [("size=0.2", "size"), ("latency=0.3", "latency"), ("bitops=0.1", "bitops")]
)
def test_a_plan_keeps_its_budget(budget: str, kind: str) -> None:
    found = plan(graph(), TARGET, budget)
    assert (found.kind, found.basis) == (kind, GUESSED)
    assert sum(r.cost for r in found.rows) == pytest.approx(found.cost)
    assert found.cost <= float(budget.split("=")[1])
    assert [r.layer for r in found.rows] == ["one", "two"]
    assert any(r.choice != "f32" for r in found.rows)


def test_a_loss_budget_makes_the_latency_smallest() -> None:
    mild, harsh = (plan(graph(), TARGET, f"loss={x}") for x in (1e-3, 0.6))
    assert mild.loss <= 1e-3
    assert harsh.loss <= 0.6
    assert (mild.kind, harsh.cost < mild.cost < 1) == ("latency", True)


def test_with_data_losses_are_measured() -> None:
    data = [(torch.randn(64, 256).numpy(),) for _ in range(2)]
    advised = bw.advise(graph(), TARGET, budget="size=0.2", calibration=data)
    assert advised.plan is not None
    assert advised.plan.basis == MEASURED
    assert {r.layer for r in advised.plan.rows} == {"one", "two"}
    assert advised.plan.cost <= 0.2
    assert len(advised) == len(list(advised)) == 2
    program = bw.compile(graph(), target=TARGET, recipe=advised.plan.recipe, calibration=data)
    assert program.manifest.weights_bytes < 0.3 * 4 * (256 * 126 + 126 * 10)


def test_a_budget_that_makes_no_sense_says_so() -> None:
    with pytest.raises(InvalidInput, match="a budget is size="):
        bw.advise(graph(), TARGET, budget="speed=2")
    with pytest.raises(InvalidInput, match="nothing to plan"):
        plan(
            parse("graph @g (%x: f32[2]) -> (y = %y) level=graph {\n  %y = relu(%x) : f32[2]\n}\n"), TARGET, "size=0.5"
        )


def test_narrow_tables_say_what_they_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(advise(GRAPH, TARGET))
    narrow, note = layers(rows, 100)
    full, nothing = layers(rows, 400)
    assert (len(full.columns) - len(narrow.columns), nothing) == (note.count(",") + 1, "")
    show(console(), rows, plan(graph(), TARGET, "size=0.2"))
    said = capsys.readouterr().out
    for expected in (
        "Contractions of the whole model",
        "nm-mask{pattern=2:8}, int8",
        "wide",
        "Plan for size=0.2",
        GUESSED[:30],
    ):
        assert expected in said
    show(console(), [], None)
    assert "nothing to advise" in capsys.readouterr().out
