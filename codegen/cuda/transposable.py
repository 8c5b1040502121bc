"""Tables and metadata of transposable 2:4 weights: what the tensor cores need beside the packed values.

A weight [outputs, inputs] is stored once, as ``bitwright.sparse_linear.TransposableWeight`` describes: the eight values
of each 4x4 block in row order, and the block's pattern, one of 90. Metadata of the product with W and of that with its
transpose are derived from the patterns; they are an eighth of the dense weight each.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.patterns import transposable_patterns

Words = NDArray[np.uint32]
ROWS, DEPTH = 16, 64
"""Rows and depth whose metadata a warp holds in one register: two instructions, one for each selector."""


@cache
def column_places() -> NDArray[np.uint8]:
    """[90, 4]: of each column, the places of its two values among the block's eight, the upper one in bits 0 to 2,
    the lower one in bits 3 to 5."""
    out = np.zeros((len(transposable_patterns()), 4), np.uint8)
    for code, grid in enumerate(transposable_patterns()):
        number = np.cumsum(grid.reshape(-1)).reshape(4, 4) - 1
        for column in range(4):
            upper, lower = number[grid[:, column], column]
            out[code, column] = upper | lower << 3
    return out


@cache
def _nibbles(transposed: bool) -> NDArray[np.uint32]:
    """[90, 4]: metadata of each row (column if ``transposed``) of a pattern: two places of 2 bits, ascending."""
    grids = transposable_patterns().transpose(0, 2, 1) if transposed else transposable_patterns()
    places = np.nonzero(grids)[2].reshape(len(grids), 4, 2)
    return (places[:, :, 0] | places[:, :, 1] << 2).astype(np.uint32)


def metadata(codes: NDArray[Any], transposed: bool) -> Words:
    """Words [rows/16, depth/64, 32] of the product with W (rows: outputs), or with its transpose (rows: inputs).

    ``codes``: [outputs/8, inputs/4, 2]. Rows and depth are filled up with a pattern whose values will be zeros.
    Lane 4 g + t holds row g (low half) and g + 8 (high half), elements 32 (t / 2) + 16 (t % 2) and the 15 after it.
    """
    down, across, _ = codes.shape
    blocks = codes.transpose(0, 2, 1).reshape(2 * down, across)
    per = _nibbles(transposed)[blocks.T if transposed else blocks]  # [block of rows, group, row in block]
    rows = per.transpose(0, 2, 1).reshape(-1, per.shape[1])
    full = np.full((-(-rows.shape[0] // ROWS) * ROWS, -(-rows.shape[1] * 4 // DEPTH) * DEPTH // 4), 0b0100, np.uint32)
    full[: rows.shape[0], : rows.shape[1]] = rows
    fours = full.reshape(full.shape[0], -1, 4)
    halves = sum(fours[:, :, i] << np.uint32(4 * i) for i in range(4))  # [row, depth/16]
    split = np.asarray(halves).reshape(-1, 2, 8, full.shape[1] * 4 // DEPTH, 4)  # [tile, upper or lower, g, step, t]
    words = split[:, 0] | split[:, 1] << np.uint32(16)
    return np.ascontiguousarray(words.transpose(0, 2, 1, 3).reshape(-1, full.shape[1] * 4 // DEPTH, 32))
