"""Pointwise torch operators: arithmetic, comparison, activations."""

from __future__ import annotations

import math
from typing import Any

from bitwright.frontends.torch_context import Context, Handler, dtype_from_torch
from bitwright.ir import ops
from bitwright.ir.types import BOOL, F32, S64, DType


def _unary(fn: str) -> Handler:
    """Cast to the result's dtype (integers become floats where torch says so), then apply."""

    def handler(cx: Context, x: str, **_: Any) -> str:
        return cx.unary(fn, cx.cast(x, cx.out.dtype))

    return handler


def _rounding(fn: str) -> Handler:
    def handler(cx: Context, x: str, **_: Any) -> str:
        return cx.unary(fn, x) if cx.dtype(x).is_float else x

    return handler


_ON_BOOL = {"add": "or", "mul": "and", "max": "or", "min": "and"}


def _binary(fn: str) -> Handler:
    def handler(cx: Context, x: Any, y: Any, alpha: Any = 1, **_: Any) -> str:
        dtype = cx.out.dtype
        if dtype == BOOL and fn in _ON_BOOL:
            return cx.binary(_ON_BOOL[fn], cx.as_value(x, BOOL), cx.as_value(y, BOOL))
        a, b = cx.as_value(x, dtype), cx.as_value(y, dtype)
        if alpha != 1:
            b = cx.binary("mul", b, cx.as_value(alpha, dtype))
        return cx.binary(fn, a, b)

    return handler


def _rsub(cx: Context, x: Any, y: Any, alpha: Any = 1) -> str:
    result: str = _binary("sub")(cx, y, x, alpha)
    return result


def _compare(fn: str) -> Handler:
    def handler(cx: Context, x: Any, y: Any) -> str:
        return cx.binary(fn, *cx.promoted(x, y))

    return handler


def _logical(fn: str) -> Handler:
    def handler(cx: Context, x: Any, y: Any) -> str:
        return cx.binary(fn, cx.as_value(x, BOOL), cx.as_value(y, BOOL))

    return handler


def _bitwise(fn: str) -> Handler:
    def handler(cx: Context, x: Any, y: Any) -> str:
        dtype = cx.out.dtype
        return cx.binary(fn if dtype == BOOL else f"bit{fn}", cx.as_value(x, dtype), cx.as_value(y, dtype))

    return handler


def _not(cx: Context, x: str) -> str:
    return cx.unary("not", cx.cast(x, BOOL))


def _bitnot(cx: Context, x: str) -> str:
    return cx.unary("not" if cx.dtype(x) == BOOL else "bitnot", x)


def _predicate(fn: str) -> Handler:
    def handler(cx: Context, x: str) -> str:
        return cx.unary(fn, cx.cast(x, cx.dtype(x) if cx.dtype(x).is_float else F32))

    return handler


def _isfinite(cx: Context, x: str) -> str:
    x = cx.cast(x, cx.dtype(x) if cx.dtype(x).is_float else F32)
    return cx.unary("not", cx.binary("or", cx.unary("isnan", x), cx.unary("isinf", x)))


def _div_mode(cx: Context, x: Any, y: Any, rounding_mode: str | None = None) -> str:
    dtype = cx.out.dtype
    a, b = cx.as_value(x, dtype), cx.as_value(y, dtype)
    if rounding_mode == "floor":
        return cx.binary("floordiv", a, b)
    quotient = cx.binary("div", a, b)
    return cx.unary("trunc", quotient) if rounding_mode == "trunc" and dtype.is_float else quotient


_POWERS = {2: ("square",), 0.5: ("sqrt",), -0.5: ("rsqrt",), -1: ("reciprocal",), 1: ()}


