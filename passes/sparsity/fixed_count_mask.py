"""Unstructured pruning with a fixed count of weights in every run of the reduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.patterns import share
from bitwright.ir.types import Unstructured
from bitwright.ir.weights import Array
from bitwright.passes._pass import Context
from bitwright.passes.sparsity._masking import Mask, MaskingPass
from bitwright.passes.sparsity.masks import fixed_count_mask_array


@dataclass(frozen=True)
class FixedCountMask(MaskingPass):
    """Keep the largest ``count`` of every ``per`` weights along the reduction axis of Linear and Conv.

    Nearly as free as unstructured pruning, yet every output has as many products in every run. ``count`` 0 takes
    ``density`` of ``per``. Where the axis is shorter than a run, it is the run, with its share of the count. Of a
    convolution, runs lie along the input channels of each tap. Without a kernel such layers run dense.

    before:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[4, 8]
          %y = linear(%x, %w) : f32[2, 4]
        }
    after:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %fc.weight = weight {ref="fc.weight.1"} : f32[4, 8] unstructured<2 per 8, axis=1>
          %y = linear(%x, %fc.weight) : f32[2, 4]
        }
    """

    name: ClassVar[str] = "fixed-count-mask"
    lossy: ClassVar[bool] = True
    count: int = 0
    per: int = 64
    density: float = 0.25
    block: int = 1
    score: Literal["magnitude", "wanda"] = "magnitude"
    only: str = "*"
    except_: str = ""
    skip_first: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise InvalidInput(f"{self.name}: a density lies above 0 and is at most 1, not {self.density}")
        if self.count < 0 or self.per < 1:
            raise InvalidInput(f"{self.name}: count={self.count} per={self.per} keeps nothing: 1 <= count <= per")
        self.encoding(1)

    def run(self, graph: Graph, context: Context) -> Graph:
        return self.mask_layers(graph, context, self.only, self.except_, self.skip_first)

    def encoding(self, axis: int) -> Unstructured:
        count = self.count or max(1, round(self.density * self.per))
        return Unstructured(count, self.per, axis, self.block)

    def choose(self, weight: Array, axis: int, name: str) -> Unstructured | str:
        whole, blocks = self.encoding(axis), -(-weight.shape[axis] // self.block)
        per = min(whole.per, blocks)
        count = share(whole.count, whole.per, per)
        if count == per:
            return f"{count} of {per} are kept: nothing to prune" if per else "no inputs"
        return Unstructured(count, per, axis, self.block)

    def mask(self, weight: Array, encoding: Mask, name: str) -> Array:
        assert isinstance(encoding, Unstructured)
        return fixed_count_mask_array(weight, encoding, name)
