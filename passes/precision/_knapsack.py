"""The multiple-choice knapsack as an integer program for HiGHS, with its numerical tolerances under control."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bitwright.ir.weights import Array

if TYPE_CHECKING:
    from highspy import HighsLp, HighsSolution

TOLERANCE = 1e-9
"""Feasibility tolerance of the solver, on rows scaled to whole numbers or to about 1."""
WHOLE = 1e5
"""Whole numbers up to this stay whole: the solver then knows that objectives differ by 1."""
CUTS = 64
"""Solutions excluded one by one for passing the capacity by less than the tolerance, before the row is tightened."""


class Solution(NamedTuple):
    """A column per group; ``bound``: proved lower bound on the total value."""

    choice: list[int]
    bound: float
    optimal: bool


def solve(values: list[Array], weights: list[Array], capacity: float, time_limit: float) -> Solution:
    """The columns of smallest total value with a total weight of at most ``capacity``; some must exist."""
    kept = [_efficient(v, w) for v, w in zip(values, weights, strict=True)]
    v = [a[k] for a, k in zip(values, kept, strict=True)]
    w = [a[k] for a, k in zip(weights, kept, strict=True)]
    base = math.fsum(float(a.min()) for a in v)
    best = [int(a.argmin()) for a in v]
    if _sum(w, best) > capacity:
        found = _program(v, w, capacity, time_limit)
        best, bound, optimal = found
    else:
        bound, optimal = base, True
    return Solution([int(k[c]) for k, c in zip(kept, best, strict=True)], bound, optimal)


def _efficient(value: Array, weight: Array) -> Array:
    """Columns that no other beats or equals in both; of equals the first. Ordered by weight."""
    order = np.lexsort((np.arange(len(value)), value, weight))
    kept, least = [], math.inf
    for c in order:
        if value[c] < least:
            kept.append(int(c))
            least = float(value[c])
    return np.array(kept)


def _sum(rows: list[Array], choice: list[int]) -> float:
    return math.fsum(float(r[c]) for r, c in zip(rows, choice, strict=True))


def _program(v: list[Array], w: list[Array], capacity: float, time_limit: float) -> Solution:
    """Offsets out, both rows scaled, and the program solved to a gap of zero."""
    import highspy

    sizes = [len(a) for a in v]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    low_v, low_w = (math.fsum(float(a.min()) for a in rows) for rows in (v, w))
    value = np.concatenate([a - a.min() for a in v])
    weight = np.concatenate([a - a.min() for a in w])
    unit_v, unit_w = _unit(value), _unit(weight)
    h = highspy.Highs()  # type: ignore[no-untyped-call]
    for option, setting in {
        "output_flag": False, "threads": 1, "random_seed": 0, "mip_rel_gap": 0.0, "mip_abs_gap": 0.0,
        "time_limit": float(time_limit), "primal_feasibility_tolerance": TOLERANCE,
        "dual_feasibility_tolerance": TOLERANCE, "mip_feasibility_tolerance": TOLERANCE,
    }.items():  # fmt: skip
        h.setOptionValue(option, setting)
    h.passModel(_model(value / unit_v, weight / unit_w, starts, (capacity - low_w) / unit_w))
    h.setSolution(_columns_on(highspy.HighsSolution(), [0] * len(v), starts))  # column 0 is the lightest: feasible
    best, best_value = [0] * len(v), _sum(v, [0] * len(v))
    for attempt in range(CUTS + 8):
        h.run()
        status, info = h.getModelStatus(), h.getInfo()
        bound = low_v + unit_v * info.mip_dual_bound
        x = np.array(h.getSolution().col_value)
        if len(x) != starts[-1] or not h.getSolution().value_valid:
            return Solution(best, min(bound, best_value), False)
        choice = [int(x[a:b].argmax()) for a, b in itertools.pairwise(starts)]
        if _sum(w, choice) <= capacity:
            if _sum(v, choice) < best_value:
                best = choice
            return Solution(best, bound, status == highspy.HighsModelStatus.kOptimal and attempt <= CUTS)
        if attempt < CUTS:  # over the capacity by less than the solver sees: exclude it and go on
            picked = (starts[:-1] + np.array(choice)).astype(np.int32)
            h.addRow(-highspy.kHighsInf, len(v) - 1.0, len(picked), picked, np.ones(len(picked)))
        else:
            h.changeRowBounds(len(v), -highspy.kHighsInf, (capacity - low_w) / unit_w - 2.0 ** (attempt - CUTS) * 1e-9)
    return Solution(best, min(low_v, best_value), False)


def _unit(a: Array) -> float:
    """What to divide a row by: its greatest common divisor where it is whole and small, which prunes; else its top."""
    top = float(a.max(initial=0.0)) or 1.0
    if top > WHOLE or not (a == np.floor(a)).all():
        return top
    return float(np.gcd.reduce(a.astype(np.int64))) or 1.0


def _columns_on(solution: HighsSolution, choice: list[int], starts: Array) -> HighsSolution:
    x = np.zeros(starts[-1])
    x[starts[:-1] + np.array(choice)] = 1.0
    solution.col_value = x.tolist()
    return solution


def _model(value: Array, weight: Array, starts: Array, room: float) -> HighsLp:
    """Binary columns, a row ``sum = 1`` per group and the capacity as last row, column-wise."""
    import highspy

    groups, columns = len(starts) - 1, len(value)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = columns, groups + 1
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = value, np.zeros(columns), np.ones(columns)
    lp.row_lower_ = np.append(np.ones(groups), -highspy.kHighsInf)
    lp.row_upper_ = np.append(np.ones(groups), room)
    owner = np.repeat(np.arange(groups), np.diff(starts))
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(0, 2 * columns + 1, 2)
    lp.a_matrix_.index_ = np.stack([owner, np.full(columns, groups)], 1).reshape(-1)
    lp.a_matrix_.value_ = np.stack([np.ones(columns), weight], 1).reshape(-1)
    lp.integrality_ = [highspy.HighsVarType.kInteger] * columns
    return lp


__all__ = ["Solution", "solve"]
