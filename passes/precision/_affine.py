"""Gain and shift of a layer's output channels, folded into its bias and its weight or, codes unchanged, the scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter
from bitwright.ir.graph import Graph, Node
from bitwright.ir.weights import Array
from bitwright.passes._layers import stem, weight_node
from bitwright.passes._match import array, used_once
from bitwright.passes.precision._rescale import constant_like, substitute


def why_no_gain(graph: Graph, node: Node) -> str:
    """Why the output channels of a layer cannot be multiplied; empty when they can."""
    source = graph.producers.get(node.inputs[1])
    if source is not None and isinstance(source.op, ops.Dequantize):
        if not all(graph.is_constant(x) for x in source.inputs):
            return "its weight is computed, not constant"
        if not used_once(graph, source.output):
            return "others share its weight"
        along_inputs = bool(source.op.group) and source.op.axis != 0
        return "" if source.op.axis in (None, 0) or along_inputs else "its weight scales do not lie along the outputs"
    return "" if graph.is_constant(node.inputs[1]) else "its weight is computed, not constant"


def why_no_shift(graph: Graph, node: Node) -> str:
    """Why nothing can be added to the output channels of a layer; empty when it can."""
    return "" if len(node.inputs) < 3 or graph.is_constant(node.inputs[2]) else "its bias is computed, not constant"


def gained(op: ops.Dequantize, scale: Array, gain: Array) -> tuple[ops.Dequantize, Array]:
    """Operator and scale of ``gain[o] * dequantized[o]``; a scale for all becomes one for each output."""
    if op.axis is None or scale.ndim == 0:
        return replace(op, axis=0, group=0), (float(scale.reshape(())) * gain).astype(scale.dtype)
    return op, (scale.astype(np.float64) * gain.reshape(-1, *[1] * (scale.ndim - 1))).astype(scale.dtype)


def affine(graph: Graph, shifts: Mapping[str, Array], gains: Mapping[str, Array] | None = None) -> Graph:
    """Every named layer computes ``gain * (W x) + gain * b + shift`` by output channel; gain 1 where none is given."""
    new: dict[str, Array] = {}
    backs: dict[str, ops.Dequantize] = {}
    for out, shift in shifts.items():
        node, gain = graph.producers[out], (gains or {}).get(out)
        old = array(graph, node.inputs[2]) if len(node.inputs) > 2 else None
        base = 0.0 if old is None else old.astype(np.float64) * (1.0 if gain is None else gain)
        new[f"{out} bias"] = (base + shift.astype(np.float64)).astype(node.type.dtype.numpy)
        if gain is not None:
            _multiply(graph, node, gain, new, backs)

    def operand(rw: Rewriter, reader: Node, i: int, key: str) -> str:
        x = reader.inputs[i]
        return constant_like(rw, x, new[key]) if key in new and not used_once(graph, x) else rw.of(x)[0]

    def step(rw: Rewriter, node: Node) -> bool:
        out = node.output
        if out in backs:
            inputs = [operand(rw, node, i, f"{out} {i}") for i in range(len(node.inputs))]
            rw.keep_as(node, backs[out], inputs, node.types)
        elif out in shifts:
            operands = [rw.of(node.inputs[0])[0], operand(rw, node, 1, f"{out} weight")]
            if len(node.inputs) > 2:
                operands.append(operand(rw, node, 2, f"{out} bias"))
            else:
                operands.append(rw.constant(new[f"{out} bias"], name=_bias_name(graph, node), origin=node.origin))
            rw.keep_as(node, node.op, operands, node.types)
        else:
            return False
        return True

    places = {"bias": 2, "weight": 1, "0": 0, "1": 1, "2": 2}
    alone: dict[str, Array] = {}
    for key, values in new.items():
        out, _, place = key.rpartition(" ")
        inputs = graph.producers[out].inputs
        if places[place] < len(inputs) and used_once(graph, inputs[places[place]]):
            alone[inputs[places[place]]] = values
    return substitute(graph, alone, step)


def _bias_name(graph: Graph, node: Node) -> str:
    source = weight_node(graph, node)
    ref = source.op.ref if source is not None and isinstance(source.op, ops.Weight) else node.output
    return f"{stem(ref).removesuffix('.weight')}.bias"


def _multiply(graph: Graph, node: Node, gain: Array, new: dict[str, Array], backs: dict[str, ops.Dequantize]) -> None:
    """Note what multiplies a layer's weight: its values, or the scale (and the shape of the zero point) behind it."""
    source = graph.producers[node.inputs[1]]
    if not isinstance(source.op, ops.Dequantize):
        w = array(graph, node.inputs[1])
        assert w is not None
        new[f"{node.output} weight"] = (w.astype(np.float64) * gain.reshape(-1, *[1] * (w.ndim - 1))).astype(w.dtype)
        return
    scale = array(graph, source.inputs[1])
    assert scale is not None
    backs[source.output], by_row = gained(source.op, scale, gain)
    new[f"{source.output} 1"] = by_row
    if len(source.inputs) > 2 and by_row.shape != scale.shape:
        zero = array(graph, source.inputs[2])
        assert zero is not None
        new[f"{source.output} 2"] = np.broadcast_to(zero.reshape(()), by_row.shape).copy()


__all__ = ["affine", "gained", "why_no_gain", "why_no_shift"]
