"""From a model that was pruned without structure to N:M, each layer with the pattern its own zeros allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.patterns import density, kept_magnitude
from bitwright.ir.types import NM
from bitwright.ir.weights import Array
from bitwright.passes._pass import Context
from bitwright.passes.sparsity._masking import Mask, MaskingPass, label
from bitwright.passes.sparsity.masks import Pattern, nm_mask_array, pattern_from_density
from bitwright.passes.sparsity.transposable_mask import TransposableMask

GROUPS = (4, 8, 16)
"""Groups with kernels; a pattern of wider ones that happens to hold is converted all the same."""


@dataclass(frozen=True)
class ConvertUnstructured(MaskingPass):
    """Give each layer pruned without structure the keep:group that its zeros nearly form, and mask what is over.

    With a share p of zeros placed at random, the largest number of zeros that a group has with a probability above
    ``confidence`` is pruned (binomial tail): little magnitude is lost, which the report states. ``transposable``:
    the mask holds along the outputs too, at a higher loss.

    before:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[4, 8] unstructured<2 per 8, axis=1>
          %y = linear(%x, %w) : f32[2, 4]
        }
    after:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %fc.weight = weight {ref="fc.weight.1"} : f32[4, 8] nm<4:8, axis=1>
          %y = linear(%x, %fc.weight) : f32[2, 4]
        }
    """

    name: ClassVar[str] = "convert-unstructured"
    lossy: ClassVar[bool] = True
    group: int = 8
    confidence: float = 0.95
    transposable: bool = False
    score: Literal["magnitude", "wanda"] = "magnitude"
    only: str = "*"
    except_: str = ""
    skip_first: bool = False

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise InvalidInput(f"{self.name}: group is 4, 8 or 16, not {self.group}")
        pattern_from_density(0.5, self.group, self.confidence)

    def run(self, graph: Graph, context: Context) -> Graph:
        return self.mask_layers(graph, context, self.only, self.except_, self.skip_first)

    def choose(self, weight: Array, axis: int, name: str) -> NM | str:
        zeros = 1.0 - density(weight)
        keep = pattern_from_density(zeros, self.group, self.confidence)
        if keep == self.group:
            return f"{zeros:.1%} zeros are too few for a pattern of {self.group}"
        return NM(keep, self.group, axis, transposable=self.transposable)

    def mask(self, weight: Array, encoding: Mask, name: str) -> Array:
        assert isinstance(encoding, NM)
        if encoding.transposable:
            return TransposableMask(Pattern(encoding.keep, encoding.group)).mask(weight, encoding, name)
        return nm_mask_array(weight, encoding.keep, encoding.group, encoding.axis, name=name)

    def facts(self, before: Array, after: Array) -> dict[str, Any]:
        lost = 1.0 - kept_magnitude(before, after)
        return {"zero_fraction": round(1.0 - density(before), 4), "magnitude_lost": round(lost, 6)}

    def _why_not(self, graph: Graph, node: Node) -> str:
        """Besides what every mask refuses: layers whose weights obey a pattern that is as tight already."""
        why = super()._why_not(graph, node)
        has, new = graph.types[node.inputs[1]].encoding, None if why else self._encoding(graph, node)
        if not isinstance(has, NM) or not isinstance(new, NM) or has == new:
            return why
        both = has.transposable or not self.transposable
        tight = has.group * has.block <= max(GROUPS) and has.density <= new.density
        return f"obeys {label(has)} already, no looser than {label(new)}" if both and tight else ""
