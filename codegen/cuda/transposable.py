"""What kernels of transposable 2:4 weights know of the 90 patterns, and how metadata lie in memory.

A weight [outputs, inputs] is stored once, as ``bitwright.sparse_linear.TransposableWeight`` describes: the eight values
of each 4x4 block in row order, and the block's pattern, one of 90. Metadata of the product with W and of that with its
transpose are derived from the patterns; they are a sixteenth of the dense 16-bit weight each.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.patterns import transposable_patterns

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
