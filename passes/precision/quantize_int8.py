"""Post-training quantization to 8 bits, written as quantize and dequantize around contractions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import F32, U8
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._pass import Context, Pass
from bitwright.passes.precision._qdq import Writer, codes_behind, why_not_codes
from bitwright.passes.precision._regions import Range, Regions
from bitwright.passes.precision._weight_writer import snr_db


@dataclass(frozen=True)
class QuantizeInt8(Pass):
    """Activations per tensor (asymmetric, zero exact), weights per output channel (symmetric, masks survive).

    ``granularity=tensor`` gives each weight a single scale, for machines whose kernels know no other.

    Residual additions, pools and layout operators between quantized contractions stay integer too. ``bits`` (2 to 8)
    are those of activations: fewer than 8 lie in bytes and run on the same kernels. Weights keep the codes that
    quantize-weights gave them. Ranges that ``observe-ranges{also=4}`` found for a width are used there.

    before:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[2, 2]
          %y = linear(%x, %w) : f32[1, 2]
        }
    after:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %x.scale = constant {values=[0.01568627543747425]} : f32[]
          %x.zero = constant {values=[64]} : u8[]
          %x.q = quantize(%x, %x.scale, %x.zero) {dtype=u8} : u8[1, 2]
          %x.dq = dequantize(%x.q, %x.scale, %x.zero) : f32[1, 2]
          %fc.weight = weight {ref="fc.weight.1"} : s8[2, 2]
          %fc.weight.scale = constant {values=[0.0010401956969872117, 0.0050426977686584]} : f32[2]
          %fc.weight.dq = dequantize(%fc.weight, %fc.weight.scale) {axis=0} : f32[2, 2]
          %y = linear(%x.dq, %fc.weight.dq) : f32[1, 2]
        }
    """

    name: ClassVar[str] = "quantize-int8"
    lossy: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("ranges",)
    only: str = "*"
    except_: str = ""
    first: bool = True
    last: bool = True
    matmul: bool = False
    granularity: Literal["channel", "tensor"] = "channel"
    bits: int = 8

    def run(self, graph: Graph, context: Context) -> Graph:
        if not 2 <= self.bits <= 8:
            raise InvalidInput(f"quantize-int8: activations take 2 to 8 bits, not {self.bits}")
        return self.with_bits(graph, context, lambda layer: self.bits)

    def with_bits(self, graph: Graph, context: Context, bits: Callable[[str], int]) -> Graph:
        """:meth:`run` with as many bits for the activation of each layer (by name) as a function says."""
        given = context.facts.get("ranges")
        if given is None:
            raise InvalidInput("quantize-int8 needs value ranges: run observe-ranges before it, with calibration data")
        ranges = _finite(given, graph)
        layers = self._layers(graph, context, ranges)
        widths = {x: bits(layer_of(graph, graph.producers[x])) for x in layers}
        narrow = {b: _finite(context.facts.get(f"ranges-{b}", {}), graph) for b in set(widths.values()) if b < 8}
        dtype = context.target.activation if context.target is not None else U8
        plan = Regions(graph, layers, ranges, widths, narrow).plan()
        writer = Writer(graph, plan, dtype, self.granularity == "tensor")
        after = writer.write()
        for x in layers:
            n = graph.producers[x]
            (low, high), _ = writer.ranges[n.inputs[0]]
            noise = (
                {"weight_snr_db": round(snr_db(writer.noise[n.inputs[1]]), 1)} if n.inputs[1] in writer.noise else {}
            )
            context.remark(self.name, layer_of(graph, n), low=low, high=high, **noise)
        return after

    def _layers(self, graph: Graph, context: Context, ranges: dict[str, Range]) -> dict[str, tuple[str, ...]]:
        """Operands to quantize by contraction; refusals for the others."""
        found = [n for n in graph.nodes if isinstance(n.op, (ops.Linear, ops.Conv, ops.ConvTranspose, ops.MatMul))]
        weighted = [n for n in found if graph.is_constant(n.inputs[1]) or codes_behind(graph, n) is not None]
        chosen: dict[str, tuple[str, ...]] = {}
        for n in found:
            if not selected(self.only, self.except_, graph, n):
                continue
            operands = n.inputs[:1] if n in weighted else n.inputs[:2]
            why = "first layer stays float (first=false)" if not self.first and n is weighted[0] else ""
            why = why or ("last layer stays float (last=false)" if not self.last and n is weighted[-1] else "")
            if why := why or self._why_not(graph, n, operands, ranges):
                context.refuse(self.name, layer_of(graph, n), why)
            else:
                chosen[n.output] = operands
        return chosen

    def _why_not(self, graph: Graph, n: Node, operands: tuple[str, ...], ranges: dict[str, Range]) -> str:
        if isinstance(n.op, ops.ConvTranspose):
            return "transposed convolution: no integer kernel"
        source = graph.producers.get(n.inputs[1])
        if isinstance(n.op, ops.MatMul) and not self.matmul:
            return "matmul of two activations (matmul=true quantizes it)"
        if not isinstance(n.op, ops.MatMul) and not graph.is_constant(n.inputs[1]):
            if source is None or not isinstance(source.op, ops.Dequantize):
                return "weight is computed, not constant"
            if why := why_not_codes(graph, n):
                return why
        if {graph.types[x].dtype for x in n.inputs} != {F32}:
            return f"operands are {graph.types[n.inputs[0]].dtype}: cast the model to f32 first"
        missing = [x for x in operands if x not in ranges]
        return f"no finite range was observed for %{missing[0]}" if missing else ""


def _finite(ranges: Mapping[str, Range], graph: Graph) -> dict[str, Range]:
    """The ranges of the graph's values that have ends."""
    return {k: v for k, v in ranges.items() if k in graph.types and all(map(math.isfinite, v))}
