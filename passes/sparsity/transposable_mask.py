"""N:M pruning whose masks hold for the weight and for its transpose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from bitwright.ir.graph import Graph
from bitwright.ir.types import NM
from bitwright.ir.weights import Array
from bitwright.passes._pass import Context
from bitwright.passes.sparsity._masking import Mask, MaskingPass
from bitwright.passes.sparsity.masks import Pattern, transposable_mask

FOUR_OF_EIGHT = Pattern(4, 8)


@dataclass(frozen=True)
class TransposableMask(MaskingPass):
    """Keep at most ``keep`` of every ``group`` weights along the reduction axis and along the output axis.

    One mask then serves the layer and, in training, its transpose. A convolution is masked at each of its taps, a
    matrix of outputs by input channels. ``score=wanda`` compares magnitudes times the norm of the input they meet on
    the calibration data.

    before:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[8, 8]
          %y = linear(%x, %w) : f32[2, 8]
        }
    after:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %fc.weight = weight {ref="fc.weight.1"} : f32[8, 8] nm<4:8, axis=1, transposable>
          %y = linear(%x, %fc.weight) : f32[2, 8]
        }
    """

    name: ClassVar[str] = "transposable-mask"
    lossy: ClassVar[bool] = True
    pattern: Pattern = FOUR_OF_EIGHT
    method: Literal["fast", "exact", "greedy", "two-approx"] = "fast"
    score: Literal["magnitude", "wanda"] = "magnitude"
    only: str = "*"
    except_: str = ""
    skip_first: bool = False

    def run(self, graph: Graph, context: Context) -> Graph:
        return self.mask_layers(graph, context, self.only, self.except_, self.skip_first)

    def encoding(self, axis: int) -> NM:
        return replace(self.pattern.along(axis), transposable=True)

    def mask(self, weight: Array, encoding: Mask, name: str) -> Array:
        assert isinstance(encoding, NM)
        from bitwright.ir.interpret import to_torch

        p, (rows, columns) = encoding, weight.shape[:2]
        taps = np.moveaxis(weight.reshape(rows, columns, -1), -1, 0)
        kept = [transposable_mask(to_torch(t), p.keep, p.group, self.method, name).numpy() for t in taps]
        out: Array = np.stack(kept, -1).reshape(weight.shape)
        return out
