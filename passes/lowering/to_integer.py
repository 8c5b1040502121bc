"""From quantize and dequantize around float operators to integer operators with explicit accumulators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter
from bitwright.ir.graph import Graph, Level, Node
from bitwright.ir.interpret import to_numpy, to_torch
from bitwright.ir.types import F32, U8
from bitwright.passes._layers import layer_of
from bitwright.passes._pass import Context, Pass
from bitwright.passes.canonical.simplify import Simplify
from bitwright.passes.lowering._dyadic import Grid, Term, scalar_quantization
from bitwright.passes.lowering._dynamic import dynamic_linear
from bitwright.passes.lowering._exact import exact_contraction
from bitwright.passes.lowering._sink import sink_dequantize
from bitwright.passes.lowering._terms import Reader
from bitwright.passes.lowering._unsigned import unsigned_codes

_CONTRACTIONS = (ops.Linear, ops.Conv, ops.MatMul)


@dataclass(frozen=True)
class LowerToInteger(Pass):
    """Integer contractions with s32 accumulators; bias, relu, residual and the next quantize become dyadic integers.

    before:
        graph @g (%q: u8[1, 2]) -> (y = %y) level=graph {
          %sx = constant {values=[0.5]} : f32[]
          %zx = constant {values=[8]} : u8[]
          %w = constant {values=[1, 2, -3, 4]} : s8[2, 2]
          %sw = constant {values=[0.25, 0.5]} : f32[2]
          %b = constant {values=[1.0, -1.0]} : f32[2]
          %x = dequantize(%q, %sx, %zx) : f32[1, 2]
          %wd = dequantize(%w, %sw) {axis=0} : f32[2, 2]
          %h = linear(%x, %wd, %b) : f32[1, 2]
          %r = relu(%h) : f32[1, 2]
          %y = quantize(%r, %sx, %zx) {dtype=u8} : u8[1, 2]
        }
    after:
        graph @g (%q: u8[1, 2]) -> (y = %y) level=integer {
          %w = constant {values=[1, 2, -3, 4]} : s8[2, 2]
          %h.acc = int_linear(%q, %w) {x_zero=8} : s32[1, 2]
          %y.bias = constant {values=[8, -4]} : s32[2]
          %y.biased = add(%h.acc, %y.bias) : s32[1, 2]
          %y.multiplier = constant {values=[524288, 524288]} : s32[2]
          %y.shift = constant {values=[21, 20]} : s32[2]
          %y.free = requantize(%y.biased, %y.multiplier, %y.shift) {dtype=u8, zero=8, axis=1} : u8[1, 2]
          %y = saturate(%y.free) {dtype=u8, lo=8} : u8[1, 2]
        }
    """

    name: ClassVar[str] = "lower-to-integer"
    gives: ClassVar[Level] = "integer"
    lossy: ClassVar[bool] = True

    def run(self, graph: Graph, context: Context) -> Graph:
        activation = context.target.activation if context.target is not None else U8
        graph = Simplify().run(sink_dequantize(unsigned_codes(graph, activation)), context)
        reader = Reader(rw := Rewriter(graph, "integer"))
        for node in graph.nodes:
            if isinstance(node.op, _CONTRACTIONS) and _quantized(graph, node):
                self._contract(reader, node, context)
            elif isinstance(node.op, ops.Quantize) and _requantize(reader, node):
                continue
            elif not exact_contraction(rw, node, context):
                rw.keep(node)
        return rw.done()

    def _contract(self, reader: Reader, node: Node, context: Context) -> None:
        """The integer contraction, and its float form for those that read it as float (dead when nobody does)."""
        if dynamic_linear(reader, node, context):
            return
        found = reader.contraction(node)
        if isinstance(found, str):
            cure = "quantize weights symmetrically to s8" if "zero point" in found else ""
            context.refuse(self.name, layer_of(reader.graph, node), f"stays float: {found}", cure)
            _keep_float(reader, node)
            return
        reader.contracted[node.output] = found
        reader.rw.free(node)
        reader.rw.replace(node, _as_float(reader, node, found))


def _quantized(graph: Graph, node: Node) -> bool:
    """True when any operand of a contraction is dequantized: then it should become integer, or say why not."""
    return any(isinstance(graph.producers[x].op, ops.Dequantize) for x in node.inputs[:2] if x in graph.producers)


def _keep_float(reader: Reader, node: Node) -> None:
    """Keep a float contraction; a weight of integer codes becomes the f32 weight that float kernels read."""
    from bitwright.ir.semantics import apply

    rw, graph = reader.rw, reader.graph
    source = graph.producers.get(node.inputs[1])
    codes = graph.producers.get(source.inputs[0]) if source and isinstance(source.op, ops.Dequantize) else None
    if source is None or codes is None or not isinstance(codes.op, ops.Weight) or source.type.dtype != F32:
        rw.keep(node)
        return
    parameters = [graph.constant(x) for x in source.inputs]
    if any(a is None for a in parameters):
        rw.keep(node)
        return
    if source.output not in reader.floats:
        (real,) = apply(source.op, *map(to_torch, parameters))
        kept = codes.type.encoding if len(source.inputs) == 2 else None
        key = codes.op.ref
        reader.floats[source.output] = rw.weight(
            key, to_numpy(real), source.type.with_encoding(kept), name=f"{key}.f32", origin=source.origin
        )
    w = reader.floats[source.output]
    rw.keep_as(node, node.op, (rw.of(node.inputs[0])[0], w, *rw.of(*node.inputs[2:])), node.types)


def _as_float(reader: Reader, node: Node, t: Term) -> str:
    rw = reader.rw
    scale = rw.constant(np.asarray(t.scale, np.float32), name=f"{node.output}.scale", origin=node.origin)
    op = ops.Dequantize(axis=t.axis if np.ndim(t.scale) else None)
    name = node.output if t.bias is None else f"{node.output}.real"
    value = rw.emit(op, t.value, scale, name=name, origin=node.origin)
    if t.bias is None:
        return value
    assert t.axis is not None
    column = t.bias.astype(np.float32).reshape(-1, *[1] * (node.type.rank - 1 - t.axis))
    bias = rw.constant(column, name=f"{node.output}.bias", origin=node.origin)
    return rw.emit(ops.Binary("add"), value, bias, name=node.output, origin=node.origin)


def _requantize(reader: Reader, node: Node) -> bool:
    """Replace a quantize of integer terms by their integer arithmetic; False leaves it to be kept."""
    op, found = node.op, scalar_quantization(reader.graph, node)
    assert isinstance(op, ops.Quantize)
    if (
        found is None
        or not op.dtype.is_integer
        or op.dtype.bits > 16
        or reader.graph.types[node.inputs[0]].dtype != F32
    ):
        return False
    reader.rw.free(node)
    value = reader.quantized(node.inputs[0], Grid(op.dtype, *found), node.output, node.origin)
    if value is None:
        return False
    reader.rw.replace(node, value)
    return True
