"""What each operator means for the channels of its operands and result (see ``_channels.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.passes.sparsity import _channel_views as views
from bitwright.passes.sparsity._channels import Label, Trace


def follow(t: Trace, node: Node) -> None:
    """Carry labels over a node by the rule of its operator; pin them when it has none."""
    rule = RULES.get(type(node.op))
    if rule is not None:
        rule(t, node)
    else:
        _pin_all(t, node, f"meet {node.op.spelling} (%{node.output}), which has no rule")


def _pin_all(t: Trace, node: Node, why: str) -> None:
    t.pin([x for v in node.inputs for x in t.of(v)], why)


# --- elementwise --------------------------------------------------------------------------------------------


def elementwise(t: Trace, node: Node) -> None:
    t.labels[node.output] = join(t, node, node.inputs)


def join(t: Trace, node: Node, values: tuple[str, ...], without: int | None = None) -> tuple[Label, ...]:
    """Labels of values that broadcast against each other, on the axes of the result (``without``: leave out those that
    include this axis). Labels of equal axes are tied; a value that differs along the axes without one pins them."""
    rank = node.type.rank
    out: dict[tuple[int, ...], Label] = {}
    shifted = {
        i: tuple(x.on(tuple(a + rank - t.graph.types[v].rank for a in x.axes)) for x in t.of(v))
        for i, v in enumerate(values)
    }
    for i, labels in shifted.items():
        for x in labels:
            if without in x.axes:
                continue
            for j, v in enumerate(values):
                if j != i:
                    _meet(t, node, j, v, x, shifted[j])
            out.setdefault(x.axes, x)
    return tuple(out.values())


def _meet(t: Trace, node: Node, operand: int, value: str, x: Label, labels: tuple[Label, ...]) -> None:
    """A label meets another operand of an elementwise operator."""
    shape = t.graph.types[value].shape
    axes = tuple(a - node.type.rank + len(shape) for a in x.axes)
    wide = [a >= 0 and shape[a] != 1 for a in axes]
    if not any(wide):
        return
    same = next((y for y in labels if y.axes == x.axes), None)
    if same is not None:
        t.tie(x, same)
    elif not t.graph.is_constant(value):
        t.pin([x], f"meet %{value} in %{node.output}, which has an order of its own")
    elif not all(wide):
        t.pin([x], f"meet %{value} in %{node.output}, which repeats over heads")
    else:
        t.use(node, operand, axes, x)


def quantized(t: Trace, node: Node) -> None:
    if all(t.graph.types[v].rank == 0 for v in node.inputs[1:]):
        t.labels[node.output] = t.of(node.inputs[0])
    else:
        _pin_all(t, node, f"have a scale each (%{node.output})")


# --- contractions -------------------------------------------------------------------------------------------


def _contract(t: Trace, node: Node, x_axis: int, out_axis: int, w_in: int, w_out: int) -> None:
    """x times a weight: sums over the channels of ``x_axis``, makes those of ``out_axis``."""
    given, rest = _split(t, node, x_axis)
    constant = t.graph.is_constant(node.inputs[1])
    t.labels[node.output] = tuple(rest)
    if not constant:
        t.pin(given, f"meet %{node.inputs[1]}, which is computed")
        _pin_all(t, node, f"meet %{node.output}, whose weight is computed")
        return
    t.weight(node, 1, w_in, given[0] if given else None, "in")
    made = t.fresh(out_axis, t.size(node.inputs[1], w_out)) if t.size(node.inputs[1], w_out) > 1 else None
    t.weight(node, 1, w_out, made, "out")
    if made is not None:
        for i in range(2, len(node.inputs)):
            t.use(node, i, (0,), made)
        t.labels[node.output] = (*rest, made)


def _split(t: Trace, node: Node, axis: int) -> tuple[list[Label], list[Label]]:
    """Labels of the first operand on ``axis`` alone, and those without it; others are pinned."""
    labels = t.of(node.inputs[0])
    t.pin([x for x in labels if axis in x.axes and x.axes != (axis,)], f"are summed head by head (%{node.output})")
    return [x for x in labels if x.axes == (axis,)], [x for x in labels if axis not in x.axes]


def linear(t: Trace, node: Node) -> None:
    last = node.type.rank - 1
    _contract(t, node, last, last, 1, 0)


def conv(t: Trace, node: Node) -> None:
    op = node.op
    assert isinstance(op, ops.Conv)
    axis = node.type.rank - 1 if op.channels_last else 1
    _pin_space(t, node, axis)
    if op.groups == 1:
        _contract(t, node, axis, axis, 1, 0)
    else:
        _grouped(t, node, axis, op.groups)


def _pin_space(t: Trace, node: Node, axis: int) -> None:
    """Labels on other axes than the channel axis and the batch have no rule in a window."""
    bad = [x for x in t.of(node.inputs[0]) if not set(x.axes) <= {0, axis}]
    t.pin(bad, f"are axes of space of %{node.output}")
    t.labels[node.inputs[0]] = tuple(x for x in t.of(node.inputs[0]) if x not in bad)


def _grouped(t: Trace, node: Node, axis: int, groups: int) -> None:
    """Depthwise: an input channel makes ``m`` outputs. Other groups: inputs stay, outputs may move in their group."""
    given, rest = _split(t, node, axis)
    outputs = t.size(node.output, axis)
    if groups == t.size(node.inputs[0], axis) and t.graph.is_constant(node.inputs[1]):
        m = outputs // groups
        made = [
            Label((axis,), x.atoms.repeat(m), x.offsets.repeat(m) * m + np.tile(np.arange(m), groups)) for x in given
        ]
        for x in made:
            t.weight(node, 1, 0, x, "ride")
            for i in range(2, len(node.inputs)):
                t.use(node, i, (0,), x)
        t.labels[node.output] = (*rest, *made)
        return
    t.pin(given, f"are the input of a grouped convolution (%{node.output})")
    t.labels[node.output] = tuple(rest)
    if t.mode == "permute" and t.graph.is_constant(node.inputs[1]):
        new = t.fresh(axis, outputs)
        t.cells.append((new, np.arange(outputs) // (outputs // groups)))
        t.weight(node, 1, 0, new, "out")
        for i in range(2, len(node.inputs)):
            t.use(node, i, (0,), new)
        t.labels[node.output] = (*rest, new)


def conv_transpose(t: Trace, node: Node) -> None:
    assert isinstance(node.op, ops.ConvTranspose)
    _pin_space(t, node, 1)
    if node.op.groups != 1:
        _pin_all(t, node, f"meet a grouped transposed convolution (%{node.output})")
        return
    _contract(t, node, 1, 1, 0, 1)


def matmul(t: Trace, node: Node) -> None:
    """A constant matrix is a weight; of two computed operands the axes that are not summed pass."""
    op, (a, b) = node.op, node.inputs
    assert isinstance(op, ops.MatMul)
    rank, (ra, rb) = node.type.rank, (t.graph.types[a].rank, t.graph.types[b].rank)
    if rb == 2 and t.graph.is_constant(b) and not t.graph.is_constant(a) and ra >= 2:
        _contract(t, node, rank - 1, rank - 1, int(op.transpose_b), 1 - int(op.transpose_b))
        return
    if min(ra, rb) < 2:
        _pin_all(t, node, f"are multiplied by a vector (%{node.output})")
        return
    out: dict[tuple[int, ...], Label] = {}
    for i, kept, to in ((0, ra - 2, rank - 2), (1, rb - 2 if op.transpose_b else rb - 1, rank - 1)):
        for x in t.of(node.inputs[i]):
            new = _factor(t, node, i, x, kept, to)
            if new is not None:
                out.setdefault(new.axes, new)
    t.labels[node.output] = tuple(out.values())


def _factor(t: Trace, node: Node, i: int, x: Label, kept: int, to: int) -> Label | None:
    """What becomes of a label of one factor of a product: ``kept`` is its axis that is not summed, ``to`` the
    result's. Channels along it move inside their matrix; those of batch axes alone must agree with the other factor."""
    here, rank = t.graph.types[node.inputs[i]], node.type.rank
    batch = tuple(a + rank - here.rank for a in x.axes if a < here.rank - 2)
    if x.axes == (kept,):
        return x.on((to,))
    if len(batch) == len(x.axes):
        other = node.inputs[1 - i]
        shift = rank - t.graph.types[other].rank
        facing = tuple(y.on(tuple(a + shift for a in y.axes)) for y in t.of(other))
        _meet(t, node, 1 - i, other, x.on(batch), facing)
        return x.on(batch)
    if t.mode == "permute" and len(batch) == len(x.axes) - 1 and kept in x.axes:
        t.cells.append((x, _others(x, len(x.axes) - 1)))
        return x.on((*batch, to))
    t.pin([x], f"are summed with computed values (%{node.output})")
    return None


