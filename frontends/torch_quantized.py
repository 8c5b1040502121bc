"""PT2E's quantize and dequantize operators."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitwright.frontends.torch_context import Context, Handler, dtype_from_torch
from bitwright.ir import ops
from bitwright.ir.types import F32, F64, S64, DType, TensorType, integer


def _narrow(low: int, high: int, dtype: DType) -> DType | None:
    """The integer format with exactly this range, when it is narrower than ``dtype``."""
    for signed in (True, False):
        for bits in range(2, dtype.bits):
            t = integer(bits, signed)
            if (t.lo, t.hi) == (low, high):
                return t
    return None


def _parameters(cx: Context, scale: Any, zero: Any, dtype: DType) -> tuple[str, str]:
    """Scale as f32 and zero point in the quantized dtype, scalars stay scalars."""
    s, z = cx.as_value(scale, F32), cx.as_value(zero, dtype)
    if cx.shape(s) == (1,):
        s, z = cx.reshape(s, ()), cx.reshape(z, ())
    return s, z


def _quantize(
    cx: Context, x: str, scale: Any, zero: Any, low: int, high: int, dtype: Any, axis: int | None, group: int = 0
) -> str:
    held = dtype_from_torch(dtype)
    target = _narrow(low, high, held) or held
    s, z = _parameters(cx, scale, zero, target)
    y = cx.emit(ops.Quantize(target, axis, group), cx.cast(x, F32), s, z)
    if (low, high) != (target.lo, target.hi):
        y = cx.emit(ops.Clamp(float(low), float(high)), y)
    return y


def _dequantize(
    cx: Context, q: str, scale: Any, zero: Any, low: int, high: int, axis: int | None, group: int = 0
) -> str:
    held = cx.dtype(q)
    narrow = _narrow(low, high, held) if held.is_integer else None
    if narrow is not None and cx.is_parameter(q):
        node = cx.b.defined_by[q]
        handle = cx.b.new_weights[node.op.ref]  # type: ignore[attr-defined]
        if int(np.min(handle.array)) >= narrow.lo and int(np.max(handle.array)) <= narrow.hi:
            q = cx.b.weight(node.op.ref, handle, TensorType(narrow, node.type.shape), origin=node.origin)  # type: ignore[attr-defined]
            held = narrow
    if zero is None:
        return cx.cast(cx.emit(ops.Dequantize(axis, group), q, cx.as_value(scale, F32)), cx.out.dtype)
    s, z = _parameters(cx, scale, zero, held)
    return cx.cast(cx.emit(ops.Dequantize(axis, group), q, s, z), cx.out.dtype)


def _quantize_tensor(cx: Context, x: str, scale: Any, zero: Any, low: int, high: int, dtype: Any, **_: Any) -> str:
    return _quantize(cx, x, scale, zero, low, high, dtype, None)


def _dequantize_tensor(cx: Context, q: str, scale: Any, zero: Any, low: int, high: int, dtype: Any, **_: Any) -> str:
    return _dequantize(cx, q, scale, zero, low, high, None)


def _quantize_channel(
    cx: Context, x: str, scale: str, zero: str, axis: int, low: int, high: int, dtype: Any, **_: Any
) -> str:
    return _quantize(cx, x, scale, zero, low, high, dtype, cx.axis(x, axis))


def _dequantize_channel(
    cx: Context, q: str, scale: str, zero: str | None, axis: int, low: int, high: int, dtype: Any, **_: Any
) -> str:
    return _dequantize(cx, q, scale, zero, low, high, cx.axis(q, axis))


def _quantize_group(
    cx: Context, x: str, scale: str, zero: str, low: int, high: int, dtype: Any, group_size: int = 128
) -> str:
    return _quantize(cx, x, scale, zero, low, high, dtype, cx.rank(x) - 1, int(group_size))


def _dequantize_group(
    cx: Context, q: str, scale: str, zero: str | None, low: int, high: int, dtype: Any, group_size: int = 128, *_: Any
) -> str:
    return _dequantize(cx, q, scale, zero, low, high, cx.rank(q) - 1, int(group_size))


def _extremes(cx: Context, x: str, axes: tuple[int, ...]) -> tuple[str, str]:
    """The lowest and highest value along some axes, zero among them."""
    wide, none = cx.cast(x, F32), cx.constant(0.0, F32)
    low, high = (cx.emit(ops.Reduce(fn, axes, len(axes) == 1), wide) for fn in ("min", "max"))
    return cx.binary("min", low, none), cx.binary("max", high, none)


def _choose(cx: Context, x: str, low: int, high: int, eps: float, dtype: Any, *_: Any) -> tuple[str, str]:
    """Scale and zero point of the whole tensor, found at run time, asymmetric."""
    least, most = _extremes(cx, x, tuple(range(cx.rank(x))))
    return _asymmetric(cx, least, most, low, high, eps)


def _asymmetric(cx: Context, least: str, most: str, low: int, high: int, eps: float) -> tuple[str, str]:
    scale = cx.binary("div", cx.binary("sub", most, least), cx.constant(float(high - low), F32))
    scale = cx.binary("max", scale, cx.constant(eps, F32))
    zero = cx.binary("sub", cx.constant(float(low), F32), cx.unary("round", cx.binary("div", least, scale)))
    return _pair(cx, scale, cx.emit(ops.Clamp(float(low), float(high)), zero))


def _pair(cx: Context, scale: str, zero: str) -> tuple[str, str]:
    """Scale and zero point in torch's types."""
    return cx.cast(cx.reshape(scale, (1,)), F64), cx.cast(cx.reshape(zero, (1,)), S64)


def _choose_symmetric(cx: Context, x: str, low: int, high: int, eps: float, dtype: Any, *_: Any) -> tuple[str, str]:
    """Scale of the whole tensor, found at run time; zero is the code 0, or the middle of unsigned codes."""
    least, most = _extremes(cx, x, tuple(range(cx.rank(x))))
    reach = cx.binary("max", cx.unary("neg", least), most)
    scale = cx.binary("div", reach, cx.constant((high - low) / 2, F32))
    middle = 0.0 if low < 0 else (high + low + 1) // 2
    return _pair(cx, cx.binary("max", scale, cx.constant(eps, F32)), cx.constant(float(middle), F32))


def _dynamic(cx: Context, *_: Any, **__: Any) -> str:
    raise cx.refuse(
        "a scale for each token is computed at run time",
        'import the float model and compile it with recipe="weight-only{bits=8 group=0}", which does the same',
    )


_FAMILIES: dict[str, Handler] = {
    "quantize_per_tensor.default": _quantize_tensor, "quantize_per_tensor.tensor": _quantize_tensor,
    "quantize_per_tensor.tensor2": _quantize_tensor, "dequantize_per_tensor.default": _dequantize_tensor,
    "dequantize_per_tensor.tensor": _dequantize_tensor, "dequantize_per_tensor.tensor2": _dequantize_tensor,
    "quantize_per_channel.default": _quantize_channel, "dequantize_per_channel.default": _dequantize_channel,
    "quantize_per_channel_group.default": _quantize_group,
    "dequantize_per_channel_group.default": _dequantize_group,
    "choose_qparams.tensor": _choose, "choose_qparams_symmetric.tensor": _choose_symmetric,
    "choose_qparams_per_token.default": _dynamic, "choose_qparams_per_token_asymmetric.default": _dynamic,
}  # fmt: skip

TABLE: dict[str, Handler] = {
    f"{space}.{name}": h for space in ("quantized_decomposed", "torchao") for name, h in _FAMILIES.items()
}
