"""assign-precision: the plan is the best within its budget, is applied as told, and bad budgets name the cure."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.types import NM
from bitwright.passes import Context, Pipeline, parse_passes
from bitwright.passes.precision import _sensitivity
from bitwright.passes.precision._assignment import Problem, apply_choice, parse_budget
from bitwright.passes.precision._choices import Choice, Rounding, choices_of
from bitwright.passes.precision._sensitivity import activation_losses, curvature, divergence, relative_error
from bitwright.passes.precision.assign_precision import AssignPrecision
from bitwright.passes.precision.observe_ranges import ObserveRanges

Read = Callable[..., Graph]

NET = """
graph @g (%x: f32[4, 16]) -> (y = %y) level=graph {
  %w1 = weight {ref="a.weight"} : f32[32, 16]
  %w2 = weight {ref="b.weight"} : f32[32, 32]
  %w3 = weight {ref="c.weight"} : f32[6, 32]
  %h = linear(%x, %w1) : f32[4, 32]
  %r = relu(%h) : f32[4, 32]
  %i = linear(%r, %w2) : f32[4, 32]
  %s = add(%r, %i) : f32[4, 32]
  %y = linear(%s, %w3) : f32[4, 6]
}
"""


def context(price: bool = False) -> Context:
    data = [(np.random.default_rng(i).standard_normal((4, 16)).astype(np.float32),) for i in range(3)]
    found = Context(calibration=data)
    if price:
        found.price = lambda graph, value, bits, pattern, measure: (
            graph.types[value].size * bits * (0.5 if pattern else 1.0) * 1e-9, "told"
        )  # fmt: skip
    return found


def observed(read: Read, price: bool = False) -> tuple[Graph, Context]:
    graph, c = read(NET), context(price)
    return ObserveRanges().run(graph, c), c


def test_choices_are_text_and_cost_what_they_say() -> None:
    c = Choice.parse("s4+2:4")
    assert (c.bits, str(c.pattern), c.density) == (4, "2:4", 0.5)
    assert c.size(800) == 800 * 0.5 * (4 + 2) / 8
    assert Choice.parse("f32").size(800) == 3200
    assert Choice.parse("s8").bit_operations(100) == 100 * 64
    assert [str(x) for x in choices_of("f32|s8|s8", None)] == ["f32", "s8"]
    assert [str(x) for x in choices_of("auto", None)] == ["f32", "s8", "s4"]
    for bad in ("s9", "f16", "s4+2", "s4+5:4"):
        with pytest.raises(InvalidInput):
            Choice.parse(bad)


def test_budgets_are_shares_or_amounts() -> None:
    assert parse_budget("size=0.16") == ("size", 0.16, "")
    assert parse_budget("latency=2ms") == ("latency", 0.002, "ms")
    for bad in ("size", "size=0", "size=-1", "size=nan", "speed=2", "latency=2m", "loss=inf"):
        with pytest.raises(InvalidInput, match="a budget is"):
            parse_budget(bad)


def test_losses_are_zero_iff_equal() -> None:
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    assert relative_error([a], [a]) == divergence([a], [a]) == 0.0
    assert relative_error([torch.zeros(3, 5)], [b]) == 1.0
    assert divergence([a], [b]) > 0.01


def test_the_plan_is_the_best_of_all(read: Read) -> None:
    graph, c = observed(read)
    p = AssignPrecision(budget="size=0.2", choices="f32|s8|s8+2:4|s8+1:4")
    problem = Problem.of(graph, c, p)
    assert problem.layers == ("a", "b", "c")
    plan = problem.solve()
    best = min(
        sum(problem.losses[i][j] for i, j in enumerate(pick))
        for pick in itertools.product(*(range(len(row)) for row in problem.losses))
        if sum(problem.costs[i][j] for i, j in enumerate(pick)) <= 0.2
    )
    assert plan.loss == pytest.approx(best)
    assert plan.cost <= 0.2
    assert plan.bound == pytest.approx(best)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_layers_measured_together_are_as_if_each_changed_alone(read: Read, rounding: Rounding) -> None:
    graph, c = observed(read)
    choices = [Choice.parse(x) for x in ("f32", "s8", "s4", "s8+2:4", "s4+2:4", "f32+2:4")]
    p = AssignPrecision(budget="size=1", choices="|".join(map(str, choices)), rounding=rounding)
    problem = Problem.of(graph, c, p)
    assert problem.evidence == "measured on 1 of 1 batches of samples that no layer was fitted to"
    (unseen,) = c.calibration[2:]
    for i, layer in enumerate(problem.layers):
        for j, choice in enumerate(choices):
            alone = apply_choice(
                graph, Context(calibration=c.calibration[:2], facts=dict(c.facts)), p, {layer: str(choice)}
            )
            want = relative_error(evaluate(alone, unseen), evaluate(graph, unseen))
            assert problem.losses[i][j] == pytest.approx(want, rel=1e-4, abs=1e-12)


def test_losses_are_measured_on_as_many_batches_as_time_allows(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, c = observed(read)
    c.calibration = [*c.calibration] * 3
    monkeypatch.setattr(_sensitivity, "EFFORT", 1)
    problem = Problem.of(graph, c, AssignPrecision(budget="size=1", choices="f32|s8"))
    assert problem.evidence == "measured on 1 of 2 batches of samples that no layer was fitted to"
    assert problem.losses[0][1] > 0


def test_the_plan_is_what_the_graph_becomes(read: Read) -> None:
    graph, c = observed(read)
    after = AssignPrecision(budget="size=0.24", choices="f32|s8|s8+2:4").run(graph, c)
    plan = c.facts["precision"]
    for layer, output in (("a", "h"), ("b", "i"), ("c", "y")):
        source = after.producers[after.producers[output].inputs[1]]
        weight = after.producers[source.inputs[0]] if source.op.spelling == "dequantize" else source
        assert str(weight.type.dtype) == ("f32" if plan[layer] == "f32" else "s8")
        assert (weight.type.encoding == NM(2, 4, 1)) == plan[layer].endswith("2:4")
    told = {place: facts for name, place, facts in c.remarks if name == "assign-precision"}
    assert told["model"]["cost"] <= 0.24
    assert told["b"]["choice"] == plan["b"]
    assert "s8+2:4: loss" in told["b"]["of"]
    assert told["model"]["measured_loss"] > 0
    assert told["model"]["plans"].startswith("least sum: cost ")


def test_more_budget_never_loses_more(read: Read) -> None:
    graph, c = observed(read)
    losses = []
    for share in (0.13, 0.16, 0.2, 0.25, 0.5, 1.0):
        p = AssignPrecision(budget=f"size={share}", choices="f32|s8|s8+2:4|s8+1:4")
        losses.append(Problem.of(graph, c, p).solve().loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0


def test_a_loss_budget_minimises_the_cost(read: Read) -> None:
    graph, c = observed(read)
    p = AssignPrecision(budget="loss=0.001", choices="f32|s8|s8+2:4")
    plan = Problem.of(graph, c, p).solve()
    assert plan.loss <= 0.001
    assert plan.minimise == "cost"
    assert plan.cost < 0.3


def test_latency_comes_from_the_driver(read: Read) -> None:
    graph, c = observed(read, price=True)
    p = AssignPrecision(budget="latency=0.25", choices="f32|s8|s8+2:4")
    problem = Problem.of(graph, c, p)
    assert "told" in problem.source
    assert problem.solve().cost <= 0.25
    absolute = AssignPrecision(budget=f"latency={0.25 * problem.whole}s", choices="f32|s8|s8+2:4")
    assert Problem.of(graph, c, absolute).solve().choice == problem.solve().choice
    with pytest.raises(InvalidInput, match="needs a target"):
        Problem.of(graph, observed(read)[1], p)


def test_first_last_ties_and_except(read: Read) -> None:
    graph, c = observed(read)
    p = AssignPrecision(budget="size=0.5", choices="f32|s8", first="f32", last="s8")
    problem = Problem.of(graph, c, p)
    plan = dict(zip(problem.layers, problem.solve().choice, strict=True))
    assert problem.choices[plan["a"]].bits == 32
    assert problem.choices[plan["c"]].bits == 8
    tied = Problem.of(graph, c, AssignPrecision(ties="residual", choices="f32|s8", first="s8"))
    assert tied.ties == ((0, 1),)
    assert tied.columns == ((1,), (1,), (0, 1))
    assert Problem.of(graph, c, AssignPrecision(except_="b", choices="f32|s8")).layers == ("a", "c")


def test_curvature_is_the_gauss_newton_diagonal(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[3, 4]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[5, 4]
          %y = linear(%x, %w) : f32[3, 5]
        }
    """)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    (y,) = evaluate(graph, [x])
    exact = float((x**2).sum() / 4) / float(y.square().sum())  # d y[n, o] / d w[o, k] = x[n, k], mean over o and k
    found = [curvature(graph, [(x,)], seed)["w"] for seed in range(40)]
    assert np.mean(found) == pytest.approx(exact, rel=0.1)


