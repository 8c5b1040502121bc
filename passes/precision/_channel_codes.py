"""Weights whose outputs have 4, 2 or 1 bits each: what each width costs an output, and which outputs get which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitwright.passes.precision._integer_codes import Codes, Width, levels, quantize_codes

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]
WIDTHS: tuple[Width, ...] = (4, 2, "bipolar")
BITS = (4, 2, 1)


def codes_by_width(w: torch.Tensor, mask: torch.Tensor | None = None) -> list[Codes]:
    """Codes of w [O, ...] in each width, a scale per output; with a mask that drops weights not in one bit."""
    widths = WIDTHS if mask is None or bool(mask.all()) else WIDTHS[:2]
    return [quantize_codes(w, b, axis=0, range="mse", mask=mask) for b in widths]


def row_errors(w: torch.Tensor, codes: Sequence[Codes]) -> Array:
    """Squared error of each output in each width, f64 [O, widths]."""
    found = [(c.real().double() - w.double()).square().reshape(len(w), -1).sum(1).numpy() for c in codes]
    return np.stack(found, 1)


def ranked(errors: Array) -> Array:
    """Outputs in the order in which they should have more bits: what they lose at the fewest comes first."""
    return np.argsort(errors[:, 0] - errors[:, -1], kind="stable")


def by_counts(errors: Array, counts: Sequence[int]) -> Array:
    """The width of each output (its place in ``WIDTHS``): ``counts`` outputs in each, the needier ones in the wider."""
    choice = np.zeros(len(errors), np.int64)
    choice[ranked(errors)] = np.repeat(np.arange(len(counts)), counts)
    return choice


def by_average(errors: Array, bits: float) -> Array:
    """The width of each output whose squared errors sum to the least within ``bits`` bits an output on average.

    Steps along the lower convex hull of each output's error over its bits, steepest first; the best up to the last
    step.
    """
    steps = []
    last = errors.shape[1] - 1
    for row, e in enumerate(errors):
        at = last
        while at > 0:
            gains = [(float(e[at] - e[to]) / (BITS[to] - BITS[at]), to) for to in range(at)]
            gain, to = max(gains)
            if gain <= 0:
                break
            steps.append((-gain, row, to, BITS[to] - BITS[at]))
            at = to
    choice, left = np.full(len(errors), last), bits * len(errors) - BITS[last] * len(errors)
    for _, row, to, cost in sorted(steps):
        if cost > left + 1e-9:
            break
        choice[row], left = to, left - cost
    return choice


def merged(codes: Sequence[Codes], choice: Array) -> Codes:
    """Codes of 4 bits that hold each output in its width."""
    import torch

    rows = torch.from_numpy(choice)
    shape = [-1] + [1] * (codes[0].codes.dim() - 1)
    values, scale = codes[0].codes.clone(), codes[0].scale.clone()
    for n, c in enumerate(codes):
        values = torch.where((rows == n).reshape(shape), c.codes.to(values.dtype), values)
        scale = torch.where(rows == n, c.scale, scale)
    return codes[0]._replace(codes=values, scale=scale, levels=levels(4))
