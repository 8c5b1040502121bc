"""Generic rules of reductions, arg-reductions and pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.generic_eval import (
    RULES,
    Evaluator,
    Idx,
    better,
    convert,
    either,
    lowest,
    sums,
    take_max,
    work,
)
from bitwright.codegen.tvm.tir import Builder, Index, Register, Vec, const, is_static, scalar
from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.types import BOOL, F32, F64, S32, S64, DType

# --- reductions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reduction:
    """How one member of REDUCE accumulates: start value, one step, and the result from the accumulator."""

    acc: DType
    start: float
    step: Callable[[Vec, Vec], Vec]
    finish: Callable[[Vec], Vec]


def reduction(fn: str, dtype: DType, count: int) -> Reduction:
    """The accumulation of ``fn`` over ``count`` elements of ``dtype`` (all but logsumexp)."""
    acc, one = sums(dtype), const(1, BOOL)

    def add(r: Vec, v: Vec) -> Vec:
        return r + convert(v, acc)

    def squares(r: Vec, v: Vec) -> Vec:
        w = convert(v, work(dtype))
        return r + convert(convert(w * w, dtype) if dtype.is_float else convert(v, acc) * convert(v, acc), acc)

    if fn in ("max", "min"):
        sign, kind = (1, work(dtype)) if fn == "max" else (-1, work(dtype))
        return Reduction(kind, lowest(kind, sign), lambda r, v: take_max(convert(v, kind), r, sign), _same)
    if fn in ("any", "all"):
        start = 0 if fn == "any" else 1
        return Reduction(
            BOOL, start, (lambda r, v: r | _truth(v)) if fn == "any" else (lambda r, v: r & _truth(v)), _same
        )
    if fn == "prod":
        if dtype == BOOL:
            return Reduction(BOOL, 1, lambda r, v: r & _truth(v), lambda r: r & one)
        return Reduction(acc, 1, lambda r, v: r * convert(v, acc), _same)
    if fn == "mean":
        return Reduction(acc, 0, add, lambda r: _mean(r, count))
    if fn == "l1":
        return Reduction(acc, 0, lambda r, v: r + convert(_abs(v), acc), _same)
    if fn == "sumsq":
        return Reduction(acc, 0, squares, _same)
    if fn == "l2":
        return Reduction(
            F64, 0, _l2_step(dtype), lambda r: _sqrt(r if dtype == F64 or dtype.is_integer else r.cast(F32))
        )
    assert fn in ("sum", "logsum"), fn
    return Reduction(acc, 0, add, _same)


def _same(r: Vec) -> Vec:
    return r


def _truth(v: Vec) -> Vec:
    return convert(v, BOOL)


def _mean(r: Vec, count: int) -> Vec:
    if r.dtype.is_float:
        return r / float(count) if count else const(float("nan"), r.dtype)
    return Vec(tirx.truncdiv(r.expr, const(count, r.dtype).expr), r.dtype)


def _abs(v: Vec) -> Vec:
    if v.dtype.kind in ("uint", "bool"):
        return v
    wide = convert(v, work(v.dtype) if v.dtype.is_float else S64)
    return wide.max(const(0, wide.dtype) - wide) if not v.dtype.is_float else Vec(tirx.abs(wide.expr), wide.dtype)


def _l2_step(dtype: DType) -> Callable[[Vec, Vec], Vec]:
    def step(r: Vec, v: Vec) -> Vec:
        w = convert(v, work(dtype) if dtype.is_float else F64)
        return r + convert(convert(w * w, dtype) if dtype.is_float else w * w, F64)

    return step


def _sqrt(v: Vec) -> Vec:
    return Vec(tirx.sqrt(v.expr), v.dtype)


def log(ev: Evaluator, v: Vec) -> Vec:
    return ev.apply(ops.Unary(fn="log"), v)


def exp(ev: Evaluator, v: Vec) -> Vec:
    return ev.apply(ops.Unary(fn="exp"), v)


def full_index(idx: Idx, rank: int, axes: tuple[int, ...], keepdim: bool, inner: list[Index]) -> Idx:
    """The operand's index from the result's and the loop variables of the reduced axes."""
    kept = iter(i for a, i in enumerate(idx) if a not in axes) if keepdim else iter(idx)
    turn = iter(inner)
    return tuple(next(turn) if a in axes else next(kept) for a in range(rank))


def _reduce(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    op, x = node.op, node.inputs[0]
    assert isinstance(op, ops.Reduce)
    shape, dtype = ev.shape(x), ev.dtype(x)
    axes = tuple(sorted(a % len(shape) for a in op.axes)) if shape else ()
    if shape and not axes:
        return ev.at(x, idx)
    extents = [shape[a] for a in axes]

    def term(inner: list[Index]) -> Vec:
        return ev.at(x, full_index(idx, len(shape), axes, op.keepdim, inner))

    if op.fn == "logsumexp":
        return log_sum_exp(ev, extents, term, dtype)
    how = reduction(op.fn, dtype, math.prod(extents))
    r = ev.register(how.acc, how.start)
    with ev.loops(extents) as inner:
        r.set(how.step(r.get(), term(inner)))
    result = how.finish(ev.b.let(r.get()))
    if op.fn == "logsum":
        return log(ev, convert(convert(result, dtype), work(dtype)) if dtype.is_float else result.cast(F32))
    return result


def running_max(ev: Evaluator, extents: list[int], term: Callable[[list[Index]], Vec], kind: DType) -> Vec:
    """The maximum of ``term`` in ``kind``; a NaN wins."""
    r = ev.register(kind, lowest(kind))
    with ev.loops(extents) as inner:
        r.set(take_max(convert(term(inner), kind), r.get()))
    return ev.b.let(r.get())


def finite_or_zero(v: Vec) -> Vec:
    """0 in the place of an infinity."""
    inf = const(float("inf"), v.dtype)
    return either(v.eq(inf), v.eq(-float("inf"))).select(const(0, v.dtype), v)


def log_sum_exp(ev: Evaluator, extents: list[int], term: Callable[[list[Index]], Vec], dtype: DType) -> Vec:
    """log of the sum of exp, shifted by the maximum."""
    kind = work(dtype) if dtype.is_float else F64
    top = ev.b.let(finite_or_zero(running_max(ev, extents, term, kind)))
    total = ev.total(extents, F64, lambda inner: exp(ev, convert(term(inner), kind) - top))
    return log(ev, convert(total, kind)) + top


# --- arg-reductions -----------------------------------------------------------------------------------------


def _arg(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    op, x = node.op, node.inputs[0]
    assert isinstance(op, ops.ArgReduce)
    shape = ev.shape(x)
    if not shape:
        return const(0, S64)
    axis, sign, kind = op.axis % len(shape), 1 if op.fn == "argmax" else -1, work(ev.dtype(x))
    size = shape[axis]

    def element(i: Index) -> Vec:
        at = size - 1 - i if op.last else i
        return ev.number(x, full_index(idx, len(shape), (axis,), op.keepdim, [at]))

    best, where = ev.register(kind, lowest(kind, sign)), ev.register(S32, 0)
    best.set(element(0))
    with ev.loop(size, 1) as i:
        v, old = element(i), ev.b.let(best.get())
        with ev.when(better(v, old, sign)):
            where.set(scalar(i))
            best.set(v)
    found = where.get().cast(S64)
    return const(size - 1, S64) - found if op.last else found


# --- pooling ------------------------------------------------------------------------------------------------


def reach(
    ev: Evaluator, at: Index, stride: int, begin: int, taps: int, dilation: int, size: int
) -> tuple[Index, Index]:
    """The range of window taps whose input position ``at * stride - begin + tap * dilation`` is inside [0, size)."""
    base = at * stride - begin
    if is_static(base):
        lo = min(max(0, -(base // dilation)), taps)
        return lo, max(lo, min(taps, -((base - size) // dilation)))
    base = ev.b.index(base)
    lo, hi = tirx.max(0 - base, 0), tirx.max(size - base, 0)
    if dilation != 1:
        lo, hi = tirx.truncdiv(lo + (dilation - 1), dilation), tirx.truncdiv(hi + (dilation - 1), dilation)
    lo = ev.b.index(tirx.min(lo, taps))
    return lo, ev.b.index(tirx.max(tirx.min(hi, taps), lo))


def _inside(at_last: int, stride: int, begin: int, taps: int, dilation: int, size: int) -> bool:
    """No window of an axis leaves the input."""
    return begin == 0 and at_last * stride + (taps - 1) * dilation < size


@contextmanager
def window(
    ev: Evaluator,
    at: Idx,
    space: tuple[int, ...],
    outs: tuple[int, ...],
    kernel: tuple[int, ...],
    geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> Iterator[tuple[list[Index], Idx, list[tuple[Index, Index]]]]:
    """Loops over the taps of a window that lie inside; ``geometry`` is stride, begin, dilation.

    Yields the taps, the input position, and the range of taps per axis.
    """  # fmt: skip
    stride, begin, dilation = geometry
    spans: list[tuple[Index, Index]] = []
    for a, i in enumerate(at):
        shut = _inside(outs[a] - 1, stride[a], begin[a], kernel[a], dilation[a], space[a])
        spans.append((0, kernel[a]) if shut else reach(ev, i, stride[a], begin[a], kernel[a], dilation[a], space[a]))
    with ev.loops(spans) as taps:
        place = tuple(i * s - b + t * d for i, s, b, t, d in zip(at, stride, begin, taps, dilation, strict=True))
        yield taps, place, spans


def geometry_of(op: ops.Op, n: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Stride, padding at the beginning and dilation, defaults filled in."""
    one, zero = (1,) * n, (0,) * n
    padding = getattr(op, "padding", ())
    return getattr(op, "stride", ()) or one, padding[:n] or zero, getattr(op, "dilation", ()) or one


