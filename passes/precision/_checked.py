"""Plans put together and measured before one is applied: the integer program adds up what layers lose one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.passes._pass import Context
from bitwright.passes.precision._assignment import Problem, apply_choice, fitted, like
from bitwright.passes.precision._sensitivity import LOSSES, few
from bitwright.passes.precision.allocation import Allocation

if TYPE_CHECKING:
    from bitwright.passes.precision.assign_precision import AssignPrecision

DOUBT = 3.0
"""Further plans are measured if their sum is below so many times the least loss measured: sums are seldom so wrong."""
ROUNDS = 4
"""How often a budget on the loss is tightened until what is measured keeps it."""
Measure = Callable[[Mapping[str, str]], float]


@dataclass(frozen=True)
class Checked:
    """The plan taken, what the whole of it loses, and all that were measured: name, share of the cost, sum, loss."""

    plan: Allocation
    loss: float
    tried: tuple[tuple[str, float, float, float], ...]

    def __str__(self) -> str:
        return "; ".join(f"{name}: cost {c:.2%}, sum {s:.3g}, measured {m:.3g}" for name, c, s, m in self.tried)


def plan_of(problem: Problem, found: Allocation) -> dict[str, str]:
    """Layer to choice, as text."""
    return {x: str(problem.choices[c]) for x, c in zip(problem.layers, found.choice, strict=True)}


def measure(graph: Graph, context: Context, p: AssignPrecision) -> Measure:
    """What a plan loses on samples it was not fitted to, its rounding learnt in the quicker way."""
    split = fitted(context, graph, p)
    batches = few(graph, split.judge, 1)
    wanted = [evaluate(graph, b) for b in batches]

    def loss(plan: Mapping[str, str]) -> float:
        scratch = Context(context.target, split.fit, context.progress, facts=dict(context.facts), price=context.price)
        made = apply_choice(graph, scratch, like(p), plan)
        losses = [LOSSES[p.metric](evaluate(made, b), want) for b, want in zip(batches, wanted, strict=True)]
        return sum(losses) / len(losses)

    return loss


def best_of(problem: Problem, loss: Measure) -> Checked:
    """The plan of the program, the best one of a single format within the budget, and others that come near (without
    patterns where the first takes any; of other formats): that of the least measured loss. With a budget on the loss,
    the plan of the least cost whose measured loss keeps it, found by tightening the budget on the sum."""
    return _within_loss(problem, loss) if problem.by_loss else _least_loss(problem, loss)


def _least_loss(problem: Problem, loss: Measure) -> Checked:
    found = [("least sum", problem.solve())]
    if any(problem.choices[c].pattern for c in found[0][1].choice):
        found += _restricted(problem, "no patterns", lambda c: problem.choices[c].pattern is None)
    single: list[tuple[str, Allocation]] = []
    for j, choice in enumerate(problem.choices):
        single += _restricted(problem, f"{choice} everywhere", lambda c, j=j: c == j)  # type: ignore[misc]
    single.sort(key=lambda item: item[1].loss)
    done: dict[tuple[int, ...], float] = {}
    tried, best, least = [], found[0][1], float("inf")
    for i, (name, plan) in enumerate([*found[:1], *single[:1], *found[1:], *single[1:]]):
        if plan.choice in done or (i > 1 and plan.loss > DOUBT * least):
            continue
        done[plan.choice] = lost = loss(plan_of(problem, plan))
        tried.append((name, plan.cost, plan.loss, lost))
        if lost < least:
            best, least = plan, lost
    return Checked(best, least, tuple(tried))


def _restricted(problem: Problem, name: str, able: Callable[[int], bool]) -> list[tuple[str, Allocation]]:
    """The best plan of these choices alone (any, for layers that can take none of them), if one fits the budget."""
    try:
        return [(name, problem.solve(able))]
    except InvalidInput:
        return []


def _within_loss(problem: Problem, loss: Measure) -> Checked:
    tried: list[tuple[str, float, float, float]] = []
    wanted = budget = problem.budget
    for _ in range(ROUNDS):
        plan = replace(problem, budget=budget).solve()
        lost = loss(plan_of(problem, plan))
        tried.append((f"sum at most {budget:.3g}", plan.cost, plan.loss, lost))
        if lost <= wanted:
            return Checked(replace(plan, budget=wanted), lost, tuple(tried))
        budget = 0.9 * min(budget, plan.loss) * wanted / lost
    least = min(measured for *_, measured in tried)
    raise InvalidInput(f"assign-precision: no plan measured has a loss of {wanted:g} or less: the least is {least:.3g}")


__all__ = ["Checked", "Measure", "best_of", "measure", "plan_of"]
