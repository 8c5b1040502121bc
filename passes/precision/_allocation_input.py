"""What an allocation is given, checked: rows of choices, ties, a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.weights import Array

Rows = Sequence[Any] | Array
"""One array of choices per layer."""
SLACK = 1e-12
"""Relative room of a budget for the rounding of sums: far below one byte in a model."""


def as_budget(value: Any) -> float:
    """A number, infinity included; raises :class:`InvalidInput`."""
    try:
        budget = float(value)
    except (TypeError, ValueError) as e:
        raise InvalidInput(f"a budget is a number, not {value!r}") from e
    if math.isnan(budget):
        raise InvalidInput("the budget is NaN")
    return budget


def tables(losses: Rows, costs: Rows) -> tuple[list[Array], list[Array]]:
    """Losses and costs as f64 rows of equal lengths; raises :class:`InvalidInput`."""
    loss, cost = ([_row(what, i, r) for i, r in enumerate(rows)] for what, rows in (("loss", losses), ("cost", costs)))
    if not loss:
        raise InvalidInput("there are no layers: losses is empty")
    if len(loss) != len(cost):
        raise InvalidInput(f"losses has {len(loss)} layers, costs has {len(cost)}")
    for i, (l, c) in enumerate(zip(loss, cost, strict=True)):  # noqa: E741
        if len(l) != len(c):
            raise InvalidInput(f"layer {i} has {len(l)} losses and {len(c)} costs: one of each per choice")
        if c.min() < 0:
            raise InvalidInput(
                f"layer {i}: the cost of choice {int(c.argmin())} is {c.min():g}; costs are not negative"
            )
    return loss, cost


def _row(what: str, layer: int, row: Any) -> Array:
    try:
        a = np.asarray(row.detach().cpu() if hasattr(row, "detach") else row, dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise InvalidInput(f"layer {layer}: its {what} is not an array of numbers: {e}") from e
    if a.ndim != 1 or not a.size:
        raise InvalidInput(f"layer {layer}: its {what} is an array of shape {list(a.shape)}, not one number per choice")
    if not np.isfinite(a).all():
        bad = int(np.flatnonzero(~np.isfinite(a))[0])
        raise InvalidInput(f"layer {layer}: the {what} of choice {bad} is {a[bad]}; leave the choice out instead")
    return a


def groups(ties: Iterable[Iterable[int]], rows: list[Array]) -> list[tuple[int, ...]]:
    """Layers that choose together, each layer in exactly one group; groups that share a layer become one."""
    leader = list(range(len(rows)))

    def find(i: int) -> int:
        while leader[i] != i:
            i = leader[i]
        return i

    for tie in ties:
        members = [_index(i, len(rows)) for i in tie]
        for i in members[1:]:
            a, b = sorted((find(members[0]), find(i)))
            if len(rows[a]) != len(rows[b]):
                raise InvalidInput(f"layers {a} and {b} are tied but have {len(rows[a])} and {len(rows[b])} choices")
            leader[b] = a
    found: dict[int, list[int]] = {}
    for i in range(len(rows)):
        found.setdefault(find(i), []).append(i)
    return [tuple(g) for g in found.values()]


def _index(i: Any, layers: int) -> int:
    if isinstance(i, bool) or not isinstance(i, int | np.integer) or not 0 <= i < layers:
        raise InvalidInput(f"ties hold layer indices from 0 to {layers - 1}, not {i!r}")
    return int(i)


def with_slack(budget: float) -> float:
    """A budget with room for the rounding of sums."""
    return budget + SLACK * abs(budget)


def column_sums(rows: list[Array], group: tuple[int, ...]) -> Array:
    """Sum over tied layers, column by column."""
    return np.array([math.fsum(float(rows[i][c]) for i in group) for c in range(len(rows[group[0]]))])


__all__ = ["Rows", "as_budget", "column_sums", "groups", "tables", "with_slack"]
