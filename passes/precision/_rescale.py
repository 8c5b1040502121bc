"""Multiplies channels of contractions, norms and bounds by factors; masks and the function stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, Step, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import F32, Codebook
from bitwright.ir.weights import Array
from bitwright.passes._layers import stem
from bitwright.passes._match import array, used_once


def input_channels(op: ops.Op, shape: tuple[int, ...]) -> Array:
    """Input channel of every [output, weight column] of a linear or (grouped) convolution weight."""
    groups = op.groups if isinstance(op, ops.Conv) else 1
    outputs, columns = shape[:2]
    first = np.arange(outputs) // (outputs // groups) * columns
    return first[:, None] + np.arange(columns)


def largest_by_channel(weight: Array) -> Array:
    """Largest magnitude of each [output, column] of a weight, f64: [O, C/groups]."""
    found: Array = np.abs(weight.astype(np.float64)).reshape(*weight.shape[:2], -1).max(2, initial=0.0)
    return found


def scale_weight(op: ops.Op, weight: Array, rows: Array | None = None, columns: Array | None = None) -> Array:
    """``weight[o, i, ...] / rows[o] * columns[input channel of (o, i)]`` in the weight's format."""
    w, tail = weight.astype(np.float64), [1] * (weight.ndim - 2)
    if rows is not None:
        w = w / rows.reshape(-1, 1, *tail)
    if columns is not None:
        w = w * columns[input_channels(op, weight.shape)].reshape(*weight.shape[:2], *tail)
    return w.astype(weight.dtype)


def why_not_scaled(graph: Graph, node: Node) -> str:
    """Why the weights (or scale and shift) of a layer cannot be multiplied; empty when they can."""
    for x in node.inputs[1:]:
        if not graph.is_constant(x):
            source = graph.producers.get(x)
            quantized = source is not None and isinstance(source.op, ops.Dequantize)
            return "its weight is quantized already" if quantized else "its weight is computed, not constant"
        if graph.types[x].dtype != F32:
            return f"its weight is {graph.types[x].dtype}, not f32"
        if isinstance(graph.types[x].encoding, Codebook):
            return "its weight comes from a codebook"
    if len(node.inputs) > 1 and not used_once(graph, node.inputs[1]):
        return "others share its weight"
    return "channels-last convolution" if getattr(node.op, "channels_last", False) else ""


def constant_like(rw: Rewriter, value: str, new: Array) -> str:
    """A new constant in place of an old one: same format, encoding, key stem and origin; its name too if it is free."""
    source = rw.graph.producers[value]
    if isinstance(source.op, ops.Weight):
        return rw.weight(stem(source.op.ref), new, source.type, name=value, origin=source.origin)
    return rw.constant(new, replace(source.type, shape=new.shape), name=value, origin=source.origin)


def substitute(graph: Graph, constants: Mapping[str, Array], step: Step) -> Graph:
    """Rewrite with ``step``; constants of one reader get their new values where they stand."""

    def visit(rw: Rewriter, node: Node) -> bool | None:
        if node.output not in constants:
            return step(rw, node)
        rw.free(node)
        rw.replace(node, constant_like(rw, node.output, constants[node.output]))
        return True

    return rewrite(graph, visit)[0]


def rescale(
    graph: Graph,
    divide: Mapping[str, Array],
    multiply: Mapping[str, Array],
    bounds: Mapping[str, Array] | None = None,
    shift: Mapping[str, Array] | None = None,
) -> Graph:
    """Divide output channels of layers, multiply input channels of their readers, divide bounds in between.

    All by output value name; ``bounds`` holds factors that broadcast to the value; ``shift`` is added to the bias.
    """
    bounds, shift = bounds or {}, shift or {}
    inputs: dict[str, list[Array]] = {}
    for node in graph.nodes:
        out = node.output
        if out in divide or out in multiply or out in shift:
            inputs[out] = _operands(graph, node, divide.get(out), multiply.get(out), shift.get(out))
    pairs = [(x, a) for out, new in inputs.items() for x, a in zip(graph.producers[out].inputs[1:], new, strict=False)]

    def step(rw: Rewriter, node: Node) -> bool:
        if node.output in bounds:
            _bound(rw, node, bounds[node.output])
            return True
        if node.output not in inputs:
            return False
        new = inputs[node.output]
        names = [
            rw.of(x)[0] if used_once(graph, x) else constant_like(rw, x, a)
            for x, a in zip(node.inputs[1:], new, strict=False)
        ]
        if len(new) > len(names):
            names.append(rw.constant(new[-1], name=f"{node.output}.bias", origin=node.origin))
        rw.keep_as(node, node.op, (*rw.of(node.inputs[0]), *names), node.types)
        return True

    return substitute(graph, {x: a for x, a in pairs if used_once(graph, x)}, step)


def _operands(graph: Graph, node: Node, rows: Array | None, columns: Array | None, shift: Array | None) -> list[Array]:
    """New weight and bias of a contraction, or scale and shift of a norm."""
    old = [array(graph, x) for x in node.inputs[1:]]
    if not isinstance(node.op, ops.Linear | ops.Conv):
        assert rows is not None
        return [(a / rows).astype(a.dtype) for a in old if a is not None]
    assert old[0] is not None
    return [scale_weight(node.op, old[0], rows, columns), *_bias(graph, node, rows, shift)]


def _bias(graph: Graph, node: Node, rows: Array | None, shift: Array | None) -> list[Array]:
    """The bias divided by ``rows`` plus ``shift``, in f32; none where there is none and none is wanted."""
    old = array(graph, node.inputs[2]) if len(node.inputs) > 2 else None
    if old is None and shift is None:
        return []
    bias = np.zeros(graph.types[node.inputs[1]].static_shape[0]) if old is None else old.astype(np.float64)
    bias = bias / (1.0 if rows is None else rows) + (0.0 if shift is None else shift)
    return [bias.astype(np.float32)]


def _bound(rw: Rewriter, node: Node, factor: Array) -> None:
    """A clamp, or a constant added or compared, for values divided by ``factor``."""
    graph, op = rw.graph, node.op
    if isinstance(op, ops.Binary):
        constants = {x: array(graph, x) for x in node.inputs if graph.is_constant(x)}
        new = {x: constant_like(rw, x, (a / factor).astype(a.dtype)) for x, a in constants.items() if a is not None}
        rw.keep_as(node, op, (new.get(x) or rw.of(x)[0] for x in node.inputs), node.types)
        return
    assert isinstance(op, ops.Clamp)
    value = rw.of(node.inputs[0])[0]
    if op.lo == 0:
        value = rw.emit(ops.Unary("relu"), value, name=f"{node.output}.relu", origin=node.origin)
    elif np.isfinite(op.lo):
        low = rw.constant((op.lo / factor).astype(np.float32), name=f"{node.output}.low", origin=node.origin)
        value = rw.emit(ops.Binary("max"), value, low, name=f"{node.output}.above", origin=node.origin)
    if not np.isfinite(op.hi):
        rw.replace(node, value)
        return
    high = rw.constant((op.hi / factor).astype(np.float32), name=f"{node.output}.high", origin=node.origin)
    rw.keep_as(node, ops.Binary("min"), (value, high), node.types)


__all__ = ["constant_like", "input_channels", "largest_by_channel", "rescale", "scale_weight", "why_not_scaled"]
