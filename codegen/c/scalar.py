"""Pointwise operators on single values as C expressions, with the meaning of ``ir/semantics.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bitwright.codegen.c.text import carried, literal
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import BOOL, F32, F64, S32, S64, U32, U64, DType

LIBM = {
    "exp": "expf", "log": "logf", "sqrt": "sqrtf", "erf": "erff", "tanh": "tanhf", "sin": "sinf", "cos": "cosf",
    "tan": "tanf", "floor": "floorf", "ceil": "ceilf", "trunc": "truncf", "log1p": "log1pf", "expm1": "expm1f",
    "sinh": "sinhf", "cosh": "coshf", "atan": "atanf", "asin": "asinf", "acos": "acosf",
}  # fmt: skip
"""The functions of ``<math.h>`` that may be called; the header lists those that are."""

_UNARY: dict[str, str] = {
    "relu": "({0} > {zero} ? {0} : {zero})",
    "neg": "(-{0})",
    "abs": "({0} < {zero} ? -{0} : {0})",
    "square": "({0} * {0})",
    "reciprocal": "({one} / {0})",
    "rsqrt": "({one} / sqrt{f}({0}))",
    "sigmoid": "({one} / ({one} + exp{f}(-{0})))",
    "silu": "({0} / ({one} + exp{f}(-{0})))",
    "softplus": "({0} > {twenty} ? {0} : log1p{f}(exp{f}({0})))",
    "softsign": "({0} / ({one} + ({0} < {zero} ? -{0} : {0})))",
    "hardswish": "({0} * bw_clamp{f}({0} + {three}, {zero}, {six}) / {six})",
    "hardsigmoid": "(bw_clamp{f}({0} + {three}, {zero}, {six}) / {six})",
    "gelu": "({0} * {half} * ({one} + erf{f}({0} * {isqrt2})))",
    "gelu_tanh": "({half} * {0} * ({one} + tanh{f}({sqrt2pi} * ({0} + {cubic} * {0} * {0} * {0}))))",
    "mish": "({0} * tanh{f}({0} > {twenty} ? {0} : log1p{f}(exp{f}({0}))))",
    "sign": "(({0} > {zero}) - ({0} < {zero}))",
    "round": "bw_round{f}({0})",
    "not": "(!{0})",
    "bitnot": "(~{0})",
}
_NUMBERS = {
    "zero": 0.0, "one": 1.0, "half": 0.5, "three": 3.0, "six": 6.0, "twenty": 20.0, "isqrt2": 0.7071067811865476,
    "sqrt2pi": 0.7978845608028654, "cubic": 0.044715,
}  # fmt: skip
_BINARY: dict[str, str] = {
    "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "min": "({0} < {1} ? {0} : {1})",
    "max": "({0} > {1} ? {0} : {1})", "and": "({0} && {1})", "or": "({0} || {1})", "xor": "(!{0} != !{1})",
    "bitand": "({0} & {1})", "bitor": "({0} | {1})", "bitxor": "({0} ^ {1})", "eq": "({0} == {1})",
    "ne": "({0} != {1})", "lt": "({0} < {1})", "le": "({0} <= {1})", "gt": "({0} > {1})", "ge": "({0} >= {1})",
    "div": "({0} / {1})",
}  # fmt: skip


class Scalar:
    """Writes one pointwise operator; ``let`` names a value that is used twice. ``used`` collects libm functions."""

    def __init__(self, let: Callable[[str, str], str], used: set[str]) -> None:
        self.let, self.used = let, used

    def apply(self, op: ops.Op, args: Sequence[str], types: Sequence[DType], out: DType) -> str:
        """The C expression; raises :class:`InvalidInput` for an operator that has none."""
        rule = _RULES.get(type(op))
        if rule is None:
            raise InvalidInput(f"the C back end has no rule for {op.spelling}")
        return rule(self, op, list(args), list(types), out)

    def _math(self, text: str, wide: bool) -> str:
        for fn in set(LIBM.values()):
            if f"{fn[:-1]}{'' if wide else 'f'}(" in text:
                self.used.add(fn[:-1] if wide else fn)
        return text

    def unary(self, op: ops.Op, args: list[str], types: list[DType], out: DType) -> str:
        assert isinstance(op, ops.Unary)
        kind = types[0]
        x = self.let(carried(kind), args[0])
        wide = kind == F64
        if op.fn in ("isnan", "isinf"):
            return f"({x} != {x})" if op.fn == "isnan" else f"({x} - {x} != {x} - {x} && {x} == {x})"
        if op.fn in _UNARY:
            numbers = {k: literal(v, kind) for k, v in _NUMBERS.items()} if kind.is_float else {"zero": "0", "one": "1"}
            try:
                text = _UNARY[op.fn].format(x, f="" if wide else "f", **numbers)
            except KeyError as e:
                raise InvalidInput(f"the C back end has no {op.fn} of {kind}") from e
            return self._math(text, wide) if op.fn != "sign" else f"({carried(kind)}){text}"
        if op.fn in LIBM and kind in (F32, F64):
            return self._math(f"{LIBM[op.fn][:-1] if wide else LIBM[op.fn]}({x})", wide)
        if not kind.is_float and op.fn in ("floor", "ceil", "trunc"):
            return x
        raise InvalidInput(f"the C back end has no {op.fn} of {kind}")

    def binary(self, op: ops.Op, args: list[str], types: list[DType], out: DType) -> str:
        assert isinstance(op, ops.Binary)
        a, b = (self.let(carried(t), x) for x, t in zip(args, types, strict=True))
        if op.fn == "pow" and types[0] in (F32, F64):
            self.used.add("powf" if types[0] == F32 else "pow")
            return f"pow{'f' if types[0] == F32 else ''}({a}, {b})"
        if op.fn not in _BINARY:
            raise InvalidInput(f"the C back end has no {op.fn} of {types[0]}")
        text = _BINARY[op.fn].format(a, b)
        return f"({carried(out)}){text}" if op.fn in ("bitand", "bitor", "bitxor") else text

    def where(self, op: ops.Op, args: list[str], types: list[DType], out: DType) -> str:
        return f"({args[0]} ? {args[1]} : {args[2]})"

    def clamp(self, op: ops.Op, args: list[str], types: list[DType], out: DType) -> str:
        assert isinstance(op, ops.Clamp)
        x = self.let(carried(types[0]), args[0])
        for bound, sign in ((op.lo, "<"), (op.hi, ">")):
            if abs(bound) != float("inf"):
                edge = literal(bound, types[0])
                x = self.let(carried(types[0]), f"({x} {sign} {edge} ? {edge} : {x})")
        return x

    def leaky(self, op: ops.Op, args: list[str], types: list[DType], out: DType) -> str:
        assert isinstance(op, ops.LeakyRelu)
        x = self.let(carried(types[0]), args[0])
        return f"({x} >= {literal(0, types[0])} ? {x} : {literal(op.slope, types[0])} * {x})"

    def elu(self, op: ops.Op, args: list[str], types: list[DType], out: DType) -> str:
        assert isinstance(op, ops.Elu)
        kind, x = types[0], self.let(carried(types[0]), args[0])
        f = "f" if kind == F32 else ""
        self.used.add(f"expm1{f}")
        below = f"{literal(op.gamma * op.alpha, kind)} * expm1{f}({x} / {literal(op.beta, kind)})"
        return f"({x} > {literal(0, kind)} ? {literal(op.gamma, kind)} * {x} : {below})"

    def cast(self, op: ops.Op, args: list[str], types: list[DType], out: DType) -> str:
        if out == BOOL:
            return f"({args[0]} != {literal(0, types[0])})"
        if out in (F32, F64, S64, U64, U32, S32):
            return f"({carried(out)})({args[0]})"
        narrow = f"({out.numpy.name}_t)({args[0]})"
        return f"(int32_t){narrow}"

    def quantize(self, op: ops.Op, args: list[str], types: list[DType], out: DType) -> str:
        f = "f" if types[0] == F32 else ""
        real = carried(types[0])
        q = f"bw_round{f}({args[0]} / {args[1]})"
        if len(args) > 2:
            q = f"({q} + ({real})({args[2]}))"
        return f"bw_to_int{f}({q}, {out.lo}, {out.hi})"

    def dequantize(self, op: ops.Op, args: list[str], types: list[DType], out: DType) -> str:
        real = carried(out)
        q = args[0] if len(args) < 3 else f"({args[0]} - {args[2]})"
        return f"(({real})({q}) * {args[1]})"

    def requantize(self, op: ops.Op, args: list[str], types: list[DType], out: DType) -> str:
        assert isinstance(op, ops.Requantize)
        lo, hi = literal(out.lo, S32), literal(out.hi, S32)
        return f"bw_requantize({args[0]}, {args[1]}, {args[2]}, {literal(op.zero, S32)}, {lo}, {hi})"

    def saturate(self, op: ops.Op, args: list[str], types: list[DType], out: DType) -> str:
        assert isinstance(op, ops.Saturate)
        lo = out.lo if op.lo is None else max(op.lo, out.lo)
        hi = out.hi if op.hi is None else min(op.hi, out.hi)
        x = self.let(carried(types[0]), args[0])
        low, high = literal(lo, types[0]), literal(hi, types[0])
        text = f"({x} < {low} ? {low} : {x} > {high} ? {high} : {x})"
        return text if carried(types[0]) == carried(out) else f"({carried(out)}){text}"


_RULES: dict[type[ops.Op], Callable[[Scalar, ops.Op, list[str], list[DType], DType], str]] = {
    ops.Unary: Scalar.unary, ops.Binary: Scalar.binary, ops.Where: Scalar.where, ops.Clamp: Scalar.clamp,
    ops.LeakyRelu: Scalar.leaky, ops.Elu: Scalar.elu, ops.Cast: Scalar.cast, ops.Quantize: Scalar.quantize,
    ops.Dequantize: Scalar.dequantize, ops.Requantize: Scalar.requantize, ops.Saturate: Scalar.saturate,
}  # fmt: skip
