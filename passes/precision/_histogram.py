"""Histograms of a stream of values, row by row, and the ranges read from them; memory does not grow with the stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BINS = 2048
CANDIDATES = 64
"""Ranges tried by ``mse`` and ``entropy``: shares of the extremes, evenly spaced down to 1 / 64."""
Loss = Callable[[int, "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""Of a row and the lower and upper ends of some ranges: the loss of each."""


class Histogram:
    """Counts of each row's values in equal bins over [-reach, reach]; the reach doubles when values leave it."""

    def __init__(self, rows: int = 1) -> None:
        import torch

        self.counts = torch.zeros(rows, BINS, dtype=torch.float64)
        self.reach = torch.zeros(rows, dtype=torch.float64)
        self.lo = torch.full((rows,), float("inf"), dtype=torch.float64)
        self.hi = torch.full((rows,), -float("inf"), dtype=torch.float64)

    def add(
        self, values: torch.Tensor, extremes: tuple[torch.Tensor, torch.Tensor] | None = None, weight: float = 1.0
    ) -> None:
        """Count finite values ``weight`` times: [rows, n], or anything for a histogram of one row; ``extremes`` where
        known, [rows]."""
        import torch

        rows = len(self.counts)
        values = values.detach().float().reshape(rows, -1)
        lo, hi = (v.double() for v in (extremes or values.aminmax(dim=1)))
        far = torch.maximum(-lo, hi).clamp_min(1e-30)
        new = self.reach == 0
        self.reach = torch.where(new, far, self.reach)
        while bool((small := far > self.reach).any()):
            middle = self.counts[small].reshape(-1, BINS // 2, 2).sum(2)
            self.counts[small] = torch.nn.functional.pad(middle, (BINS // 4, BINS // 4))
            self.reach[small] *= 2
        if rows == 1:
            reach = float(self.reach)
            self.counts[0] += torch.histc(values, BINS, -reach, reach).double() * weight
        else:
            reach32 = self.reach[:, None].float()
            index = ((values + reach32) * (BINS / 2) / reach32).long().clamp_(0, BINS - 1)
            index += torch.arange(rows)[:, None] * BINS
            self.counts += torch.bincount(index.reshape(-1), minlength=rows * BINS).reshape(rows, BINS) * weight
        self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)

    def range(self, percent: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The interval that leaves (100 - percent) / 2 percent of the values on either side, within the extremes."""
        import torch

        share = torch.cumsum(self.counts, 1) / self.counts.sum(1, keepdim=True)
        cut, width = (1 - percent / 100) / 2, 2 * self.reach / BINS
        first = (share <= cut).sum(1)
        last = (share < 1 - cut - 1e-12).sum(1)
        low, high = -self.reach + first * width, -self.reach + (last + 1) * width
        return torch.maximum(self.lo, low), torch.minimum(self.hi, high)

    def centres(self) -> torch.Tensor:
        """The middle of every bin, [rows, bins]."""
        import torch

        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 * self.reach / BINS)[:, None] - self.reach[:, None]

    def mse(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The range whose grid of ``steps`` + 1 codes, zero among them, has the smallest squared error."""
        return self._least(lambda row, a, b: self._squares(row, a, b, steps))

    def entropy(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The range with the smallest Kullback-Leibler divergence of the coarse histogram from the clipped one.

        As in TensorRT's calibration: values outside are counted in the outermost bins, the codes' counts are spread
        evenly over the bins that have any.
        """
        return self._least(lambda row, a, b: self._divergence(row, a, b, steps))

    def _least(self, loss: Loss) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row the range with the least loss, of those that leave out a share of both ends or of one.

        Every fourth share is tried, then those beside the best of these.
        """
        import torch

        found = torch.empty(2, len(self.counts), dtype=torch.float64)
        kinds = torch.tensor([[1, 1], [1, 0], [0, 1]])
        for row in range(len(self.counts)):
            ends = torch.stack([self.lo[row].clamp_max(0), self.hi[row].clamp_min(0)])
            able = kinds if bool((ends != 0).all()) else kinds[:1]  # no end to cut alone where the other is zero
            best, along = torch.zeros(2, dtype=torch.int64), able
            for shares in (torch.arange(0, CANDIDATES, 4), torch.arange(-3, 4)):
                cuts = (best + shares[:, None, None] * along).reshape(-1, 2).clamp(0, CANDIDATES - 1)
                a, b = (ends * (1 - cuts.double() / CANDIDATES)).T
                best = cuts[loss(row, a, b).argmin()]
                along = best.sign()[None] if bool(best.any()) else able
            a, b = ends * (1 - best.double() / CANDIDATES)
            found[0, row], found[1, row] = torch.maximum(a, self.lo[row]), torch.minimum(b, self.hi[row])
        return found[0], found[1]

    def _squares(self, row: int, a: torch.Tensor, b: torch.Tensor, steps: int) -> torch.Tensor:
        """Squared error of the grids over [a, b], by candidate."""
        import torch

        filled = self.counts[row] > 0
        x, counts = self.centres()[row][filled], self.counts[row][filled]
        scale = ((b - a) / steps).clamp_min(1e-30)[:, None]
        zero = torch.round(-a[:, None] / scale)
        back = torch.round(x / scale + zero).clamp_(0, steps).sub_(zero).mul_(scale)
        return back.sub_(x).square_() @ counts

    def _divergence(self, row: int, a: torch.Tensor, b: torch.Tensor, steps: int) -> torch.Tensor:
        """Divergence of the grids over [a, b], by candidate; infinite where fewer bins than codes tell nothing."""
        import torch

        counts, x = self.counts[row], self.centres()[row]
        a, b = a[:, None], b[:, None]
        inside = (x >= a) & (x <= b)
        p = torch.where(inside, counts, 0.0)
        filled, within = p > 0, inside.sum(1)
        able = (within > steps // 2) & (p.sum(1) > 0)
        scale = ((b - a) / steps).clamp_min(1e-30)
        code = (torch.round(x / scale) + torch.round(-a / scale)).clamp_(0, steps).long()
        empty = torch.zeros(len(a), steps + 1, dtype=torch.float64)
        total, holders = empty.scatter_add(1, code, p), empty.scatter_add(1, code, filled.double())
        q = torch.where(filled, (total / holders.clamp_min(1)).gather(1, code), 0.0)
        first = inside.int().argmax(1, keepdim=True)
        last = first + (within[:, None] - 1).clamp_min(0)
        p.scatter_add_(1, first, torch.where(x < a, counts, 0.0).sum(1, keepdim=True))
        p.scatter_add_(1, last, torch.where(x > b, counts, 0.0).sum(1, keepdim=True))
        p, q = (t / t.sum(1, keepdim=True).clamp_min(1e-300) for t in (p, q))
        terms = torch.where(p > 0, p * (p.clamp_min(1e-300) / q.clamp_min(1e-9)).log(), 0.0)
        return torch.where(able, terms.sum(1), float("inf"))


__all__ = ["BINS", "Histogram"]
