"""Masks with at most ``keep`` in every row and every column of each block: exact, fast, greedy, two-approx.

All solvers take blocks [blocks, rows, columns] of magnitudes, and how many each row (``across``) and each column
(``down``) may keep; they work on all blocks at once, a bounded number at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Literal

from bitwright.ir.errors import InvalidInput
from bitwright.ir.patterns import transposable_patterns
from bitwright.ir.types import NM
from bitwright.passes.sparsity._magnitude import floats, share

if TYPE_CHECKING:
    import torch

Method = Literal["exact", "fast", "greedy", "two-approx"]
CHUNK = 1 << 19
"""Elements worked on at a time: the working set stays in the caches."""


def transposable_mask(
    weight: torch.Tensor, keep: int, group: int, method: Method = "fast", name: str = "weight"
) -> torch.Tensor:
    """True where an element is kept: at most ``keep`` in every row and column of each group x group block.

    ``exact``: the largest magnitude among the masks with ``keep`` in every line. ``fast``: about 0.999 of it.
    ``greedy``: heaviest first, at least half of it. ``two-approx``: prunes lightest first, at most twice the least
    magnitude. The last three may keep fewer in a line. Blocks are tiles of the matrix from its first row and
    column; a row of a tile cut at the right edge (a column of one cut at the bottom) keeps at most its
    proportional share, rounded up. Equals go to the lower row, then the lower column, except where a better sum
    decides. Raises :class:`InvalidInput` for a weight that is not a finite float matrix.
    """
    import torch

    NM(keep, group, 1)
    if method not in SOLVERS:
        raise InvalidInput(f"method is one of {', '.join(SOLVERS)}, not {method!r}")
    if weight.dim() != 2:
        raise InvalidInput(f"{name} has rank {weight.dim()}: a transposable mask is made on a matrix")
    w = floats(weight, name).abs()
    mask = torch.zeros(w.shape, dtype=torch.bool)
    for r0, r1, high in _spans(w.shape[0], group):
        for c0, c1, wide in _spans(w.shape[1], group):
            tiles = w[r0:r1, c0:c1].reshape((r1 - r0) // high, high, (c1 - c0) // wide, wide).transpose(1, 2)
            blocks = tiles.reshape(-1, high, wide)
            kept = _solve(blocks, share(keep, group, wide), share(keep, group, high), method)
            mask[r0:r1, c0:c1] = kept.reshape(tiles.shape).transpose(1, 2).reshape(r1 - r0, c1 - c0)
    return mask


def _spans(size: int, group: int) -> list[tuple[int, int, int]]:
    """Start, end and tile size of the whole tiles of an axis, then of the cut one."""
    full = size - size % group
    return [s for s in ((0, full, group), (full, size, size - full)) if s[0] < s[1]]


def _solve(blocks: torch.Tensor, across: int, down: int, method: Method) -> torch.Tensor:
    import torch

    most = blocks.amax((1, 2), keepdim=True)
    unit = blocks / torch.where(most > 0, most, 1.0)  # no method depends on the scale, and none overflows
    if across >= blocks.shape[2] and down >= blocks.shape[1]:
        return torch.ones_like(blocks, dtype=torch.bool)
    step = max(1, CHUNK // (blocks.shape[1] * blocks.shape[2]))
    return torch.cat([SOLVERS[method](part, across, down) for part in torch.split(unit, step)])


def exact(w: torch.Tensor, across: int, down: int) -> torch.Tensor:
    """2:4 by the 90 patterns, anything else by minimum-cost flow."""
    from bitwright.passes.sparsity._flow import max_weight

    if tuple(w.shape[1:]) != (4, 4) or (across, down) != (2, 2):
        return max_weight(w, across, down)
    patterns = _ninety()
    best = (w.reshape(-1, 16) @ patterns.T.to(w.dtype)).argmax(-1)
    return patterns[best].bool().reshape(w.shape)


@cache
def _ninety() -> torch.Tensor:
    """The 4x4 patterns with two in every line, as rows of 16."""
    import torch

    return torch.from_numpy(transposable_patterns().reshape(-1, 16)).float()


def greedy(score: torch.Tensor, across: int, down: int) -> torch.Tensor:
    """Keep heaviest first wherever row and column have room."""
    return _in_order(score, True, across, down)


def two_approx(w: torch.Tensor, across: int, down: int) -> torch.Tensor:
    """Prune lightest first wherever row or column still has too many."""
    return ~_in_order(w, False, w.shape[2] - across, w.shape[1] - down)


def _in_order(score: torch.Tensor, heaviest: bool, across: int, down: int) -> torch.Tensor:
    """Visit the entries in order, and take those whose row and (or, lightest first) column has taken too few."""
    import torch

    blocks, rows, columns = score.shape
    order = torch.sort(score.flatten(1), dim=1, descending=heaviest, stable=True).indices.T.contiguous()
    both = torch.logical_and if heaviest else torch.logical_or
    in_row, in_column = torch.zeros(rows * blocks, dtype=torch.int16), torch.zeros(columns * blocks, dtype=torch.int16)
    taken = torch.zeros(rows * columns * blocks, dtype=torch.bool)
    lane = torch.arange(blocks)
    for place in order:
        i, j = (place // columns) * blocks + lane, (place % columns) * blocks + lane
        r, c = in_row[i], in_column[j]
        take = both(r < across, c < down)
        in_row[i], in_column[j], taken[place * blocks + lane] = r + take, c + take, take
    return taken.reshape(rows * columns, blocks).T.reshape(score.shape)


def fast(w: torch.Tensor, across: int, down: int) -> torch.Tensor:
    """Entropy-regularised scaling, greedy rounding of the scaled plan, local search."""
    from bitwright.passes.sparsity._scaling import improve, plan

    return improve(w, greedy(plan(w, across, down), across, down), across, down)


SOLVERS: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {
    "exact": exact,
    "fast": fast,
    "greedy": greedy,
    "two-approx": two_approx,
}
