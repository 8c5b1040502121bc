"""Generic rules of the shape and indexing operators: an element of the result is an element elsewhere."""

from __future__ import annotations

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.generic_eval import (
    RULES,
    Evaluator,
    Idx,
    broadcast,
    carried,
    clip,
    conjunction,
    convert,
    flatten,
    mod,
    unflatten,
)
from bitwright.codegen.tvm.tir import Condition, Index, Vec, choose, const, is_static
from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.types import F32, F64, DType


def _reshape(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    x = node.inputs[0]
    if ev.shape(x) == ev.shape(node.output):
        return ev.at(x, idx)
    return ev.at(x, unflatten(ev.b.index(flatten(idx, ev.shape(node.output))), ev.shape(x)))


def _transpose(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    at: list[Index] = [0] * len(idx)
    for i, p in zip(idx, node.op.perm, strict=True):  # type: ignore[attr-defined]
        at[p] = i
    return ev.at(node.inputs[0], tuple(at))


def _expand(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    x = node.inputs[0]
    return ev.at(x, broadcast(idx, ev.shape(x)))


def _concat(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    axis = node.op.axis % len(idx)  # type: ignore[attr-defined]
    sizes = [ev.shape(x)[axis] for x in node.inputs]
    result = ev.register(carried(node.type.dtype), 0)
    start, i = 0, idx[axis]
    for x, n in zip(node.inputs, sizes, strict=True):
        if n and is_static(i) and start <= i < start + n:
            return ev.at(x, (*idx[:axis], i - start, *idx[axis + 1 :]))
        if n and not is_static(i):
            with ev.when(conjunction([i >= start, i < start + n])):
                result.set(ev.at(x, (*idx[:axis], ev.b.index(i - start), *idx[axis + 1 :])))
        start += n
    return result.get()


def _slice(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    op: ops.Slice = node.op  # type: ignore[assignment]
    axis = op.axis % len(idx)
    at = idx[axis] * op.step + op.start if op.step != 1 or op.start else idx[axis]
    return ev.at(node.inputs[0], (*idx[:axis], at, *idx[axis + 1 :]))


def _tile(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    x = node.inputs[0]
    shape = ev.shape(x)
    tail = idx[len(idx) - len(shape) :]
    repeats = node.op.repeats[len(idx) - len(shape) :]  # type: ignore[attr-defined]
    return ev.at(x, tuple(i if r == 1 else mod(i, n) for i, n, r in zip(tail, shape, repeats, strict=True)))


def _flip(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    shape = ev.shape(node.output)
    axes = {a % len(idx) for a in node.op.axes} if idx else set()  # type: ignore[attr-defined]
    return ev.at(node.inputs[0], tuple(shape[k] - 1 - i if k in axes else i for k, i in enumerate(idx)))


def _reflect(i: Index, size: int) -> Index:
    if size == 1:
        return 0
    period = 2 * (size - 1)
    i = mod(abs(i) if is_static(i) else tirx.max(i, 0 - i), period)
    return choose(i >= size, period - i, i)


def _pad(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    op, x = node.op, node.inputs[0]
    assert isinstance(op, ops.Pad)
    shape, n = ev.shape(x), len(idx)
    begin, end = op.padding[:n], op.padding[n:]
    at: list[Index] = []
    outside: list[Condition | bool] = []
    for i, size, b, e in zip(idx, shape, begin, end, strict=True):
        if not b and not e:
            at.append(i)
            continue
        i = ev.b.index(i - b)
        if op.mode == "wrap":
            at.append(mod(i + size * -(-b // size) if b else i, size))
        elif op.mode == "reflect":
            at.append(_reflect(i, size))
        else:
            at.append(clip(i, 0, size - 1))
        if op.mode == "constant":
            outside += ([i < 0] if b else []) + ([i >= size] if e else [])
    fill = const(_fill(op.value, node.type.dtype), carried(node.type.dtype))
    if ev.empty(x):
        return fill
    value = ev.at(x, tuple(at))
    for condition in outside:
        if isinstance(condition, bool):
            value = fill if condition else value
        else:
            value = Condition(condition).select(fill, value)
    return value


def _fill(value: float, dtype: DType) -> float:
    if dtype.is_float:
        return float(dtype.numpy.type(value))
    if dtype.kind == "bool":
        return int(bool(value))
    return int(value)


def _gather(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    x, index = node.inputs
    shape, many = ev.shape(x), len(ev.shape(index))
    axis = node.op.axis % len(shape)  # type: ignore[attr-defined]
    if ev.empty(x):
        return const(0, carried(node.type.dtype))
    at = ev.integer(index, idx[axis : axis + many], shape[axis])
    return ev.at(x, (*idx[:axis], at, *idx[axis + many :]))


def _gather_elements(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    x, index = node.inputs
    shape = ev.shape(x)
    if ev.empty(x):
        return const(0, carried(node.type.dtype))
    if not shape:
        return ev.at(x, ())
    axis = node.op.axis % len(shape)  # type: ignore[attr-defined]
    at = ev.integer(index, idx, shape[axis])
    return ev.at(x, (*idx[:axis], at, *idx[axis + 1 :]))


def _gather_nd(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    x, index = node.inputs
    shape, batch = ev.shape(x), node.op.batch  # type: ignore[attr-defined]
    lead, depth = len(ev.shape(index)) - 1, ev.shape(index)[-1]
    if ev.empty(x):
        return const(0, carried(node.type.dtype))
    at = [ev.integer(index, (*idx[:lead], k), shape[batch + k]) for k in range(depth)]
    return ev.at(x, (*idx[:batch], *at, *idx[lead:]))


def _resize(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    op, x = node.op, node.inputs[0]
    assert isinstance(op, ops.Resize)
    kind = ev.dtype(x)
    wide = F64 if kind == F64 else F32
    taps = taps_of(op)
    n = len(op.size)
    starts = [ev.b.index(i * taps) for i in idx[2:]]
    where = [[ev.b.index(ev.b.load(ev.tables[2 * a], starts[a] + t).expr) for t in range(taps)] for a in range(n)]
    if op.mode == "nearest":
        return ev.at(x, (*idx[:2], *(w[0] for w in where)))
    weight = [
        [ev.b.let(ev.b.load(ev.tables[2 * a + 1], starts[a] + t).cast(wide)) for t in range(taps)] for a in range(n)
    ]

    def along(axis: int, tail: Idx) -> Vec:
        """Interpolated over the space axes 0..axis at the fixed indices of the later ones."""
        if axis < 0:
            return convert(ev.at(x, (*idx[:2], *tail)), wide)
        total = None
        for t in range(taps):
            term = along(axis - 1, (where[axis][t], *tail)) * weight[axis][t]
            total = term if total is None else total + term
        assert total is not None
        return ev.b.let(total)

    y = along(n - 1, ())
    return y if kind.is_float else Vec(tirx.nearbyint(y.expr), y.dtype)


def taps_of(op: ops.Resize) -> int:
    """How many input elements of one axis an output element reads."""
    return {"nearest": 1, "linear": 2, "cubic": 4}[op.mode]


RULES.update({
    ops.Reshape: _reshape, ops.Transpose: _transpose, ops.Expand: _expand, ops.Concat: _concat, ops.Slice: _slice,
    ops.Tile: _tile, ops.Flip: _flip, ops.Pad: _pad, ops.Gather: _gather, ops.GatherElements: _gather_elements,
    ops.GatherNd: _gather_nd, ops.Resize: _resize,
})  # fmt: skip
