"""How many products of known weights any partial sum may take before it leaves a narrow register."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.weights import Array

_CHUNK = 1 << 22
"""Weights sorted at once."""


class Reach(NamedTuple):
    """What sums of a few products can be.

    ``terms``: the partial sums of any so many products of one row, in any order and for any inputs, stay in the
    register; at most the row's length. ``pair``: the sum of two products that is farthest from zero.
    """

    terms: int
    pair: int


def safe_products(weights: Array, x_hi: int, bits: int) -> Reach:
    """:class:`Reach` of integer weights [out, k] (64 bits at most) with inputs from 0 to ``x_hi`` in a signed register.

    The n largest positive weights of a row make its largest sum of n products, the n smallest its smallest one; some
    input attains each, so one term more would not do. Raises :class:`InvalidInput` for anything but such weights.

    >>> safe_products(np.array([[7, -3, 2, 7]]), 255, 16)
    Reach(terms=4, pair=3570)
    >>> safe_products(np.array([[127, 127, 0]]), 255, 16)
    Reach(terms=1, pair=64770)
    """
    if weights.ndim != 2 or weights.dtype.kind not in "iu":
        raise InvalidInput(f"weights are an integer array [out, k], got {weights.dtype} with {weights.ndim} axes")
    if not 0 < x_hi < 1 << 16 or not 1 <= bits <= 32:
        raise InvalidInput(f"inputs go up to 1 to 65535 and registers have 1 to 32 bits, got {x_hi} and {bits}")
    length = weights.shape[1]
    terms, pairs = length, [0]
    for first in range(0, len(weights), size := max(1, _CHUNK // max(1, length))):
        rising = np.sort(weights[first : first + size], axis=1)
        for sign, ends, limit in ((1, rising[:, ::-1], (1 << bits - 1) - 1), (-1, rising, 1 << bits - 1)):
            few = ends[:, : limit // x_hi + 2].astype(np.int64)  # so many that are not zero are always too many
            sums = np.cumsum(np.clip(sign * few, 0, limit + 1), axis=1) * x_hi
            fit = int((sums <= limit).sum(1).min(initial=few.shape[1]))
            terms = min(terms, fit) if fit < few.shape[1] else terms
            pairs.append(sign * x_hi * int(np.clip(sign * few[:, :2], 0, None).sum(1).max(initial=0)))
    return Reach(terms, max(pairs, key=abs))
