"""Batch normalization at inference is a scale and a shift: into the weights before it, or two pointwise steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import TensorType
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of, stem
from bitwright.passes._match import array, used_once
from bitwright.passes._norms import Norm, known_norms
from bitwright.passes._pass import Context, Pass


def fold_scale(op: ops.Op, weight: Array, bias: Array | None, scale: Array, shift: Array) -> tuple[Array, Array]:
    """Weight and bias of the contraction whose result is ``scale * (W x + bias) + shift`` by output channel.

    For batch norm, scale = gamma / sqrt(variance + eps) and shift = beta - mean * scale; Range-BN stores the
    scale itself. Computed in f64, given back in the weight's format. Zeros stay zeros.
    """
    s = scale.astype(np.float64)
    if isinstance(op, ops.ConvTranspose):  # [C, O/groups, *K]: output channels are split by group
        w = weight.reshape(op.groups, weight.shape[0] // op.groups, weight.shape[1], -1)
        folded = (w * s.reshape(op.groups, 1, weight.shape[1], 1)).reshape(weight.shape)
    else:
        folded = weight * s.reshape(-1, *[1] * (weight.ndim - 1))
    base = np.zeros(s.shape) if bias is None else bias.astype(np.float64)
    return folded.astype(weight.dtype), (base * s + shift.astype(np.float64)).astype(weight.dtype)


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch norm into the contraction before it; elsewhere spell it as mul and add.

    What each norm knew about its result stays in ``facts["norms"]``.

    before:
        graph @g (%x: f32[1, 1, 2, 2]) -> (y = %y) level=graph {
          %w = constant {values=[2.0]} : f32[1, 1, 1, 1]
          %one = constant {values=[1.0]} : f32[1]
          %half = constant {values=[0.5]} : f32[1]
          %four = constant {values=[4.0]} : f32[1]
          %h = conv(%x, %w) : f32[1, 1, 2, 2]
          %y = batch_norm(%h, %one, %half, %one, %four) {eps=0.0} : f32[1, 1, 2, 2]
        }
    after:
        graph @g (%x: f32[1, 1, 2, 2]) -> (y = %y) level=graph {
          %h.weight = constant {values=[1.0]} : f32[1, 1, 1, 1]
          %h.bias = constant {values=[0.0]} : f32[1]
          %y = conv(%x, %h.weight, %h.bias) : f32[1, 1, 2, 2]
        }
    """

    name: ClassVar[str] = "fold-batch-norm"
    establishes: ClassVar[tuple[str, ...]] = ("norms",)

    def run(self, graph: Graph, context: Context) -> Graph:
        norms = known_norms(context)

        def step(rw: Rewriter, node: Node) -> bool:
            if not isinstance(node.op, ops.BatchNorm):
                return False
            parameters = [array(graph, x) for x in node.inputs[1:]]
            if any(p is None for p in parameters):
                context.refuse(self.name, node.output, "its parameters are computed, not constant")
                return False
            gamma, beta, mean, variance = (p.astype(np.float64) for p in parameters if p is not None)
            scale = gamma / np.sqrt(variance + node.op.eps)
            shift = beta - mean * scale
            if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
                context.refuse(self.name, node.output, "its scale is not finite: a variance is zero or negative")
                return False
            norms[node.output] = Norm(gamma, beta, mean, variance, node.op.eps)
            before = graph.producers.get(node.inputs[0])
            why = _why_not(graph, before, node)
            if before is not None and not why and (why := _fold(rw, before, node, scale, shift)) == "":
                context.remark(self.name, layer_of(graph, before), folded=node.output)
                return True
            if before is not None and isinstance(before.op, ops.CONTRACTION):
                context.refuse(self.name, node.output, f"not folded into {before.op.spelling}: {why}")
            _spell(rw, node, scale, shift)
            return True

        return rewrite(graph, step)[0]


def _why_not(graph: Graph, before: Node | None, norm: Node) -> str:
    if before is None or not isinstance(before.op, (ops.Conv, ops.ConvTranspose, ops.Linear)):
        return "no contraction with a weight before it"
    if not used_once(graph, before.output):
        return "others read the value before normalization"
    if isinstance(before.op, ops.Linear) and norm.type.rank != 2:
        return "the channel axis is not the axis of the outputs"
    if isinstance(before.op, ops.Conv) and before.op.channels_last:
        return "channels-last convolution"
    if not all(graph.is_constant(x) for x in before.inputs[1:]):
        return "its weight is computed or quantized"
    return ""


def _fold(rw: Rewriter, before: Node, norm: Node, scale: Array, shift: Array) -> str:
    graph = rw.graph
    weight, bias = array(graph, before.inputs[1]), array(graph, before.inputs[2]) if len(before.inputs) > 2 else None
    assert weight is not None
    w, b = fold_scale(before.op, weight, bias, scale, shift)
    if not (np.isfinite(w.astype(np.float32)).all() and np.isfinite(b.astype(np.float32)).all()):
        return f"the folded weight overflows {graph.types[before.inputs[1]].dtype}"
    source = graph.producers[before.inputs[1]]
    key = stem(source.op.ref) if isinstance(source.op, ops.Weight) else f"{before.output}.weight"
    place = key.removesuffix(".weight")
    new_w = rw.constant(w, source.type.with_encoding(None), name=key, origin=source.origin)
    if source.type.encoding is not None:
        new_w = rw.weight(key, w, source.type, name=key, origin=source.origin)
    new_b = rw.constant(b, TensorType(source.type.dtype, b.shape), name=f"{place}.bias", origin=norm.origin)
    here = replace(norm, origin=before.origin or norm.origin)
    rw.keep_as(here, before.op, (rw.of(before.inputs[0])[0], new_w, new_b))
    return ""


def _spell(rw: Rewriter, norm: Node, scale: Array, shift: Array) -> None:
    shape = (-1, *[1] * (norm.type.rank - 2))
    dtype = norm.type.dtype.numpy
    s = rw.constant(scale.astype(dtype).reshape(shape), name=f"{norm.output}.scale", origin=norm.origin)
    b = rw.constant(shift.astype(dtype).reshape(shape), name=f"{norm.output}.shift", origin=norm.origin)
    scaled = rw.emit(ops.Binary("mul"), rw.of(norm.inputs[0])[0], s, name=f"{norm.output}.scaled", origin=norm.origin)
    rw.keep_as(norm, ops.Binary("add"), (scaled, b))
