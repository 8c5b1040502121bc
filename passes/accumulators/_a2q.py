"""Integer weights whose sums fit a register: budgets, projections, rounding toward zero.

A2Q (Colbert et al., ICCV 2023) bounds the l1 norm of each row. A2Q+ (Colbert et al., ICML 2024) centres the row, so
that its positive and its negative weights each take half of a norm twice as large. Centring and projecting on the l1
ball are not enough: (3, -1, -1, -1) becomes (2, 0, 0, 0) on the ball of radius 2, no longer centred, and overflows.
Here both halves are projected on simplices of half the radius, which is the projection on the rows of that norm that
sum to zero. Rounding toward zero then shrinks each half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitwright.ir import numerics
from bitwright.ir.weights import Array

FACTORS = 2.0 ** (np.arange(25) / 4)
"""What scales are multiplied with in a search: coarser codes, fewer of which are lost to the projection."""
_SLAB = 1 << 20
"""Weights projected at once."""


@dataclass(frozen=True)
class Inputs:
    """Bounds of the input codes, and their zero point."""

    lo: int
    hi: int
    zero: int

    @property
    def signed(self) -> bool:
        return self.lo < 0

    @property
    def bits(self) -> int:
        return (self.hi - self.lo).bit_length()

    @property
    def spread(self) -> int:
        """How far a register moves when its row holds positive and negative weights of sum 1 each, whichever way the
        kernel sums: codes less their zero point, codes alone, or codes from a start of -zero * sum(w)."""
        lo, hi, z = self.lo, self.hi, self.zero
        up, down = max(hi, 0), max(-lo, 0)
        return max(max(hi - z, 0) + max(z - lo, 0), up + down, max(up - z, 0) + max(down + z, 0))


@dataclass(frozen=True)
class Limit:
    """What each tile of each row must obey: sum of magnitudes (``halves`` False), or each sign's sum, within
    ``radius``. ``tile``: terms of one inner sum, 0 for all. ``lo`` and ``hi``: ends of the codes."""

    radius: float
    halves: bool
    tile: int = 0
    lo: int = -127
    hi: int = 127

    def toward_zero(self, rows: Array) -> Array:
        """Projected rows as codes: centring may have brought them past the end of their format."""
        out: Array = np.trunc(rows).clip(self.lo, self.hi)
        return out


def limit_of(bits: int, x: Inputs, method: str, tile: int = 0) -> Limit:
    """The A2Q cap for ``a2q``; for the other methods half the A2Q+ cap on each sign."""
    if method == "a2q":
        return Limit(numerics.a2q_cap(bits, x.bits, x.signed and not x.zero), False, tile)
    return Limit(((1 << (bits - 1)) - 1) / x.spread if x.spread else float("inf"), True, tile)


def inner_bits(rows: Array, x: Inputs, tile: int = 0) -> Array:
    """The width that each row of integer weights [O, K] needs for every partial sum of the kernels, in any order.

    With ``tile`` only the sums of one tile count, which start from zero.
    """
    lo, hi, z = x.lo, x.hi, x.zero
    wide = tiled(rows.astype(np.int64), tile)
    up, down = np.maximum(wide, 0).sum(-1), np.maximum(-wide, 0).sum(-1)
    steps = [(hi - z, lo - z, 0), (hi, lo, 0)] + ([] if tile else [(hi, lo, z)])
    most, least = np.zeros_like(up), np.zeros_like(up)
    for high, low, zero in steps:
        start = -zero * (up - down)
        most = np.maximum(most, start + up * max(high, low, 0) + down * max(-high, -low, 0))
        least = np.minimum(least, start - up * max(-high, -low, 0) - down * max(high, low, 0))
    tops, bottoms = most.max(1).tolist(), least.min(1).tolist()
    return np.array([numerics.bits_for(b, t) for b, t in zip(bottoms, tops, strict=True)])


def tiled(rows: Array, tile: int) -> Array:
    """[O, K] as [O, tiles, tile], zeros at the end."""
    if not tile or tile >= rows.shape[1]:
        return rows[:, None, :]
    pad = -rows.shape[1] % tile
    return np.pad(rows, [(0, 0), (0, pad)]).reshape(len(rows), -1, tile)


class Shrink:
    """Soft thresholds that bring weights within a limit; sorted once, asked for many radii."""

    def __init__(self, rows: Array, limit: Limit) -> None:
        """``rows``: float64 [O, K]."""
        self.rows, self.limit = rows, limit
        parts = tiled(rows, limit.tile)
        signs = (np.maximum(parts, 0), np.maximum(-parts, 0)) if limit.halves else (np.abs(parts),)
        self.sorted = [np.flip(np.sort(p, -1), -1) for p in signs]
        self.sums = [np.cumsum(p, -1) for p in self.sorted]

    def thresholds(self, radius: Array) -> list[Array]:
        """[O, tiles] for each part: what is taken off its magnitudes so that they sum to ``radius`` [O] at most."""
        out, r = [], radius[:, None, None]
        for s, c in zip(self.sorted, self.sums, strict=True):
            n = np.arange(1, s.shape[-1] + 1)
            last = np.maximum((s * n > c - r).sum(-1, keepdims=True) - 1, 0)
            cut = (np.take_along_axis(c, last, -1) - r) / (last + 1)
            out.append(np.where(c[..., -1:] > r, np.maximum(cut, 0.0), 0.0)[..., 0])
        return out

    def spread(self, thresholds: list[Array]) -> list[Array]:
        """Thresholds for each weight [O, K]: of positive ones, and of negative ones."""
        tile = self.limit.tile or self.rows.shape[1]
        each = [np.repeat(t, tile, 1)[:, : self.rows.shape[1]] for t in thresholds]
        return [each[0], each[-1]]

    def project(self, factor: Array) -> Array:
        """The projection of rows / factor [O] on the limit, in float64."""
        up, down = self.spread(self.thresholds(self.limit.radius * factor))
        v = self.rows
        shrunk: Array = np.where(v > 0, np.maximum(v - up, 0.0), np.minimum(v + down, 0.0))
        return shrunk / factor[:, None]


@dataclass(frozen=True)
class Fit:
    """Integer rows [O, K], the factor [O] that their scales were divided by before rounding, and the factor [O] that
    their scales are best multiplied with now."""

    rows: Array
    divisor: Array
    factor: Array


def fit(
    codes: Array, kept: Array, limit: Limit, factors: Array, *, centre: bool, shared: bool = False, refit: bool = True,
    importance: Array | None = None,
) -> Fit:  # fmt: skip
    """Integer rows within a limit, times the factors closest to ``codes`` [O, K].

    ``kept``: elsewhere rows stay zero. ``factors``: divisors to choose from. ``centre``: rows lose their mean over
    kept places first (A2Q+). ``shared``: all rows take the same factor. ``refit``: factors by least squares after the
    rounding, which takes back what rounding toward zero shrank. ``importance`` [O, K] weights squared errors.
    """
    step = max(1, _SLAB // max(1, codes.shape[1]))
    slabs = [slice(i, i + step) for i in range(0, len(codes), step)]
    sums = np.zeros((2, len(factors), len(codes)))
    for s in slabs:
        shrink = Shrink(_centred(codes[s], kept[s]) if centre else codes[s], limit)
        weight = 1.0 if importance is None else importance[s]
        for i, f in enumerate(factors):
            q = limit.toward_zero(shrink.project(np.full(len(codes[s]), f)))
            sums[:, i, s] = (weight * q * codes[s]).sum(1), (weight * q * q).sum(1)
    if shared:
        sums = np.broadcast_to(sums.sum(2, keepdims=True), sums.shape)
    both, own = sums
    times = np.broadcast_to(factors[:, None], own.shape)
    if refit:
        times = np.where((both > 0) & (own > 0), both / np.maximum(own, 1e-30), times)
    best = (times * times * own - 2 * times * both).argmin(0)  # squared error less that of zero
    divisor, parts = factors[best], []
    for s in slabs:
        shrink = Shrink(_centred(codes[s], kept[s]) if centre else codes[s], limit)
        parts.append(limit.toward_zero(shrink.project(divisor[s])))
    return Fit(np.concatenate(parts).astype(np.int64), divisor, np.take_along_axis(times, best[None], 0)[0])


def _centred(rows: Array, kept: Array) -> Array:
    mean = rows.sum(1, where=kept) / np.maximum(kept.sum(1), 1)
    out: Array = np.where(kept, rows - mean[:, None], 0.0)
    return out


def coarsest(codes: Array) -> tuple[Array, Array]:
    """The same rows [O, K] on the coarsest grid that rounds back to them, and the factors [O] of their scales.

    Weights that were trained as few codes come back from quantization to 8 bits with larger ones: 127 q / max|q|.
    """
    rows, factor = codes.astype(np.int64), np.ones(len(codes))
    top = np.maximum(np.abs(rows).max(1, initial=0), 1)
    sample = np.unique(np.linspace(0, max(rows.shape[1] - 1, 0), 24).astype(int))
    open_ = np.ones(len(rows), bool)
    for m in range(1, int(top.max(initial=1))):
        at = np.flatnonzero(open_ & (m <= 0.6 * top))  # every integer lies near some point of a finer grid
        for columns in (sample, slice(None)):  # most rows fail on a few columns
            ratio = m / top[at, None]
            coarse = np.rint(codes[at][:, columns] * ratio)
            same = (np.abs(coarse / ratio - codes[at][:, columns]) <= 0.501).all(1)  # halves round either way
            at, coarse = at[same], coarse[same]
        rows[at], factor[at], open_[at] = coarse.astype(np.int64), top[at] / m, False
    return rows, factor
