"""The arithmetic of a norm: products with an inverse root, mean and variance, constants over the last axes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.weights import Array
from bitwright.passes._match import fn, made_by, uniform


@dataclass
class Norm:
    """What was found: the operator, its operand, and constants that multiply and add."""

    op: ops.LayerNorm | ops.RmsNorm
    x: str
    scale: Array | None = None
    bias: Array | None = None


def factors(graph: Graph, value: str, plain: list[str], roots: list[str], depth: int) -> None:
    """Split a product into plain factors and the operands of inverse square roots."""
    node = graph.producers.get(value)
    kind = node.op.fn if node is not None and isinstance(node.op, (ops.Unary, ops.Binary)) else ""
    if node is not None and kind == "mul" and depth:
        for x in node.inputs:
            factors(graph, x, plain, roots, depth - 1)
    elif node is not None and kind == "div" and depth and (root := fn(graph, node.inputs[1], "sqrt")) is not None:
        roots.append(root.inputs[0])
        factors(graph, node.inputs[0], plain, roots, depth - 1)
    elif node is not None and kind == "rsqrt":
        roots.append(node.inputs[0])
    else:
        plain.append(value)


def statistics(graph: Graph, inside: str, centred: str) -> Norm | None:
    """``inside`` as mean(square(centred)) + eps; with centred = x - mean(x) it is a layer norm."""
    total = fn(graph, inside, "add")
    if total is None:
        return None
    for v, c in (total.inputs, total.inputs[::-1]):
        eps, mean = uniform(graph, c), made_by(graph, v, ops.Reduce)
        if eps is None or mean is None or (axes := _last_axes(graph, mean)) == 0:
            continue
        squared = fn(graph, mean.inputs[0], "square")
        if squared is None or squared.inputs[0] != centred:
            continue
        away = fn(graph, centred, "sub")
        if away is not None:
            centre = made_by(graph, away.inputs[1], ops.Reduce)
            if centre is not None and centre.inputs == away.inputs[:1] and _last_axes(graph, centre) == axes:
                return Norm(ops.LayerNorm(axes, eps), away.inputs[0])
        return Norm(ops.RmsNorm(axes, eps), centred)
    return None


def _last_axes(graph: Graph, node: Node) -> int:
    """How many last axes a mean with kept axes runs over; 0 when it is something else."""
    op, rank = node.op, graph.types[node.inputs[0]].rank
    assert isinstance(op, ops.Reduce)
    axes = sorted(a % rank for a in op.axes)
    return len(axes) if op.fn == "mean" and op.keepdim and axes == list(range(rank - len(axes), rank)) else 0


def tail(graph: Graph, a: Array | None, node: Node, axes: int) -> Array | None:
    """A constant as a tensor over the last ``axes`` axes, if that is all it varies along."""
    last = node.type.shape[node.type.rank - axes :]
    if a is None or any(not isinstance(d, int) for d in last) or any(d != 1 for d in a.shape[: max(0, a.ndim - axes)]):
        return None
    shape = tuple(int(d) for d in last)
    return np.ascontiguousarray(np.broadcast_to(a.reshape(a.shape[max(0, a.ndim - axes) :]), shape))
