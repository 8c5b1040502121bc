"""Data movement as boxes: every shape operator writes parts of its result that are an operand seen through strides.

A box is a range of every result axis together with where its elements come from: an operand with an offset and a
stride per axis, or one value. Axes of a box that all arrays walk alike are merged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node


@dataclass(frozen=True, slots=True)
class Axis:
    """One loop: its size, and the steps in elements of the result, the source and each further operand."""

    size: int
    out: int
    src: int
    leaves: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Indirect:
    """The source offset grows by ``step`` times an index out of the tensor ``name``, of ``size`` positions.

    The index itself is the last of the further operands of the axes.
    """

    name: str
    step: int
    size: int


@dataclass(frozen=True, slots=True)
class Box:
    """A part of the result. ``source`` is an operand, or None for a fill with the value ``fill``."""

    axes: tuple[Axis, ...]
    out: int
    src: int
    leaves: tuple[int, ...]
    source: str | None
    fill: float = 0.0
    indirect: Indirect | None = None

    @property
    def size(self) -> int:
        return math.prod(a.size for a in self.axes)

    @property
    def transposed(self) -> int | None:
        """The axis along which the source is contiguous when it is not the last one."""
        if self.axes[-1].src in (0, 1):
            return None
        return next((k for k, a in enumerate(self.axes[:-1]) if a.src == 1), None)


@dataclass(frozen=True, slots=True)
class Span:
    """A raw box axis: ``size`` positions of result axis ``axis``, ``step`` apart; ``src`` apart in the source."""

    axis: int
    size: int
    src: int
    step: int = 1


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


Raw = tuple[list[int], list[Span], int, str | None]
"""Start along every result axis, spans, source offset, source."""


def boxes_of(body: Graph, node: Node, leaves: Sequence[Sequence[int]]) -> list[Box] | str:
    """The boxes of a shape operator, or why there are none. ``leaves``: strides of further operands along the
    result's axes."""
    shape = node.type.static_shape
    shapes = [body.types[x].static_shape for x in node.inputs]
    if math.prod(shape) == 0:
        return "an empty result"
    makers = {
        ops.Transpose: _transpose, ops.Expand: _expand, ops.Slice: _slice, ops.Flip: _flip, ops.Tile: _tile,
        ops.Concat: _concat, ops.Pad: _pad,
    }  # fmt: skip
    if isinstance(node.op, ops.Gather):
        return _gather(node, shape, shapes, leaves)
    raw = makers[type(node.op)](node, shape, shapes)
    if isinstance(raw, str):
        return raw
    fill = node.op.value if isinstance(node.op, ops.Pad) else 0.0
    return [_box(shape, r, leaves, fill) for r in raw if all(s.size for s in r[1])]


def _box(
    shape: Sequence[int],
    raw: Raw,
    leaves: Sequence[Sequence[int]],
    fill: float = 0.0,
    indirect: Indirect | None = None,
) -> Box:
    start, spans, src, source = raw
    out = strides_of(shape)
    axes = [Axis(s.size, s.step * out[s.axis], s.src, tuple(s.step * x[s.axis] for x in leaves)) for s in spans]
    at = sum(i * n for i, n in zip(start, out, strict=True))
    leaf_at = tuple(sum(i * n for i, n in zip(start, x, strict=True)) for x in leaves)
    return Box(_merged(axes), at, src, leaf_at, source, fill, indirect)


