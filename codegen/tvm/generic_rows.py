"""Generic rules of the operators that need a statistic of a whole row first: norms, softmax, attention.

Each has a preparation, emitted where the row is known and its elements are not: the nest of the generic
kernel orders its loops so that this happens once per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.generic_eval import RULES, Evaluator, Idx, convert, div, sums, take_max, work
from bitwright.codegen.tvm.generic_reduce import exp, log, running_max
from bitwright.codegen.tvm.tir import Condition, Index, Pointer, Vec, const
from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.types import BOOL, F32, F64, DType


@dataclass(frozen=True)
class Row:
    """Which axes of the result lie inside a row; ``split`` axes do with their last ``split[axis]`` positions."""

    inner: tuple[int, ...]
    split: dict[int, int] = field(default_factory=dict)


Prepare = Callable[[Evaluator, Node, Idx], Any]
ROWS: dict[type[ops.Op], tuple[Callable[[Any, Sequence[int]], Row], Prepare]] = {}
"""Row of an operator given its first operand's shape, and the preparation for the row that an index lies in."""


def prepared(ev: Evaluator, node: Node, idx: Idx) -> Any:
    """The statistics of the row of ``idx``: from an enclosing scope, else computed here."""
    known = ev.recall(("row", node.output))
    return ROWS[type(node.op)][1](ev, node, idx) if known is None else known


def _rsqrt(v: Vec) -> Vec:
    return const(1, v.dtype) / Vec(tirx.sqrt(v.expr), v.dtype)


def affine(ev: Evaluator, y: Vec, dtype: DType, scale: Vec | None, bias: Vec | None) -> Vec:
    """y * scale + bias, rounded to ``dtype`` after each step as the reference does."""
    y = ev.keep(y, dtype)
    if scale is not None:
        y = ev.keep(convert(y, work(dtype)) * scale, dtype)
    if bias is not None:
        y = ev.keep(convert(y, work(dtype)) + bias, dtype)
    return y


def _moments(ev: Evaluator, x: str, extents: Sequence[int], place: Callable[[list[Index]], Idx]) -> tuple[Vec, Vec]:
    """Mean and population variance over nested loops."""
    acc, count = sums(ev.dtype(x)), math.prod(extents)
    mean = ev.b.let(ev.total(list(extents), acc, lambda at: ev.at(x, place(at))) / float(count))

    def square(at: list[Index]) -> Vec:
        centred = ev.b.let(convert(ev.at(x, place(at)), acc) - mean)
        return centred * centred

    return mean, ev.b.let(ev.total(list(extents), acc, square) / float(count))


# --- norms --------------------------------------------------------------------------------------------------


def _tail_row(op: ops.LayerNorm | ops.RmsNorm, shape: Sequence[int]) -> Row:
    return Row(tuple(range(len(shape) - op.axes, len(shape))))


def _layer_stats(ev: Evaluator, node: Node, idx: Idx) -> tuple[Vec, Vec]:
    op, x = node.op, node.inputs[0]
    assert isinstance(op, ops.LayerNorm)
    shape = ev.shape(x)
    mean, var = _moments(ev, x, shape[len(shape) - op.axes :], lambda at: (*idx[: len(shape) - op.axes], *at))
    return mean, ev.b.let(_rsqrt(var + op.eps))


def _tail(ev: Evaluator, node: Node, k: int, idx: Idx) -> Vec | None:
    """Operand ``k`` (scale or bias, broadcast to the result) if there is one."""
    if k >= len(node.inputs):
        return None
    name = node.inputs[k]
    shape = ev.shape(name)
    at = tuple(0 if n == 1 else i for i, n in zip(idx[len(idx) - len(shape) :], shape, strict=True))
    return ev.number(name, at)