def split_space(idx: Idx, last: bool) -> tuple[Index, Index, Idx]:
    """Batch, channel and space of an index."""
    return (idx[0], idx[-1], idx[1:-1]) if last else (idx[0], idx[1], idx[2:])


def join_space(n: Index, c: Index, space: Idx, last: bool) -> Idx:
    return (n, *space, c) if last else (n, c, *space)


def _max_pool(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    op, x = node.op, node.inputs[0]
    assert isinstance(op, ops.MaxPool)
    kind, last = work(ev.dtype(x)), op.channels_last
    n, c, at = split_space(idx, last)
    space, outs = split_space(ev.shape(x), last)[2], split_space(ev.shape(node.output), last)[2]
    r = ev.register(kind, lowest(kind))
    with window(ev, at, space, outs, op.kernel, geometry_of(op, len(at))) as (_taps, place, _spans):
        r.set(take_max(ev.number(x, join_space(n, c, place, last)), r.get()))
    return r.get()


def _avg_pool(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    op, x = node.op, node.inputs[0]
    assert isinstance(op, ops.AvgPool)
    dtype, last = ev.dtype(x), op.channels_last
    n, c, at = split_space(idx, last)
    space, outs = split_space(ev.shape(x), last)[2], split_space(ev.shape(node.output), last)[2]
    stride, begin, dilation = geometry_of(op, len(at))
    r = ev.register(sums(dtype), 0)
    with window(ev, at, space, outs, op.kernel, (stride, begin, dilation)) as (_taps, place, spans):
        r.set(r.get() + convert(ev.at(x, join_space(n, c, place, last)), sums(dtype)))
    count: Index = 1
    end = op.padding[len(at) :] or (0,) * len(at)
    for a, (lo, hi) in enumerate(spans):
        if op.count_padding:
            lo, hi = reach(ev, at[a], stride[a], 0, op.kernel[a], 1, begin[a] + space[a] + end[a])
        count = count * (hi - lo)
    kind = F32 if not dtype.is_float else r.dtype
    return convert(r.get(), kind) / scalar(count, kind)


RULES.update({ops.Reduce: _reduce, ops.ArgReduce: _arg, ops.MaxPool: _max_pool, ops.AvgPool: _avg_pool})

__all__ = ["Builder", "Register", "exp", "finite_or_zero", "geometry_of", "log_sum_exp", "reduction", "window"]
