"""Integer weights changed so that their sums fit a narrower accumulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_torch
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._pass import Context, Pass
from bitwright.passes.accumulators._constrain import Layer, Options, layer_at, new_bias, solve, written
from bitwright.passes.sparsity._frontier import walk
from bitwright.passes.sparsity._inputs import need_calibration

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ConstrainWeights(Pass):
    """Change quantized weights so that every partial sum of their layer fits ``bits`` bits, for any input.

    Runs after the weights are quantized. ``a2q``: rows projected on the l1 ball of the A2Q cap; ``a2q+``: rows centred
    over their kept weights (``centre=false``: not), the positive and the negative half each within half the A2Q+ cap;
    both round toward zero. ``axe-gptq`` and ``axe-gpfq``: error-compensating rounding in which no weight may take more
    than what is left of its row's budgets; they need calibration data. ``tile``: only the sums of so many consecutive
    terms (taps first, then channels) must fit, a wider register adds them up. ``scales=search`` also makes the codes
    coarser where that loses less than the projection does. With calibration data the mean of the error is taken off
    the bias. Rows that fit stay as they are, masked weights stay zero.

    before:
        graph @g (%q: u8[1, 4]) -> (y = %y) level=graph {
          %s = constant {values=[0.5]} : f32[]
          %z = constant {values=[0]} : u8[]
          %w = constant {values=[100, 30, -100, -30, 3, -4, 0, 1]} : s8[2, 4]
          %t = constant {values=[0.25, 0.5]} : f32[2]
          %x = dequantize(%q, %s, %z) : f32[1, 4]
          %wd = dequantize(%w, %t) {axis=0} : f32[2, 4]
          %y = linear(%x, %wd) : f32[1, 2]
        }
    after:
        graph @g (%q: u8[1, 4]) -> (y = %y) level=graph {
          %s = constant {values=[0.5]} : f32[]
          %z = constant {values=[0]} : u8[]
          %x = dequantize(%q, %s, %z) : f32[1, 4]
          %w.1 = weight {ref="w"} : s8[2, 4]
          %w.scale = constant {values=[2.5, 0.5]} : f32[2]
          %w.dq = dequantize(%w.1, %w.scale) {axis=0} : f32[2, 4]
          %y = linear(%x, %w.dq) : f32[1, 2]
        }
    """

    name: ClassVar[str] = "constrain-weights"
    lossy: ClassVar[bool] = True
    bits: int = 16
    method: Literal["a2q", "a2q+", "axe-gptq", "axe-gpfq"] = "a2q+"
    tile: int = 0
    scales: Literal["search", "keep"] = "search"
    centre: bool = True
    only: str = "*"
    except_: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        if not 2 <= self.bits <= 64 or self.tile < 0:
            raise InvalidInput(f"constrain-weights: bits from 2 to 64 and tile from 0, not {self.bits} and {self.tile}")
        if self.method.startswith("axe"):
            need_calibration(context, f"constrain-weights{{method={self.method}}}")
        layers = self._layers(graph, context)
        waiting = {n.output: x for x in layers.values() for n in x.nodes}
        total, options = len(waiting), Options(self.bits, self.method, self.tile, self.scales == "search", self.centre)

        def visit(node: Node, xs: list[torch.Tensor], *_: list[torch.Tensor]) -> dict[int, torch.Tensor]:
            layer = waiting.pop(node.output)
            if context.progress is not None:
                context.progress(f"constrain {layer.name}", 1 - len(waiting) / total)
            for x in xs:
                layer.see(graph, node, x)
            if node is not layer.nodes[-1]:
                return {}
            self._solve(layer, options, context)
            if layer.done is None:
                return {}
            bias = new_bias(graph, node, layer)
            return {1: to_torch(layer.real), **({} if bias is None else {2: to_torch(bias)})}

        if context.calibration and layers:
            walk(graph, context.calibration, set(waiting), visit)
        else:
            for layer in layers.values():
                self._solve(layer, options, context)
        return written(graph, {k: x for k, x in layers.items() if x.done is not None and x.facts["changed_rows"]})

    def _layers(self, graph: Graph, context: Context) -> dict[str, Layer]:
        """The layers to constrain by the value of their dequantized weight; refusals for the others."""
        found: dict[str, Layer] = {}
        for n in graph.nodes:
            if not isinstance(n.op, ops.CONTRACTION) or not selected(self.only, self.except_, graph, n):
                continue
            made = layer_at(graph, n)
            if isinstance(made, str):
                cure = 'quantize it first, as in recipe="int8, constrain-weights"' if "integer" in made else ""
                context.refuse(self.name, layer_of(graph, n), made, cure)
            elif n.inputs[1] in found:
                found[n.inputs[1]].nodes.append(n)
                found[n.inputs[1]].inputs += made.inputs
            else:
                found[n.inputs[1]] = made
        return found

    def _solve(self, layer: Layer, options: Options, context: Context) -> None:
        if why := solve(layer, options):
            context.refuse(self.name, layer.name, why, "give it more bits, or inputs of fewer bits")
        else:
            context.remark(self.name, layer.name, **layer.facts)
