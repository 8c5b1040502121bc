"""Where the channels of a value go: which contractions read them, through operators that a scale passes.

A channel multiplied by a positive factor comes out of such an operator multiplied by the same factor, so it can be
divided out of the weights that read it. Channels are followed by number: an integer array of the rank of each value,
of size 1 along axes that the channel does not depend on, moved by the same layout operators as the value itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.infer import bind_graph
from bitwright.ir.weights import Array

HOMOGENEOUS = frozenset(["relu", "abs", "neg"])
"""f(s x) = s f(x) for every s > 0."""
WEIGHTED = (ops.Linear, ops.Conv)
_SHIFTABLE = (ops.Reshape, ops.Transpose, ops.Flip, ops.Slice, ops.MaxPool, ops.Expand)


@dataclass
class Reach:
    """What reads the channels of a value.

    ``readers``: channel of each input channel of a contraction, by its output. ``bounds``: clamps and constants on
    the way that must be scaled along, with the channel of each entry. ``why``: the reason when the channels cannot
    be scaled. ``shiftable``: adding a constant to a channel adds it to that input channel of every reader.
    """

    readers: dict[str, Array] = field(default_factory=dict)
    bounds: dict[str, Array] = field(default_factory=dict)
    why: str = ""
    shiftable: bool = True
    relu: bool = False


def bound(graph: Graph) -> Graph:
    """The graph with every symbolic size set to 2: what :func:`follow` takes."""
    return bind_graph(graph, dict.fromkeys(graph.symbols, 2)) if graph.symbols else graph


def follow(graph: Graph, start: str, axis: int) -> Reach:
    """Follow the channels of ``start`` along ``axis`` through a graph of static sizes."""
    shape = graph.types[start].static_shape
    axis %= len(shape)
    first = np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    ids, reach = {start: first}, Reach()
    todo = {id(n) for n in graph.users[start]}
    for node in graph.nodes:
        if reach.why:
            return reach
        if id(node) not in todo:
            continue
        found = _visit(graph, node, ids, reach)
        if isinstance(found, str):
            reach.why = found
        elif found is not None:
            ids[node.output] = found
            todo |= {id(n) for n in graph.users[node.output]}
    if (shown := [x for x in graph.outputs if x in ids]) and not reach.why:
        reach.why = f"%{shown[0]} is an output of the model"
    if not reach.readers and not reach.why:
        reach.why = "no contraction reads it"
    return reach


def _visit(graph: Graph, node: Node, ids: dict[str, Array], reach: Reach) -> Array | str | None:
    """Channels of the result; None for a contraction that reads them; else why a scale does not pass."""
    op, tracked = node.op, [x for x in node.inputs if x in ids]
    if isinstance(op, WEIGHTED) and tracked == [node.inputs[0]] and node.inputs[0] not in node.inputs[1:]:
        return _read(graph, node, ids[tracked[0]], reach)
    found = _pointwise(graph, node, ids, reach) if isinstance(op, ops.POINTWISE) else None
    if found is None and len(tracked) == 1 and not isinstance(op, ops.POINTWISE):
        found = _moved(graph, node, tracked[0], ids[tracked[0]])
        reach.shiftable &= isinstance(op, _SHIFTABLE) or (isinstance(op, ops.Reduce) and op.fn != "sum")
    return f"{op.spelling} at %{node.output} reads it" if found is None else found


def _read(graph: Graph, node: Node, ids: Array, reach: Reach) -> str | None:
    axis = 1 if isinstance(node.op, ops.Conv) and not node.op.channels_last else ids.ndim - 1
    if any(size != 1 for a, size in enumerate(ids.shape) if a != axis):
        return f"%{node.output} does not read it by channel"
    size = int(graph.types[node.inputs[0]].shape[axis])
    reach.readers[node.output] = np.broadcast_to(ids.reshape(-1), (size,))
    reach.shiftable &= not any(getattr(node.op, "padding", ()))
    return None


def _pointwise(graph: Graph, node: Node, ids: dict[str, Array], reach: Reach) -> Array | None:
    op, tracked = node.op, [x for x in node.inputs if x in ids]
    if isinstance(op, ops.Unary | ops.LeakyRelu):
        passes = isinstance(op, ops.LeakyRelu) or op.fn in HOMOGENEOUS
        reach.relu |= isinstance(op, ops.Unary) and op.fn == "relu"
        reach.shiftable &= isinstance(op, ops.Unary) and op.fn == "relu"
        return ids[tracked[0]] if passes else None
    if isinstance(op, ops.Clamp):
        reach.bounds[node.output], reach.shiftable = ids[tracked[0]], False
        return ids[tracked[0]]
    if not isinstance(op, ops.Binary):
        return None
    reach.shiftable = False
    if len(tracked) == 2 and op.fn in ("add", "sub", "min", "max"):
        a, b = (ids[x] for x in node.inputs)
        return a if a.shape == b.shape and bool((a == b).all()) else None
    if len(tracked) != 1 or node.inputs[0] == node.inputs[1]:
        return None
    other = node.inputs[node.inputs.index(tracked[0]) ^ 1]
    moved = ids[tracked[0]].reshape([1] * (node.type.rank - ids[tracked[0]].ndim) + list(ids[tracked[0]].shape))
    if op.fn == "mul" or (op.fn == "div" and node.inputs[0] == tracked[0]):
        return moved if other not in ids else None
    if op.fn in ("add", "sub", "min", "max") and graph.is_constant(other):
        reach.bounds[node.output] = moved
        return moved
    return None


def _moved(graph: Graph, node: Node, value: str, ids: Array) -> Array | None:
    """Channels after an operator that moves, pools or mixes elements of one channel."""
    op, x = node.op, graph.types[node.inputs[0]]
    if isinstance(op, ops.Reshape):
        return _squeezed(np.broadcast_to(ids, x.static_shape).reshape(node.type.static_shape))
    if isinstance(op, ops.Transpose):
        return ids.transpose(op.perm)
    if isinstance(op, ops.Expand):
        return ids.reshape([1] * (node.type.rank - ids.ndim) + list(ids.shape))
    if isinstance(op, ops.Slice):
        return ids if ids.shape[op.axis] == 1 else _sliced(ids, op)
    if isinstance(op, ops.Reduce) and op.fn in ("mean", "sum", "max", "min", "l1", "l2"):
        axes = {a % ids.ndim for a in op.axes}
        if not axes or any(ids.shape[a] != 1 for a in axes):
            return None
        return ids if op.keepdim else ids.reshape([s for a, s in enumerate(ids.shape) if a not in axes])
    if isinstance(op, ops.MaxPool | ops.AvgPool):
        axis = ids.ndim - 1 if op.channels_last else 1
        return ids if all(s == 1 for a, s in enumerate(ids.shape) if a != axis) else None
    if isinstance(op, ops.Pad) and (op.mode != "constant" or op.value == 0):
        padded = [a for a in range(ids.ndim) if op.padding[a] or op.padding[a + ids.ndim]]
        return ids if all(ids.shape[a] == 1 for a in padded) else None
    if isinstance(op, ops.Attention | ops.MatMul):
        return _mixed(node, value, ids)
    return None


def _mixed(node: Node, value: str, ids: Array) -> Array | None:
    """Channels after a weighted sum over the rows of the value operand."""
    op, place = node.op, 2 if isinstance(node.op, ops.Attention) else 1
    if getattr(op, "transpose_b", False) or [i for i, x in enumerate(node.inputs) if x == value] != [place]:
        return None
    if ids.shape[-2] != 1:
        return None
    if isinstance(op, ops.Attention) and op.kv_groups > 1 and ids.ndim > 2 and ids.shape[-3] != 1:
        ids = np.repeat(ids, op.kv_groups, axis=-3)
    return ids.reshape([1] * (node.type.rank - ids.ndim) + list(ids.shape))


def _sliced(ids: Array, op: ops.Slice) -> Array:
    return ids[(slice(None),) * (op.axis % ids.ndim) + (slice(op.start, op.stop, op.step),)]


def _squeezed(ids: Array) -> Array:
    """The same channels with size 1 along axes that do not matter."""
    for axis in range(ids.ndim):
        first = ids[(slice(None),) * axis + (slice(0, 1),)]
        if bool((ids == first).all()):
            ids = first
    return np.ascontiguousarray(ids)


__all__ = ["Reach", "bound", "follow"]