def attention(t: Trace, node: Node) -> None:
    op, (q, k, v) = node.op, node.inputs[:3]
    assert isinstance(op, ops.Attention)
    if t.mode == "prune":
        _heads(t, node, op.kv_groups)
        return
    _pin_all_of(t, (q, k, *node.inputs[3:]), f"order the scores of an attention (%{node.output})")
    rank, out = node.type.rank, []
    for x in t.of(v):
        if rank - 1 not in x.axes or rank - 2 in x.axes or t.graph.types[v].rank != rank:
            t.pin([x], f"are positions of an attention (%{node.output})")
            continue
        head = x.axes.index(rank - 3) if rank - 3 in x.axes else None
        if op.kv_groups > 1 and head is not None:
            copies = np.arange(op.kv_groups).reshape(-1, *[1] * (len(x.axes) - head - 1))
            atoms = x.atoms.repeat(op.kv_groups, head)
            tiled = np.tile(copies, (x.atoms.shape[head], *[1] * (len(x.axes) - head - 1)))
            x = Label(x.axes, atoms, x.offsets.repeat(op.kv_groups, head) * op.kv_groups + tiled)
        t.cells.append((x, _others(x, len(x.axes) - 1)))
        out.append(x)
    t.labels[node.output] = tuple(out)


def _pin_all_of(t: Trace, values: Iterable[str], why: str) -> None:
    t.pin([x for v in values for x in t.of(v)], why)