def _pow_scalar(cx: Context, x: str, exponent: Any) -> str:
    dtype = cx.out.dtype
    x = cx.cast(x, dtype)
    if exponent in _POWERS and (dtype.is_float or exponent in (1, 2)):
        for fn in _POWERS[exponent]:
            x = cx.unary(fn, x)
        return x
    if exponent == 3:
        return cx.binary("mul", cx.unary("square", x), x)
    return cx.binary("pow", x, cx.as_value(exponent, dtype))


def _where(cx: Context, condition: str, x: Any, y: Any) -> str:
    dtype = cx.out.dtype
    return cx.emit(ops.Where(), cx.cast(condition, BOOL), cx.as_value(x, dtype), cx.as_value(y, dtype))


def _masked_fill(cx: Context, x: str, mask: str, value: Any) -> str:
    return _where(cx, mask, value, x)


def _clamp(cx: Context, x: str, min: Any = None, max: Any = None) -> str:
    lo, hi = (v if v is not None else d for v, d in ((min, -math.inf), (max, math.inf)))
    return cx.emit(ops.Clamp(float(lo), float(hi)), cx.cast(x, cx.out.dtype))


def _clamp_tensor(cx: Context, x: str, min: Any = None, max: Any = None) -> str:
    dtype = cx.out.dtype
    y = cx.cast(x, dtype)
    if min is not None:
        y = cx.binary("max", y, cx.as_value(min, dtype))
    return y if max is None else cx.binary("min", y, cx.as_value(max, dtype))


def _hardtanh(cx: Context, x: str, min_val: float = -1.0, max_val: float = 1.0) -> str:
    return _clamp(cx, x, min_val, max_val)


def _identity(cx: Context, x: str, *_: Any, **__: Any) -> str:
    return x


def _dropout(cx: Context, x: str, p: float = 0.5, train: bool = False) -> str:
    if train and p:
        raise cx.refuse("dropout is active", "export the module in eval() mode")
    return x


def _convert(cx: Context, x: str, *_: Any, **__: Any) -> str:
    return cx.cast(x, cx.out.dtype)


def _prims_convert(cx: Context, x: str, dtype: Any) -> str:
    return cx.cast(x, dtype_from_torch(dtype))


# --- activations -------------------------------------------------------------------------------------------


def _gelu(cx: Context, x: str, approximate: str = "none") -> str:
    return cx.unary("gelu_tanh" if approximate == "tanh" else "gelu", x)


def _leaky_relu(cx: Context, x: str, negative_slope: float = 0.01) -> str:
    return cx.emit(ops.LeakyRelu(float(negative_slope)), x)


def _rrelu(cx: Context, x: str, lower: float = 0.125, upper: float = 1 / 3, *_: Any, **__: Any) -> str:
    return cx.emit(ops.LeakyRelu((lower + upper) / 2), x)


