"""Exact transposable masks: minimum-cost flow by shortest augmenting paths, on all blocks at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SCALE = 2.0**44
"""Weights become integers up to this: sums along any path are exact in float64, so paths never run in circles."""


def max_weight(w: torch.Tensor, across: int, down: int) -> torch.Tensor:
    """The heaviest of the fullest masks of [blocks, rows, columns] in 0..1, to 2**-44 of the largest entry."""
    import torch

    weight = (w.double() * SCALE).round()
    kept = _prefix(weight, across, down)
    todo = torch.arange(len(w))
    while len(todo):
        part, mask = weight[todo], kept[todo]
        grown = _augment(part, mask, across, down)
        kept[todo] = mask
        todo = todo[grown]
    return kept


def _prefix(weight: torch.Tensor, across: int, down: int) -> torch.Tensor:
    """The k heaviest entries, k as large as no line overflows: the heaviest mask of k entries."""
    import torch

    _, rows, columns = weight.shape
    order = torch.sort(weight.flatten(1), dim=1, descending=True, stable=True).indices
    in_row = torch.nn.functional.one_hot(order // columns, rows).to(torch.int16).cumsum(1).amax(-1)
    in_column = torch.nn.functional.one_hot(order % columns, columns).to(torch.int16).cumsum(1).amax(-1)
    fits = (in_row <= across) & (in_column <= down)
    return torch.zeros_like(fits).scatter_(1, order, fits).reshape(weight.shape)


def _augment(weight: torch.Tensor, kept: torch.Tensor, across: int, down: int) -> torch.Tensor:
    """One more entry in every block by the cheapest alternating path (in place); False where none is left."""
    import torch

    inf = float("inf")
    add, drop = torch.where(kept, inf, -weight), torch.where(kept, weight, inf)
    to_row = torch.where(kept.sum(2) < across, 0.0, inf).double()
    to_column = torch.full_like(weight[:, 0], inf)
    row_from = torch.full(to_row.shape, -1)
    column_from = torch.full(to_column.shape, -1)
    while True:  # Bellman-Ford: no negative circle exists, so it ends; strict improvement keeps parents acyclic
        d, i = (to_row[:, :, None] + add).min(1)
        column_from = torch.where(d < to_column, i, column_from)
        to_column = torch.minimum(d, to_column)
        d, j = (to_column[:, None, :] + drop).min(2)
        better = d < to_row
        if not bool(better.any()):
            break
        row_from = torch.where(better, j, row_from)
        to_row = torch.minimum(d, to_row)
    cost, j = torch.where(kept.sum(1) < down, to_column, inf).min(1)
    reached = torch.isfinite(cost)
    at, j = reached.nonzero()[:, 0], j[reached]
    while len(at):
        i = column_from[at, j]
        kept[at, i, j] = True
        back = row_from[at, i]
        on = back >= 0
        at, i, j = at[on], i[on], back[on]
        kept[at, i, j] = False
    return reached
