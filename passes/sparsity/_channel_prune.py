"""Removing channels: what each is worth, how many go, and the smaller graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.infer import bind_graph
from bitwright.ir.target import Target
from bitwright.ir.types import Dim
from bitwright.ir.work import macs
from bitwright.passes.sparsity._channel_edit import Constants
from bitwright.passes.sparsity._channels import Coupling, Group, Ints, Label, Use

Score = Literal["l1", "l2"]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def worth(coupling: Coupling, group: Group, score: Score) -> Floats:
    """Norm of all weights that would go with each channel of a group: what makes it and what reads it."""
    total, seen = np.zeros(len(coupling.root)), set()
    for u in group.uses:
        if u.role == "ride" or (u.const, u.axes) in seen:
            continue
        seen.add((u.const, u.axes))
        w = np.moveaxis(np.asarray(coupling.graph.constant(u.const)), u.axes[0], 0).astype(np.float64)
        w = w.reshape(len(w), -1)
        part = np.abs(w).sum(1) if score == "l1" else np.square(w).sum(1)
        total += np.bincount(coupling.channels(u.label), part, minlength=len(total))
    mine: Floats = total[group.channels]
    return mine if score == "l1" else np.sqrt(mine)


def width(coupling: Coupling, group: Group) -> int:
    """How many outputs of the first weight that makes the group one channel has (more than one for heads)."""
    first = next(u for u in group.uses if u.role == "out")
    return int(np.isin(coupling.channels(first.label), group.channels).sum()) // len(group.channels)


def rounded(kept: int, most: int, width: int, multiple: str, target: Target | None) -> int:
    """The smallest number of channels from ``kept`` to ``most`` whose outputs are a multiple, else ``most``.

    ``multiple`` auto: the float lanes of the target's vectors, its bytes from eight vectors of bytes on, 1 without one.
    """
    if multiple != "auto":
        m = int(multiple)
    elif target is None:
        m = 1
    else:
        lanes = target.vector_bits // 8
        m = lanes if most * width >= 8 * lanes else lanes // 4
    return next((k for k in range(max(kept, 1), most + 1) if k * width % m == 0), most)


def pruned(coupling: Coupling, keep: Flags) -> Graph:
    """The graph without the channels that ``keep`` (by channel) leaves out; shapes are inferred again."""
    graph = coupling.graph

    def pick(u: Use) -> Ints | None:
        kept = keep[coupling.channels(u.label)]
        return None if kept.all() else np.flatnonzero(kept)

    constants = Constants(coupling, pick)
    shapes: dict[str, tuple[Dim, ...]] = {}
    for value, labels in coupling.labels.items():
        shape = list(graph.types[value].shape)
        for x in labels:
            shape[x.axes[0]] = int(keep[coupling.channels(x)].sum())
        shapes[value] = tuple(shape)

    def step(rw: Rewriter, node: Node) -> bool:
        operands, op = constants.operands(rw, node), _smaller(coupling, node, keep, shapes)
        if op == node.op and operands == rw.of(*node.inputs):
            return False
        rw.keep_as(node, op, operands)
        want = shapes.get(node.output, node.type.shape)
        assert rw.types[rw.moved[node.output]].shape == want, f"%{node.output}: {rw.types[node.output]}, not {want}"
        return True

    return rewrite(graph, step)[0]


def _smaller(coupling: Coupling, node: Node, keep: Flags, shapes: Mapping[str, tuple[Dim, ...]]) -> ops.Op:
    """The operator with sizes that stand in its attributes adapted."""
    op, before = node.op, coupling.graph.types
    if isinstance(op, (ops.Reshape, ops.Expand)):
        return replace(op, shape=shapes.get(node.output, op.shape))
    if isinstance(op, ops.Conv) and op.groups > 1:
        axis = node.type.rank - 1 if op.channels_last else 1
        old = before[node.inputs[0]].shape[axis]
        return (
            replace(op, groups=int(shapes[node.inputs[0]][axis]))
            if op.groups == old and node.inputs[0] in shapes
            else op
        )
    if isinstance(op, ops.GroupNorm) and node.output in shapes:
        return replace(op, groups=op.groups * int(shapes[node.output][1]) // int(node.type.shape[1]))
    if isinstance(op, ops.Slice):
        axis = op.axis % node.type.rank
        label: Label | None = next((x for x in coupling.labels.get(node.inputs[0], ()) if x.axes == (axis,)), None)
        if label is not None:
            kept = keep[coupling.channels(label)]
            return replace(op, start=int(kept[: op.start].sum()), stop=int(kept[: op.stop].sum()))
    return op


def size(graph: Graph) -> tuple[int, int]:
    """Numbers in the weights, and multiply-accumulates of one row of symbolic sizes."""
    parameters = sum(graph.weights[k].array.size for k in graph.drop_dead().used_weights())
    parameters += sum(len(n.op.values) for n in graph.nodes if isinstance(n.op, ops.Constant))
    bound = bind_graph(graph, dict.fromkeys(graph.symbols, 1))
    return parameters, sum(macs(n, bound) for n in bound.nodes)
