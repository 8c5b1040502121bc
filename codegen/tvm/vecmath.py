"""Vector math on f32 (and f64): own polynomials where LLVM would call the C library lane by lane.

Errors are below 3e-7 relative for exp, log, tanh, erf, sin and cos, and below 1e-6 max(1, |x|) for GELU (which is not
NaN at infinity); infinities, NaN and subnormals come out as in the C library. Rare functions, and all transcendental
ones in f64, do call it, once per lane. The polynomials were fitted for this file (least squares with Lawson weights,
coefficients rounded to f32).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.tir import Builder, Condition, Vec, const, intrinsic, tvm_dtype
from bitwright.ir.types import F32, F64, S32, S64, DType

INF = float("inf")
_CUDA = {
    "llvm.fabs": "fabs", "llvm.copysign": "copysign", "llvm.sqrt": "sqrt", "llvm.roundeven": "rint",
    "llvm.floor": "floor", "llvm.ceil": "ceil", "llvm.trunc": "trunc",
}  # fmt: skip
_MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP = (0.4999999403953552, 0.1666651964187622, 0.04166840761899948, 0.00836889911442995, 0.0013814219273626804)
_EXPM1 = (0.4999999701976776, 0.16666541993618011, 0.04166720435023308, 0.008366691879928112, 0.0013882486382499337)
_LOG = (
    0.3333331346511841, -0.25000008940696716, 0.2000211924314499, -0.1666799634695053, 0.14219550788402557,
    -0.12405591458082199, 0.11888174712657928, -0.11675641685724258, 0.06746601313352585,
)  # fmt: skip
_SIN = (-0.1666666716337204, 0.008333329111337662, -0.0001983930415008217, 2.718046516747563e-06)
_COS = (0.0416666679084301, -0.0013888883404433727, 2.479945214872714e-05, -2.720504710396199e-07)
_TANH_P = (1.0, 0.13379716873168945, 0.003494033357128501, 2.058346217381768e-05, 1.3319047198478884e-08)
_TANH_Q = (1.0, 0.4671303331851959, 0.025871068239212036, 0.0003283090773038566, 7.762008635836537e-07)
_ERF_P = (
    1.1283791065216064, 0.19154730439186096, 0.05287506803870201, 0.0038080397062003613, 0.0002846861898433417,
    2.0259449229342863e-06,
)  # fmt: skip
_ERF_Q = (
    1.0, 0.503087043762207, 0.1145583987236023, 0.01505484152585268, 0.0011706986697390676, 3.783210922847502e-05,
)  # fmt: skip
_GELU = (
    5.125,
    (0.9576055407524109, -0.04777879640460014, -0.017769183963537216, -0.0013945632381364703, 0.0006916211568750441,
     -4.5439093810273334e-05),
)  # fmt: skip
_GELU_TANH = (
    4.975,
    (0.957603394985199, -0.04775257781147957, -0.017878925427794456, -0.0011243110056966543, 0.0004301982998000397,
     0.0001838060125010088, -0.00012260176299605519, 2.566555303928908e-05, -1.843717882366036e-06),
)  # fmt: skip


def keep(b: Builder, x: Vec) -> Vec:
    """Evaluate ``x`` once, in a register; constants, variables and what is in a register already stay as they are."""
    kind = type(x.expr).__name__
    if kind in ("Var", "IntImm", "FloatImm"):
        return x
    if kind == "BufferLoad" and [int(n) for n in x.expr.buffer.shape] == [1]:
        return x
    return b.register(x.dtype, x.lanes, x).get()


def both(a: Condition, b: Condition) -> Condition:
    """a and b."""
    return Condition(tirx.And(a.expr, b.expr), a.lanes)


def either(a: Condition, b: Condition) -> Condition:
    """a or b."""
    return Condition(tirx.Or(a.expr, b.expr), a.lanes)


def polynomial(x: Vec, coefficients: Sequence[float]) -> Vec:
    """Horner's rule, constant term first."""
    y = const(coefficients[-1], x.dtype, x.lanes)
    for c in reversed(coefficients[:-1]):
        y = y * x + c
    return y


