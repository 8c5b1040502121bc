"""Generic rules of the contractions with small-float sums: the bits of ``ir/semantics_small_float.py``.

Every value in flight is f64: it holds products of f32 exactly and rounds sums as the exact ones. One output is one
chain of dependent roundings, and every rounding takes the bits of its operand: no sum of a product is left for LLVM to
contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from bitwright.codegen.tvm.generic_eval import (
    RULES,
    Evaluator,
    Idx,
    broadcast,
    conjunction,
    convert,
    div,
    is_nan,
    mod,
    unflatten,
)
from bitwright.codegen.tvm.generic_reduce import geometry_of, join_space, split_space
from bitwright.codegen.tvm.tir import Builder, Index, Vec, const
from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.semantics_small_float import Sums, sums_of
from bitwright.ir.small_float import Format, small_float_range
from bitwright.ir.types import F32, F64, S64

_MAX = math.ldexp(1 - 2.0**-53, 1024)
Pair = Callable[[Index], tuple[Vec, Vec]]
"""The operands of term k."""


def rounded(b: Builder, value: Vec, f: Format, rounding: str) -> Vec:
    """An f64 scalar in a small float; a NaN stays one or becomes any number."""
    smallest, largest = small_float_range(*f)
    drop = 52 - f[1]
    v = b.let(value)
    bits = b.register(S64, 1, v.bits(S64))  # in a register: TVM would rearrange the arithmetic on bits
    if rounding == "nearest":
        odd = b.register(S64, 1, (bits.get() >> drop) & 1)
        bits.set(bits.get() + odd.get() + ((1 << (drop - 1)) - 1))
    cut = b.let((bits.get() & -(1 << drop)).bits(F64))
    size = b.let((v.bits(S64) & ((1 << 63) - 1)).bits(F64))
    return b.let(size.lt(smallest).select(const(0.0, F64), cut.max(-largest).min(largest)))


def _total(ev: Evaluator, node: Node, terms: int, pair: Pair, channel: Index) -> Vec:
    """The sum in chunks, rounded to the result's format, and the bias."""
    b, sums = ev.b, sums_of(node.op)
    total, spoilt = ev.register(F64, 0.0), ev.register(F64, 0.0)
    chunk = max(1, min(sums.chunk, terms))

    def run(first: Index, count: int) -> None:
        inner = ev.register(F64, 0.0)
        with ev.loop(count) as i:
            x, w = (b.let(convert(v, F64)) for v in pair(b.index(first + i)))
            for v in (x, w):
                with ev.when(is_nan(v).expr):
                    spoilt.set(v)
            product = b.let(x.max(-_MAX).min(_MAX) * w.max(-_MAX).min(_MAX))
            inner.set(rounded(b, inner.get() + rounded(b, product, sums.product, sums.rounding), *_rest(sums)))
        total.set(rounded(b, total.get() + inner.get(), *_rest(sums)))

    with ev.loop(terms // chunk) as c:
        run(b.index(c * chunk), chunk)
    if terms % chunk:
        run(terms - terms % chunk, terms % chunk)
    found = b.let(is_nan(spoilt.get()).select(spoilt.get(), total.get()))
    narrow = ev.keep(convert(found, F32), ev.dtype(node.output))
    if len(node.inputs) < 3:
        return narrow
    return ev.keep(convert(narrow, F32) + ev.number(node.inputs[2], (channel,)), ev.dtype(node.output))


def _rest(sums: Sums) -> tuple[Format, str]:
    return sums.acc, sums.rounding


def _linear(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    x, w = node.inputs[:2]

    def pair(k: Index) -> tuple[Vec, Vec]:
        return ev.at(x, (*idx[:-1], k)), ev.at(w, (idx[-1], k))

    return _total(ev, node, ev.shape(w)[1], pair, idx[-1])


def _matmul(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    op, (a, b) = node.op, node.inputs
    assert isinstance(op, ops.SmallMatMul)
    *lead, row, column = idx
    abatch, bbatch = (broadcast(tuple(lead), ev.shape(t)[:-2]) for t in (a, b))

    def pair(k: Index) -> tuple[Vec, Vec]:
        right = (column, k) if op.transpose_b else (k, column)
        return ev.at(a, (*abatch, row, k)), ev.at(b, (*bbatch, *right))

    return _total(ev, node, ev.shape(a)[-1], pair, 0)


def _conv(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    op, (x, w) = node.op, node.inputs[:2]
    assert isinstance(op, ops.SmallConv)
    wshape = ev.shape(w)
    n, o, at = split_space(idx, op.channels_last)
    space = split_space(ev.shape(x), op.channels_last)[2]
    stride, begin, dilation = geometry_of(op, len(at))
    channels, taps = wshape[1], wshape[2:]

    def pair(k: Index) -> tuple[Vec, Vec]:
        c = mod(k, channels)
        tap = unflatten(div(k, channels), taps)
        place = [ev.b.index(i * s + t * d - p) for i, s, t, d, p in zip(at, stride, tap, dilation, begin, strict=True)]
        value = ev.register(F64, 0.0)
        with ev.when(conjunction([f for p, size in zip(place, space, strict=True) for f in (p >= 0, p < size)])):
            value.set(convert(ev.at(x, join_space(n, ev.b.index(c), tuple(place), op.channels_last)), F64))
        return value.get(), ev.at(w, (o, ev.b.index(c), *(ev.b.index(t) for t in tap)))

    return _total(ev, node, math.prod(wshape[1:]), pair, o)


RULES.update({ops.SmallLinear: _linear, ops.SmallMatMul: _matmul, ops.SmallConv: _conv})