def _others(x: Label, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """A key for every position of a label: its place on all axes but one."""
    shape = [1 if i == index else n for i, n in enumerate(x.atoms.shape)]
    return np.broadcast_to(np.arange(x.atoms.size // x.atoms.shape[index]).reshape(shape), x.atoms.shape)


def _heads(t: Trace, node: Node, kv_groups: int) -> None:
    """Query, key, value and result lose a head together; with shared key heads, all queries of one go."""
    axis, (q, k, v) = node.type.rank - 3, node.inputs[:3]
    found = [next((x for x in t.of(i) if x.axes == (axis,)), None) for i in (q, k, v)]
    bad = [x for i in node.inputs[:3] for x in t.of(i) if x not in found]
    t.pin(bad, f"are summed or ordered in an attention (%{node.output})")
    _pin_all_of(t, node.inputs[3:], f"mask an attention (%{node.output})")
    known = [x for x in found if x is not None]
    if len(known) < 3 or not t.heads or len({t.graph.types[i].rank for i in (q, k, v)}) > 1:
        why = "are heads (heads=false)" if known and not t.heads else "are heads that query, key and value do not share"
        t.pin(known, f"{why} (%{node.output})")
        return
    query, key, value = known
    for x in (key, value):
        t.tie(query, Label(x.axes, x.atoms.repeat(kv_groups), x.offsets.repeat(kv_groups)))
    for i in range(3, len(node.inputs)):
        mask = t.graph.types[node.inputs[i]].shape
        if len(mask) >= 3 and mask[-3] != 1:
            t.use(node, i, (len(mask) - 3,), query)
    t.labels[node.output] = (query,)


# --- normalisation, pooling, reductions ---------------------------------------------------------------------


def batch_norm(t: Trace, node: Node) -> None:
    for x in t.of(node.inputs[0]):
        for i in range(1, 5) if x.axes == (1,) else ():
            t.use(node, i, (0,), x)
    good = tuple(x for x in t.of(node.inputs[0]) if 1 not in x.axes or x.axes == (1,))
    t.pin([x for x in t.of(node.inputs[0]) if x not in good], f"are normalized in parts (%{node.output})")
    t.labels[node.output] = good


def layer_norm(t: Trace, node: Node) -> None:
    op, rank = node.op, node.type.rank
    assert isinstance(op, (ops.LayerNorm, ops.RmsNorm))
    out = []
    for x in t.of(node.inputs[0]):
        inside = [a >= rank - op.axes for a in x.axes]
        if any(inside) and (t.mode == "prune" or not all(inside)):
            t.pin([x], f"are normalized over by {op.spelling} (%{node.output})")
        for i in range(1, len(node.inputs)) if all(inside) else ():
            t.use(node, i, tuple(a - rank + op.axes for a in x.axes), x)
        out.append(x)
    t.labels[node.output] = tuple(out)


def group_norm(t: Trace, node: Node) -> None:
    """Channels move inside their group; a group goes as a whole."""
    assert isinstance(node.op, ops.GroupNorm)
    out, groups = [], node.op.groups
    for x in t.of(node.inputs[0]):
        if x.axes == (1,):
            t.cells.append((x, np.arange(x.atoms.size) // (x.atoms.size // groups)))
            if t.mode == "prune":
                t.unite(x.atoms.reshape(groups, -1))
            for i in range(1, len(node.inputs)):
                t.use(node, i, (0,), x)
            out.append(x)
        elif x.axes == (0,):
            out.append(x)
        else:
            t.pin([x], f"are normalized over by group_norm (%{node.output})")
    t.labels[node.output] = tuple(out)


def softmax(t: Trace, node: Node) -> None:
    assert isinstance(node.op, ops.Softmax)
    axis, out = node.op.axis % node.type.rank, []
    for x in t.of(node.inputs[0]):
        if axis in x.axes and t.mode == "prune":
            t.pin([x], f"are summed by softmax (%{node.output})")
        if axis in x.axes and len(x.axes) > 1:
            t.cells.append((x, _others(x, x.axes.index(axis))))
        out.append(x)
    t.labels[node.output] = tuple(out)


def pool(t: Trace, node: Node) -> None:
    assert isinstance(node.op, (ops.MaxPool, ops.AvgPool))
    channel = node.type.rank - 1 if node.op.channels_last else 1
    views.keep_axes(t, node, {0, channel}, "are axes of space")


def resize(t: Trace, node: Node) -> None:
    views.keep_axes(t, node, {0, 1}, "are axes of space")


def reduce(t: Trace, node: Node) -> None:
    """A reduction over all axes of a label ends it: sums do not ask for the order (but for the number)."""
    op, rank = node.op, t.graph.types[node.inputs[0]].rank
    assert isinstance(op, ops.Reduce)
    gone, out = {a % rank for a in op.axes}, []
    for x in t.of(node.inputs[0]):
        over = gone & set(x.axes)
        if over and (t.mode == "prune" or over != set(x.axes)):
            t.pin([x], f"are reduced over by {op.spelling} (%{node.output})")
        elif not over:
            out.append(x if op.keepdim else x.on(tuple(a - sum(g < a for g in gone) for a in x.axes)))
    t.labels[node.output] = tuple(out)


def along_axis(t: Trace, node: Node) -> None:
    """Operators whose result depends on the order along one axis."""
    rank = t.graph.types[node.inputs[0]].rank
    axis = node.op.axis % rank  # type: ignore[attr-defined]
    views.keep_axes(t, node, set(range(rank)) - {axis}, f"are ordered by {node.op.spelling}")
    if isinstance(node.op, ops.ArgReduce) and not node.op.keepdim:
        t.labels[node.output] = tuple(x.on(tuple(a - (a > axis) for a in x.axes)) for x in t.of(node.output))


RULES: dict[type[ops.Op], Callable[[Trace, Node], None]] = {
    **dict.fromkeys((ops.Unary, ops.Binary, ops.Where, ops.Clamp, ops.LeakyRelu, ops.Elu, ops.Cast), elementwise),
    **dict.fromkeys((ops.Quantize, ops.Dequantize), quantized),
    ops.Linear: linear, ops.Conv: conv, ops.ConvTranspose: conv_transpose, ops.MatMul: matmul,
    ops.Attention: attention, ops.BatchNorm: batch_norm, ops.LayerNorm: layer_norm, ops.RmsNorm: layer_norm,
    ops.GroupNorm: group_norm, ops.Softmax: softmax, ops.MaxPool: pool, ops.AvgPool: pool, ops.Reduce: reduce,
    ops.ArgReduce: along_axis, ops.CumSum: along_axis, ops.TopK: along_axis, ops.Resize: resize,
    ops.Reshape: views.reshape, ops.Transpose: views.transpose, ops.Expand: views.expand, ops.Concat: views.concat,
    ops.Slice: views.slice_, ops.Pad: views.pad, ops.Tile: views.tile, ops.Flip: views.flip, ops.Gather: views.gather,
}  # fmt: skip