def test_both_sensitivities_agree_on_what_hurts(read: Read) -> None:
    graph, c = observed(read)
    rows = {
        kind: Problem.of(graph, c, AssignPrecision(choices="s8|s8+1:4", sensitivity=kind, reconstruct=False)).losses
        for kind in ("measured", "curvature")
    }
    for row in rows.values():
        assert all(dense < sparse for dense, sparse in row)


def test_impossible_budgets_name_the_smallest(read: Read) -> None:
    graph, c = observed(read)
    with pytest.raises(InvalidInput, match=r"budget 0.01 \(size, as a share of float\).*smallest possible is 0\.2"):
        AssignPrecision(budget="size=0.01", choices="f32|s8").run(graph, c)
    with pytest.raises(InvalidInput, match="needs calibration data"):
        AssignPrecision().run(graph, Context(facts=c.facts))
    with pytest.raises(InvalidInput, match="needs ranges"):
        Pipeline(parse_passes("assign-precision"), "graph")


def test_curvature_tells_of_activations_as_measuring_does(read: Read) -> None:
    """Of linear layers the estimate is exact but for its random signs; relu and sums of several layers stay near."""
    graph, c = observed(read)
    found = {}
    for kind in ("measured", "curvature"):
        p = AssignPrecision(choices="s8|s8a4|s8a3|s8a2", sensitivity=kind)
        found[kind] = np.array(Problem.of(graph, c, p).losses)
    assert (np.diff(found["curvature"], axis=1) > 0).all()
    ratio = found["curvature"][:, 1:] / found["measured"][:, 1:]
    assert 0.2 < ratio.min() < ratio.max() < 5


def test_rounding_of_an_activation_through_a_layer_is_estimated(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[8, 16]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[12, 16]
          %y = linear(%x, %w) : f32[8, 12]
        }
    """)
    x = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    scale = 8 / 15
    rounded = ((np.rint(x / scale) + 8).clip(0, 15) - 8) * scale
    exact = relative_error(evaluate(graph, [rounded.astype(np.float32)]), evaluate(graph, [x]))
    found = [activation_losses(graph, [(x,)], {("x", 4): (-4.0, 4.0)}, seed)["x", 4] for seed in range(60)]
    assert np.mean(found) == pytest.approx(exact, rel=0.2)
