"""Placing intervals in one arena: values with a size and a lifetime, no two live ones overlapping."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_ROUNDS = 60


@dataclass(frozen=True, slots=True)
class Span:
    """``nbytes`` bytes needed during the steps ``first`` to ``last``, both included."""

    nbytes: int
    first: int
    last: int


def lower_bound(spans: Sequence[Span]) -> int:
    """The largest sum of sizes live at one step: no placement needs less.

    >>> lower_bound([Span(64, 0, 1), Span(128, 1, 2), Span(64, 2, 3)])
    192
    """
    change: dict[int, int] = {}
    for s in spans:
        change[s.first] = change.get(s.first, 0) + s.nbytes
        change[s.last + 1] = change.get(s.last + 1, 0) - s.nbytes
    live = most = 0
    for step in sorted(change):
        live += change[step]
        most = max(most, live)
    return most


def pack(spans: Sequence[Span]) -> tuple[list[int], int]:
    """(offset of each span, size of the arena), the best of several greedy best-fit orders.

    Orders: by size, lifetime, area, start, end, crowdedness. While the best is above the lower bound, the
    spans that stick out are moved to the front and placed again.
    """
    if not spans:
        return [], 0
    goal = lower_bound(spans)
    neighbours = _neighbours(spans)
    crowd = [sum(spans[j].nbytes for j in near) for near in neighbours]
    length = [s.last - s.first + 1 for s in spans]
    keys: tuple[Callable[[int], tuple[int, ...]], ...] = (
        lambda i: (-spans[i].nbytes, -length[i], i),
        lambda i: (-length[i], -spans[i].nbytes, i),
        lambda i: (-spans[i].nbytes * length[i], i),
        lambda i: (spans[i].first, -spans[i].nbytes, i),
        lambda i: (-spans[i].last, -spans[i].nbytes, i),
        lambda i: (-crowd[i], -spans[i].nbytes, i),
    )
    best: tuple[int, list[int]] | None = None
    for key in keys:
        order = sorted(range(len(spans)), key=key)
        found = _improve(spans, neighbours, order, goal)
        if best is None or found[0] < best[0]:
            best = found
        if best[0] == goal:
            break
    assert best is not None
    return best[1], best[0]


def _neighbours(spans: Sequence[Span]) -> list[list[int]]:
    """For each span the others it lives with, by a sweep over the steps."""
    near: list[list[int]] = [[] for _ in spans]
    active: list[int] = []
    for i in sorted(range(len(spans)), key=lambda k: spans[k].first):
        active = [j for j in active if spans[j].last >= spans[i].first]
        near[i] += active
        for j in active:
            near[j].append(i)
        active.append(i)
    return near


def _improve(
    spans: Sequence[Span], neighbours: Sequence[Sequence[int]], order: list[int], goal: int
) -> tuple[int, list[int]]:
    """Place in ``order``; then, a bounded number of times, again with what sticks out placed first."""
    best = _place(spans, neighbours, order)
    current = best
    for _ in range(_ROUNDS if len(spans) <= 2000 else 4):
        if best[0] <= goal:
            break
        peak, offsets = current
        tops = [i for i in order if offsets[i] + spans[i].nbytes == peak]
        if order[: len(tops)] == tops:
            break
        raised = set(tops)
        order = tops + [i for i in order if i not in raised]
        current = _place(spans, neighbours, order)
        if current[0] < best[0]:
            best = current
    return best


def _place(spans: Sequence[Span], neighbours: Sequence[Sequence[int]], order: Sequence[int]) -> tuple[int, list[int]]:
    """Best fit: each span in turn goes to the tightest gap between the placed spans it lives with."""
    offsets = [-1] * len(spans)
    peak = 0
    for i in order:
        taken: list[tuple[int, int]] = []
        for j in neighbours[i]:
            if offsets[j] >= 0:
                insort(taken, (offsets[j], offsets[j] + spans[j].nbytes))
        offsets[i] = _gap(taken, spans[i].nbytes)
        peak = max(peak, offsets[i] + spans[i].nbytes)
    return peak, offsets


def _gap(taken: Sequence[tuple[int, int]], nbytes: int) -> int:
    """Start of the smallest gap of at least ``nbytes`` in sorted ``taken``, else the end of all."""
    best, room, end = -1, -1, 0
    for low, high in taken:
        free = low - end
        if free >= nbytes and (best < 0 or free < room):
            best, room = end, free
        end = max(end, high)
    return end if best < 0 else best
