"""Typed TIR values: :class:`Vec` is an expression that knows its number format and its number of lanes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.ir.types import BOOL, S32, S64, DType

Index = Any
"""An ``int`` or an int32 TIR expression."""
Expr = Any
Number = int | float


def tvm_dtype(dtype: DType, lanes: int = 1) -> str:
    """TVM's name of the carrier of ``dtype`` (sub-byte integers travel in bytes, stored bool in a byte).

    >>> from bitwright.ir.types import S8, parse_dtype
    >>> tvm_dtype(S8, 64), tvm_dtype(parse_dtype("u4"))
    ('int8x64', 'uint8')
    """
    name = "uint8" if dtype == BOOL else str(dtype.numpy)
    return name if lanes == 1 else f"{name}x{lanes}"


def width(dtype: DType) -> int:
    """Bytes of one stored element."""
    return int(dtype.numpy.itemsize)


@dataclass(frozen=True, eq=False)
class Vec:
    """A value: an expression, its number format, its lanes. Arithmetic wraps at the width of the carrier."""

    expr: Expr
    dtype: DType
    lanes: int = 1

    def __add__(self, other: Vec | Number) -> Vec:
        return self._binary(tirx.Add, other)

    def __sub__(self, other: Vec | Number) -> Vec:
        return self._binary(tirx.Sub, other)

    def __mul__(self, other: Vec | Number) -> Vec:
        return self._binary(tirx.Mul, other)

    def __truediv__(self, other: Vec | Number) -> Vec:
        """Division of floats."""
        return self._binary(tirx.Div, other)

    def __and__(self, other: Vec | Number) -> Vec:
        return self._operator(tirx.bitwise_and, other)

    def __or__(self, other: Vec | Number) -> Vec:
        return self._operator(tirx.bitwise_or, other)

    def __xor__(self, other: Vec | Number) -> Vec:
        return self._operator(tirx.bitwise_xor, other)

    def __lshift__(self, other: Vec | Number) -> Vec:
        return self._operator(tirx.shift_left, other)

    def __rshift__(self, other: Vec | Number) -> Vec:
        """Arithmetic for signed, logical for unsigned formats."""
        return self._operator(tirx.shift_right, other)

    def min(self, other: Vec | Number) -> Vec:
        return self._binary(tirx.Min, other)

    def max(self, other: Vec | Number) -> Vec:
        return self._binary(tirx.Max, other)

    def clip(self, lo: Number, hi: Number) -> Vec:
        return self.max(lo).min(hi)

    def lt(self, other: Vec | Number) -> Condition:
        return Condition(tirx.LT(self.expr, self._same(other).expr), self.lanes)

    def le(self, other: Vec | Number) -> Condition:
        return Condition(tirx.LE(self.expr, self._same(other).expr), self.lanes)

    def gt(self, other: Vec | Number) -> Condition:
        return Condition(tirx.GT(self.expr, self._same(other).expr), self.lanes)

    def ge(self, other: Vec | Number) -> Condition:
        return Condition(tirx.GE(self.expr, self._same(other).expr), self.lanes)

    def eq(self, other: Vec | Number) -> Condition:
        return Condition(tirx.EQ(self.expr, self._same(other).expr), self.lanes)

    def ne(self, other: Vec | Number) -> Condition:
        return Condition(tirx.NE(self.expr, self._same(other).expr), self.lanes)

    def cast(self, dtype: DType) -> Vec:
        """Convert the value: floats truncate towards zero, integers wrap."""
        if tvm_dtype(dtype) == tvm_dtype(self.dtype):
            return Vec(self.expr, dtype, self.lanes)
        return Vec(tirx.Cast(tvm_dtype(dtype, self.lanes), self.expr), dtype, self.lanes)

    def bits(self, dtype: DType) -> Vec:
        """The same bits as another format; the number of lanes follows."""
        total = self.lanes * width(self.dtype)
        lanes = total // width(dtype)
        if lanes * width(dtype) != total:
            raise ValueError(f"{self.lanes} x {self.dtype} do not make whole lanes of {dtype}")
        name = tvm_dtype(dtype, lanes)
        if name == tvm_dtype(self.dtype, self.lanes):
            return Vec(self.expr, dtype, lanes)
        return Vec(tirx.reinterpret(name, self.expr), dtype, lanes)

    def spread(self, lanes: int) -> Vec:
        """A scalar in every lane."""
        if self.lanes != 1:
            raise ValueError("only a scalar can be spread")
        return Vec(tirx.Broadcast(self.expr, lanes), self.dtype, lanes) if lanes != 1 else self

    def shuffle(self, lanes: Sequence[int]) -> Vec:
        """Lanes by constant number."""
        return shuffle([self], lanes)

    def part(self, start: int, lanes: int) -> Vec:
        """``lanes`` consecutive lanes from ``start``."""
        return self if (start, lanes) == (0, self.lanes) else self.shuffle(range(start, start + lanes))

    def _same(self, other: Vec | Number) -> Vec:
        if isinstance(other, Vec):
            if other.lanes == self.lanes:
                return other
            return other.spread(self.lanes)
        return const(other, self.dtype, self.lanes)

    def _binary(self, node: Any, other: Vec | Number) -> Vec:
        return Vec(node(self.expr, self._same(other).expr), self.dtype, self.lanes)

    def _operator(self, function: Any, other: Vec | Number) -> Vec:
        return Vec(function(self.expr, self._same(other).expr), self.dtype, self.lanes)


@dataclass(frozen=True, eq=False)
class Condition:
    """A truth value per lane."""

    expr: Expr
    lanes: int = 1

    def select(self, yes: Vec, no: Vec) -> Vec:
        """``yes`` where true; both sides are evaluated."""
        return Vec(tirx.Select(self.expr, yes.expr, no.expr), yes.dtype, self.lanes)


def const(value: Number, dtype: DType, lanes: int = 1) -> Vec:
    """A constant in every lane."""
    scalar = tirx.const(float(value) if dtype.is_float else int(value), tvm_dtype(dtype))
    return Vec(tirx.Broadcast(scalar, lanes) if lanes != 1 else scalar, dtype, lanes)


def constants(values: Sequence[Number], dtype: DType) -> Vec:
    """A vector of different constants."""
    if len(set(values)) == 1:
        return const(values[0], dtype, len(values))
    scalars = [const(v, dtype).expr for v in values]
    return Vec(tirx.Shuffle(scalars, list(range(len(values)))), dtype, len(values))


def scalar(index: Index, dtype: DType = S32) -> Vec:
    """An index expression as a value."""
    expr = tirx.const(index, "int32") if isinstance(index, int) else index
    return Vec(expr, S32).cast(dtype)


def shuffle(parts: Sequence[Vec], lanes: Sequence[int]) -> Vec:
    """Lanes by constant number out of the concatenation of ``parts``."""
    order = list(lanes)
    total = sum(p.lanes for p in parts)
    if len(order) > total:  # TVM wants no more results than inputs: repeat the input
        parts = list(parts) * -(-len(order) // total)
    return Vec(tirx.Shuffle([p.expr for p in parts], order), parts[0].dtype, len(order))


def concat(parts: Sequence[Vec]) -> Vec:
    """The lanes of all parts, one after the other."""
    return shuffle(parts, range(sum(p.lanes for p in parts))) if len(parts) > 1 else parts[0]


def intrinsic(name: str, dtype: DType, lanes: int, *args: Vec) -> Vec:
    """Call an LLVM intrinsic without side effects; the operand types must be exact."""
    call = tirx.call_llvm_pure_intrin(tvm_dtype(dtype, lanes), name, *(a.expr for a in args))
    return Vec(call, dtype, lanes)


def fma(a: Vec, b: Vec, c: Vec) -> Vec:
    """a*b + c rounded once. Only for targets that have it: elsewhere LLVM calls a slow library function."""
    kind = {32: "f32", 64: "f64", 16: "f16"}[a.dtype.bits]
    name = f"llvm.fma.v{a.lanes}{kind}" if a.lanes > 1 else f"llvm.fma.{kind}"
    return intrinsic(name, a.dtype, a.lanes, a, b, c)


def is_static(index: Index) -> bool:
    return isinstance(index, int)


def wide(index: Index) -> Vec:
    """An index as s64, for products that may pass 2^31."""
    return scalar(index).cast(S64)


def minimum(a: Index, b: Index) -> Index:
    """The smaller of two index expressions."""
    return min(a, b) if is_static(a) and is_static(b) else tirx.min(a, b)


def maximum(a: Index, b: Index) -> Index:
    """The larger of two index expressions."""
    return max(a, b) if is_static(a) and is_static(b) else tirx.max(a, b)


def choose(condition: Expr, yes: Index, no: Index) -> Index:
    """An index that depends on a condition."""
    if isinstance(condition, bool):
        return yes if condition else no
    return tirx.Select(condition, scalar(yes).expr, scalar(no).expr)


def both(*conditions: Expr) -> Expr:
    """Scalar conjunction of index conditions."""
    return tirx.all(*conditions)


def either(*conditions: Expr) -> Expr:
    """Scalar disjunction of index conditions."""
    return tirx.any(*conditions)
