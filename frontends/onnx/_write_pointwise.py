"""Writes the pointwise operators."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from bitwright.frontends.onnx._write_context import Handler, Writing, container, element
from bitwright.frontends.onnx._write_quant import clipped
from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.types import BOOL, DType

_UNARY = {
    "neg": "Neg", "abs": "Abs", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "reciprocal": "Reciprocal", "erf": "Erf",
    "tanh": "Tanh", "sigmoid": "Sigmoid", "softplus": "Softplus", "mish": "Mish", "sin": "Sin", "cos": "Cos",
    "tan": "Tan", "asin": "Asin", "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "asinh": "Asinh",
    "acosh": "Acosh", "atanh": "Atanh", "floor": "Floor", "ceil": "Ceil", "round": "Round", "sign": "Sign",
    "isnan": "IsNaN", "isinf": "IsInf", "softsign": "Softsign", "hardswish": "HardSwish", "gelu": "Gelu",
}  # fmt: skip
"""Operators that ONNX has under the same meaning."""


def _relu(w: Writing, x: str, dtype: DType) -> str:
    return w.emit("Relu", x) if dtype.is_float else clipped(w, x, container(dtype), 0, None)


def _trunc(w: Writing, x: str, _: DType) -> str:
    return w.emit("Mul", w.emit("Sign", x), w.emit("Floor", w.emit("Abs", x)))


def _not(w: Writing, x: str, dtype: DType) -> str:
    return w.emit("Not", x if dtype == BOOL else w.cast(x, BOOL))


def _near_zero(w: Writing, x: str, dtype: DType, near: str, far: str) -> str:
    """``near`` where abs(x) < 1/2, ``far`` elsewhere: each would lose digits where the other is."""
    return w.emit("Where", w.emit("Less", w.emit("Abs", x), w.literal(0.5, dtype)), near, far)


def _expm1(w: Writing, x: str, dtype: DType) -> str:
    """2 t / (1 - t) with t = tanh(x/2) near zero."""
    one, two = w.literal(1, dtype), w.literal(2, dtype)
    t = w.emit("Tanh", w.emit("Div", x, two))
    near = w.emit("Div", w.emit("Mul", two, t), w.emit("Sub", one, t))
    return _near_zero(w, x, dtype, near, w.emit("Sub", w.emit("Exp", x), one))


def _log1p(w: Writing, x: str, dtype: DType) -> str:
    """2 atanh(x / (2 + x)) near zero."""
    one, two = w.literal(1, dtype), w.literal(2, dtype)
    near = w.emit("Mul", two, w.emit("Atanh", w.emit("Div", x, w.emit("Add", two, x))))
    return _near_zero(w, x, dtype, near, w.emit("Log", w.emit("Add", one, x)))


_SPELLED: dict[str, Callable[[Writing, str, DType], str]] = {
    "relu": _relu, "trunc": _trunc, "not": _not, "expm1": _expm1, "log1p": _log1p,
    "rsqrt": lambda w, x, _: w.emit("Reciprocal", w.emit("Sqrt", x)),
    "silu": lambda w, x, _: w.emit("Mul", x, w.emit("Sigmoid", x)),
    "bitnot": lambda w, x, d: w.emit("Not" if d == BOOL else "BitwiseNot", x),
    "hardsigmoid": lambda w, x, _: w.emit("HardSigmoid", x, alpha=1 / 6, beta=0.5),
    "gelu_tanh": lambda w, x, _: w.emit("Gelu", x, approximate="tanh"),
    "square": lambda w, x, _: w.emit("Mul", x, x),
}  # fmt: skip


def unary(w: Writing, n: Node, op: ops.Unary) -> str:
    """A node of that name, or its definition."""
    x = w.name(n.inputs[0])
    return w.emit(_UNARY[op.fn], x) if op.fn in _UNARY else _SPELLED[op.fn](w, x, w.type(n.inputs[0]).dtype)


# --- two operands -------------------------------------------------------------------------------------------------

_BINARY = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow", "min": "Min", "max": "Max",
    "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual",
    "bitand": "BitwiseAnd", "bitor": "BitwiseOr", "bitxor": "BitwiseXor",
}  # fmt: skip
_LOGICAL = {"and": "And", "or": "Or", "xor": "Xor"}
_ON_BOOL = {
    "add": "Or", "max": "Or", "mul": "And", "min": "And", "bitand": "And", "bitor": "Or", "bitxor": "Xor",
    "ne": "Xor", "eq": "Equal",
}  # fmt: skip


def _mod(w: Writing, a: str, b: str, dtype: DType) -> str:
    """The remainder with the divisor's sign; ONNX has that for integers only."""
    if not dtype.is_float:
        return w.emit("Mod", a, b)
    zero = w.literal(0, dtype)
    r = w.emit("Mod", a, b, fmod=1)
    apart = w.emit("Xor", w.emit("Less", r, zero), w.emit("Less", b, zero))
    wrong = w.emit("And", apart, w.emit("Not", w.emit("Equal", r, zero)))
    return w.emit("Where", wrong, w.emit("Add", r, b), r)


