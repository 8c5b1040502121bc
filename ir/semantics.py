"""The one meaning of every operator, in torch. Everything else (inference, kernels, tests) is held against it.

``MEANING[type(op)](op, *tensors)`` returns one tensor or a tuple. Works on meta tensors and under autograd;
integer contractions are exact. torch is imported when this module is, and by nothing else in ``ir``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bitwright.ir import ops
from bitwright.ir.semantics_dynamic import DYNAMIC_MEANING
from bitwright.ir.semantics_index import INDEX_MEANING
from bitwright.ir.semantics_random import RANDOM_MEANING
from bitwright.ir.semantics_small_float import SMALL_FLOAT_MEANING, in_small_float
from bitwright.ir.types import BF16, DType

Tensor = torch.Tensor
Meaning = Callable[..., "Tensor | tuple[Tensor, ...]"]


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype whose tensors hold values of ``dtype``."""
    if dtype == BF16:
        return torch.bfloat16
    name = dtype.numpy.name
    result = getattr(torch, name, None)
    assert isinstance(result, torch.dtype), name
    return result


_INV_SQRT2 = 1.0 / math.sqrt(2.0)

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0), "neg": lambda x: -x, "abs": lambda x: x.abs(), "exp": torch.exp, "log": torch.log,
    "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal, "erf": torch.erf,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu, "softplus": F.softplus, "mish": F.mish,
    "sin": torch.sin, "cos": torch.cos, "tan": torch.tan, "asin": torch.asin, "acos": torch.acos,
    "atan": torch.atan, "sinh": torch.sinh, "cosh": torch.cosh, "asinh": torch.asinh, "acosh": torch.acosh,
    "atanh": torch.atanh, "floor": torch.floor, "ceil": torch.ceil, "round": torch.round, "trunc": torch.trunc,
    "sign": torch.sign, "not": torch.logical_not, "bitnot": torch.bitwise_not, "isnan": torch.isnan,
    "isinf": torch.isinf, "softsign": F.softsign, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "log1p": torch.log1p,
    "expm1": torch.expm1, "square": torch.square,
}  # fmt: skip


def _unary(op: ops.Unary, x: Tensor) -> Tensor:
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch lacks most of these: s64 holds the same bits
        return UNARY[op.fn](x.to(torch.int64)).to(x.dtype) if op.fn in ("bitnot", "neg", "square") else x
    return UNARY[op.fn](x)


