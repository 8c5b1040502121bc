"""Every pointwise operator on one vector of values, with the meaning of ``ir/semantics.py``.

:func:`emit_pointwise` takes the operator and its operands as vectors of equal lanes. f16 and bf16 are computed in
f32 and rounded back after every operator; integers wrap at the width of their carrier; bool is a byte of 0 or 1.
Integer results (quantize, requantize, casts, comparisons) are exact on every target.
"""

from __future__ import annotations

from collections.abc import Callable

from bitwright.codegen.tvm.pointwise_convert import Convert
from bitwright.codegen.tvm.pointwise_int import integer_binary, integer_unary
from bitwright.codegen.tvm.tir import Builder, Condition, Vec, const
from bitwright.codegen.tvm.vecmath import INF, both
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.types import BF16, BOOL, F16, F32, F64, S64, U64, DType


class Unsupported(Exception):
    """An operator with operand types that no kernel computes; the message is the reason."""


_LIBM = frozenset("asin acos atan sinh cosh asinh acosh atanh".split())
_MATH = frozenset(
    "exp log log1p expm1 sqrt erf tanh sigmoid silu softplus mish gelu gelu_tanh sin cos tan "
    "floor ceil round trunc abs".split()
)
_BOOL = frozenset(["not", "bitnot", *ops.PREDICATES])
_INTEGER = _BOOL | frozenset("relu neg abs square sign floor ceil round trunc".split())
_BOOL_BINARY = ops.COMPARE | frozenset("and or xor add mul min max bitand bitor bitxor".split())
_EXACT_FLOAT = frozenset("floor ceil round trunc sign".split())


def needs_exact(body: Graph) -> bool:
    """Whether float products must round as the reference does: some result jumps with the last bit of a float, or is
    what integers stand for, whose bits are the same on every target.

    Then multiply and add are not contracted, so that what comes out is the reference's.
    """
    for n in body.nodes:
        floats = [body.types[x].dtype.is_float for x in n.inputs]
        if not any(floats):
            continue
        if isinstance(n.op, ops.Unary) and n.op.fn in _EXACT_FLOAT:
            return True
        if not n.type.dtype.is_float or isinstance(n.op, ops.Quantize):
            return True
        if isinstance(n.op, ops.Dequantize) and not floats[0]:
            return True
    return False


def why_unsupported(op: ops.Op, operands: list[DType]) -> str:
    """Empty when :func:`emit_pointwise` takes the operator on these formats, otherwise the reason."""
    if not isinstance(op, ops.POINTWISE):
        return f"{op.spelling} is not pointwise"
    first = operands[0]
    if first.is_float:
        return ""
    if isinstance(op, ops.Unary) and op.fn not in (_INTEGER if first != BOOL else _BOOL):
        return f"{op.fn} of {first}"
    if isinstance(op, ops.Binary) and (op.fn == "atan2" or (first == BOOL and op.fn not in _BOOL_BINARY)):
        return f"{op.fn} of {first}"
    if isinstance(op, (ops.Elu, ops.LeakyRelu)) or (isinstance(op, ops.Clamp) and first == BOOL):
        return f"{op.spelling} of {first}"
    return ""


def emit_pointwise(b: Builder, op: ops.Op, args: list[Vec], *, isa: str = "portable", exact: bool = False) -> Vec:
    """The operator on vectors. ``exact`` keeps products of floats from being fused with additions."""
    args = [Vec(a.expr, a.dtype, a.lanes) for a in args]
    if why := why_unsupported(op, [a.dtype for a in args]):
        raise Unsupported(why)
    return Pointwise(b, isa, exact).emit(op, args)


