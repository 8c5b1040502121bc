"""Pointwise operators on integers: wrap-around, C and Python division, shifts, powers.

Division of up to 32 bits goes through floats, which is exact and stays in vectors; dividing by zero never traps
(the divisor counts as one).
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.tir import Builder, Vec, const, width
from bitwright.codegen.tvm.vecmath import both, either, keep
from bitwright.ir.types import BOOL, F32, F64, S32, S64, U64, DType


def integer_unary(b: Builder, fn: str, x: Vec) -> Vec:
    """One of relu, neg, abs, square, sign, bitnot and the roundings, which change nothing."""
    zero, one = const(0, x.dtype, x.lanes), const(1, x.dtype, x.lanes)
    signed = x.dtype.kind not in ("uint", "bool")
    if x.dtype.kind == "uint" and width(x.dtype) >= 4 and fn in ("neg", "square"):  # TVM's unsigned may not wrap
        return _as_signed(x, lambda v: integer_unary(b, fn, v))
    if fn in ("floor", "ceil", "round", "trunc") or (fn in ("relu", "abs") and not signed):
        return x
    if fn == "sign":
        positive = x.gt(0).select(one, zero)
        return x.lt(0).select(zero - one, positive) if signed else x.ne(0).select(one, zero)
    if fn == "bitnot":
        return x ^ one if x.dtype == BOOL else x ^ (-1 if signed else (1 << 8 * width(x.dtype)) - 1)
    simple: dict[str, Callable[[], Vec]] = {
        "relu": lambda: x.max(0),
        "neg": lambda: zero - x,
        "abs": lambda: x.lt(0).select(zero - x, x),
        "square": lambda: x * x,
    }
    return simple[fn]()


def integer_binary(b: Builder, fn: str, x: Vec, y: Vec) -> Vec:
    """Arithmetic, bit operations and shifts on operands of one format."""
    if x.dtype == BOOL:
        return _bool(fn, x, y)
    bitwise = {"bitand": lambda: x & y, "bitor": lambda: x | y, "bitxor": lambda: x ^ y}
    if fn in bitwise:
        return bitwise[fn]()
    if fn in ("shl", "shr"):
        return _shift(b, fn, x, y)
    if x.dtype == U64:  # as the reference: in s64
        return integer_binary(b, fn, x.bits(S64), y.bits(S64)).bits(U64)
    if x.dtype.kind == "uint" and width(x.dtype) >= 4 and fn in ("add", "sub", "mul"):
        return _as_signed(x, lambda v: integer_binary(b, fn, v, y.bits(v.dtype)))
    simple: dict[str, Callable[[], Vec]] = {
        "add": lambda: x + y,
        "sub": lambda: x - y,
        "mul": lambda: x * y,
        "min": lambda: x.min(y),
        "max": lambda: x.max(y),
        "pow": lambda: _power(b, x, y),
    }
    return simple[fn]() if fn in simple else _divide(b, fn, x, y)


def _as_signed(x: Vec, compute: Callable[[Vec], Vec]) -> Vec:
    """The same bits computed as signed integers."""
    return compute(x.bits(DType("int", x.dtype.bits))).bits(x.dtype)


def _bool(fn: str, x: Vec, y: Vec) -> Vec:
    if fn in ("add", "max", "bitor"):
        return x | y
    return x & y if fn in ("mul", "min", "bitand") else x ^ y


def _shift(b: Builder, fn: str, x: Vec, y: Vec) -> Vec:
    bits = 8 * width(x.dtype)
    signed = x.dtype.kind != "uint"
    inside = y.lt(bits) if not signed else both(y.lt(bits), y.ge(0))
    by = keep(b, inside.select(y, const(bits - 1, y.dtype, y.lanes)))
    if fn == "shr" and signed:
        return x >> by
    moved = keep(b, x << by if fn == "shl" else x >> by)
    return inside.select(moved, const(0, x.dtype, x.lanes))


def _divide(b: Builder, fn: str, x: Vec, y: Vec) -> Vec:
    """div (toward zero), floordiv, fmod (dividend's sign) and mod (divisor's sign)."""
    y = keep(b, y.eq(0).select(const(1, y.dtype, y.lanes), y))
    if width(x.dtype) > 4:
        return _divide_64(b, fn, x, y)
    wide = F64 if width(x.dtype) == 4 else F32
    xf, yf = keep(b, x.cast(wide)), keep(b, y.cast(wide))
    middle = S32 if wide == F32 else S64
    toward_zero = keep(b, (xf / yf).cast(middle).cast(wide))
    quotient, rest = toward_zero, keep(b, xf - toward_zero * yf)
    if fn in ("floordiv", "mod"):
        low = either(both(rest.lt(0.0), yf.gt(0.0)), both(rest.gt(0.0), yf.lt(0.0)))
        quotient, rest = low.select(quotient - 1.0, quotient), low.select(rest + yf, rest)
    result = quotient if fn in ("div", "floordiv") else rest
    return result.cast(S64 if wide == F64 else S32).cast(x.dtype)


def _divide_64(b: Builder, fn: str, x: Vec, y: Vec) -> Vec:
    """s64 only: scalar division; -1 is taken apart because the smallest value over it traps."""
    zero, one = const(0, x.dtype, x.lanes), const(1, x.dtype, x.lanes)
    minus = y.eq(-1)
    safe = keep(b, minus.select(one, y))
    quotient = keep(b, Vec(tirx.Div(x.expr, safe.expr), x.dtype, x.lanes))
    rest = keep(b, x - quotient * safe)
    quotient = keep(b, minus.select(zero - x, quotient))
    if fn == "div":
        return quotient
    if fn == "fmod":
        return rest
    low = either(both(rest.lt(0), safe.gt(0)), both(rest.gt(0), safe.lt(0)))
    return low.select(quotient - 1, quotient) if fn == "floordiv" else low.select(rest + safe, rest)


def _power(b: Builder, x: Vec, y: Vec) -> Vec:
    """Square and multiply; a negative exponent gives 0 except for bases 1 and -1."""
    bits = 8 * width(x.dtype)
    signed = x.dtype.kind != "uint"
    one, zero = const(1, x.dtype, x.lanes), const(0, x.dtype, x.lanes)
    result, base = one, x
    for i in range(bits - (1 if signed else 0)):
        used = ((y >> i) & 1).ne(0)
        result = keep(b, used.select(result * base, result))
        base = keep(b, base * base)
    if not signed:
        return result
    odd = (y & 1).ne(0)
    unit = x.eq(1).select(one, x.eq(-1).select(odd.select(zero - one, one), zero))
    return y.lt(0).select(unit, result)