def _floordiv(w: Writing, a: str, b: str, dtype: DType) -> str:
    if dtype.is_float:
        return w.emit("Floor", w.emit("Div", a, b))
    return w.emit("Div", w.emit("Sub", a, w.emit("Mod", a, b)), b)


def binary(w: Writing, n: Node, op: ops.Binary) -> str:
    """A node of that name, or its definition."""
    dtype = w.type(n.inputs[0]).dtype
    a, b = w.names(n.inputs)
    if op.fn in _LOGICAL:
        return w.emit(_LOGICAL[op.fn], *(x if dtype == BOOL else w.cast(x, BOOL) for x in (a, b)))
    if dtype == BOOL and op.fn in _ON_BOOL:
        return w.emit(_ON_BOOL[op.fn], a, b)
    if op.fn == "ne":
        return w.emit("Not", w.emit("Equal", a, b))
    if op.fn in _BINARY:
        return w.emit(_BINARY[op.fn], a, b)
    if op.fn == "fmod":
        return w.emit("Mod", a, b, fmod=1)
    if op.fn in ("mod", "floordiv"):
        return (_mod if op.fn == "mod" else _floordiv)(w, a, b, dtype)
    if op.fn in ("shl", "shr") and dtype.kind == "uint":
        return w.emit("BitShift", a, b, direction="LEFT" if op.fn == "shl" else "RIGHT")
    w.refuse(f"ONNX has no {op.fn} of {dtype}")


# --- the rest -----------------------------------------------------------------------------------------------------


def clamp(w: Writing, n: Node, op: ops.Clamp) -> str:
    """Clip; an end that is infinite is left out."""
    dtype, x = w.type(n.inputs[0]).dtype, w.name(n.inputs[0])
    lo, hi = (None if math.isinf(v) else v for v in (op.lo, op.hi))
    if lo is None and hi is None:
        return x
    if not dtype.is_float:
        return clipped(w, x, container(dtype), *(None if v is None else int(v) for v in (lo, hi)))
    return w.emit("Clip", x, *("" if v is None else w.literal(v, dtype) for v in (lo, hi)))


def elu(w: Writing, n: Node, op: ops.Elu) -> str:
    """Elu, Selu or Celu."""
    x = w.name(n.inputs[0])
    if (op.gamma, op.beta) == (1.0, 1.0):
        return w.emit("Elu", x, alpha=op.alpha)
    if op.beta == 1.0:
        return w.emit("Selu", x, alpha=op.alpha, gamma=op.gamma)
    if op.gamma == 1.0 and op.alpha == op.beta and op.alpha > 0:
        return w.emit("Celu", x, alpha=op.alpha)
    w.refuse(f"ONNX has no elu with alpha={op.alpha}, gamma={op.gamma} and beta={op.beta}")


def cast(w: Writing, n: Node, op: ops.Cast) -> str:
    """Cast between formats that ONNX has."""
    have, want = w.type(n.inputs[0]).dtype, op.dtype
    held = container(want)
    if held != want and not (have.is_integer and have.lo >= want.lo and have.hi <= want.hi):
        w.refuse(f"ONNX has no format {want} to cast to")
    if container(have) == held:
        return w.name(n.inputs[0])
    return w.emit("Cast", w.name(n.inputs[0]), to=element(held))


TABLE: dict[type[ops.Op], Handler] = {
    ops.Unary: unary, ops.Binary: binary, ops.Clamp: clamp, ops.Elu: elu, ops.Cast: cast,
    ops.Where: lambda w, n, op: w.emit("Where", *w.names(n.inputs)),
    ops.LeakyRelu: lambda w, n, op: w.emit("LeakyRelu", w.name(n.inputs[0]), alpha=float(np.float32(op.slope))),
}  # fmt: skip
