"""Rules of simplify around contractions: one spelling for linear layers, biases and padding inside."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import NM, TensorType, Unstructured
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of, stem
from bitwright.passes._match import array, made_by, used_once


def matmul(rw: Rewriter, node: Node) -> bool:
    """matmul(x, W) = linear(x, W^T) when W is a constant matrix."""
    g, op, (x, w) = rw.graph, node.op, node.inputs
    assert isinstance(op, ops.MatMul)
    if g.types[w].rank != 2 or not g.is_constant(w) or not g.types[x].rank:
        return False
    if op.transpose_b:
        rw.keep_as(node, ops.Linear(), rw.of(x, w))
        return True
    values, t, source = array(g, w), g.types[w], g.producers[w]
    assert values is not None
    along = t.encoding if isinstance(t.encoding, NM | Unstructured) else None
    encoding = replace(along, axis=1 - along.axis % 2) if along is not None else None
    key = stem(source.op.ref) if isinstance(source.op, ops.Weight) else w
    turned = TensorType(t.dtype, t.shape[::-1], encoding)
    new = rw.weight(key, np.ascontiguousarray(values.T), turned, name=key, origin=source.origin)
    rw.keep_as(node, ops.Linear(), (rw.of(x)[0], new))
    return True


def add_bias(rw: Rewriter, node: Node) -> bool:
    """linear(x, W) + b = linear(x, W, b), conv likewise, for a constant b of one entry per output channel."""
    g, op = rw.graph, node.op
    if not isinstance(op, ops.Binary) or op.fn not in ("add", "sub"):
        return False
    for value, other in (node.inputs, node.inputs[::-1])[: 2 if op.fn == "add" else 1]:
        before = g.producers.get(value)
        if before is None or not isinstance(before.op, (ops.Linear, ops.Conv)) or not used_once(g, value):
            continue
        if g.types[value] != node.type or (len(before.inputs) > 2 and not g.is_constant(before.inputs[2])):
            continue
        last = isinstance(before.op, ops.Linear) or before.op.channels_last
        bias = _per_channel(g, other, node.type, node.type.rank - 1 if last else 1)
        if bias is None:
            continue
        bias = -bias if op.fn == "sub" else bias
        if len(before.inputs) > 2:
            bias = bias + np.asarray(array(g, before.inputs[2]))
        name, t = f"{layer_of(g, before)}.bias", TensorType(node.type.dtype, bias.shape)
        new = rw.constant(bias, t, name=name, origin=node.origin)
        rw.keep_as(replace(node, origin=before.origin or node.origin), before.op, (*rw.of(*before.inputs[:2]), new))
        return True
    return False


def _per_channel(graph: Graph, value: str, like: TensorType, axis: int) -> Array | None:
    """A constant that broadcasts along one axis only, as a vector of that axis."""
    a, channels = array(graph, value), like.shape[axis]
    if a is None or not isinstance(channels, int) or a.ndim > like.rank:
        return None
    full = a.reshape((1,) * (like.rank - a.ndim) + a.shape)
    if any(d != 1 for i, d in enumerate(full.shape) if i != axis) or full.shape[axis] not in (1, channels):
        return None
    return np.ascontiguousarray(np.broadcast_to(full.reshape(-1), (channels,)))


def linear_views(rw: Rewriter, node: Node) -> bool:
    """reshape(linear(reshape(x), W)) = linear(x, W) when the reshapes only merge and split the leading axes."""
    g = rw.graph
    linear = made_by(g, node.inputs[0], ops.Linear)
    if linear is None or not used_once(g, linear.output):
        return False
    view = made_by(g, linear.inputs[0], ops.Reshape)
    if view is None:
        return False
    x = view.inputs[0]
    if g.types[x].shape[-1:] != view.type.shape[-1:] or node.type.shape != (
        *g.types[x].shape[:-1],
        linear.type.shape[-1],
    ):
        return False
    rw.keep_as(replace(node, origin=linear.origin or node.origin), linear.op, rw.of(x, *linear.inputs[1:]))
    return True


def pad_into(rw: Rewriter, node: Node) -> bool:
    """Constant padding of the space axes moves into the convolution or pool behind it."""
    g, op = rw.graph, node.op
    pad = made_by(g, node.inputs[0], ops.Pad)
    if pad is None or not isinstance(pad.op, ops.Pad) or pad.op.mode != "constant" or not isinstance(op, _PADDED):
        return False
    rank = pad.type.rank
    space = slice(1, rank - 1) if op.channels_last else slice(2, rank)
    begin, end = pad.op.padding[:rank], pad.op.padding[rank:]
    if sum(begin[space]) + sum(end[space]) != sum(pad.op.padding):
        return False
    lowest = pad.op.value == -math.inf
    counted = isinstance(op, ops.AvgPool) and (op.count_padding or not any(op.padding))
    if not (lowest if isinstance(op, ops.MaxPool) else pad.op.value == 0 and (counted or isinstance(op, ops.Conv))):
        return False
    n = rank - 2
    have = op.padding or (0,) * (2 * n)
    moved = tuple(a + b for a, b in zip(have, (*begin[space], *end[space]), strict=True))
    new: ops.Op = replace(op, padding=moved)
    if isinstance(new, ops.AvgPool):
        new = replace(new, count_padding=True)
    rw.keep_as(node, new, rw.of(pad.inputs[0], *node.inputs[1:]))
    return True


_PADDED = (ops.Conv, ops.MaxPool, ops.AvgPool)