class Pointwise(Convert):
    """The operators as methods on one builder."""

    def emit(self, op: ops.Op, args: list[Vec]) -> Vec:
        table: dict[type[ops.Op], Callable[..., Vec]] = {
            ops.Unary: self.unary, ops.Binary: self.binary, ops.Where: self.where, ops.Clamp: self.clamp,
            ops.LeakyRelu: self.leaky_relu, ops.Elu: self.elu, ops.Cast: self.cast_op, ops.Quantize: self.quantize,
            ops.Dequantize: self.dequantize, ops.Requantize: self.requantize, ops.Saturate: self.saturate,
        }  # fmt: skip
        return table[type(op)](op, *args)

    def _floats(self, args: tuple[Vec, ...], compute: Callable[..., Vec]) -> Vec:
        """Compute in f32 when the format is narrower; small floats travel in f32 anyway."""
        dtype = args[0].dtype
        carrier = dtype if dtype in (F64, F16, BF16) else F32
        out = compute(*(self.keep(self.widen(a)) for a in args))
        out = self.convert(out, carrier)
        return Vec(out.expr, dtype, out.lanes)

    # ---- unary
    def unary(self, op: ops.Unary, x: Vec) -> Vec:
        if op.fn in ops.PREDICATES:
            return self._predicate(op.fn, x)
        if not x.dtype.is_float:
            return integer_unary(self.b, op.fn, self.keep(x))
        return self._floats((x,), lambda v: self._float_unary(op.fn, v))

    def _predicate(self, fn: str, x: Vec) -> Vec:
        x = self.keep(x)
        if fn == "not":
            return self.truth(self.is_true(x), flip=True)
        if not x.dtype.is_float:
            return const(0, BOOL, x.lanes)
        wide = self.keep(self.widen(x))
        if fn == "isnan":
            return self.truth(self.m.number(wide), flip=True)
        return self.truth(self.m.abs(wide).eq(INF))

    def _float_unary(self, fn: str, x: Vec) -> Vec:
        if fn in _LIBM:
            return self.m.libm(fn, x)
        if fn in _MATH:
            result: Vec = getattr(self.m, fn)(x)
            return result
        return self._simple(fn, x)

    def _simple(self, fn: str, x: Vec) -> Vec:
        one = const(1.0, x.dtype, x.lanes)
        simple: dict[str, Callable[[], Vec]] = {
            "relu": lambda: self.m.at_least(x, 0.0),
            "neg": lambda: self.m.negate(x),
            "rsqrt": lambda: one / self.m.sqrt(x),
            "reciprocal": lambda: one / x,
            "sign": lambda: x.gt(0.0).select(one, x.lt(0.0).select(const(-1.0, x.dtype, x.lanes), one - one)),
            "softsign": lambda: x / (self.m.abs(x) + 1.0),
            "hardswish": lambda: x * self._relu6(x) / 6.0,
            "hardsigmoid": lambda: self._relu6(x) / 6.0,
            "square": lambda: self.fenced(x * x),
        }
        return simple[fn]()

    def _relu6(self, x: Vec) -> Vec:
        return self.m.at_most(self.m.at_least(x + 3.0, 0.0), 6.0)

    # ---- binary
    def binary(self, op: ops.Binary, x: Vec, y: Vec) -> Vec:
        x, y = self.keep(x), self.keep(y)
        if op.fn in ("and", "or", "xor"):
            a, c = self.truth(self.is_true(x)), self.truth(self.is_true(y))
            return {"and": a & c, "or": a | c, "xor": a ^ c}[op.fn]
        if op.fn in ops.COMPARE:
            return self._compare(op.fn, self.widen(x), self.widen(y))
        if not x.dtype.is_float:
            return integer_binary(self.b, op.fn, x, y)
        return self._floats((x, y), lambda a, c: self._float_binary(op.fn, a, c))

    def _compare(self, fn: str, x: Vec, y: Vec) -> Vec:
        if x.dtype == U64 and fn not in ("eq", "ne"):
            x, y = x.bits(S64), y.bits(S64)
        x, y = self.keep(x), self.keep(y)
        if fn == "ne":  # true for NaN, which TVM's own NE is not
            return self.truth(x.eq(y), flip=True)
        test: Condition = getattr(x, fn)(y)
        return self.truth(test)

    def _float_binary(self, fn: str, x: Vec, y: Vec) -> Vec:
        simple: dict[str, Callable[[], Vec]] = {
            "add": lambda: x + y,
            "sub": lambda: x - y,
            "mul": lambda: self.fenced(x * y),
            "div": lambda: x / y,
            "min": lambda: self._extreme(x.lt(y), x, y),
            "max": lambda: self._extreme(x.gt(y), x, y),
            "pow": lambda: self._power(x, y),
            "atan2": lambda: self.m.libm("atan2", x, y),
            "fmod": lambda: self.m.libm("fmod", x, y),
            "mod": lambda: self._remainder(x, y)[1],
            "floordiv": lambda: self._floor_divide(x, y),
        }
        return simple[fn]()

    def _extreme(self, first: Condition, x: Vec, y: Vec) -> Vec:
        """x where ``first`` holds, else y; NaN where either is."""
        return self.m.number(x).select(first.select(x, y), x)

    def _power(self, x: Vec, y: Vec) -> Vec:
        known = constant_of(y)
        if known in (2.0, 3.0, 1.0, 0.5, -1.0):
            one = const(1.0, x.dtype, x.lanes)
            return {2.0: x * x, 3.0: x * x * x, 1.0: x, 0.5: self.m.sqrt(x), -1.0: one / x}[known]
        return self.m.pow(x, y)

    def _remainder(self, x: Vec, y: Vec) -> tuple[Vec, Vec]:
        """fmod and the remainder with the divisor's sign."""
        r = self.keep(self.m.libm("fmod", x, y))
        zero = const(0.0, x.dtype, x.lanes)
        other = self.truth(r.lt(0.0)) ^ self.truth(y.lt(0.0))
        wrong = both(other.ne(0), r.eq(0.0).select(zero, zero + 1.0).gt(0.0))
        return r, self.keep(wrong.select(r + y, r))

    def _floor_divide(self, x: Vec, y: Vec) -> Vec:
        r, signed = self._remainder(x, y)
        quotient = self.keep(self.m.fence(x - r) / y)
        quotient = self.keep(r.eq(signed).select(quotient, quotient - 1.0))
        low = self.keep(self.m.floor(quotient))
        low = (quotient - low).gt(0.5).select(low + 1.0, low)
        plain = self.keep(x / y)
        result = quotient.eq(0.0).select(self.m.with_sign(const(0.0, x.dtype, x.lanes), plain), low)
        return y.eq(0.0).select(plain, result)

    # ---- the rest
    def where(self, op: ops.Where, condition: Vec, x: Vec, y: Vec) -> Vec:
        return self.is_true(condition).select(x, y)

    def clamp(self, op: ops.Clamp, x: Vec) -> Vec:
        if x.dtype.is_float:
            lo, hi = op.lo, op.hi
            return self._floats((x,), lambda v: self._limit(v, min(lo, hi), hi))
        return self._clamp_integer(op, x)

    def _limit(self, x: Vec, lo: float, hi: float) -> Vec:
        x = x if lo == -INF else self.m.at_least(x, lo)
        return x if hi == INF else self.m.at_most(x, hi)

    def _clamp_integer(self, op: ops.Clamp, x: Vec) -> Vec:
        as_signed = Vec(x.bits(S64).expr, S64, x.lanes) if x.dtype == U64 else x
        least, most = carrier_range(as_signed.dtype)
        if op.lo != -INF:
            as_signed = as_signed.max(min(max(int(op.lo), least), most))
        if op.hi != INF:
            as_signed = as_signed.min(min(max(int(op.hi), least), most))
        return Vec(as_signed.bits(U64).expr, U64, x.lanes) if x.dtype == U64 else as_signed

    def leaky_relu(self, op: ops.LeakyRelu, x: Vec) -> Vec:
        return self._floats((x,), lambda v: v.gt(0.0).select(v, self.fenced(v * op.slope)))

    def elu(self, op: ops.Elu, x: Vec) -> Vec:
        def compute(v: Vec) -> Vec:
            inner = v if op.beta == 1.0 else v / op.beta
            low = self.m.expm1(inner)
            slope = op.gamma * op.alpha
            low = low if slope == 1.0 else self.fenced(low * slope)
            return v.gt(0.0).select(v if op.gamma == 1.0 else self.fenced(v * op.gamma), low)

        return self._floats((x,), compute)


def carrier_range(dtype: DType) -> tuple[int, int]:
    """Smallest and largest value of the stored integer."""
    bits = 8 * dtype.numpy.itemsize
    return (0, (1 << bits) - 1) if dtype.kind in ("uint", "bool") else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def constant_of(x: Vec) -> float | None:
    """The value of an immediate, or None."""
    expr = x.expr
    if type(expr).__name__ == "Broadcast":
        expr = expr.value
    return float(expr.value) if type(expr).__name__ in ("FloatImm", "IntImm") else None


__all__ = ["Pointwise", "Unsupported", "emit_pointwise", "needs_exact", "why_unsupported"]
