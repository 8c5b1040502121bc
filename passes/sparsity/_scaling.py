"""Fast transposable masks: Dykstra's scaling towards the entropy-regularised optimum, and local search."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHARPNESS, DOUBLINGS, ROUNDS = 10.0, 3, 15
"""Entries weigh exp(10 |w| / max|w|) for 15 rounds, then the square of that, and so on up to exp(80 ...)."""
SMALL, LARGE = 1e-30, 1e30
SWAPS = 10


def plan(w: torch.Tensor, across: int, down: int) -> torch.Tensor:
    """Reduced magnitudes (scale of the logarithm dropped) of [blocks, rows, columns] in 0..1.

    The clipped plan min(P, 1) with P = exp(s w) u v^T tends to the best fractional mask; an entry's P tells how
    far it lies above the price of its row and column.
    """
    import torch

    p = torch.exp(SHARPNESS * (w.float() - 1.0)).permute(1, 2, 0).contiguous()  # blocks last: all sums vectorise
    rows, columns = p.shape[:2]
    total = min(rows * across, columns * down)
    for sharper in range(DOUBLINGS + 1):
        p = (p * p).clamp_(SMALL, LARGE) if sharper else p
        for _ in range(ROUNDS):
            s = p.clamp(max=1.0)
            a = (total / rows) / s.sum(1, keepdim=True)
            s *= a
            p *= a
            p *= (total / columns) / s.sum(0, keepdim=True)
    return p.permute(2, 0, 1).contiguous()


def improve(w: torch.Tensor, kept: torch.Tensor, across: int, down: int) -> torch.Tensor:
    """Fill rows and columns with room: add two entries for one dropped while the sum grows."""
    import torch

    todo = torch.arange(len(w))
    for _ in range(SWAPS):
        k = kept[todo]
        row_room, column_room = k.sum(2) < across, k.sum(1) < down
        open_ = row_room.any(1) & column_room.any(1)
        todo, k = todo[open_], k[open_]
        if not len(todo):
            break
        x, lane = w[todo], torch.arange(len(todo))
        i, j = row_room[open_].int().argmax(1), column_room[open_].int().argmax(1)
        gain = x[lane, i][:, None, :] + x[lane, :, j][:, :, None] - x
        legal = k & ~k[lane, i][:, None, :] & ~k[lane, :, j][:, :, None]
        gain = torch.where(legal, gain, -1.0).flatten(1)
        best, at = gain.max(1)
        direct = ~k[lane, i, j]
        ok = (best > 0) | direct
        swap = ok & ~(direct & (x[lane, i, j] >= best))
        s, r, c = lane[swap], at[swap] // w.shape[2], at[swap] % w.shape[2]
        k[s, r, c], k[s, i[swap], c], k[s, r, j[swap]] = False, True, True
        plain = ok & ~swap
        k[lane[plain], i[plain], j[plain]] = True
        kept[todo] = k
        todo = todo[ok]
    return kept
