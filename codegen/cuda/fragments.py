"""Weights in the order in which lanes of a warp read them: fragments of ``mma`` operands, 2:4 values and metadata.

A fragment is 16 rows by 32 bytes of k: lane l holds 16 bytes at ``[16 l, 16 l + 16)``, its four registers
(``instructions/mma.py``). Arrays of bytes; rows are outputs. Metadata as in ``instructions/mma_sparse.py``.
"""

from __future__ import annotations

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.weights import Array

ROWS, STEP = 16, 32
"""Rows and bytes of k of a fragment."""
BLOCK = 64
"""Rows of a block of metadata: four fragments."""
GROUP = 4


def padded(a: Array, rows: int, columns: int) -> Array:
    """``a`` [r, c] with zeros behind, up to multiples of ``rows`` and ``columns``."""
    r, c = a.shape
    out = np.zeros((-(-r // rows) * rows, -(-c // columns) * columns), a.dtype)
    out[:r, :c] = a
    return out


def fragments(a: Array) -> Array:
    """[rows, bytes of k] u8 -> [rows / 16, bytes / 32, 32, 16]."""
    m, k = a.shape[0] // ROWS, a.shape[1] // STEP
    parts = a.reshape(m, 2, 8, k, 2, 4, 4).transpose(0, 3, 2, 5, 4, 1, 6)
    return np.ascontiguousarray(parts).reshape(m, k, 32, 16)


def from_fragments(f: Array) -> Array:
    """The inverse of :func:`fragments`."""
    m, k = f.shape[:2]
    parts = f.reshape(m, k, 8, 4, 2, 2, 4).transpose(0, 5, 2, 1, 4, 3, 6)
    return np.ascontiguousarray(parts).reshape(m * ROWS, k * STEP)


def is_2_4(a: Array) -> bool:
    """Whether of every four consecutive elements of a row (zeros follow the last) at most two are not zero."""
    wide = padded(a != 0, 1, GROUP)
    return bool((wide.reshape(a.shape[0], -1, GROUP).sum(2) <= 2).all())


def compress(a: Array) -> tuple[Array, Array]:
    """The two elements kept of every four along a row, and their places (u8, 0 to 3, ascending).

    ``a``: [rows, k], k a multiple of 4. Where fewer than two are not zero, zeros at the lowest free places are kept.
    Raises :class:`InvalidInput` where more than two are not zero.
    """
    rows, k = a.shape
    groups = a.reshape(rows, k // GROUP, GROUP)
    full = groups != 0
    if (full.sum(2) > 2).any():
        row, group = (int(x[0]) for x in np.nonzero(full.sum(2) > 2))
        raise InvalidInput(f"row {row} has more than two values in elements {GROUP * group} to {GROUP * group + 3}")
    first = np.argsort(~full, axis=2, kind="stable")[:, :, :2]
    places = np.sort(first, axis=2)
    kept = np.take_along_axis(groups, places, 2)
    return kept.reshape(rows, k // 2), places.astype(np.uint8).reshape(rows, k // 2)


def expand(kept: Array, places: Array) -> Array:
    """The inverse of :func:`compress`."""
    rows, half = kept.shape
    out = np.zeros((rows, half // 2, GROUP), kept.dtype)
    np.put_along_axis(out, places.reshape(rows, -1, 2).astype(np.int64), kept.reshape(rows, -1, 2), 2)
    return out.reshape(rows, 2 * half)


def metadata(places: Array, size: int) -> Array:
    """[rows, k / 2] places -> u32 [rows / 64, k / 64, 32, 4]: lane l reads its 16 bytes at once.

    ``size``: bytes of an element. 2: words 2 s + p are of the pair p of fragments (2 p with selector 0, 2 p + 1 with
    selector 1) and of the s-th 32 elements. 1: word i is of fragment i of the four.
    """
    rows, k = places.shape[0], 2 * places.shape[1]
    m, n = rows // BLOCK, k // 64
    pairs = places.reshape(rows, k // GROUP, 2).astype(np.uint32)
    groups = pairs[:, :, 0] | pairs[:, :, 1] << 2
    if size == 2:
        halves = _joined(groups.reshape(rows, k // 16, 4), 4)
        # fragment 2 p + u, row g + 8 v, elements 32 s + 16 h: lane (g, 2 u + h), bits 16 v, word 2 s + p
        parts = halves.reshape(m, 2, 2, 2, 8, n, 2, 2)  # m, p, u, v, g, n, s, h
        words = parts[:, :, :, 0] | parts[:, :, :, 1] << 16  # m, p, u, g, n, s, h
        return np.ascontiguousarray(words.transpose(0, 4, 3, 2, 6, 5, 1)).reshape(m, n, 32, 4)
    words = _joined(groups.reshape(rows, k // 32, 8), 4)
    # fragment i, row g + 8 v, elements 32 h: lane (g, 2 h + v), word i
    parts = words.reshape(m, 4, 2, 8, n, 2)  # m, i, v, g, n, h
    return np.ascontiguousarray(parts.transpose(0, 4, 3, 5, 2, 1)).reshape(m, n, 32, 4)


def places_of(words: Array, size: int) -> Array:
    """The inverse of :func:`metadata`."""
    m, n = words.shape[:2]
    if size == 2:
        parts = words.reshape(m, n, 8, 2, 2, 2, 2).transpose(0, 6, 3, 2, 1, 5, 4)  # m, p, u, g, n, s, h
        halves = np.stack([parts & 0xFFFF, parts >> 16], 3)  # m, p, u, v, g, n, s, h
        groups = _split(halves.reshape(m * BLOCK, n * 4), 4)
    else:
        parts = words.reshape(m, n, 8, 2, 2, 4).transpose(0, 5, 4, 2, 1, 3)  # m, i, v, g, n, h
        groups = _split(parts.reshape(m * BLOCK, n * 2), 8)
    pairs = np.stack([groups & 3, groups >> 2], 2)
    return pairs.reshape(m * BLOCK, n * 32).astype(np.uint8)


def _joined(parts: Array, bits: int) -> Array:
    """The last axis as fields of one word, lowest first."""
    shifts = np.arange(parts.shape[-1], dtype=np.uint32) * bits
    joined: Array = np.bitwise_or.reduce(parts << shifts, axis=-1)
    return joined


def _split(words: Array, count: int) -> Array:
    """Fields of 4 bits, lowest first: [r, c] -> [r, c * count]."""
    shifts = np.arange(count, dtype=np.uint32) * 4
    return ((words[:, :, None] >> shifts) & 15).reshape(words.shape[0], -1)