def _merged(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Without axes of size 1 and with neighbours joined; the last axis has step 1 in the result."""
    done: list[Axis] = []
    for a in axes:
        if a.size == 1:
            continue
        if done and _joins(done[-1], a):
            last = done.pop()
            a = Axis(last.size * a.size, a.out, a.src, a.leaves)
        done.append(a)
    if not done or done[-1].out != 1:
        done.append(Axis(1, 1, 1, (0,) * len(axes[0].leaves) if axes else ()))
    return tuple(done)


def _joins(outer: Axis, inner: Axis) -> bool:
    pairs = [(outer.out, inner.out), (outer.src, inner.src), *zip(outer.leaves, inner.leaves, strict=True)]
    return all(a == b * inner.size for a, b in pairs)


def _transpose(node: Node, shape: Sequence[int], shapes: list[tuple[int, ...]]) -> list[Raw]:
    src = strides_of(shapes[0])
    spans = [Span(k, n, src[p]) for k, (n, p) in enumerate(zip(shape, node.op.perm, strict=True))]  # type: ignore[attr-defined]
    return [([0] * len(shape), spans, 0, node.inputs[0])]


def _expand(node: Node, shape: Sequence[int], shapes: list[tuple[int, ...]]) -> list[Raw]:
    lead = len(shape) - len(shapes[0])
    src = (0,) * lead + tuple(0 if n == 1 else s for n, s in zip(shapes[0], strides_of(shapes[0]), strict=True))
    return [([0] * len(shape), [Span(k, n, src[k]) for k, n in enumerate(shape)], 0, node.inputs[0])]


def _slice(node: Node, shape: Sequence[int], shapes: list[tuple[int, ...]]) -> list[Raw]:
    op, src = node.op, strides_of(shapes[0])
    assert isinstance(op, ops.Slice)
    axis = op.axis % len(shape)
    spans = [Span(k, n, src[k] * (op.step if k == axis else 1)) for k, n in enumerate(shape)]
    return [([0] * len(shape), spans, op.start * src[axis], node.inputs[0])]


def _flip(node: Node, shape: Sequence[int], shapes: list[tuple[int, ...]]) -> list[Raw]:
    src = strides_of(shape)
    axes = {a % len(shape) for a in node.op.axes} if shape else set()  # type: ignore[attr-defined]
    spans = [Span(k, n, -src[k] if k in axes else src[k]) for k, n in enumerate(shape)]
    return [([0] * len(shape), spans, sum((shape[a] - 1) * src[a] for a in axes), node.inputs[0])]


def _tile(node: Node, shape: Sequence[int], shapes: list[tuple[int, ...]]) -> list[Raw]:
    lead = len(shape) - len(shapes[0])
    inside, src = (1,) * lead + shapes[0], (0,) * lead + strides_of(shapes[0])
    spans: list[Span] = []
    for k, n in enumerate(inside):
        spans += [Span(k, shape[k] // n, 0, n), Span(k, n, src[k])]
    return [([0] * len(shape), spans, 0, node.inputs[0])]


def _concat(node: Node, shape: Sequence[int], shapes: list[tuple[int, ...]]) -> list[Raw]:
    axis, at, raw = node.op.axis % len(shape), 0, list[Raw]()  # type: ignore[attr-defined]
    for x, mine in zip(node.inputs, shapes, strict=True):
        src = strides_of(mine)
        start = [at if k == axis else 0 for k in range(len(shape))]
        raw.append((start, [Span(k, n, src[k]) for k, n in enumerate(mine)], 0, x))
        at += mine[axis]
    return raw


def _pad(node: Node, shape: Sequence[int], shapes: list[tuple[int, ...]]) -> list[Raw] | str:
    op, inside = node.op, shapes[0]
    assert isinstance(op, ops.Pad)
    if op.mode != "constant":
        return f"{op.mode} padding"
    begin, src = op.padding[: len(shape)], strides_of(inside)
    raw: list[Raw] = [(list(begin), [Span(k, n, src[k]) for k, n in enumerate(inside)], 0, node.inputs[0])]
    for axis in range(len(shape)):
        behind = begin[axis] + inside[axis]
        for at, n in ((0, begin[axis]), (behind, shape[axis] - behind)):
            start = [*begin[:axis], at, *[0] * (len(shape) - axis - 1)]
            sizes = [*inside[:axis], n, *shape[axis + 1 :]]
            raw.append((start, [Span(k, s, 0) for k, s in enumerate(sizes)], 0, None))
    return raw


def _gather(
    node: Node, shape: Sequence[int], shapes: list[tuple[int, ...]], leaves: Sequence[Sequence[int]]
) -> list[Box] | str:
    x, index = shapes
    axis = node.op.axis % len(x)  # type: ignore[attr-defined]
    if math.prod(x[axis + 1 :]) == 1 or math.prod(x) == 0:
        return "a gather of single elements"
    src, ind, many = strides_of(x), strides_of(index), len(index)
    from_x = (*src[:axis], *(0,) * many, *src[axis + 1 :])
    from_index = (*(0,) * axis, *ind, *(0,) * (len(x) - axis - 1))
    spans = [Span(k, n, from_x[k]) for k, n in enumerate(shape)]
    raw: Raw = ([0] * len(shape), spans, 0, node.inputs[0])
    return [_box(shape, raw, [*leaves, from_index], 0.0, Indirect(node.inputs[1], src[axis], x[axis]))]
