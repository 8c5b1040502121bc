"""Contractions in half precision: activations and weights rounded to bf16 or f16, sums in f32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Level, Node
from bitwright.ir.types import BF16, F16, F32, DType
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._pass import Context, Pass

HALVES = {"bf16": BF16, "f16": F16}
"""Half precision by name."""


@dataclass(frozen=True)
class LowerContractions(Pass):
    """Round activations and constant weights of linear layers and convolutions to bf16 or f16 (to the nearest, ties to
    even).

    Products are exact in f32 and summed there; a result is rounded once to the format (kernels may keep more of it),
    and biases are added in f32. What has no such kernel stays f32, with the reason.

    before:
        graph @g (%x: f32[2, 4]) -> (y = %y) level=integer {
          %w = constant {values=[1.0, 0.5, 0.25, 3.1415927, 2.0, 0.0, -1.0, 1.0]} : f32[2, 4]
          %b = constant {values=[0.5, 1.5]} : f32[2]
          %y = linear(%x, %w, %b) : f32[2, 2]
        }
    after:
        graph @g (%x: f32[2, 4]) -> (y = %y) level=integer {
          %b = constant {values=[0.5, 1.5]} : f32[2]
          %x.half = cast(%x) {dtype=bf16} : bf16[2, 4]
          %w.half = constant {values=[1.0, 0.5, 0.25, 3.140625, 2.0, 0.0, -1.0, 1.0]} : bf16[2, 4]
          %y.half = linear(%x.half, %w.half) : bf16[2, 2]
          %y.sum = cast(%y.half) {dtype=f32} : f32[2, 2]
          %y = add(%y.sum, %b) : f32[2, 2]
        }
    """

    name: ClassVar[str] = "lower-contractions"
    takes: ClassVar[Level] = "integer"
    gives: ClassVar[Level] = "integer"
    lossy: ClassVar[bool] = True
    format: Literal["bf16", "f16"] = "bf16"
    only: str = "*"
    except_: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        halves: dict[str, str] = {}
        kind = HALVES[self.format]

        def half(rw: Rewriter, name: str) -> str:
            if name not in halves:
                halves[name] = _constant(rw, name, kind) or rw.emit(ops.Cast(kind), *rw.of(name), name=f"{name}.half")
            return halves[name]

        def step(rw: Rewriter, node: Node) -> bool:
            if not isinstance(node.op, (ops.Linear, ops.Conv)) or graph.types[node.inputs[0]].dtype != F32:
                return False
            if not selected(self.only, self.except_, graph, node):
                return False
            if why := _why_not(graph, node, context, kind):
                context.refuse(self.name, layer_of(graph, node), f"stays f32: {why}")
                return False
            x, w = (half(rw, v) for v in node.inputs[:2])
            rw.free(node)
            value = rw.emit(node.op, x, w, name=f"{node.output}.half", origin=node.origin)
            biased = len(node.inputs) > 2
            value = rw.emit(ops.Cast(F32), value, name=f"{node.output}.sum" if biased else node.output)
            if biased:
                value = rw.emit(ops.Binary("add"), value, _column(rw, node), name=node.output, origin=node.origin)
            rw.replace(node, value)
            context.remark(self.name, layer_of(graph, node), format=self.format)
            return True

        return rewrite(graph, step)[0]


def _constant(rw: Rewriter, name: str, half: DType) -> str:
    """The form of a constant in half precision; the empty string for other values."""
    array, maker = rw.graph.constant(name), rw.graph.producers.get(name)
    if not isinstance(array, np.ndarray) or maker is None:
        return ""
    rounded, kind = array.astype(half.numpy), rw.graph.types[name].with_dtype(half)
    if isinstance(maker.op, ops.Weight):
        return rw.weight(maker.op.ref, rounded, kind, name=f"{name}.half", origin=maker.origin)
    return rw.constant(rounded, kind, name=f"{name}.half", origin=maker.origin)


def _column(rw: Rewriter, node: Node) -> str:
    """The bias so that it broadcasts along the channels of the result."""
    (bias,) = rw.of(node.inputs[2])
    if isinstance(node.op, ops.Linear):
        return bias
    shape = (int(rw.types[bias].static_shape[0]), *(1,) * (node.type.rank - 2))
    return rw.emit(ops.Reshape(shape), bias, name=f"{node.output}.bias", origin=node.origin)


def _why_not(graph: Graph, node: Node, context: Context, half: DType) -> str:
    if context.target is not None and not context.target.rate(half, half):
        return f"{context.target.name} has no products of {half}"
    weight = graph.types[node.inputs[1]]
    if graph.constant(node.inputs[1]) is None:
        return "its weights are computed"
    if isinstance(node.op, ops.Conv):
        if node.op.groups > 1 and weight.static_shape[1] == 1:
            return f"a depthwise convolution has no {half} kernel"
        if weight.rank != 4:
            return f"only convolutions of images have {half} kernels"
    size = weight.static_shape[1]
    return f"{size} inputs have no pairs of {half}" if size % 2 else ""


__all__ = ["HALVES", "LowerContractions"]