def _layer_norm(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    mean, inverse = prepared(ev, node, idx)
    x = node.inputs[0]
    y = (convert(ev.at(x, idx), mean.dtype) - mean) * inverse
    return affine(ev, y, ev.dtype(x), _tail(ev, node, 1, idx), _tail(ev, node, 2, idx))


def _rms_stats(ev: Evaluator, node: Node, idx: Idx) -> Vec:
    op, x = node.op, node.inputs[0]
    assert isinstance(op, ops.RmsNorm)
    shape, acc = ev.shape(x), sums(ev.dtype(x))
    head, extents = idx[: len(shape) - op.axes], list(shape[len(shape) - op.axes :])

    def square(at: list[Index]) -> Vec:
        v = ev.b.let(convert(ev.at(x, (*head, *at)), acc))
        return v * v

    return ev.b.let(_rsqrt(ev.total(extents, acc, square) / float(math.prod(extents)) + op.eps))


def _rms_norm(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    inverse, x = prepared(ev, node, idx), node.inputs[0]
    return affine(ev, convert(ev.at(x, idx), inverse.dtype) * inverse, ev.dtype(x), _tail(ev, node, 1, idx), None)


def _group_row(op: ops.GroupNorm, shape: Sequence[int]) -> Row:
    return Row(tuple(range(2, len(shape))), {1: shape[1] // op.groups})


def _group_stats(ev: Evaluator, node: Node, idx: Idx) -> tuple[Vec, Vec]:
    op, x = node.op, node.inputs[0]
    assert isinstance(op, ops.GroupNorm)
    shape = ev.shape(x)
    size = shape[1] // op.groups
    first = ev.b.index(div(idx[1], size) * size)
    mean, var = _moments(ev, x, [size, *shape[2:]], lambda at: (idx[0], first + at[0], *at[1:]))
    return mean, ev.b.let(_rsqrt(var + op.eps))


def _group_norm(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    mean, inverse = prepared(ev, node, idx)
    x = node.inputs[0]
    scale, bias = (ev.number(w, (idx[1],)) if w else None for w in (*node.inputs[1:], "", "")[:2])
    return affine(ev, (convert(ev.at(x, idx), mean.dtype) - mean) * inverse, ev.dtype(x), scale, bias)


def _batch_norm(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    op = node.op
    assert isinstance(op, ops.BatchNorm)
    x, *rest = node.inputs
    acc = sums(ev.dtype(x))
    scale, bias, mean, var = (convert(ev.at(w, (idx[1],)), acc) for w in rest)
    return (convert(ev.at(x, idx), acc) - mean) * (_rsqrt(var + op.eps) * scale) + bias


# --- softmax ------------------------------------------------------------------------------------------------


def _softmax_row(op: ops.Softmax, shape: Sequence[int]) -> Row:
    return Row((op.axis % len(shape),) if shape else ())


def _softmax_stats(ev: Evaluator, node: Node, idx: Idx) -> tuple[Vec, Vec]:
    op, x = node.op, node.inputs[0]
    assert isinstance(op, ops.Softmax)
    shape, kind = ev.shape(x), work(ev.dtype(x))
    axis = op.axis % max(len(shape), 1)

    def element(at: list[Index]) -> Vec:
        return ev.number(x, (*idx[:axis], *at, *idx[axis + 1 :]))

    extents = list(shape[axis : axis + 1])
    top = running_max(ev, extents, element, kind)
    total = ev.total(extents, F64, lambda at: exp(ev, element(at) - top)).cast(kind)
    return top, ev.b.let(log(ev, total) if op.log else total)


def _softmax(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    top, total = prepared(ev, node, idx)
    shifted = ev.number(node.inputs[0], idx) - top
    assert isinstance(node.op, ops.Softmax)
    result: Vec = shifted - total if node.op.log else exp(ev, shifted) / total
    return result


# --- attention ----------------------------------------------------------------------------------------------


def _attention_row(op: ops.Attention, shape: Sequence[int]) -> Row:
    return Row((len(shape) - 1,))


def scores_bytes(body_types: Sequence[Sequence[int]]) -> int:
    """Scratch for one row of attention scores (f64)."""
    return 8 * body_types[1][-2]


def _head(ev: Evaluator, name: str, idx: Idx, kv_groups: int) -> Idx:
    """Batch index of keys or values for the query's batch index."""
    shape = ev.shape(name)[:-2]
    lead = list(idx[:-2][len(idx) - 2 - len(shape) :])
    if kv_groups > 1:
        lead[-1] = div(lead[-1], kv_groups)
    return tuple(0 if n == 1 else i for i, n in zip(lead, shape, strict=True))


def _attention_stats(ev: Evaluator, node: Node, idx: Idx) -> tuple[Pointer, Vec]:
    """Writes exp(score - max) of the row into the scratch; returns it and the sum."""
    op = node.op
    assert isinstance(op, ops.Attention)
    assert ev.scratch is not None
    q, k, *_rest = node.inputs
    kind, acc = work(ev.dtype(q)), sums(ev.dtype(q))
    length, depth = ev.shape(k)[-2:]
    scores = ev.b.view(ev.scratch, F64)
    head, qshape = _head(ev, k, idx, op.kv_groups), ev.shape(q)
    lead = tuple(0 if n == 1 else i for i, n in zip(idx[:-2][len(idx) - len(qshape) :], qshape[:-2], strict=True))
    top = ev.register(F64, -float("inf"))
    with ev.loop(length) as s:

        def product(at: list[Index]) -> Vec:
            return convert(ev.at(q, (*lead, idx[-2], *at)), acc) * convert(ev.at(k, (*head, s, *at)), acc)

        v = convert(convert(ev.total([depth], acc, product), kind) * op.scale, F64)
        v = _masked(ev, node, v, (*idx[:-1], s))
        v = ev.b.let(v)
        top.set(take_max(v, ev.b.let(top.get())))
        ev.b.store(scores, s, v)
    best = ev.b.let(top.get())
    total = ev.register(F64, 0)
    with ev.loop(length) as s:
        e = ev.b.let(convert(exp(ev, convert(ev.b.load(scores, s) - best, kind)), F64))
        total.set(total.get() + e)
        ev.b.store(scores, s, e)
    return scores, ev.b.let(total.get())


def _masked(ev: Evaluator, node: Node, v: Vec, idx: Idx) -> Vec:
    """The score with the causal and the explicit mask applied; ``idx`` is [..., l, s]."""
    op = node.op
    assert isinstance(op, ops.Attention)
    never = const(-float("inf"), F64)
    if op.causal:
        later = idx[-1] > idx[-2]
        v = Condition(later).select(never, v) if not isinstance(later, bool) else (never if later else v)
    if len(node.inputs) == 4:
        mask = node.inputs[3]
        shape = ev.shape(mask)
        m = ev.at(mask, tuple(0 if n == 1 else i for i, n in zip(idx[len(idx) - len(shape) :], shape, strict=True)))
        v = m.ne(0).select(v, never) if m.dtype == BOOL else v + convert(m, F64)
    return v


def _attention(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    op, v = node.op, node.inputs[2]
    assert isinstance(op, ops.Attention)
    scores, total = prepared(ev, node, idx)
    head = _head(ev, v, idx, op.kv_groups)
    length = ev.shape(v)[-2]
    out = ev.total([length], F64, lambda at: ev.b.load(scores, at[0]) * convert(ev.at(v, (*head, *at, idx[-1])), F64))
    return convert(out / total, F64 if ev.dtype(v) == F64 else F32)


ROWS.update({
    ops.LayerNorm: (_tail_row, _layer_stats), ops.RmsNorm: (_tail_row, _rms_stats),
    ops.GroupNorm: (_group_row, _group_stats), ops.Softmax: (_softmax_row, _softmax_stats),
    ops.Attention: (_attention_row, _attention_stats),
})  # fmt: skip
RULES.update({
    ops.LayerNorm: _layer_norm, ops.RmsNorm: _rms_norm, ops.GroupNorm: _group_norm, ops.BatchNorm: _batch_norm,
    ops.Softmax: _softmax, ops.Attention: _attention,
})  # fmt: skip

__all__ = ["ROWS", "Row", "scores_bytes"]
