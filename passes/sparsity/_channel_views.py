"""How labels of channels travel through operators that only move data (see ``_channels.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.types import Dim, symbols_of
from bitwright.passes.sparsity._channels import Label, Trace


def arranged(axes: Sequence[int], label: Label) -> Label:
    """The label with its array axes standing for ``axes``, brought into ascending order."""
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    return Label(tuple(axes[i] for i in order), label.atoms.transpose(order), label.offsets.transpose(order))


def transpose(t: Trace, node: Node) -> None:
    op = node.op
    assert isinstance(op, ops.Transpose)
    rank = len(op.perm)
    to = {a % rank: i for i, a in enumerate(op.perm)}
    t.labels[node.output] = tuple(arranged([to[a] for a in x.axes], x) for x in t.of(node.inputs[0]))


def slice_(t: Trace, node: Node) -> None:
    op = node.op
    assert isinstance(op, ops.Slice)
    axis, out = op.axis % node.type.rank, []
    for x in t.of(node.inputs[0]):
        if axis not in x.axes:
            out.append(x)
        elif t.mode == "prune" and op.step != 1:
            t.pin([x], f"are sliced with step {op.step} (%{node.output})")
        elif node.type.shape[axis] != 1:
            at = np.arange(op.start, op.stop, op.step)
            i = x.axes.index(axis)
            out.append(replace(x, atoms=x.atoms.take(at, i), offsets=x.offsets.take(at, i)))
        else:
            t.pin([x], f"are taken one by one (%{node.output})")
    t.labels[node.output] = tuple(out)


def flip(t: Trace, node: Node) -> None:
    assert isinstance(node.op, ops.Flip)
    turned = {a % node.type.rank for a in node.op.axes}
    out = []
    for x in t.of(node.inputs[0]):
        along = tuple(i for i, a in enumerate(x.axes) if a in turned)
        out.append(replace(x, atoms=np.flip(x.atoms, along), offsets=np.flip(x.offsets, along)))
    t.labels[node.output] = tuple(out)


def concat(t: Trace, node: Node) -> None:
    """Labels that include the joined axis are joined; the others must agree in all operands."""
    from bitwright.passes.sparsity._channel_rules import join

    op = node.op
    assert isinstance(op, ops.Concat)
    axis = op.axis % node.type.rank
    along = {x.axes for v in node.inputs for x in t.of(v) if axis in x.axes}
    out = list(join(t, node, tuple(node.inputs), without=axis))
    if len(along) > 1:
        t.pin([x for v in node.inputs for x in t.of(v) if axis in x.axes], f"are joined with others (%{node.output})")
    for axes in along if len(along) == 1 else ():
        parts = [_part(t, node, v, axes) for v in node.inputs]
        i = axes.index(axis)
        atoms, offsets = (np.concatenate([getattr(p, f) for p in parts], i) for f in ("atoms", "offsets"))
        out.append(Label(axes, atoms, offsets))
    t.labels[node.output] = tuple(out)


def _part(t: Trace, node: Node, value: str, axes: tuple[int, ...]) -> Label:
    """The label of an operand on these axes; one that stays in place for an operand without."""
    for x in t.of(value):
        if x.axes == axes:
            return x
    shape = tuple(t.size(value, a) for a in axes)
    new = t.fresh(0, math.prod(shape))
    fixed = Label(axes, new.atoms.reshape(shape), new.offsets.reshape(shape))
    t.pin([fixed], f"stand beside %{value} in %{node.output}, whose order is given")
    return fixed


def reshape(t: Trace, node: Node) -> None:
    before, after = t.graph.types[node.inputs[0]].shape, node.type.shape
    pieces, out = _pieces(before, after), []
    for x in t.of(node.inputs[0]):
        why = _why_not(pieces, before, after, x, t.of(node.inputs[0]))
        new = _reshaped(t, pieces, before, after, x) if not why else None
        if new is None:
            t.pin([x], f"{why or 'are split'} in a reshape (%{node.output})")
        else:
            out.append(new)
    t.labels[node.output] = tuple(out)


Piece = tuple[tuple[int, ...], tuple[int, ...]]
"""Axes before and axes after that hold the same elements."""


def _why_not(
    pieces: list[Piece], before: tuple[Dim, ...], after: tuple[Dim, ...], x: Label, others: Sequence[Label]
) -> str:
    for inner, outer in pieces:
        if not set(inner) & set(x.axes) or (len(inner), len(outer)) == (1, 1):
            continue
        if any(not isinstance(before[a], int) for a in inner) or any(not isinstance(after[a], int) for a in outer):
            return "mix with an axis of symbolic size"
        if any(o is not x and set(inner) & set(o.axes) for o in others):
            return "mix with other channels"
    return ""


def _reshaped(t: Trace, pieces: list[Piece], before: tuple[Dim, ...], after: tuple[Dim, ...], x: Label) -> Label | None:
    """The label spread over all axes of the pieces it touches, in the new shape of these axes."""
    inner = tuple(a for i, _ in (p for p in pieces if set(p[0]) & set(x.axes)) for a in i if before[a] != 1)
    outer = tuple(a for _, o in (p for p in pieces if set(p[0]) & set(x.axes)) for a in o if after[a] != 1)
    full = tuple(int(before[a]) for a in inner)
    free = [n if a not in x.axes else 1 for a, n in zip(inner, full, strict=True)]
    box = [n if a in x.axes else 1 for a, n in zip(inner, full, strict=True)]
    running = np.arange(math.prod(free), dtype=np.int64).reshape(free)
    atoms = np.broadcast_to(x.atoms.reshape(box), full)
    offsets = np.broadcast_to(x.offsets.reshape(box) * math.prod(free) + running, full)
    shape = tuple(int(after[a]) for a in outer)
    new = Label(outer, atoms.reshape(shape).astype(np.int64), offsets.reshape(shape))
    if t.mode == "permute" or len(outer) == 1:
        return new
    for i, axis in enumerate(outer):  # as where two axes had been merged before
        along = np.moveaxis(new.atoms, i, 0).reshape(shape[i], -1)
        if (along == along[:, :1]).all():
            return Label((axis,), along[:, 0], np.zeros(shape[i], np.int64))
    t.unite(new.atoms.reshape(shape[0], -1))  # a block of the first axis goes or stays as a whole
    return Label(outer[:1], new.atoms.reshape(shape[0], -1)[:, 0], np.zeros(shape[0], np.int64))


def _pieces(before: tuple[Dim, ...], after: tuple[Dim, ...]) -> list[Piece]:
    """The finest cut of both shapes into runs of axes with equal products, symbols included."""
    out: list[Piece] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(left), j + len(right)
        while _product(before, left) != _product(after, right):
            smaller = _product(before, left)[0] < _product(after, right)[0]
            if (smaller and i < len(before)) or j >= len(after):
                if i >= len(before):
                    return [(tuple(range(len(before))), tuple(range(len(after))))]
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        out.append((tuple(left), tuple(right)))
    return out


def _product(shape: tuple[Dim, ...], axes: list[int]) -> tuple[int, tuple[str, ...]]:
    """Static factor and symbols of a product of sizes."""
    factor, symbols = 1, []
    for a in axes:
        d = shape[a]
        symbols += list(symbols_of(d))
        head = str(d).split("*")[0]
        factor *= d if isinstance(d, int) else int(head) if head.isdigit() else 1
    return factor, tuple(sorted(symbols))


def tile(t: Trace, node: Node) -> None:
    assert isinstance(node.op, ops.Tile)
    same = {a for a, r in enumerate(node.op.repeats) if r == 1}
    keep_axes(t, node, same, "are repeated")


def pad(t: Trace, node: Node) -> None:
    assert isinstance(node.op, ops.Pad)
    rank = node.type.rank
    same = {a for a in range(rank) if not node.op.padding[a] and not node.op.padding[rank + a]}
    keep_axes(t, node, same, "are padded")


def keep_axes(t: Trace, node: Node, axes: set[int], why: str) -> None:
    """Labels within ``axes`` of the first operand pass to every result; the others are pinned."""
    good = tuple(x for x in t.of(node.inputs[0]) if set(x.axes) <= axes)
    t.pin([x for x in t.of(node.inputs[0]) if x not in good], f"{why} (%{node.output})")
    for out in node.outputs:
        t.labels[out] = good


def expand(t: Trace, node: Node) -> None:
    shift = node.type.rank - t.graph.types[node.inputs[0]].rank
    t.labels[node.output] = tuple(x.on(tuple(a + shift for a in x.axes)) for x in t.of(node.inputs[0]))


def gather(t: Trace, node: Node) -> None:
    """Rows of a constant table are made of channels, as an embedding is; of a computed value the other axes pass."""
    op, (table, index) = node.op, node.inputs
    assert isinstance(op, ops.Gather)
    shape = t.graph.types[table].shape
    axis, more = op.axis % len(shape), t.graph.types[index].rank - 1
    t.pin(t.of(index), f"are used as an index (%{node.output})")
    if t.graph.is_constant(table):
        out = t.fresh(node.type.rank - 1, t.size(table, 1)) if len(shape) == 2 and axis == 0 and shape[1] != 1 else None
        if len(shape) == 2:
            t.weight(node, 0, 0, None, "ride")
            t.weight(node, 0, 1, out, "out")
        t.labels[node.output] = () if out is None else (out,)
        return
    good = [x for x in t.of(table) if axis not in x.axes]
    t.pin([x for x in t.of(table) if axis in x.axes], f"are gathered (%{node.output})")
    t.labels[node.output] = tuple(x.on(tuple(a + (more if a > axis else 0) for a in x.axes)) for x in good)