def llvm_name(name: str, dtype: DType, lanes: int) -> str:
    """An overloaded intrinsic's full name: ``llvm.sqrt`` of 16 f32 is ``llvm.sqrt.v16f32``."""
    kind = f"{'f' if dtype.is_float else 'i'}{dtype.bits}"
    return f"{name}.v{lanes}{kind}" if lanes > 1 else f"{name}.{kind}"


@dataclass(frozen=True)
class VecMath:
    """Functions on vectors of f32 or f64, written through a builder for one instruction-set level."""

    b: Builder
    isa: str = "portable"

    # ---- pieces
    def keep(self, x: Vec) -> Vec:
        """Evaluate once: a register, because TVM substitutes pure bindings back wherever they occur."""
        return keep(self.b, x)

    def call(self, name: str, *args: Vec) -> Vec:
        """An LLVM intrinsic overloaded on its operands' type; in CUDA C++ the function that computes the same."""
        x = args[0]
        if self.isa == "cuda":
            return self.libm(_CUDA[name], *args)
        return intrinsic(llvm_name(name, x.dtype, x.lanes), x.dtype, x.lanes, *args)

    def libm(self, name: str, *args: Vec) -> Vec:
        """The C library's function, lane by lane."""
        first = args[0]
        name, kind = name + ("f" if first.dtype == F32 else ""), tvm_dtype(first.dtype)
        if first.lanes == 1:
            return Vec(tirx.call_pure_extern(kind, name, *(a.expr for a in args)), first.dtype)
        args = tuple(self.keep(a) for a in args)
        lanes = [
            tirx.call_pure_extern(kind, name, *(tirx.Shuffle([a.expr], [i]) for a in args)) for i in range(first.lanes)
        ]
        return Vec(tirx.Shuffle(lanes, list(range(first.lanes))), first.dtype, first.lanes)

    def fence(self, x: Vec) -> Vec:
        """The value as it is, rounded: a product behind it is not contracted into a fused multiply-add."""
        return self.call("llvm.arithmetic.fence", x) if self.isa != "cuda" else x  # compiled without contraction

    def number(self, x: Vec) -> Condition:
        """True where ``x`` is not NaN."""
        x = self.keep(x)
        if self.isa == "cuda":
            top, inf = (0x7FFFFFFF, 0x7F800000) if x.dtype == F32 else ((1 << 63) - 1, 0x7FF << 52)
            return (x.bits(S32 if x.dtype == F32 else S64) & top).le(inf)
        return x.eq(self.fence(x))

    def nan(self, like: Vec) -> Vec:
        if self.isa == "cuda":
            return const(float("nan"), like.dtype, like.lanes)
        bits = const(0x7FC00000, S32, like.lanes) if like.dtype == F32 else const(0x7FF8 << 48, S64, like.lanes)
        return bits.bits(like.dtype)

    def at_most(self, x: Vec, hi: float) -> Vec:
        """min(x, hi); NaN stays."""
        x, limit = self.keep(x), const(hi, x.dtype, x.lanes)
        return limit.lt(x).select(limit, x)

    def at_least(self, x: Vec, lo: float) -> Vec:
        """max(x, lo); NaN stays."""
        x, limit = self.keep(x), const(lo, x.dtype, x.lanes)
        return limit.gt(x).select(limit, x)

    def abs(self, x: Vec) -> Vec:
        return self.call("llvm.fabs", x)

    def with_sign(self, x: Vec, sign: Vec) -> Vec:
        """|x| with the sign of ``sign``."""
        return self.call("llvm.copysign", x, sign)

    def sqrt(self, x: Vec) -> Vec:
        return self.call("llvm.sqrt", x)

    # ---- rounding
    def round(self, x: Vec) -> Vec:
        """To the nearest integer, ties to even."""
        if self.isa != "portable":
            return self.call("llvm.roundeven", x)
        x = self.keep(x)
        step = self.with_sign(const(8388608.0 if x.dtype == F32 else 2.0**52, x.dtype, x.lanes), x)
        near = self.with_sign(self.fence(x + step) - step, x)
        return self.abs(x).lt(const(8388608.0 if x.dtype == F32 else 2.0**52, x.dtype, x.lanes)).select(near, x)

    def floor(self, x: Vec) -> Vec:
        if self.isa != "portable":
            return self.call("llvm.floor", x)
        x = self.keep(x)
        near = self.keep(self.round(x))
        return self.with_sign(near.gt(x).select(near - 1.0, near), x)

    def ceil(self, x: Vec) -> Vec:
        return self.call("llvm.ceil", x) if self.isa != "portable" else self.negate(self.floor(self.negate(x)))

    def trunc(self, x: Vec) -> Vec:
        if self.isa != "portable":
            return self.call("llvm.trunc", x)
        x = self.keep(x)
        return self.with_sign(self.floor(self.abs(x)), x)

    def negate(self, x: Vec) -> Vec:
        """-x, the sign of zero included."""
        kind = S32 if x.dtype == F32 else S64
        return (x.bits(kind) ^ (-(1 << (kind.bits - 1)))).bits(x.dtype)

    # ---- exponentials
    def _reduce(self, x: Vec) -> tuple[Vec, Vec]:
        """x = n ln 2 + r: (n + magic, r) for |n| < 2^22."""
        z = self.keep(x * 1.44269504088896341 + _MAGIC)
        n = self.keep(z - _MAGIC)
        return z, self.keep((x - n * _LN2_HIGH) - n * _LN2_LOW)

    def _scale(self, p: Vec, z: Vec) -> Vec:
        """p * 2^n for z = n + magic, |n| < 252; overflow and subnormal results are right."""
        if self.isa == "avx512-vnni" and p.lanes in (4, 8, 16):
            return self.scale(p, z - _MAGIC)
        n = self.keep(z.bits(S32) - 0x4B400000)
        half = self.keep(n >> 1)
        return p * ((half + 127) << 23).bits(F32) * ((n - half + 127) << 23).bits(F32)

    def scale(self, p: Vec, n: Vec) -> Vec:
        """p * 2^n for a whole n, by AVX-512's vscalefps on 4, 8 or 16 lanes."""
        name = f"llvm.x86.avx512.mask.scalef.ps.{32 * p.lanes}"
        mask = tirx.const(-1, "int16" if p.lanes == 16 else "int8")
        extra = [tirx.const(4, "int32")] if p.lanes == 16 else []
        call = tirx.call_llvm_pure_intrin(tvm_dtype(F32, p.lanes), name, p.expr, n.expr, p.expr, mask, *extra)
        return Vec(call, F32, p.lanes)

    def exp(self, x: Vec) -> Vec:
        if x.dtype == F64:
            return self.libm("exp", x)
        x = self.keep(self.at_least(self.at_most(x, 89.0), -104.0))
        z, r = self._reduce(x)
        p = self.keep(polynomial(r, _EXP) * (r * r) + r + 1.0)
        return self._scale(p, z)

    def expm1(self, x: Vec) -> Vec:
        if x.dtype == F64:
            return self.libm("expm1", x)
        x = self.keep(x)
        near = self.keep(self.at_least(self.at_most(x, 89.0), -20.0))
        z, r = self._reduce(near)
        e = self.keep(r + (r * r) * polynomial(r, _EXPM1))
        half = self.keep(((z.bits(S32) - (0x4B400000 - 126)) << 23).bits(F32))  # 2^(n-1)
        big = (half * e + (half - 0.5)) * 2.0
        return self.abs(x).lt(1e-20).select(x, big)

    def sigmoid(self, x: Vec) -> Vec:
        return const(1.0, x.dtype, x.lanes) / (self.exp(self.negate(x)) + 1.0)

    def silu(self, x: Vec) -> Vec:
        x = self.keep(x)
        return x / (self.exp(self.negate(x)) + 1.0)

    def softplus(self, x: Vec) -> Vec:
        x = self.keep(x)
        return x.gt(20.0).select(x, self.log1p(self.exp(self.at_most(x, 20.0))))

    def mish(self, x: Vec) -> Vec:
        x = self.keep(x)
        e = self.keep(self.exp(self.at_most(x, 20.0)))
        n = self.keep(e * (e + 2.0))
        return x.gt(20.0).select(x, x * (n / (n + 2.0)))

    def gelu(self, x: Vec) -> Vec:
        """Within 9e-7 max(1, |x|) of the exact value."""
        x = self.keep(x)
        if x.dtype == F64:
            return x * 0.5 * (self.erf(x * math.sqrt(0.5)) + 1.0)
        return self._below_relu(x, *_GELU)

    def gelu_tanh(self, x: Vec) -> Vec:
        """Within 6e-7 max(1, |x|) of the exact value."""
        x = self.keep(x)
        if x.dtype == F64:
            twice = (x + x * x * x * 0.044715) * (2.0 * math.sqrt(2.0 / math.pi))
            return x / (self.exp(self.negate(twice)) + 1.0)
        return self._below_relu(x, *_GELU_TANH)

    def _below_relu(self, x: Vec, limit: float, root: Sequence[float]) -> Vec:
        """relu(x) - a P(a)^16 for a = |x|, at most ``limit``: without a division, and with little cancellation.

        What separates the function from relu is even, and its sixteenth root nearly a parabola.
        """
        a = self.keep(self.at_most(self.abs(x), limit))
        p = self.keep(polynomial(a, root))
        for _ in range(4):
            p = self.keep(p * p)
        return self.at_least(x, 0.0) - a * p

    # ---- logarithms
    def log(self, x: Vec) -> Vec:
        if x.dtype == F64:
            return self.libm("log", x)
        x = self.keep(x)
        tiny = x.lt(1.17549435e-38)
        y = self.keep(tiny.select(x * 8388608.0, x).bits(S32))
        e = self.keep((y - 0x3F3504F3) >> 23)
        f = self.keep((y - (e << 23)).bits(F32) - 1.0)
        n = self.keep(e.cast(F32) + tiny.select(const(-23.0, F32, x.lanes), const(0.0, F32, x.lanes)))
        small = polynomial(f, _LOG) * (f * f * f) - f * f * 0.5 + n * _LN2_LOW
        result = x.lt(INF).select(n * _LN2_HIGH + (f + small), x)
        zero = x.eq(0.0).select(const(-INF, F32, x.lanes), self.nan(x))
        return x.gt(0.0).select(result, zero)

    def log1p(self, x: Vec) -> Vec:
        if x.dtype == F64:
            return self.libm("log1p", x)
        x = self.keep(x)
        u = self.keep(self.fence(x + 1.0))
        lost = self.keep(x - self.fence(u - 1.0))
        fixed = self.log(u) + both(u.gt(0.0), u.lt(INF)).select(lost / u, const(0.0, F32, x.lanes))
        return self.abs(x).lt(1e-20).select(x, fixed)

    # ---- tanh, erf
    def _odd(self, x: Vec, limit: float, p: Sequence[float], q: Sequence[float]) -> Vec:
        """x P(x^2) / Q(x^2) within +-limit, exactly +-1 beyond."""
        x = self.keep(x)
        u = self.keep(x * x)
        y = x * (polynomial(u, p) / polynomial(u, q))
        return self.abs(x).ge(limit).select(self.with_sign(const(1.0, F32, x.lanes), x), y)

    def tanh(self, x: Vec) -> Vec:
        return self.libm("tanh", x) if x.dtype == F64 else self._odd(x, 9.01, _TANH_P, _TANH_Q)

    def erf(self, x: Vec) -> Vec:
        return self.libm("erf", x) if x.dtype == F64 else self._odd(x, 3.92, _ERF_P, _ERF_Q)

    # ---- circle
    def sincos(self, x: Vec) -> tuple[Vec, Vec]:
        """Sine and cosine; the argument is reduced in f64, good to about 1e8 and, with fused multiply-add, 2^52."""
        if x.dtype == F64:
            return self.libm("sin", x), self.libm("cos", x)
        wide = self.keep(x.cast(F64))
        n = self.keep(self.round(wide * 0.63661977236758134308))
        # pi/2 in three parts; the products with the first two are exact for |n| < 2^20
        r = wide - n * 1.57079632673412561417
        r = r - n * 6.07710050630396597660e-11
        r = (r - n * 2.02226624879595063154e-21).cast(F32)
        r = self.keep(self.at_least(self.at_most(r, 0.8), -0.8))  # beyond the range: wrong, but bounded
        quadrant = self.keep((n - self.floor(n * 0.25) * 4.0).cast(S32))
        u = self.keep(r * r)
        sin = self.keep(r + r * u * polynomial(u, _SIN))
        cos = self.keep(u * u * polynomial(u, _COS) - u * 0.5 + 1.0)
        swap = (quadrant & 1).eq(0)
        sign_sin = self.keep((quadrant & 2) << 30)
        sign_cos = self.keep(((quadrant + 1) & 2) << 30)
        s = (swap.select(sin, cos).bits(S32) ^ sign_sin).bits(F32)
        c = (swap.select(cos, sin).bits(S32) ^ sign_cos).bits(F32)
        finite = self.abs(x).lt(INF)
        return finite.select(s, self.nan(x)), finite.select(c, self.nan(x))

    def sin(self, x: Vec) -> Vec:
        return self.sincos(self.keep(x))[0]

    def cos(self, x: Vec) -> Vec:
        return self.sincos(self.keep(x))[1]

    def tan(self, x: Vec) -> Vec:
        if x.dtype == F64:
            return self.libm("tan", x)
        s, c = self.sincos(self.keep(x))
        return s / c

    # ---- powers
    def pow(self, x: Vec, y: Vec) -> Vec:
        """x^y; for f32 as exp(y log |x|) in f64."""
        if x.dtype == F64:
            return self.libm("pow", x, y)
        return _pow(self, self.keep(x), self.keep(y))


