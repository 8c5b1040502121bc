"""Plans are measured as a whole: the best of them is taken, whatever the sums say."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.passes import Context
from bitwright.passes.precision import _checked
from bitwright.passes.precision._assignment import Problem
from bitwright.passes.precision._checked import best_of, measure, plan_of
from bitwright.passes.precision._choices import Choice
from bitwright.passes.precision.assign_precision import AssignPrecision
from bitwright.passes.precision.observe_ranges import ObserveRanges

CHOICES = tuple(map(Choice.parse, ("f32", "s8", "s4", "s8+2:4")))
COSTS = [1.0, 0.25, 0.125, 0.15]
Read = Callable[..., Graph]


def problem(losses: list[list[float]], budget: float, by_loss: bool = False) -> Problem:
    layers = tuple("abcdef"[: len(losses)])
    costs = [[c / len(losses) for c in COSTS] for _ in losses]
    columns = tuple((0, 1, 2, 3) for _ in losses)
    return Problem(layers, CHOICES, losses, costs, (), "size", 1.0, "counted", budget, by_loss, columns, 60.0)


@pytest.mark.parametrize("masked", [0.5, 3.0])
def test_patterns_that_hurt_together_are_left_out(masked: float) -> None:
    """Alone each mask loses half of what 4 bits do; together ``masked`` times of it."""
    p = problem([[0.0, 0.01, 0.1, 0.05]] * 4, 0.16)

    def loss(plan: Mapping[str, str]) -> float:
        weights = {"f32": 0.0, "s8": 0.01, "s4": 0.1, "s8+2:4": 0.1 * masked}
        return sum(weights[c] for c in plan.values())

    found = best_of(p, loss)
    assert set(plan_of(p, found.plan).values()) == ({"s8+2:4"} if masked < 1 else {"s4", "s8"})
    assert found.plan.cost <= 0.16
    measured = dict((name, m) for name, _, _, m in found.tried)
    assert found.loss == min(measured.values())
    assert {"least sum", "no patterns", "s4 everywhere"} == set(measured)
    assert "no patterns: cost " in str(found)


def test_no_plan_of_one_format_within_the_budget_is_better() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = problem([[0.0, *rng.random(3)] for _ in range(5)], 0.3)
        apart = {layer: dict(zip(map(str, CHOICES), [0.0, *rng.random(3)], strict=True)) for layer in p.layers}

        def loss(plan: Mapping[str, str], apart: dict[str, dict[str, float]] = apart) -> float:
            return sum(apart[layer][c] for layer, c in plan.items())

        found = best_of(p, loss)
        uniform = [loss(dict.fromkeys(p.layers, c)) for c in ("s8", "s4", "s8+2:4")]
        sums = [sum(row[j] for row in p.losses) for j in (1, 2, 3)]
        near = [u for u, s in zip(uniform, sums, strict=True) if s <= _checked.DOUBT * found.loss]
        assert found.loss <= min(near, default=np.inf)


def test_what_is_far_off_is_not_even_measured() -> None:
    asked: list[str] = []

    def loss(plan: Mapping[str, str]) -> float:
        asked.append("|".join(plan.values()))
        return 0.001

    best_of(problem([[0.0, 0.001, 0.1, 0.5]] * 2, 0.5), loss)
    assert asked == ["s8|s8"]
    best_of(problem([[0.0, 0.001, 0.1, 0.5]] * 2, 0.2), loss)
    assert set(asked[1:]) in ({"s4|s4", "s8|s4"}, {"s4|s4", "s4|s8"})


def test_a_budget_on_the_loss_is_kept_by_what_is_measured() -> None:
    p = problem([[0.0, 0.01, 0.1, 0.5]] * 4, 0.2, by_loss=True)

    def loss(plan: Mapping[str, str]) -> float:
        return 2 * sum({"f32": 0.0, "s8": 0.01, "s4": 0.1, "s8+2:4": 0.5}[c] for c in plan.values())

    found = best_of(p, loss)
    assert found.loss <= 0.2 < found.tried[0][3]
    assert found.plan.budget == 0.2
    assert sorted(plan_of(p, found.plan).values()) == ["s8", "s8", "s8", "s8"]
    with pytest.raises(InvalidInput, match=r"no plan measured has a loss of 0.2 or less: the least is 0.3"):
        best_of(p, lambda plan: 0.3)


def test_masks_fitted_to_few_rows_are_judged_on_others(read: Read) -> None:
    """32 weights an output fitted to 12 rows meet these exactly in half of them; other rows tell what that is worth."""
    graph = read("""
        graph @g (%x: f32[b, 32]) -> (y = %y) level=graph {
          %w1 = weight {ref="a.weight"} : f32[32, 32]
          %w2 = weight {ref="b.weight"} : f32[8, 32]
          %h = linear(%x, %w1) : f32[b, 32]
          %y = linear(%h, %w2) : f32[b, 8]
        }
    """)
    rng = np.random.default_rng(3)
    c = Context(calibration=[(rng.standard_normal((16, 32)).astype(np.float32),)])
    graph = ObserveRanges().run(graph, c)
    p = AssignPrecision(budget="size=0.16", choices="s8|s4|s8+2:4", rounding="gptq")
    found = best_of(Problem.of(graph, c, p), measure(graph, c, p))
    assert not any(Choice.parse(x).pattern for x in plan_of(Problem.of(graph, c, p), found.plan).values())
    assert found.loss < 0.1
