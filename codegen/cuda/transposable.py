"""What kernels of transposable 2:4 weights know of the 90 patterns, and how metadata lie in memory.

A weight [outputs, inputs] is stored once, as ``bitwright.sparse_linear.TransposableWeight`` describes: the eight values
of each 4x4 block in row order, and the block's pattern, one of 90. Metadata of the product with W and of that with its
transpose are derived from the patterns; they are a sixteenth of the dense 16-bit weight each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.errors import InvalidInput
from bitwright.ir.patterns import transposable_patterns
from bitwright.ir.types import BF16, F16, DType

ROWS, DEPTH = 16, 64
"""Rows and depth whose metadata a warp holds in one register: two instructions, one for each selector."""


@dataclass(frozen=True, slots=True)
class Product:
    """One of the two products of a weight [outputs, inputs] with ``tokens`` rows of activations or gradients.

    ``by_columns``: the input gradient. ``dtype``: f16 or bf16, of all operands; sums are f32. ``bias``: f32 values
    are added. Outputs and inputs are multiples of 8: raises :class:`InvalidInput` otherwise.
    """

    outputs: int
    inputs: int
    tokens: int
    by_columns: bool = False
    dtype: DType = F16
    bias: bool = False
    stages: int = 3

    def __post_init__(self) -> None:
        if self.outputs % 8 or self.inputs % 8:
            raise InvalidInput(f"a weight of {self.outputs}x{self.inputs}: both sizes must be multiples of 8")
        if self.dtype not in (F16, BF16):
            raise InvalidInput(f"sparse products on tensor cores take f16 or bf16, not {self.dtype}")

    @property
    def rows(self) -> int:
        return self.inputs if self.by_columns else self.outputs

    @property
    def depth(self) -> int:
        return self.outputs if self.by_columns else self.inputs

    @property
    def steps(self) -> int:
        """Turns of the main loop."""
        return -(-self.depth // DEPTH)


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
