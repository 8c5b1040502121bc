"""Histograms of a stream of values, row by row, and the ranges read from them; memory does not grow with the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BINS = 2048
CANDIDATES = 64
"""Ranges tried by ``mse`` and ``entropy``: shares of the extremes, evenly spaced down to 1 / 64."""


class Histogram:
    """Counts of each row's values in equal bins over [-reach, reach]; the reach doubles when values leave it."""

    def __init__(self, rows: int = 1) -> None:
        import torch

        self.counts = torch.zeros(rows, BINS, dtype=torch.float64)
        self.reach = torch.zeros(rows, dtype=torch.float64)
        self.lo = torch.full((rows,), float("inf"), dtype=torch.float64)
        self.hi = torch.full((rows,), -float("inf"), dtype=torch.float64)

    def add(self, values: torch.Tensor, extremes: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Count finite values: [rows, n], or anything for a histogram of one row; ``extremes`` where known, [rows]."""
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
            self.counts[0] += torch.histc(values, BINS, -reach, reach).double()
        else:
            reach32 = self.reach[:, None].float()
            index = ((values + reach32) * (BINS / 2) / reach32).long().clamp_(0, BINS - 1)
            index += torch.arange(rows)[:, None] * BINS
            self.counts += torch.bincount(index.reshape(-1), minlength=rows * BINS).reshape(rows, BINS)
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

    def ends(self) -> list[tuple[float, float]]:
        """Shares of the lower and upper extreme to try: both alike, and each alone."""
        shares = [i / CANDIDATES for i in range(CANDIDATES, 0, -1)]
        return [(f, f) for f in shares] + [e for f in shares[1:] for e in ((1.0, f), (f, 1.0))]

    def mse(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The range whose grid of ``steps`` + 1 codes, zero among them, has the smallest squared error."""
        import torch

        x, lo, hi = self.centres(), self.lo.clamp_max(0), self.hi.clamp_min(0)
        best, least = (self.lo, self.hi), torch.full_like(lo, float("inf"))
        for low, high in self.ends():
            a, b = lo * low, hi * high
            scale = ((b - a) / steps).clamp_min(1e-30)[:, None]
            zero = torch.round(-a[:, None] / scale)
            back = (torch.round(x / scale + zero).clamp_(0, steps) - zero) * scale
            error = ((back - x).square_() * self.counts).sum(1)
            won = error < least
            least = torch.where(won, error, least)
            best = (
                torch.where(won, torch.maximum(a, self.lo), best[0]),
                torch.where(won, torch.minimum(b, self.hi), best[1]),
            )
        return best

    def entropy(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The range with the smallest Kullback-Leibler divergence of the coarse histogram from the clipped one.

        As in TensorRT's calibration: values outside are counted in the outermost bins, the codes' counts are spread
        evenly over the bins that have any.
        """
        import torch

        found = [self._entropy_row(i, steps) for i in range(len(self.counts))]
        lo, hi = torch.tensor(found, dtype=torch.float64).reshape(-1, 2).T
        return lo, hi

    def _entropy_row(self, row: int, steps: int) -> tuple[float, float]:
        import torch

        counts, x = self.counts[row], self.centres()[row]
        lo, hi = float(self.lo[row].clamp_max(0)), float(self.hi[row].clamp_min(0))
        best, least = (float(self.lo[row]), float(self.hi[row])), float("inf")
        for low, high in self.ends():
            a, b = lo * low, hi * high
            inside = (x >= a) & (x <= b)
            if int(inside.sum()) <= steps // 2 or float(counts[inside].sum()) == 0:
                continue  # fewer bins than codes tell nothing
            p = torch.where(inside, counts, 0.0)
            filled = p > 0
            first, last = int(inside.nonzero()[0]), int(inside.nonzero()[-1])
            p[first] += counts[:first].sum()
            p[last] += counts[last + 1 :].sum()
            scale = (b - a) / steps
            code = (torch.round(x / scale) + round(-a / scale)).clamp_(0, steps).long()
            total = torch.zeros(steps + 1, dtype=torch.float64).index_add_(0, code, torch.where(inside, counts, 0.0))
            holders = torch.zeros(steps + 1, dtype=torch.float64).index_add_(0, code, filled.double())
            q = torch.where(filled, total[code] / holders[code].clamp_min(1), 0.0)
            p, q = p / p.sum(), q / q.sum()
            both = p > 0
            divergence = float((p[both] * (p[both] / q[both].clamp_min(1e-9)).log()).sum())
            if divergence < least - 1e-12:
                best, least = (max(a, float(self.lo[row])), min(b, float(self.hi[row]))), divergence
        return best


__all__ = ["BINS", "Histogram"]
