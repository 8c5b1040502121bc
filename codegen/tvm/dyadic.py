"""Requantization in 32-bit lanes where its constants and the range of its operand allow it, exactly.

``requantize`` means floor((acc * m + 2^(e-1)) / 2^e) in 64-bit integers. Three shorter forms give the same integers:

``shift``: m is the same power of two everywhere, so (acc + 2^(s-1)) >> s.
``low``: acc * m + 2^(e-1) fits 32 bits.
``high``: e >= 33 (after moving acc left where it has room). Only the upper half of the product is needed:
    floor(floor(p / 2^32) / 2^(e-32)) = floor(p / 2^e), and 2^(e-1) has no bits in the lower half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bitwright.codegen.instructions import x86
from bitwright.codegen.tvm.spelling import call
from bitwright.codegen.tvm.tir import Builder, Vec, const, shuffle
from bitwright.codegen.tvm.vecmath import keep
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import S32, S64, U8, DType
from bitwright.ir.weights import Array

Range = tuple[int, int]
"""Smallest and largest value, both included."""
_S32: Range = (S32.lo, S32.hi)
_HALF = 32


@dataclass(frozen=True, slots=True)
class Form:
    """How one requantize is computed; ``by``: the right shift of ``shift``, the left shift before ``high``."""

    kind: Literal["shift", "low", "high"]
    by: int = 0


def form_of(op: ops.Requantize, multiplier: Array, shift: Array, operand: Range) -> Form | None:
    """The shortest exact form for these constants and every operand in ``operand``; None if only 64 bits do."""
    if op.dtype.bits > 32 or (op.dtype.bits > 16 and op.zero):
        return None
    m, e = multiplier.astype(np.int64).reshape(-1), shift.astype(np.int64).reshape(-1)
    if m.size == 0 or m.min() < 0 or e.min() < 1:
        return None
    most = max(abs(operand[0]), abs(operand[1]))
    if m.min() > 0 and not np.any(m & (m - 1)):
        distance = np.unique(e - np.log2(m).astype(np.int64))
        if distance.size == 1 and 1 <= (s := int(distance[0])) <= 30 and most + (1 << (s - 1)) < 1 << 31:
            return Form("shift", s)
    if e.max() <= 31 and most * int(m.max()) + (1 << (int(e.max()) - 1)) < 1 << 31:
        return Form("low")
    left = max(0, 33 - int(e.min()))
    if int(e.max()) + left <= 62 and most << left < 1 << 31:
        return Form("high", left)
    return None


def emit_form(
    b: Builder, op: ops.Requantize, acc: Vec, multiplier: Vec, shift: Vec, form: Form, wide: bool = False
) -> Vec:
    """The requantize as ``form``; ``acc`` of at most 32 bits, the constants s32 of equal lanes. ``wide``: as s32,
    before the clamp."""
    value = acc.cast(S32)
    if form.kind == "shift":
        value = (value + (1 << (form.by - 1))) >> form.by
    elif form.kind == "low":
        value = (value * multiplier + (const(1, S32, acc.lanes) << (shift - 1))) >> shift
    else:
        value = keep(b, value << form.by if form.by else value)
        upper, e = _upper(b, value, keep(b, multiplier)), keep(b, shift + (form.by - _HALF))
        value = (upper + (const(1, S32, acc.lanes) << (e - 1))) >> e
    if op.zero:
        value = value + op.zero
    return value if wide or op.dtype == S32 else keep(b, value).max(op.dtype.lo).min(op.dtype.hi).cast(op.dtype)


def _upper(b: Builder, x: Vec, y: Vec) -> Vec:
    """The upper halves of the products of s32 lanes: even and odd lanes are multiplied as the low halves of s64."""
    if x.lanes % 2:
        return ((x.cast(S64) * y.cast(S64)) >> _HALF).cast(S32)

    def even(v: Vec) -> Vec:
        return (v.bits(S64) << _HALF) >> _HALF

    def odd(v: Vec) -> Vec:
        return v.bits(S64) >> _HALF

    low, high = keep(b, even(x) * even(y)).bits(S32), keep(b, odd(x) * odd(y)).bits(S32)
    order = [n for i in range(1, x.lanes, 2) for n in (i, x.lanes + i)]
    return shuffle([low, high], order)


def packed_bytes(b: Builder, parts: Sequence[Vec]) -> Vec:
    """Two or four s32x16 clamped to u8, in order (AVX-512): the instructions narrow by 128 bits, one permutation of
    32-bit lanes puts them in order."""
    words = [keep(b, call(x86.VPACKSSDW_512, parts[i], parts[i + 1])) for i in range(0, len(parts), 2)]
    mixed = keep(b, call(x86.VPACKUSWB_512, words[0], words[-1])).bits(S32)
    return mixed.shuffle([4 * (i % 4) + i // 4 for i in range(4 * len(parts))]).bits(U8)


def byte_words(b: Builder, four: Sequence[Vec], wide: bool) -> Vec:
    """Four vectors of bytes (``wide``: s32x16 yet to be clamped to u8, AVX-512) as one of s32: byte j of a lane is of
    vector j."""
    if wide:
        low, high = (keep(b, call(x86.VPACKSSDW_512, four[i], four[i + 1])) for i in (0, 2))
        mixed = keep(b, call(x86.VPACKUSWB_512, low, high))
        order = [16 * part + 4 * j + i for part in range(4) for i in range(4) for j in range(4)]
        return keep(b, keep(b, mixed.shuffle(order)).bits(S32))
    words = [keep(b, v.cast(S32)) for v in four]
    return keep(b, words[0] | words[1] << 8 | words[2] << 16 | words[3] << 24)


def forms(body: Graph, root: Node, constants: Mapping[str, Array]) -> tuple[tuple[str, Form], ...]:
    """(result, form) of every requantize behind ``root`` that has a short form with these constants."""
    found: list[tuple[str, Form]] = []
    ranges: dict[str, Range] = {}
    for v in body.inputs:
        ranges[v.name] = _of_array(constants[v.name]) if v.name in constants else _of_format(v.type.dtype)
    for n in body.nodes:
        if n is root:
            ranges[n.output] = _of_root(n, body, constants)
            continue
        known = [constants.get(x) for x in n.inputs[1:]]
        m, e = (known[0], known[1]) if isinstance(n.op, ops.Requantize) else (None, None)
        if isinstance(n.op, ops.Requantize) and m is not None and e is not None:
            kind = body.types[n.inputs[0]].dtype
            form = form_of(n.op, m, e, ranges[n.inputs[0]]) if kind == S32 or kind.bits < 32 else None
            if form is not None:
                found.append((n.output, form))
            ranges[n.output] = _of_requantize(n.op, m, e, ranges[n.inputs[0]])
        else:
            ranges[n.output] = _of_node(n, [ranges.get(x, _S32) for x in n.inputs])
    return tuple(found)


def _of_array(a: Array) -> Range:
    return (int(a.min()), int(a.max())) if a.size and a.dtype.kind in "iu" else _S32


def _of_format(dtype: DType) -> Range:
    return (dtype.lo, dtype.hi) if dtype.is_integer and dtype.bits < 32 else _S32


def _of_root(root: Node, body: Graph, constants: Mapping[str, Array]) -> Range:
    """Bounds on the sums: every product at its extremes."""
    weight, x = constants.get(root.inputs[1]), body.types[root.inputs[0]].dtype
    if not isinstance(root.op, ops.IntLinear | ops.IntConv) or weight is None or not x.is_integer:
        return _S32
    w, zero = weight.reshape(weight.shape[0], -1), root.op.x_zero
    least, most = min(x.lo - zero, 0), max(x.hi - zero, 0)
    if w.size == 0:
        return 0, 0
    plus, minus = (f(w, 0).sum(1, dtype=np.int64) for f in (np.maximum, np.minimum))
    return _limited(int((plus * least + minus * most).min()), int((plus * most + minus * least).max()))


def _of_requantize(op: ops.Requantize, multiplier: Array, shift: Array, x: Range) -> Range:
    pairs = list(zip(multiplier.reshape(-1).tolist(), shift.reshape(-1).tolist(), strict=True))
    ends = [((v * m + (1 << (e - 1))) >> e) + op.zero for v in x for m, e in pairs]
    lo, hi = max(op.dtype.lo, -1 << 62), min(op.dtype.hi, 1 << 62)
    return min(max(min(ends), lo), hi), min(max(max(ends), lo), hi)


def _of_node(n: Node, x: list[Range]) -> Range:
    """Interval arithmetic for the operators of residual sums; the whole format for all others."""
    if isinstance(n.op, ops.Constant):
        values = [int(v) for v in n.op.values] if n.type.dtype.is_integer else []
        return (min(values), max(values)) if values else _S32
    if isinstance(n.op, ops.Binary) and n.type.dtype == S32 and n.op.fn in ("add", "sub"):
        other = x[1] if n.op.fn == "add" else (-x[1][1], -x[1][0])
        return _limited(x[0][0] + other[0], x[0][1] + other[1])
    if isinstance(n.op, ops.Cast) and n.type.dtype == S32:
        return _limited(*x[0])
    return _of_format(n.type.dtype)


def _limited(lo: int, hi: int) -> Range:
    """What wraps can be anything."""
    return (lo, hi) if lo >= S32.lo and hi <= S32.hi else _S32