def _pow(m: VecMath, x: Vec, y: Vec) -> Vec:
    save, lanes = m.keep, x.lanes
    # log |x|: f32 bits give exponent and mantissa (subnormals scaled first), the rest is in f64
    ax = save(m.abs(x))
    tiny = ax.lt(1.17549435e-38)
    bits = save(tiny.select(ax * 8388608.0, ax).bits(S32))
    e = save((bits - 0x3F3504F3) >> 23)
    mantissa = save((bits - (e << 23)).bits(F32).cast(F64))
    n = e.cast(F64) + tiny.select(const(-23.0, F32, lanes), const(0.0, F32, lanes)).cast(F64)
    s = save((mantissa - 1.0) / (mantissa + 1.0))
    u = save(s * s)
    series = polynomial(u, [2.0 / (2 * k + 1) for k in range(8)])
    t = save((n * math.log(2.0) + s * series) * y.cast(F64))
    t = save(m.at_least(m.at_most(t, 89.0), -110.0))
    # exp(t)
    k = save(m.round(t * (1.0 / math.log(2.0))))
    r = save(t - k * math.log(2.0))
    p = polynomial(r, [1.0 / math.factorial(i) for i in range(10)])
    scale = ((k.cast(S32) + 1023).cast(S64) << 52).bits(F64)
    result = save((p * scale).cast(F32))
    # special arguments, as in C
    zero, one, inf = (const(v, F32, lanes) for v in (0.0, 1.0, INF))
    whole = save(m.trunc(y))
    half = save(y * 0.5)
    odd = both(y.eq(whole), half.eq(m.trunc(half)).select(zero, one).gt(0.0))
    up = save(y.gt(0.0).select(inf, zero))  # |x| > 1 to an infinite power, inf^y
    down = save(y.gt(0.0).select(zero, inf))
    result = ax.ge(INF).select(up, ax.eq(0.0).select(down, result))
    endless = save(ax.gt(1.0).select(up, ax.lt(1.0).select(down, one)))
    result = save(m.abs(y).ge(INF).select(endless, result))
    signed = save(odd.select(m.with_sign(result, x), result))
    real = save(y.eq(whole).select(signed, either(ax.eq(0.0), ax.ge(INF)).select(result, m.nan(x))))
    result = save(x.lt(0.0).select(real, signed))
    result = save(m.number(y).select(result, y))
    result = save(m.number(x).select(result, x))
    return either(y.eq(0.0), x.eq(1.0)).select(one, result)
