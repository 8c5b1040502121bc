"""One choice per layer under a budget, exactly: a multiple-choice knapsack solved as an integer program (HiGHS).

Every layer has a row of choices (number formats, sparsity patterns) with a loss and a cost each. ``allocate`` picks one
per layer so that the sum of losses is smallest within a budget on the sum of costs, or the other way round. The
program of HAWQ-V3 (arXiv 2011.10680) and of CalibTIP (arXiv 2006.10518).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.weights import Array
from bitwright.passes.precision._allocation_input import Rows, as_budget, column_sums, groups, tables, with_slack
from bitwright.passes.precision._knapsack import solve

Minimise = Literal["loss", "cost"]


@dataclass(frozen=True, slots=True)
class Allocation:
    """The column chosen for each layer, with its total loss and cost.

    ``bound`` is proved: no allocation within the budget has a smaller objective. ``gap`` is the distance of the
    objective from it, relative to the objective; 0 where the solution is proved optimal.
    """

    choice: tuple[int, ...]
    loss: float
    cost: float
    bound: float
    gap: float
    budget: float
    minimise: Minimise = "loss"

    @property
    def optimal(self) -> bool:
        """True when nothing better exists within the budget."""
        return self.gap == 0.0


def allocate(
    losses: Rows,
    costs: Rows,
    budget: float,
    ties: Iterable[Iterable[int]] = (),
    minimise: Minimise = "loss",
    time_limit: float = 60.0,
) -> Allocation:
    """Choose one column per layer: the smallest total loss whose total cost is at most ``budget``.

    ``losses`` and ``costs``: one array of choices per layer; layers may have different numbers of choices. Losses are
    any finite numbers (a measured increase may be below zero), costs are not negative; both in whatever unit.
    ``ties``: groups of layer indices that take the same column. With ``minimise="cost"`` the total cost is smallest
    and ``budget`` bounds the total loss. The solution is the same for the same input, as long as ``time_limit``
    (seconds) is not reached; when it is, the best one found comes with its bound and gap.

    Raises :class:`InvalidInput` for rows that do not match, NaN and infinities, negative costs, ties that do not
    fit, and for a budget that nothing meets: the error names the smallest one that can be met.

    >>> a = allocate([[3.0, 0.0], [5.0, 0.0]], [[1, 2], [1, 3]], budget=4)
    >>> a.choice, a.loss, a.cost
    ((0, 1), 3.0, 4.0)
    """
    if minimise not in ("loss", "cost"):
        raise InvalidInput(f"minimise is 'loss' or 'cost', not {minimise!r}")
    if not time_limit > 0:
        raise InvalidInput(f"time_limit is a number of seconds above zero, not {time_limit}")
    loss, cost = tables(losses, costs)
    tied = groups(ties, loss)
    budget = as_budget(budget)
    value, weight = (loss, cost) if minimise == "loss" else (cost, loss)
    values = [column_sums(value, g) for g in tied]
    weights = [column_sums(weight, g) for g in tied]
    smallest = math.fsum(float(w.min()) for w in weights)
    if smallest > with_slack(budget):
        what = "cost" if minimise == "loss" else "loss"
        raise InvalidInput(f"no allocation has a {what} of {budget:g} or less: the smallest possible is {smallest:.9g}")
    found = solve(values, weights, with_slack(budget), time_limit)
    choice = [0] * len(loss)
    for group, column in zip(tied, found.choice, strict=True):
        for layer in group:
            choice[layer] = column
    return _allocation(tuple(choice), loss, cost, found.bound, found.optimal, budget, minimise)


def pareto(
    losses: Rows,
    costs: Rows,
    ties: Iterable[Iterable[int]] = (),
    points: int | Sequence[float] = 20,
    time_limit: float = 60.0,
) -> tuple[Allocation, ...]:
    """The front of loss against cost, cheapest first: the best loss at each of a number of cost budgets.

    ``points``: how many budgets, evenly spaced from the cheapest allocation to the cheapest one of least loss; or the
    budgets themselves, of which those that nothing meets are left out. ``time_limit`` holds for each. Allocations
    that cost no less and lose no less than another are dropped, so that both columns are strictly monotone.
    """
    tied = tuple(tuple(g) for g in ties)
    if isinstance(points, int | np.integer):
        if isinstance(points, bool) or points < 1:
            raise InvalidInput(f"points is a number of budgets, at least 1, not {points!r}")
        low, high = _ends(losses, costs, tied, time_limit)
        budgets = np.linspace(low, high, int(points)).tolist() if points > 1 else [high]
    else:
        low = _ends(losses, costs, tied, time_limit)[0]
        budgets = [b for b in sorted(map(as_budget, points)) if low <= with_slack(b)]
    front: list[Allocation] = []
    for budget in budgets:
        a = allocate(losses, costs, budget, tied, time_limit=time_limit)
        if front and a.loss >= front[-1].loss:
            continue
        front = [f for f in front if f.cost < a.cost]
        front.append(a)
    return tuple(front)


def _ends(losses: Rows, costs: Rows, ties: tuple[tuple[int, ...], ...], time_limit: float) -> tuple[float, float]:
    """The smallest cost of all, and the smallest cost at the smallest loss."""
    loss, cost = tables(losses, costs)
    tied = groups(ties, loss)
    low, high = [], []
    for g in tied:
        l, c = column_sums(loss, g), column_sums(cost, g)  # noqa: E741
        low.append(float(c.min()))
        high.append(float(c[l == l.min()].min()))
    return math.fsum(low), math.fsum(high)


def _allocation(
    choice: tuple[int, ...], loss: list[Array], cost: list[Array], bound: float, optimal: bool, budget: float,
    minimise: Minimise,
) -> Allocation:  # fmt: skip
    total = {
        "loss": math.fsum(float(r[c]) for r, c in zip(loss, choice, strict=True)),
        "cost": math.fsum(float(r[c]) for r, c in zip(cost, choice, strict=True)),
    }
    objective = total[minimise]
    bound = objective if optimal else min(bound, objective)
    gap = (objective - bound) / max(abs(objective), np.finfo(float).tiny)
    return Allocation(choice, total["loss"], total["cost"], bound, gap, budget, minimise)


__all__ = ["Allocation", "allocate", "pareto"]