def _elu(cx: Context, x: str, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> str:
    return cx.emit(ops.Elu(float(alpha), float(scale), 1.0 / float(input_scale)), x)


def _selu(cx: Context, x: str) -> str:
    return cx.emit(ops.Elu(1.6732632423543772848170429916717, 1.0507009873554804934193349852946), x)


def _celu(cx: Context, x: str, alpha: float = 1.0) -> str:
    return cx.emit(ops.Elu(float(alpha), 1.0, float(alpha)), x)


def _prelu(cx: Context, x: str, weight: str) -> str:
    if cx.rank(weight) == 1 and cx.rank(x) > 1:
        weight = cx.reshape(weight, (cx.shape(weight)[0], *[1] * (cx.rank(x) - 2)))
    zero = cx.constant(0, cx.dtype(x))
    return cx.emit(ops.Where(), cx.binary("gt", x, zero), x, cx.binary("mul", x, weight))


def _softplus(cx: Context, x: str, beta: float = 1.0, threshold: float = 20.0) -> str:
    if beta == 1 and threshold == 20:
        return cx.unary("softplus", x)
    dtype = cx.dtype(x)
    scaled = cx.binary("mul", x, cx.constant(beta, dtype))
    y = cx.binary("div", cx.unary("softplus", scaled), cx.constant(beta, dtype))
    return cx.emit(ops.Where(), cx.binary("gt", scaled, cx.constant(threshold, dtype)), x, y)


def _log_sigmoid(cx: Context, x: str) -> str:
    return cx.unary("neg", cx.unary("softplus", cx.unary("neg", x)))


def _glu(cx: Context, x: str, dim: int = -1) -> str:
    axis = cx.axis(x, dim)
    size = cx.static(cx.shape(x)[axis], "the gated axis")
    half = cx.slice(x, axis, 0, size // 2)
    return cx.binary("mul", half, cx.unary("sigmoid", cx.slice(x, axis, size // 2, size)))


def _threshold(cx: Context, x: str, threshold: Any, value: Any) -> str:
    dtype = cx.dtype(x)
    above = cx.binary("gt", x, cx.constant(threshold, dtype))
    return cx.emit(ops.Where(), above, x, cx.constant(value, dtype))


def _hardshrink(cx: Context, x: str, lambd: float = 0.5) -> str:
    dtype = cx.dtype(x)
    outside = cx.binary("gt", cx.unary("abs", x), cx.constant(lambd, dtype))
    return cx.emit(ops.Where(), outside, x, cx.constant(0, dtype))


def _softshrink(cx: Context, x: str, lambd: float = 0.5) -> str:
    return cx.binary("sub", x, cx.emit(ops.Clamp(-float(lambd), float(lambd)), x))


# --- small compositions --------------------------------------------------------------------------------------


def _log_base(base: float) -> Handler:
    def handler(cx: Context, x: str) -> str:
        dtype = cx.out.dtype
        return cx.binary("mul", cx.unary("log", cx.cast(x, dtype)), cx.constant(1 / math.log(base), dtype))

    return handler


def _exp2(cx: Context, x: str) -> str:
    dtype = cx.out.dtype
    return cx.binary("pow", cx.constant(2, dtype), cx.cast(x, dtype))


def _erfc(cx: Context, x: str) -> str:
    dtype = cx.out.dtype
    return cx.binary("sub", cx.constant(1, dtype), cx.unary("erf", cx.cast(x, dtype)))


def _addc(fn: str) -> Handler:
    def handler(cx: Context, x: str, a: str, b: str, value: Any = 1) -> str:
        dtype = cx.out.dtype
        product = cx.binary(fn, cx.cast(a, dtype), cx.cast(b, dtype))
        if value != 1:
            product = cx.binary("mul", product, cx.as_value(value, dtype))
        return cx.binary("add", cx.cast(x, dtype), product)

    return handler


def _lerp(cx: Context, x: str, end: str, weight: Any) -> str:
    return cx.binary("add", x, cx.binary("mul", cx.binary("sub", end, x), cx.as_value(weight, cx.dtype(x))))


def _logaddexp(cx: Context, x: str, y: str) -> str:
    high, low = cx.binary("max", x, y), cx.binary("min", x, y)
    return cx.binary("add", high, cx.unary("log1p", cx.unary("exp", cx.binary("sub", low, high))))


def _nan_to_num(cx: Context, x: str, nan: Any = None, posinf: Any = None, neginf: Any = None) -> str:
    import torch

    from bitwright.frontends.torch_context import TORCH

    dtype: DType = cx.dtype(x)
    if not dtype.is_float:
        return x
    info = torch.finfo(TORCH[dtype])
    y = cx.emit(ops.Where(), cx.unary("isnan", x), cx.constant(nan or 0.0, dtype), x)
    for bound, value in (
        (math.inf, info.max if posinf is None else posinf),
        (-math.inf, info.min if neginf is None else neginf),
    ):
        y = cx.emit(ops.Where(), cx.binary("eq", y, cx.constant(bound, dtype)), cx.constant(value, dtype), y)
    return y


def _round(cx: Context, x: str, *, decimals: int = 0) -> str:
    scale = cx.constant(10.0**decimals, cx.dtype(x))
    return cx.binary("div", cx.unary("round", cx.binary("mul", x, scale)), scale)


def _hypot(cx: Context, x: str, y: str) -> str:
    return cx.unary("sqrt", cx.binary("add", cx.unary("square", x), cx.unary("square", y)))


def _xlogy(cx: Context, x: Any, y: Any) -> str:
    dtype = cx.out.dtype
    a, b = cx.as_value(x, dtype), cx.as_value(y, dtype)
    zero = cx.constant(0, dtype)
    product = cx.emit(ops.Where(), cx.binary("eq", a, zero), zero, cx.binary("mul", a, cx.unary("log", b)))
    return cx.emit(ops.Where(), cx.unary("isnan", b), b, product)


def _signbit(cx: Context, x: str) -> str:
    """True for negative numbers and for the negative zero, whose reciprocal is -inf."""
    zero = cx.constant(0, cx.dtype(x))
    below = cx.binary("lt", x, zero)
    if not cx.dtype(x).is_float:
        return below
    negative_zero = cx.binary("and", cx.binary("eq", x, zero), cx.binary("lt", cx.unary("reciprocal", x), zero))
    return cx.binary("or", below, negative_zero)


def _copysign(cx: Context, x: str, y: Any) -> str:
    dtype = cx.out.dtype
    size = cx.unary("abs", cx.cast(x, dtype))
    return cx.emit(ops.Where(), _signbit(cx, cx.as_value(y, dtype)), cx.unary("neg", size), size)


def _copy(cx: Context, x: str, source: str, non_blocking: bool = False) -> str:
    return cx.expand(cx.cast(source, cx.dtype(x)), cx.out.shape)


def _heaviside(cx: Context, x: str, values: str) -> str:
    zero, one = cx.constant(0, cx.dtype(x)), cx.constant(1, cx.dtype(x))
    step = cx.emit(ops.Where(), cx.binary("gt", x, zero), one, zero)
    return cx.emit(ops.Where(), cx.binary("eq", x, zero), values, step)


def _one_hot(cx: Context, x: str, num_classes: int = -1) -> str:
    size = cx.shape(x)
    classes = cx.out.shape[-1]
    hot = cx.binary("eq", cx.reshape(x, (*size, 1)), cx.cast(cx.iota(classes), cx.dtype(x)))
    return cx.cast(hot, S64)


_PLAIN = (
    "relu neg abs exp log sqrt rsqrt reciprocal erf tanh sigmoid silu mish sin cos tan asin acos atan sinh cosh asinh "
    "acosh atanh hardswish hardsigmoid log1p expm1 square sign".split()
)
_ARITHMETIC = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "div", "maximum": "max", "minimum": "min", "fmax": "max",
    "fmin": "min", "remainder": "mod", "fmod": "fmod", "atan2": "atan2", "floor_divide": "floordiv",
    "bitwise_left_shift": "shl", "bitwise_right_shift": "shr", "__lshift__": "shl", "__rshift__": "shr",
}  # fmt: skip
_OVERLOADS = ("Tensor", "Scalar", "default", "Scalar_Tensor", "Tensor_Scalar")

TABLE: dict[str, Handler] = {
    **{f"aten.{fn}.default": _unary(fn) for fn in _PLAIN},
    **{f"aten.{fn}.default": _rounding(fn) for fn in ("floor", "ceil", "round", "trunc")},
    **{f"aten.{name}.{o}": _binary(fn) for name, fn in _ARITHMETIC.items() for o in _OVERLOADS},
    **{f"aten.{fn}.{o}": _compare(fn) for fn in ("eq", "ne", "lt", "le", "gt", "ge") for o in _OVERLOADS},
    **{f"aten.logical_{fn}.default": _logical(fn) for fn in ("and", "or", "xor")},
    **{f"aten.bitwise_{fn}.{o}": _bitwise(fn) for fn in ("and", "or", "xor") for o in _OVERLOADS},
    **{f"aten.__{fn}__.{o}": _bitwise(fn) for fn in ("and", "or", "xor") for o in _OVERLOADS},
    **{f"aten.{name}.default": _identity for name in (
        "alias", "clone", "contiguous", "detach", "lift_fresh", "lift_fresh_copy", "lift", "detach_copy",
        "alias_copy", "positive", "resolve_conj", "resolve_neg", "conj", "conj_physical")},
    **{f"aten.{name}.default": _dropout for name in (
        "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")},
    **{f"aten.{name}": _convert for name in ("_to_copy.default", "to.dtype", "to.device", "to.dtype_layout", "to.other",
                                             "type_as.default")},
    "prims.convert_element_type.default": _prims_convert,
    "aten.rsub.Tensor": _rsub, "aten.rsub.Scalar": _rsub, "aten.logical_not.default": _not,
    "aten.bitwise_not.default": _bitnot, "aten.isnan.default": _predicate("isnan"),
    "aten.isinf.default": _predicate("isinf"), "aten.isfinite.default": _isfinite,
    "aten.div.Tensor_mode": _div_mode, "aten.div.Scalar_mode": _div_mode,
    "aten.pow.Tensor_Scalar": _pow_scalar, "aten.pow.Tensor_Tensor": _binary("pow"), "aten.pow.Scalar": _binary("pow"),
    "aten.where.self": _where, "aten.where.ScalarOther": _where, "aten.where.ScalarSelf": _where,
    "aten.where.Scalar": _where, "aten.masked_fill.Scalar": _masked_fill, "aten.masked_fill.Tensor": _masked_fill,
    "aten.clamp.default": _clamp, "aten.clamp.Tensor": _clamp_tensor, "aten.hardtanh.default": _hardtanh,
    "aten.clamp_min.default": lambda cx, x, m: _clamp(cx, x, m, None),
    "aten.clamp_max.default": lambda cx, x, m: _clamp(cx, x, None, m),
    "aten.clamp_min.Tensor": lambda cx, x, m: _clamp_tensor(cx, x, m, None),
    "aten.clamp_max.Tensor": lambda cx, x, m: _clamp_tensor(cx, x, None, m),
    "aten.relu6.default": lambda cx, x: _clamp(cx, x, 0.0, 6.0),
    "aten.gelu.default": _gelu, "aten.leaky_relu.default": _leaky_relu, "aten.rrelu.default": _rrelu,
    "aten.elu.default": _elu, "aten.selu.default": _selu, "aten.celu.default": _celu, "aten.prelu.default": _prelu,
    "aten.softplus.default": _softplus, "aten.log_sigmoid.default": _log_sigmoid, "aten.glu.default": _glu,
    "aten.threshold.default": _threshold, "aten.hardshrink.default": _hardshrink,
    "aten.softshrink.default": _softshrink, "aten.log2.default": _log_base(2), "aten.log10.default": _log_base(10),
    "aten.exp2.default": _exp2, "aten.erfc.default": _erfc, "aten.addcmul.default": _addc("mul"),
    "aten.addcdiv.default": _addc("div"), "aten.lerp.Scalar": _lerp, "aten.lerp.Tensor": _lerp,
    "aten.logaddexp.default": _logaddexp, "aten.nan_to_num.default": _nan_to_num,
    "aten.round.decimals": _round, "aten.hypot.default": _hypot, "aten.signbit.default": _signbit,
    "aten.copysign.Tensor": _copysign, "aten.copysign.Scalar": _copysign, "aten.copy.default": _copy,
    **{f"aten.xlogy.{o}": _xlogy for o in ("Tensor", "Scalar_Self", "Scalar_Other")},
    "aten.heaviside.default": _heaviside, "aten.one_hot.default": _one_hot,
}  # fmt: skip
