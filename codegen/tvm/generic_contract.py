"""Generic rules of the contractions: one dot product per result element, integers exact."""

from __future__ import annotations

import math
from typing import Any

from bitwright.codegen.tvm.generic_eval import RULES, Evaluator, Idx, broadcast, conjunction, convert, div, mod, sums
from bitwright.codegen.tvm.generic_reduce import geometry_of, join_space, split_space, window
from bitwright.codegen.tvm.tir import Index, Vec
from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.types import S32, S64, DType


def _acc(x: DType, w: DType, zeros: tuple[int, int], length: int) -> DType:
    """s32 where no sum of ``length`` products can leave it, else the wide format."""
    if x.is_float:
        return sums(x)
    bound = length * math.prod(max(abs(d.lo - z), abs(d.hi - z)) for d, z in ((x, zeros[0]), (w, zeros[1])))
    return S32 if bound < 1 << 31 else S64


def _product(a: Vec, b: Vec, acc: DType, zeros: tuple[int, int] = (0, 0)) -> Vec:
    x, y = convert(a, acc), convert(b, acc)
    x = x - zeros[0] if zeros[0] else x
    return x * (y - zeros[1] if zeros[1] else y)


def _with_bias(ev: Evaluator, node: Node, total: Vec, channel: Index) -> Vec:
    return total + convert(ev.at(node.inputs[2], (channel,)), total.dtype) if len(node.inputs) > 2 else total


def _linear(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    x, w = node.inputs[:2]
    zero, k = getattr(node.op, "x_zero", 0), ev.shape(w)[1]
    acc = _acc(ev.dtype(x), ev.dtype(w), (zero, 0), k)
    total = ev.total(
        [k], acc, lambda at: _product(ev.at(x, (*idx[:-1], *at)), ev.at(w, (idx[-1], *at)), acc, (zero, 0))
    )
    return _with_bias(ev, node, total, idx[-1])


def _matmul(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    a, b = node.inputs
    op = node.op
    assert isinstance(op, (ops.MatMul, ops.IntMatMul))
    zeros = (op.a_zero, op.b_zero) if isinstance(op, ops.IntMatMul) else (0, 0)
    ashape, bshape = ev.shape(a), ev.shape(b)
    rest = list(idx)  # a vector on either side has no row or column in the result
    column = (rest.pop(),) if len(bshape) > 1 else ()
    row = (rest.pop(),) if len(ashape) > 1 else ()
    lead = tuple(rest)
    abatch, bbatch = broadcast(lead, ashape[:-2]), broadcast(lead, bshape[:-2])
    acc = _acc(ev.dtype(a), ev.dtype(b), zeros, ashape[-1])

    def term(at: list[Index]) -> Vec:
        right = (*column, *at) if op.transpose_b else (*at, *column)
        return _product(ev.at(a, (*abatch, *row, *at)), ev.at(b, (*bbatch, *right)), acc, zeros)

    return ev.total([ashape[-1]], acc, term)


def _conv(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    op, (x, w) = node.op, node.inputs[:2]
    assert isinstance(op, (ops.Conv, ops.IntConv))
    zero, last, wshape = getattr(op, "x_zero", 0), op.channels_last, ev.shape(w)
    n, o, at = split_space(idx, last)
    space, outs = split_space(ev.shape(x), last)[2], split_space(ev.shape(node.output), last)[2]
    size = wshape[1]
    first = ev.b.index(div(o, wshape[0] // op.groups) * size) if op.groups > 1 else 0
    acc = _acc(ev.dtype(x), ev.dtype(w), (zero, 0), math.prod(wshape[1:]))
    r = ev.register(acc, 0)
    with window(ev, at, space, outs, wshape[2:], geometry_of(op, len(at))) as (taps, place, _spans), ev.loop(size) as c:
        v = ev.at(x, join_space(n, first + c, place, last))
        r.set(r.get() + _product(v, ev.at(w, (o, c, *taps)), acc, (zero, 0)))
    return _with_bias(ev, node, ev.b.let(r.get()), o)


def _conv_transpose(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    op, (x, w) = node.op, node.inputs[:2]
    assert isinstance(op, ops.ConvTranspose)
    xshape, wshape = ev.shape(x), ev.shape(w)
    stride, begin, dilation = geometry_of(op, len(idx) - 2)
    size = xshape[1] // op.groups
    n, o = idx[:2]
    first = ev.b.index(div(o, wshape[1]) * size)
    acc = _acc(ev.dtype(x), ev.dtype(w), (0, 0), size * math.prod(wshape[2:]))
    r = ev.register(acc, 0)
    with ev.loops(list(wshape[2:])) as taps:
        fits: list[Any] = []
        place: list[Index] = []
        for a, (i, t) in enumerate(zip(idx[2:], taps, strict=True)):
            full = ev.b.index(i + begin[a] - t * dilation[a])  # position in the full result that this tap starts at
            source = full if stride[a] == 1 else full // stride[a]
            whole = True if stride[a] == 1 else source * stride[a] == full
            fits += [full >= 0, whole, source < xshape[2 + a]]
            place.append(source)
        with ev.when(conjunction(fits)):
            where = tuple(ev.b.index(p) for p in place)
            with ev.loop(size) as c:
                v = ev.at(w, (first + c, mod(o, wshape[1]), *taps))
                r.set(r.get() + _product(ev.at(x, (n, first + c, *where)), v, acc))
    return _with_bias(ev, node, ev.b.let(r.get()), o)


RULES.update({
    ops.Linear: _linear, ops.IntLinear: _linear, ops.MatMul: _matmul, ops.IntMatMul: _matmul,
    ops.Conv: _conv, ops.IntConv: _conv, ops.ConvTranspose: _conv_transpose,
})  # fmt: skip
