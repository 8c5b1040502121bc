"""Unstructured pruning: the smallest weights of a layer, or the smallest blocks of weights, are zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.patterns import grouped
from bitwright.ir.types import Unstructured
from bitwright.ir.weights import Array
from bitwright.passes._pass import Context
from bitwright.passes.sparsity._masking import Mask, MaskingPass

DIGITS = 4
"""Of the share that an encoding names."""


@dataclass(frozen=True)
class MagnitudeMask(MaskingPass):
    """Zero the share ``sparsity`` of the weights of each Linear and Conv, the smallest magnitudes first.

    ``block`` consecutive weights along the reduction axis are kept or zeroed together: integer kernels skip blocks of
    4, floating-point ones single weights. At equal density this loses less magnitude than any pattern; kernels gain
    from it at about half and more zeros (``targets``). ``score=wanda`` compares magnitudes times the norm of the input
    they meet on the calibration data.

    before:
        graph @g (%x: f32[2, 4]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[4, 4]
          %y = linear(%x, %w) : f32[2, 4]
        }
    after:
        graph @g (%x: f32[2, 4]) -> (y = %y) level=graph {
          %fc.weight = weight {ref="fc.weight.1"} : f32[4, 4] unstructured<0 per 0, axis=1, kept=0.25>
          %y = linear(%x, %fc.weight) : f32[2, 4]
        }
    """

    name: ClassVar[str] = "magnitude-mask"
    lossy: ClassVar[bool] = True
    sparsity: float = 0.75
    block: int = 1
    score: Literal["magnitude", "wanda"] = "magnitude"
    only: str = "*"
    except_: str = ""
    skip_first: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < round(self.sparsity, DIGITS) < 1.0:
            raise InvalidInput(f"{self.name}: sparsity lies between 0 and 1, not {self.sparsity}")
        if self.block < 1:
            raise InvalidInput(f"{self.name}: block is at least 1, not {self.block}")

    def run(self, graph: Graph, context: Context) -> Graph:
        return self.mask_layers(graph, context, self.only, self.except_, self.skip_first)

    def choose(self, weight: Array, axis: int, name: str) -> Unstructured | str:
        encoding = Unstructured(0, 0, axis, self.block, round(1.0 - self.sparsity, DIGITS))
        blocks = _scores(weight, encoding).size
        if not 0 < _kept(blocks, encoding) < blocks:
            return f"{blocks} blocks are too few for {self.sparsity:.2%} zeros"
        return encoding

    def mask(self, weight: Array, encoding: Mask, name: str) -> Array:
        assert isinstance(encoding, Unstructured)
        return unstructured_mask_array(weight, encoding, name)


def unstructured_mask_array(weight: Array, encoding: Unstructured, name: str = "weight") -> Array:
    """True where an element is kept: the largest blocks of the whole tensor, as many as the encoding's share allows.

    The first of equals is kept. Raises :class:`InvalidInput` for NaN and infinities, quoting ``name``.
    """
    if not np.all(np.isfinite(weight)):
        raise InvalidInput(f"{name} has values that are not finite: there is no order to prune by")
    score = _scores(weight, encoding)
    chosen = np.argsort(-score.reshape(-1), kind="stable")[: _kept(score.size, encoding)]
    kept = np.zeros(score.size, bool)
    kept[chosen] = True
    wide: Array = np.repeat(kept.reshape(score.shape), encoding.block, -1)[..., : weight.shape[encoding.axis]]
    return np.ascontiguousarray(np.moveaxis(wide, -1, encoding.axis))


def _scores(weight: Array, encoding: Unstructured) -> Array:
    """The summed magnitude of every block, the axis last."""
    total: Array = grouped(np.abs(weight.astype(np.float64)), 1, encoding.axis, encoding.block).sum((-1, -2))
    return total


def _kept(blocks: int, encoding: Unstructured) -> int:
    return int(encoding.kept * blocks + 1e-6)
