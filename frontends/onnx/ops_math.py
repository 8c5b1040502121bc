"""Element-wise operators: arithmetic, comparison, logic, activations, casts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx

from bitwright.frontends.onnx.call import Call
from bitwright.frontends.onnx.reader import dtype_of_element
from bitwright.frontends.onnx.values import Val
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import BOOL, F32, S64, DType

_UNARY = {
    "Abs": "abs", "Acos": "acos", "Acosh": "acosh", "Asin": "asin", "Asinh": "asinh", "Atan": "atan",
    "Atanh": "atanh", "BitwiseNot": "bitnot", "Ceil": "ceil", "Cos": "cos", "Cosh": "cosh", "Erf": "erf",
    "Exp": "exp", "Floor": "floor", "HardSwish": "hardswish", "IsNaN": "isnan", "Log": "log", "Mish": "mish",
    "Neg": "neg", "Not": "not", "Reciprocal": "reciprocal", "Relu": "relu", "Round": "round", "Sigmoid": "sigmoid",
    "Sign": "sign", "Sin": "sin", "Sinh": "sinh", "Softplus": "softplus", "Softsign": "softsign", "Sqrt": "sqrt",
    "Tan": "tan", "Tanh": "tanh",
}  # fmt: skip
_BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "And": "and", "Or": "or", "Xor": "xor", "Equal": "eq",
    "Greater": "gt", "GreaterOrEqual": "ge", "Less": "lt", "LessOrEqual": "le", "BitwiseAnd": "bitand",
    "BitwiseOr": "bitor", "BitwiseXor": "bitxor",
}  # fmt: skip
_VARIADIC = {"Max": "max", "Min": "min", "Sum": "add"}


def _unary(fn: str) -> Callable[[Call], Val]:
    return lambda c: c.unary(fn, c.x())


def _binary(fn: str) -> Callable[[Call], Val]:
    def handler(c: Call) -> Val:
        a, b = c.x(0), c.x(1)
        if c.since < 7 and c.int_("broadcast") and b.rank:  # operator sets 1 to 6: b's axes start at ``axis``
            start = c.axis(c.int_("axis", a.rank - b.rank), a.rank)
            b = c.reshape(b, (*b.dims, *[1] * (a.rank - b.rank - start)))
        return c.binary(fn, a, b)

    return handler


def _variadic(fn: str) -> Callable[[Call], Val]:
    def handler(c: Call) -> Val:
        xs = c.all()
        out = xs[0]
        for x in xs[1:]:
            out = c.binary(fn, out, x)
        return out

    return handler


def _mean(c: Call) -> Val:
    return c.div(_variadic("add")(c), len(c.ins))


def _pow(c: Call) -> Val:
    base, exponent = c.x(0), c.x(1)
    if base.type.dtype == exponent.type.dtype:
        return c.binary("pow", base, exponent)
    if base.type.dtype.is_float:
        return c.binary("pow", base, c.cast(exponent, base.type.dtype))
    if exponent.type.dtype.is_float:
        return c.cast(c.binary("pow", c.cast(base, exponent.type.dtype), exponent), base.type.dtype)
    return c.cast(c.binary("pow", c.cast(base, S64), c.cast(exponent, S64)), base.type.dtype)


def _mod(c: Call) -> Val:
    return c.binary("fmod" if c.int_("fmod") else "mod", c.x(0), c.x(1))


def _bit_shift(c: Call) -> Val:
    direction = c.text("direction")
    if direction not in ("LEFT", "RIGHT"):
        raise InvalidInput(f"direction is {direction!r}, neither LEFT nor RIGHT")
    return c.binary("shl" if direction == "LEFT" else "shr", c.x(0), c.x(1))


def _where(c: Call) -> Val:
    return c.where(c.x(0), c.x(1), c.x(2))


def _clip(c: Call) -> Val:
    x = c.x()
    if c.since < 11:
        return c.emit(ops.Clamp(c.float_("min", -math.inf), c.float_("max", math.inf)), x)
    lo, hi = c.opt(1), c.opt(2)
    if all(v is None or v.handle is not None for v in (lo, hi)) and x.type.dtype.is_float:
        low = -math.inf if lo is None else float(c.known(lo, "min").reshape(()))
        high = math.inf if hi is None else float(c.known(hi, "max").reshape(()))
        if low <= high:
            return c.emit(ops.Clamp(low, high), x)
    x = x if lo is None else c.binary("max", x, lo)
    return x if hi is None else c.binary("min", x, hi)


def cast_to(c: Call, x: Val, dtype: DType) -> Val:
    """Cast as ONNX does: a number is true when it is not zero."""
    if dtype == BOOL and x.type.dtype != BOOL:
        return c.binary("ne", x, 0)
    return c.cast(x, dtype)


def _cast(c: Call) -> Val:
    return cast_to(c, c.x(), dtype_of_element(c.int_("to"), c.importer.origin, "Cast"))


def _cast_like(c: Call) -> Val:
    return cast_to(c, c.x(0), c.x(1).type.dtype)


def _identity(c: Call) -> object:
    return c.ins[0]


def _is_inf(c: Call) -> Val:
    x = c.x()
    both = c.unary("isinf", x)
    if c.int_("detect_negative", 1) and c.int_("detect_positive", 1):
        return both
    if not c.int_("detect_negative", 1) and not c.int_("detect_positive", 1):
        return c.binary("and", both, c.unary("not", both))
    side = c.binary("gt" if c.int_("detect_positive", 1) else "lt", x, 0)
    return c.binary("and", both, side)


def _elu(c: Call) -> Val:
    return c.emit(ops.Elu(c.float_("alpha", 1.0)), c.x())


def _selu(c: Call) -> Val:
    return c.emit(
        ops.Elu(c.float_("alpha", 1.67326319217681884765625), c.float_("gamma", 1.05070102214813232421875)), c.x()
    )


def _celu(c: Call) -> Val:
    alpha = c.float_("alpha", 1.0)
    return c.emit(ops.Elu(alpha, 1.0, alpha), c.x())


def _leaky_relu(c: Call) -> Val:
    return c.emit(ops.LeakyRelu(c.float_("alpha", 0.01)), c.x())


def _prelu(c: Call) -> Val:
    x, slope = c.x(0), c.x(1)
    if c.since < 7 and slope.rank == 1 and x.rank > 2:
        slope = c.reshape(slope, (*slope.dims, *[1] * (x.rank - 2)))
    return c.where(c.binary("lt", x, 0), c.mul(x, slope), x)


def _hard_sigmoid(c: Call) -> Val:
    alpha, beta = c.float_("alpha", 0.2), c.float_("beta", 0.5)
    return c.emit(ops.Clamp(0.0, 1.0), c.add(c.mul(c.x(), alpha), beta))


def _thresholded_relu(c: Call) -> Val:
    x = c.x()
    return c.where(c.binary("gt", x, c.float_("alpha", 1.0)), x, c.scalar(0, x.type.dtype))


def _shrink(c: Call) -> Val:
    x, bias, edge = c.x(), c.float_("bias"), c.float_("lambd", 0.5)
    inner = c.where(c.binary("gt", x, edge), c.sub(x, bias), c.scalar(0, x.type.dtype))
    return c.where(c.binary("lt", x, -edge), c.add(x, bias), inner)


def _gelu(c: Call) -> Val:
    approximate = c.text("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise InvalidInput(f"approximate is {approximate!r}, neither none nor tanh")
    return c.unary("gelu_tanh" if approximate == "tanh" else "gelu", c.x())


def _swish(c: Call) -> Val:
    x, alpha = c.x(), c.float_("alpha", 1.0)
    return c.unary("silu", x) if alpha == 1.0 else c.mul(x, c.unary("sigmoid", c.mul(x, alpha)))


def _dropout(c: Call) -> object:
    """Inference: the input, and a mask of ones."""
    x = c.x()
    c.ignore("seed", "ratio")
    training = c.opt(2) if c.since >= 12 else None
    if training is not None and bool(c.known(training, "training_mode").reshape(())):
        ratio = c.opt(1)
        if ratio is None or float(c.known(ratio, "ratio").reshape(())) != 0.0:
            raise c.refuse("dropout in training mode is random", "export the model for inference")
    if c.since < 7 and not c.int_("is_test"):
        raise c.refuse("dropout in training mode is random", "export the model for inference")
    mask_type = BOOL if c.since >= 10 else x.type.dtype
    return (x, c.expand(c.scalar(1, mask_type), x.dims)) if c.wants(1) else x


def _bit_cast(c: Call) -> Val:
    x, to = c.x(), dtype_of_element(c.int_("to"), c.importer.origin, "BitCast")
    if x.type.dtype == to:
        return x
    if x.type.dtype.kind in ("int", "uint") and to.kind in ("int", "uint") and x.type.dtype.bits == to.bits:
        return c.cast(x, to)
    if x.handle is None:
        raise c.refuse(f"reinterpreting the bits of {x.type} as {to} has no operator here")
    array = np.ascontiguousarray(x.handle.array)
    if array.dtype.itemsize != to.numpy.itemsize:
        raise c.refuse("the two formats differ in width")
    return c.literal(array.view(to.numpy), to)


def _constant(c: Call) -> Val:
    found = [
        a for a in c.node.attribute if a.name in ("value", "value_float", "value_floats", "value_int", "value_ints")
    ]
    if len(found) != 1 or len(c.node.attribute) != 1:
        names = ", ".join(a.name for a in c.node.attribute) or "nothing"
        raise c.refuse(f"a constant of {names} is not supported (tensor, number and list of numbers are)")
    a = found[0]
    c.has(a.name)
    if a.type == onnx.AttributeProto.TENSOR:
        v = c.importer.initializer(a.t)
        v.label = c.label
        return v
    kind = onnx.AttributeProto
    values: dict[int, Callable[[], tuple[object, DType]]] = {
        kind.FLOAT: lambda: (a.f, F32), kind.INT: lambda: (a.i, S64),
        kind.FLOATS: lambda: (list(a.floats), F32), kind.INTS: lambda: (list(a.ints), S64),
    }  # fmt: skip
    if a.type not in values:
        raise InvalidInput(f"attribute {a.name!r} has the wrong type")
    value, dtype = values[a.type]()
    return c.literal(value, dtype)


def _bias_gelu(c: Call) -> Val:
    return c.unary("gelu", c.add(c.x(0), c.x(1)))


def _fast_gelu(c: Call) -> Val:
    bias = c.opt(1)
    return c.unary("gelu_tanh", c.x() if bias is None else c.add(c.x(), bias))


def _quick_gelu(c: Call) -> Val:
    return c.mul(c.x(), c.unary("sigmoid", c.mul(c.x(), c.float_("alpha", 1.702))))


TABLE = {
    **{("", name): _unary(fn) for name, fn in _UNARY.items()},
    **{("", name): _binary(fn) for name, fn in _BINARY.items()},
    **{("", name): _variadic(fn) for name, fn in _VARIADIC.items()},
    ("", "Mean"): _mean, ("", "Pow"): _pow, ("", "Mod"): _mod, ("", "BitShift"): _bit_shift, ("", "Where"): _where,
    ("", "Clip"): _clip, ("", "Cast"): _cast, ("", "CastLike"): _cast_like, ("", "Identity"): _identity,
    ("", "IsInf"): _is_inf, ("", "Elu"): _elu, ("", "Selu"): _selu, ("", "Celu"): _celu,
    ("", "LeakyRelu"): _leaky_relu, ("", "PRelu"): _prelu, ("", "HardSigmoid"): _hard_sigmoid,
    ("", "ThresholdedRelu"): _thresholded_relu, ("", "Shrink"): _shrink, ("", "Gelu"): _gelu, ("", "Swish"): _swish,
    ("", "Dropout"): _dropout, ("", "BitCast"): _bit_cast, ("", "Constant"): _constant,
    ("com.microsoft", "Gelu"): _gelu, ("com.microsoft", "BiasGelu"): _bias_gelu,
    ("com.microsoft", "FastGelu"): _fast_gelu, ("com.microsoft", "QuickGelu"): _quick_gelu,
}  # fmt: skip
