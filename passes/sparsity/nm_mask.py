"""Structured N:M pruning of constant contraction weights by magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from bitwright.ir.graph import Graph
from bitwright.ir.types import NM
from bitwright.ir.weights import Array
from bitwright.passes._pass import Context
from bitwright.passes.sparsity._masking import Mask, MaskingPass
from bitwright.passes.sparsity.masks import Pattern, nm_mask_array

TWO_OF_FOUR = Pattern(2, 4)


@dataclass(frozen=True)
class NMMask(MaskingPass):
    """Keep the largest ``keep`` of every ``group`` weights along the reduction axis of Linear and Conv.

    ``score=wanda`` compares magnitudes times the norm of the input they meet on the calibration data.

    before:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[4, 8]
          %y = linear(%x, %w) : f32[2, 4]
        }
    after:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %fc.weight = weight {ref="fc.weight.1"} : f32[4, 8] nm<2:4, axis=1>
          %y = linear(%x, %fc.weight) : f32[2, 4]
        }
    """

    name: ClassVar[str] = "nm-mask"
    lossy: ClassVar[bool] = True
    pattern: Pattern = TWO_OF_FOUR
    score: Literal["magnitude", "wanda"] = "magnitude"
    only: str = "*"
    except_: str = ""
    shared: int = 1
    block: int = 1
    skip_first: bool = False

    def run(self, graph: Graph, context: Context) -> Graph:
        return self.mask_layers(graph, context, self.only, self.except_, self.skip_first)

    def encoding(self, axis: int) -> NM:
        return self.pattern.along(axis, self.shared, self.block)

    def mask(self, weight: Array, encoding: Mask, name: str) -> Array:
        assert isinstance(encoding, NM)
        e = encoding
        return nm_mask_array(weight, e.keep, e.group, e.axis, e.shared, e.block, name)
