"""Conversions: casts, quantize, dequantize, requantize, saturate; and the pieces the other operators share."""

from __future__ import annotations

from bitwright.codegen.tvm.tir import Builder, Condition, Vec, const, fma, width
from bitwright.codegen.tvm.vecmath import VecMath, keep
from bitwright.ir import ops
from bitwright.ir.small_float import format_of, small_float_range
from bitwright.ir.types import BF16, BOOL, F16, F32, F64, S32, S64, U8, U64, DType


class Convert:
    """Pointwise operators that change the number format."""

    def __init__(self, b: Builder, isa: str, exact: bool) -> None:
        self.b, self.isa, self.exact, self.m = b, isa, exact, VecMath(b, isa)

    # ---- shared pieces
    def keep(self, x: Vec) -> Vec:
        return keep(self.b, x)

    def fenced(self, x: Vec) -> Vec:
        """A product that an addition must not swallow when results have to match the reference bit by bit."""
        return self.m.fence(x) if self.exact else x

    def truth(self, test: Condition, flip: bool = False) -> Vec:
        yes, no = const(1, BOOL, test.lanes), const(0, BOOL, test.lanes)
        return test.select(no, yes) if flip else test.select(yes, no)

    def is_true(self, x: Vec) -> Condition:
        """x != 0, true for NaN."""
        if x.dtype.is_float:
            return self.truth(self.widen(x).eq(0.0), flip=True).ne(0)
        return x.ne(0)

    def widen(self, x: Vec) -> Vec:
        """Half floats as f32; small floats are f32 already."""
        if x.dtype in (F16, BF16):
            return x.cast(F32)
        return Vec(x.expr, F32, x.lanes) if x.dtype.is_float and x.dtype != F64 else x

    # ---- casts
    def cast_op(self, op: ops.Cast, x: Vec) -> Vec:
        return self.convert(x, op.dtype)

    def convert(self, x: Vec, dtype: DType) -> Vec:
        """The value in another format, as ``Cast`` means it."""
        if x.dtype == dtype:
            return x
        if dtype == BOOL:
            return self.truth(self.is_true(self.keep(x)))
        if dtype.is_small_float:
            return self._small_float(self._to_float(x, F32), dtype)
        if dtype.is_float:
            return self._to_float(x, dtype)
        if x.dtype.is_float:
            return self._float_to_integer(self.widen(x), dtype)
        return Vec(x.expr, U8, x.lanes).cast(dtype) if x.dtype == BOOL else x.cast(dtype)

    def _to_float(self, x: Vec, dtype: DType) -> Vec:
        source = Vec(x.expr, U8, x.lanes) if x.dtype == BOOL else self.widen(x)
        if dtype in (F16, BF16):  # through f32, as torch does
            return source.cast(F32).cast(dtype)
        carrier = F64 if dtype == F64 else F32
        return Vec(source.cast(carrier).expr, dtype, x.lanes)

    def _float_to_integer(self, x: Vec, dtype: DType) -> Vec:
        x = self.keep(x)
        if dtype.bits > 32 or width(dtype) > 4:
            return self._float_to_64(x, dtype)
        if x.dtype == F64:
            return x.cast(S64).cast(S32).cast(dtype)
        return self._float_to_32(x).cast(dtype)

    def _float_to_64(self, x: Vec, dtype: DType) -> Vec:
        if dtype.kind != "uint":
            return x.cast(dtype)
        big = x.ge(2.0**63)
        low = x.cast(S64).bits(U64)
        high = (x - 2.0**63).cast(S64).bits(U64) + (1 << 63)
        return Vec(big.select(high, low).expr, dtype, x.lanes)

    def _float_to_32(self, x: Vec) -> Vec:
        """The low 32 bits of trunc(x) as a 64-bit integer (0 where that overflows, and for NaN)."""
        bits = self.keep(x.bits(S32))
        shift = self.keep(((bits >> 23) & 255) - 150)
        mantissa = (bits & 0x7FFFFF) | 0x800000
        moved = self.keep(mantissa << shift.max(0).min(31))
        wrapped = self.keep(shift.gt(31).select(const(0, S32, x.lanes), moved))
        signed = bits.lt(0).select(const(0, S32, x.lanes) - wrapped, wrapped)
        inside = self.m.abs(x).lt(2.0**31)
        return inside.select(x.cast(S32), signed)

    # ---- quantization
    def quantize(self, op: ops.Quantize, x: Vec, scale: Vec, zero: Vec | None = None) -> Vec:
        carrier = scale.dtype
        ratio = self.widen(self._to_float(x, carrier)) / self.widen(scale)
        if op.dtype.is_small_float:
            return self._small_float(self._to_float(ratio, F32), op.dtype)
        q = self._rounded(self.m.round(self.widen(self._to_float(ratio, carrier))), carrier)
        if zero is not None:
            q = self._rounded(q + self.widen(self._to_float(zero, carrier)), carrier)
        q = self.keep(q)
        if op.dtype.is_float:
            return self.convert(Vec(q.expr, F64 if carrier == F64 else F32, q.lanes), op.dtype)
        return self._clamped(q, op.dtype)

    def _small_float(self, x: Vec, dtype: DType) -> Vec:
        """f32 rounded half to even to a small float; NaN becomes 0, what is too large the largest."""
        smallest, largest = small_float_range(*format_of(dtype))
        drop = 23 - dtype.mantissa
        x = self.keep(x)
        x = self.keep(self.m.number(x).select(x, const(0.0, F32, x.lanes)))
        bits = self.keep(x.bits(S32))
        odd = self.keep((bits >> drop) & 1)
        up = self.keep(bits + odd)  # in registers: TVM would rearrange the arithmetic on bits
        cut = self.keep((self.keep(up + ((1 << (drop - 1)) - 1)) & -(1 << drop)).bits(F32))
        size = (bits & 0x7FFFFFFF).bits(F32)
        kept = size.lt(smallest).select(const(0.0, F32, x.lanes), cut.max(-largest).min(largest))
        return Vec(kept.expr, dtype, x.lanes)

    def quantize_near(self, op: ops.Quantize, x: Vec, scale: Vec, zero: Vec) -> Vec:
        """:meth:`quantize` of an f32 that is an approximation anyway to at most 8 unsigned bits, in fewer operations.

        The quotient is a product with 1 / scale, so it may round to the other side of a tie. Adding 1.5 * 2^23 rounds
        to the nearest integer (ties to even) and leaves the code in the low bits.
        """
        inverse = self.keep(const(1.0, F32, x.lanes) / scale)
        magic = 12582912.0
        near = self.keep(fma(x, inverse, const(magic, F32, x.lanes)) + self.keep(zero.cast(F32)))
        lo, hi = (const(magic + v, F32, x.lanes) for v in (op.dtype.lo, op.dtype.hi))
        near = self.keep(near.gt(lo).select(near, lo))  # NaN becomes code 0
        return near.min(hi).bits(S32).cast(op.dtype)

    def _rounded(self, x: Vec, dtype: DType) -> Vec:
        """To a half format and back, nothing for others."""
        return x.cast(dtype).cast(F32) if dtype in (F16, BF16) else x

    def _clamped(self, q: Vec, dtype: DType) -> Vec:
        """Whole floats as integers, NaN as 0, the rest clamped."""
        zero = const(0.0, q.dtype, q.lanes)
        if dtype.bits <= 16 or (q.dtype == F64 and dtype.bits <= 32):
            q = q.gt(0.0).select(q, zero) if dtype.lo == 0 else self.m.number(q).select(q, zero)
            q = self.keep(self.keep(q).max(float(dtype.lo)))
            limited = q.min(float(dtype.hi))
            return limited.cast(S32 if dtype.bits <= 16 else S64).cast(dtype)
        wide = q.cast(F64) if q.dtype == F32 else q
        wide = self.keep(self.m.number(wide).select(wide, const(0.0, F64, q.lanes)))
        if dtype.bits <= 32:
            return wide.max(float(dtype.lo)).min(float(dtype.hi)).cast(S64).cast(dtype)
        over, under = wide.ge(float(dtype.hi)), wide.le(float(dtype.lo))
        inner = self.keep(self._float_to_64(wide, dtype))
        return over.select(const(dtype.hi, dtype, q.lanes), under.select(const(dtype.lo, dtype, q.lanes), inner))

    def dequantize(self, op: ops.Dequantize, q: Vec, scale: Vec, zero: Vec | None = None) -> Vec:
        kind = scale.dtype
        if zero is None:
            value = self._to_float(q, kind)
        elif q.dtype.is_float:
            value = self._to_float(q, kind)
            value = self._to_float(self.widen(value) - self.widen(self._to_float(zero, kind)), kind)
        else:
            small = max(width(q.dtype), width(zero.dtype)) <= 2
            middle = S32 if small else S64
            value = self._to_float(self.convert(q, middle) - self.convert(zero, middle), kind)
        return self._to_float(self.fenced(self.widen(value) * self.widen(scale)), kind)

    def requantize(self, op: ops.Requantize, acc: Vec, multiplier: Vec, shift: Vec) -> Vec:
        e = self.keep(shift.cast(S64))
        product = self.convert(acc, S64) * multiplier.cast(S64)
        value = (product + (const(1, S64, acc.lanes) << (e - 1))) >> e
        if op.zero:
            value = value + op.zero
        lo, hi = (op.dtype.lo, op.dtype.hi)
        if op.dtype.bits > 32:
            return self.keep(value).cast(op.dtype)
        return self.keep(value).max(lo).min(hi).cast(op.dtype)

    def saturate(self, op: ops.Saturate, x: Vec) -> Vec:
        lo = op.dtype.lo if op.lo is None else max(op.lo, op.dtype.lo)
        hi = op.dtype.hi if op.hi is None else min(op.hi, op.dtype.hi)
        x = self.convert(x, U8) if x.dtype == BOOL else x
        x = self.keep(Vec(x.bits(S64).expr, S64, x.lanes) if x.dtype == U64 else x)
        bits = 8 * width(x.dtype)
        least = -(1 << (bits - 1)) if x.dtype.kind != "uint" else 0
        most = (1 << (bits - 1)) - 1 if x.dtype.kind != "uint" else (1 << bits) - 1
        if lo > most or hi < least:  # everything lands on one bound
            return const(lo if lo > most else hi, op.dtype, x.lanes)
        x = x.max(lo) if lo > least else x
        x = x.min(hi) if hi < most else x
        return x.cast(op.dtype)