def _div(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _unsigned(fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """torch lacks some integer operators for u16, u32 and u64: go through s64 (same bits, compared shifted)."""

    def wrapped(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype not in (torch.uint16, torch.uint32, torch.uint64):
            return fn(a, b)
        out = fn(a.to(torch.int64), b.to(torch.int64))
        return out if out.dtype == torch.bool else out.to(a.dtype)

    return wrapped


def _shr(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.uint64:  # logical shift of the bits held in an s64
        wide, by = a.view(torch.int64), b.to(torch.int64)
        moved = ((wide >> 1) & 0x7FFFFFFFFFFFFFFF) >> (by - 1).clamp(0, 63)
        moved = torch.where((by < 0) | (by > 63), torch.zeros_like(wide), moved)
        return torch.where(by == 0, wide, moved).view(torch.uint64)
    return _unsigned(torch.bitwise_right_shift)(a, b)


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": _unsigned(torch.add), "sub": _unsigned(torch.sub), "mul": _unsigned(torch.mul), "div": _unsigned(_div),
    "floordiv": _unsigned(lambda a, b: torch.div(a, b, rounding_mode="floor")), "pow": _unsigned(torch.pow),
    "min": _unsigned(torch.minimum), "max": _unsigned(torch.maximum), "mod": _unsigned(torch.remainder),
    "fmod": _unsigned(torch.fmod), "and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor,
    "bitand": _unsigned(torch.bitwise_and), "bitor": _unsigned(torch.bitwise_or),
    "bitxor": _unsigned(torch.bitwise_xor), "shl": _unsigned(torch.bitwise_left_shift), "shr": _shr,
    "atan2": torch.atan2, "eq": torch.eq, "ne": torch.ne, "lt": _unsigned(torch.lt), "le": _unsigned(torch.le),
    "gt": _unsigned(torch.gt), "ge": _unsigned(torch.ge),
}  # fmt: skip


def _per(value: Tensor, like: Tensor, axis: int | None, group: int = 0) -> Tensor:
    """Shape a scale or zero so that it broadcasts against ``like``: scalar, per axis, or per group of an axis."""
    if value.dim() == 0 or axis is None:
        return value
    if group:
        return value.repeat_interleave(group, dim=axis).narrow(axis, 0, like.shape[axis])
    shape = [1] * like.dim()
    shape[axis] = -1
    return value.reshape(shape)


def _quantize(op: ops.Quantize, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    s = _per(scale, x, op.axis, op.group)
    if op.dtype.is_small_float:
        return in_small_float(x.to(s.dtype) / s, op.dtype, zero)
    q = torch.round(x.to(s.dtype) / s)
    if zero is not None:
        q = q + _per(zero, x, op.axis, op.group).to(q.dtype)
    if op.dtype.is_float:
        return q.to(torch_dtype(op.dtype))
    q = torch.nan_to_num(q.to(torch.float64 if op.dtype.bits > 16 else q.dtype), nan=0.0)
    return q.clamp(op.dtype.lo, op.dtype.hi).to(torch_dtype(op.dtype))


def _dequantize(op: ops.Dequantize, q: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    s = _per(scale, q, op.axis, op.group)
    if zero is None:
        return q.to(s.dtype) * s
    z = _per(zero, q, op.axis, op.group)
    if q.is_floating_point():
        return (q.to(s.dtype) - z.to(s.dtype)) * s
    return (q.to(torch.int64) - z.to(torch.int64)).to(s.dtype) * s


def _requantize(op: ops.Requantize, acc: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    m, e = (_per(t, acc, op.axis).to(torch.int64) for t in (multiplier, shift))
    product = acc.to(torch.int64) * m
    rounded = torch.bitwise_right_shift(product + torch.bitwise_left_shift(torch.ones_like(e), e - 1), e)
    return (rounded + op.zero).clamp(op.dtype.lo, op.dtype.hi).to(torch_dtype(op.dtype))


def _saturate(op: ops.Saturate, x: Tensor) -> Tensor:
    lo = op.dtype.lo if op.lo is None else max(op.lo, op.dtype.lo)
    hi = op.dtype.hi if op.hi is None else min(op.hi, op.dtype.hi)
    return x.to(torch.int64).clamp(lo, hi).to(torch_dtype(op.dtype))


def _cast(op: ops.Cast, x: Tensor) -> Tensor:
    target = torch_dtype(op.dtype)
    if op.dtype.is_small_float:
        return in_small_float(x, op.dtype)
    if x.is_floating_point() and op.dtype.is_integer and op.dtype.bits < 64:
        return x.to(torch.int64).to(target)  # as C does on x86: through a wide integer, then wrap
    return x.to(target)


def _elu(op: ops.Elu, x: Tensor) -> Tensor:
    return torch.where(x > 0, op.gamma * x, op.gamma * op.alpha * torch.expm1(x / op.beta))


def _clamp(op: ops.Clamp, x: Tensor) -> Tensor:
    if x.is_floating_point():
        return x.clamp(op.lo, op.hi)
    lo = None if op.lo == float("-inf") else int(op.lo)
    hi = None if op.hi == float("inf") else int(op.hi)
    return x if lo is None and hi is None else x.clamp(lo, hi)


# --- contractions --------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    """f64 where f32 would lose: f16 and bf16 products accumulate in f32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _contract(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run a float contraction with at least f32 sums, back in the operand's dtype; integers exactly via f64."""

    def wrapped(op: ops.Op, *xs: Tensor) -> Tensor:
        dtype = xs[0].dtype
        if not dtype.is_floating_point:
            return fn(op, *(x.to(torch.float64) for x in xs)).round().to(torch.int64).to(dtype)
        return fn(op, *(_wide(x) for x in xs)).to(dtype)

    return wrapped


def _linear(op: ops.Op, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, w, bias)


def _matmul(op: ops.MatMul | ops.IntMatMul, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b.transpose(-1, -2) if op.transpose_b else b)


def _space(x: Tensor, last: bool) -> Tensor:
    return x.movedim(-1, 1) if last else x


def pad_space(x: Tensor, begin: tuple[int, ...], end: tuple[int, ...], value: float = 0.0) -> Tensor:
    """Pad the trailing space axes of x[N, C, *S]."""
    if not any(begin) and not any(end):
        return x
    flat = [p for b, e in zip(reversed(begin), reversed(end), strict=True) for p in (b, e)]
    return F.pad(x, flat, value=value)


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _conv(op: ops.Conv | ops.IntConv, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    x, n = _space(x, op.channels_last), w.dim() - 2
    x = pad_space(x, op.padding[:n], op.padding[n:])
    y = _CONV[n](x, w, bias, op.stride or 1, 0, op.dilation or 1, op.groups)
    return y.movedim(1, -1) if op.channels_last else y


_CONVT = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _conv_transpose(op: ops.ConvTranspose, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    n = w.dim() - 2
    extra = op.output_padding or (0,) * n
    stride, dilation = op.stride or (1,) * n, op.dilation or (1,) * n
    y = _CONVT[n](x, w, None, stride, 0, 0, op.groups, dilation)
    begin, end = op.padding[:n] or (0,) * n, op.padding[n:] or (0,) * n
    trim = [e - o for e, o in zip(end, extra, strict=True)]
    y = pad_space(y, (0,) * n, tuple(max(0, -t) for t in trim))  # output padding beyond the full result is zeros
    full = [(x.shape[2 + i] - 1) * stride[i] + dilation[i] * (w.shape[2 + i] - 1) + 1 for i in range(n)]
    for i in range(n):
        y = y.narrow(2 + i, begin[i], full[i] - begin[i] - trim[i])
    return y if bias is None else y + bias.reshape(-1, *[1] * n)


def _exact(x: Tensor, zero: int) -> Tensor:
    """Integers as f64 (products and sums stay below 2^53), shifted by the zero point."""
    return x.to(torch.float64) - zero if zero else x.to(torch.float64)


def _int(result: Tensor, acc: DType) -> Tensor:
    return result.to(torch.int64).to(torch_dtype(acc))


def _attention(op: ops.Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    dtype = q.dtype
    q, k, v = (_wide(t) for t in (q, k, v))
    if op.kv_groups > 1:
        k, v = (t.repeat_interleave(op.kv_groups, dim=-3) for t in (k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)) * op.scale
    if op.causal:
        allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + _wide(mask)
    return torch.matmul(torch.softmax(scores, -1), v).to(dtype)


# --- normalisation, pooling, reductions ----------------------------------------------------------------------


def _channel(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(1, -1, *[1] * (x.dim() - 2))


def _batch_norm(op: ops.BatchNorm, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    inverse = torch.rsqrt(var + op.eps) * scale
    return (x - _channel(mean, x)) * _channel(inverse, x) + _channel(bias, x)


def _affine(y: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def _layer_norm(op: ops.LayerNorm, x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    wide, axes = _wide(x), tuple(range(-op.axes, 0))
    centred = wide - wide.mean(axes, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + op.eps)
    return _affine(y.to(x.dtype), scale, bias)


def _rms_norm(op: ops.RmsNorm, x: Tensor, scale: Tensor | None = None) -> Tensor:
    wide, axes = _wide(x), tuple(range(-op.axes, 0))
    return _affine((wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + op.eps)).to(x.dtype), scale, None)


def _group_norm(op: ops.GroupNorm, x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    grouped = _wide(x).reshape(x.shape[0], op.groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    y = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + op.eps)).reshape(x.shape).to(x.dtype)
    return _affine(y, None if scale is None else _channel(scale, x), None if bias is None else _channel(bias, x))


def _softmax(op: ops.Softmax, x: Tensor) -> Tensor:
    return (torch.log_softmax if op.log else torch.softmax)(_wide(x), op.axis).to(x.dtype)


def _windows(x: Tensor, op: ops.MaxPool | ops.AvgPool, fill: float, extra: tuple[int, ...]) -> Tensor:
    """x[N, C, *S] -> [N, C, *outputs, window]: every pooling window as the last axis."""
    n = len(op.kernel)
    begin, end = op.padding[:n] or (0,) * n, op.padding[n:] or (0,) * n
    extra = extra or (0,) * n
    dilation = (op.dilation if isinstance(op, ops.MaxPool) else ()) or (1,) * n
    x = pad_space(x, begin, tuple(e + f for e, f in zip(end, extra, strict=True)), fill)
    for i in range(n):  # each unfold appends the window axis at the end
        reach = dilation[i] * (op.kernel[i] - 1) + 1
        x = x.unfold(2 + i, reach, op.stride[i] if op.stride else 1)[..., :: dilation[i]]
    return x.flatten(-n)


def _max_pool(op: ops.MaxPool, x: Tensor) -> Tensor:
    x = _space(x, op.channels_last)
    fill = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    y = _windows(x, op, fill, ()).amax(-1)
    return y.movedim(1, -1) if op.channels_last else y


def _avg_pool(op: ops.AvgPool, x: Tensor) -> Tensor:
    n, dtype = len(op.kernel), x.dtype
    x = _wide(_space(x, op.channels_last))
    inside = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    total = _windows(x, op, 0.0, op.extra).sum(-1)
    if op.count_padding:  # the declared padding counts, the extra of ceil mode does not
        inside = pad_space(inside, op.padding[:n] or (0,) * n, op.padding[n:] or (0,) * n, 1.0)
        plain = ops.AvgPool(op.kernel, op.stride, (), op.extra)
        count = _windows(inside, plain, 0.0, op.extra).sum(-1)
    else:
        count = _windows(inside, op, 0.0, op.extra).sum(-1)
    y = (total / count).to(dtype)
    return y.movedim(1, -1) if op.channels_last else y


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for a in sorted((a % x.dim() for a in axes), reverse=True):
        x = x.prod(a, keepdim=keep, dtype=x.dtype)
    return x


REDUCE: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "sum": lambda x, a, k: x.sum(a, keepdim=k, dtype=x.dtype),
    "mean": lambda x, a, k: x.mean(a, keepdim=k) if x.is_floating_point()
    else torch.div(x.sum(a, keepdim=k), math.prod(x.shape[i] for i in a), rounding_mode="trunc").to(x.dtype),
    "max": lambda x, a, k: x.amax(a, keepdim=k), "min": lambda x, a, k: x.amin(a, keepdim=k), "prod": _prod,
    "any": lambda x, a, k: x.any(a, keepdim=k) if x.dim() else x,
    "all": lambda x, a, k: x.all(a, keepdim=k) if x.dim() else x,
    "l1": lambda x, a, k: x.abs().sum(a, keepdim=k, dtype=x.dtype),
    "l2": lambda x, a, k: x.square().sum(a, keepdim=k).sqrt().to(x.dtype) if x.is_floating_point()
    else x.double().square().sum(a, keepdim=k).sqrt().to(x.dtype),
    "sumsq": lambda x, a, k: x.square().sum(a, keepdim=k, dtype=x.dtype),
    "logsum": lambda x, a, k: x.sum(a, keepdim=k).log().to(x.dtype),
    "logsumexp": lambda x, a, k: torch.logsumexp(x if x.is_floating_point() else x.double(), a, keepdim=k).to(x.dtype),
}  # fmt: skip


def _reduce(op: ops.Reduce, x: Tensor) -> Tensor:
    axes = tuple(a % x.dim() for a in op.axes) if x.dim() else ()
    if x.dim() and not axes:
        return x
    return REDUCE[op.fn](x, axes, op.keepdim)


def _region(op: ops.Region, *xs: Tensor) -> Tensor | tuple[Tensor, ...]:
    from bitwright.ir.interpret import run_nodes

    values = dict(zip((v.name for v in op.body.inputs), xs, strict=True))
    run_nodes(op.body, values)
    outs = tuple(values[o] for o in op.body.outputs)
    return outs[0] if len(outs) == 1 else outs


def _weight(op: ops.Op, *xs: Tensor) -> Tensor:
    raise AssertionError("weights and constants are read by the interpreter, not computed")


MEANING: dict[type[ops.Op], Meaning] = {
    ops.Weight: _weight, ops.Constant: _weight,
    ops.Unary: _unary,
    ops.Binary: lambda op, a, b: BINARY[op.fn](a, b),
    ops.Where: lambda op, c, a, b: torch.where(c, a, b),
    ops.Clamp: _clamp, ops.Elu: _elu, ops.Cast: _cast,
    ops.LeakyRelu: lambda op, x: F.leaky_relu(x, op.slope),
    ops.Quantize: _quantize, ops.Dequantize: _dequantize, ops.Requantize: _requantize, ops.Saturate: _saturate,
    ops.Linear: _contract(_linear), ops.MatMul: _contract(_matmul), ops.Conv: _contract(_conv),
    ops.ConvTranspose: _contract(_conv_transpose), ops.Attention: _attention,
    ops.IntLinear: lambda op, x, w: _int(F.linear(_exact(x, op.x_zero), _exact(w, 0)), op.acc),
    ops.IntMatMul: lambda op, a, b: _int(_matmul(op, _exact(a, op.a_zero), _exact(b, op.b_zero)), op.acc),
    ops.IntConv: lambda op, x, w: _int(_conv(op, _exact(x, op.x_zero), _exact(w, 0)), op.acc),
    ops.BatchNorm: _batch_norm, ops.LayerNorm: _layer_norm, ops.RmsNorm: _rms_norm, ops.GroupNorm: _group_norm,
    ops.Softmax: _softmax, ops.MaxPool: _max_pool, ops.AvgPool: _avg_pool, ops.Reduce: _reduce,
    ops.Region: _region,
    **DYNAMIC_MEANING,
    **INDEX_MEANING,
    **RANDOM_MEANING,
    **SMALL_FLOAT_MEANING,
}  # fmt: skip

__all__ = ["BINARY", "MEANING", "REDUCE", "UNARY", "Meaning", "torch_dtype"]


def apply(op: ops.Op, *xs: Any) -> tuple[Tensor, ...]:
    """Run an operator's meaning on tensors; always a tuple."""
    out = MEANING[type(op)](op, *xs)
    return out if isinstance(out, tuple) else (out,)
