"""Torch normalisations, softmax, pooling and interpolation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from bitwright.frontends.torch_context import TORCH, Context, Handler, per_axis
from bitwright.ir import ops


def _softmax(log: bool) -> Handler:
    def handler(cx: Context, x: str, dim: int, *_: Any, **__: Any) -> str:
        return cx.emit(ops.Softmax(cx.axis(x, dim), log), cx.cast(x, cx.out.dtype))

    return handler


def _channels(cx: Context, x: str, value: str | None, default: float) -> str:
    """A per-channel operand in x's dtype, filled in when the layer has none."""
    if value is not None:
        return cx.cast(value, cx.dtype(x))
    return cx.expand(cx.constant(default, cx.dtype(x)), (cx.shape(x)[1],))


def _batch_norm(
    cx: Context, x: str, w: str | None, b: str | None, mean: str | None, var: str | None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5, cudnn_enabled: bool = True,
) -> str:  # fmt: skip
    if mean is None or var is None:
        return _batch_statistics(cx, x, w, b, eps)
    if training:
        raise cx.refuse("batch normalisation is in training mode", "export the module in eval() mode")
    operands = [_channels(cx, x, v, d) for v, d in ((w, 1.0), (b, 0.0), (mean, 0.0), (var, 1.0))]
    return cx.emit(ops.BatchNorm(float(eps)), x, *operands)


def _batch_statistics(cx: Context, x: str, w: str | None, b: str | None, eps: float) -> str:
    """A batch norm that keeps no running statistics normalises with those of the batch."""
    axes = (0, *range(2, cx.rank(x)))
    centred = cx.binary("sub", x, cx.emit(ops.Reduce("mean", axes, True), x))
    var = cx.emit(ops.Reduce("mean", axes, True), cx.unary("square", centred))
    y = cx.binary("mul", centred, cx.unary("rsqrt", cx.binary("add", var, cx.constant(eps, cx.dtype(x)))))
    shape = (cx.shape(x)[1], *[1] * (cx.rank(x) - 2))
    y = y if w is None else cx.binary("mul", y, cx.reshape(w, shape))
    return y if b is None else cx.binary("add", y, cx.reshape(b, shape))


def _batch_norm_legit(
    cx: Context, x: str, w: str | None, b: str | None, mean: str, var: str, momentum: float, eps: float
) -> tuple[str | None, ...]:
    return _batch_norm(cx, x, w, b, mean, var, False, momentum, eps), None, None


def _batch_norm_no_stats(
    cx: Context, x: str, w: str | None, b: str | None, training: bool, momentum: float, eps: float
) -> tuple[str | None, ...]:
    return _batch_statistics(cx, x, w, b, eps), None, None


def _instance_norm(
    cx: Context, x: str, w: str | None, b: str | None, mean: str | None, var: str | None, use_input_stats: bool,
    momentum: float, eps: float, cudnn_enabled: bool = True,
) -> str:  # fmt: skip
    if not use_input_stats:
        return _batch_norm(cx, x, w, b, mean, var, False, momentum, eps)
    return _group_norm(cx, x, cx.static(cx.shape(x)[1], "the channel axis"), w, b, eps)


def _group_norm(
    cx: Context, x: str, groups: int, w: str | None = None, b: str | None = None, eps: float = 1e-5, *_: Any
) -> str:
    return cx.emit(ops.GroupNorm(int(groups), float(eps)), x, *_affine(cx, x, w, b, (cx.shape(x)[1],)))


def _affine(cx: Context, x: str, w: str | None, b: str | None, shape: Any) -> list[str]:
    dtype = cx.dtype(x)
    if b is None:
        return [] if w is None else [cx.cast(w, dtype)]
    scale = cx.expand(cx.constant(1, dtype), shape) if w is None else cx.cast(w, dtype)
    return [scale, cx.cast(b, dtype)]


def _layer_norm(
    cx: Context, x: str, shape: Any, w: str | None = None, b: str | None = None, eps: float = 1e-5, *_: Any
) -> str:
    return cx.emit(ops.LayerNorm(len(shape), float(eps)), x, *_affine(cx, x, w, b, tuple(shape)))


def _native_layer_norm(
    cx: Context, x: str, shape: Any, w: str | None, b: str | None, eps: float
) -> tuple[str | None, ...]:
    return _layer_norm(cx, x, shape, w, b, eps), None, None


def _native_group_norm(
    cx: Context, x: str, w: str | None, b: str | None, n: Any, c: Any, hw: Any, groups: int, eps: float
) -> tuple[str | None, ...]:
    return _group_norm(cx, x, groups, w, b, eps), None, None


def _rms_norm(cx: Context, x: str, shape: Any, w: str | None = None, eps: float | None = None) -> str:
    eps = torch.finfo(TORCH[cx.dtype(x)]).eps if eps is None else float(eps)
    return cx.emit(ops.RmsNorm(len(shape), eps), x, *_affine(cx, x, w, None, tuple(shape)))


# --- pooling -------------------------------------------------------------------------------------------------


def _space(cx: Context, x: str, n: int) -> tuple[str, bool]:
    return (x, False) if cx.rank(x) == n + 2 else (cx.unsqueeze(x, 0), True)


def _overhang(
    cx: Context, x: str, kernel: tuple[int, ...], stride: tuple[int, ...], pad: tuple[int, ...],
    dilation: tuple[int, ...], ceil: bool,
) -> tuple[int, ...]:  # fmt: skip
    """How far the last window of ceil mode reaches beyond the padding."""
    n = len(kernel)
    if not ceil:
        return (0,) * n
    extra = []
    for i, (size, out) in enumerate(zip(cx.shape(x)[-n:], cx.out.shape[-n:], strict=True)):
        size, out = cx.static(size, "a pooled axis in ceil mode"), cx.static(out, "a pooled axis in ceil mode")
        reach = (out - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
        extra.append(max(0, reach - size - 2 * pad[i]))
    return tuple(extra)


def _max_pool(n: int) -> Handler:
    def handler(
        cx: Context, x: str, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> str:  # fmt: skip
        kernel, pad, dilations = per_axis(kernel_size, n, 1), per_axis(padding, n, 0), per_axis(dilation, n, 1)
        strides = per_axis(stride, n, 1) if stride else kernel
        extra = _overhang(cx, x, kernel, strides, pad, dilations, ceil_mode)
        x, added = _space(cx, x, n)
        end = tuple(p + e for p, e in zip(pad, extra, strict=True))
        y = cx.emit(ops.MaxPool(kernel, strides, pad + end, dilations), x)
        return cx.squeeze(y, 0) if added else y

    return handler


def _with_indices(handler: Handler) -> Handler:
    """The same pool where torch also gives indices (refused when somebody reads them)."""
    return lambda cx, *args, **kwargs: (handler(cx, *args, **kwargs), None)


def _avg_pool(n: int) -> Handler:
    def handler(
        cx: Context, x: str, kernel_size: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> str:  # fmt: skip
        kernel, pad = per_axis(kernel_size, n, 1), per_axis(padding, n, 0)
        strides = per_axis(stride, n, 1) if stride else kernel
        extra = _overhang(cx, x, kernel, strides, pad, (1,) * n, ceil_mode)
        x, added = _space(cx, x, n)
        if divisor_override:
            begin, end = (0, 0, *pad), (0, 0, *(p + e for p, e in zip(pad, extra, strict=True)))
            x = cx.emit(ops.Pad(begin + end), x) if any(begin + end) else x
            y = cx.emit(ops.AvgPool(kernel, strides), x)
            y = cx.binary("mul", y, cx.constant(math.prod(kernel) / divisor_override, cx.dtype(y)))
        else:
            more = extra if any(extra) else ()
            y = cx.emit(ops.AvgPool(kernel, strides, pad + pad, more, bool(count_include_pad)), x)
        return cx.squeeze(y, 0) if added else y

    return handler


def _bins(size: int, out: int) -> list[tuple[int, int]]:
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


def _adaptive_avg(n: int) -> Handler:
    def handler(cx: Context, x: str, output_size: Any) -> str:
        rank, outs = cx.rank(x), cx.out.shape[-n:]
        axes = tuple(range(rank - n, rank))
        if all(o == 1 for o in outs):
            return cx.emit(ops.Reduce("mean", axes, True), x)
        sizes = [cx.static(d, "an adaptively pooled axis") for d in cx.shape(x)[-n:]]
        wanted = [cx.static(d, "an adaptively pooled axis") for d in outs]
        if sizes == wanted:
            return x
        if all(s % o == 0 for s, o in zip(sizes, wanted, strict=True)):
            kernel = tuple(s // o for s, o in zip(sizes, wanted, strict=True))
            x, added = _space(cx, x, n)
            y = cx.emit(ops.AvgPool(kernel, kernel), x)
            return cx.squeeze(y, 0) if added else y
        for axis, size, out in zip(axes, sizes, wanted, strict=True):
            matrix = np.zeros((out, size))
            for row, (a, b) in enumerate(_bins(size, out)):
                matrix[row, a:b] = 1 / (b - a)
            x = cx.along(x, matrix, axis)
        return x

    return handler


def _adaptive_max(n: int) -> Handler:
    def handler(cx: Context, x: str, output_size: Any) -> tuple[str, None]:
        rank = cx.rank(x)
        for axis, out in zip(range(rank - n, rank), cx.out.shape[-n:], strict=True):
            size = cx.static(cx.shape(x)[axis], "an adaptively pooled axis")
            parts = [
                cx.emit(ops.Reduce("max", (axis,), True), cx.slice(x, axis, a, b))
                for a, b in _bins(size, cx.static(out, "an adaptively pooled axis"))
            ]
            x = cx.concat(parts, axis)
        return x, None

    return handler


# --- interpolation -------------------------------------------------------------------------------------------


def _resize(mode: str, exact: bool = False) -> Handler:
    """Both overloads: (x, size, [align], factors) and (x, size, [align], *scales)."""

    def handler(cx: Context, x: str, output_size: Any, *rest: Any, **kwargs: Any) -> str:
        align = bool(kwargs.pop("align_corners", False))
        if mode != "nearest" and rest:
            align, rest = bool(rest[0]), rest[1:]
        factors = [*rest, *kwargs.values()]
        if len(factors) == 1 and isinstance(factors[0], (list, tuple)):
            factors = list(factors[0])
        n = cx.rank(x) - 2
        sizes = [cx.static(d, "an interpolated axis") for d in cx.shape(x)[2:]]
        outs = tuple(cx.static(d, "an interpolated axis") for d in cx.out.shape[2:])
        given = factors if len(factors) == n else [None] * n
        scales = tuple(o / s if f is None else float(f) for f, o, s in zip(given, outs, sizes, strict=True))
        if mode == "nearest":
            place, rounding = ("half_pixel", "round_prefer_ceil") if exact else ("asymmetric", "floor")
            return cx.emit(ops.Resize(outs, scales, "nearest", place, rounding), x)
        return cx.emit(ops.Resize(outs, scales, mode, "align_corners" if align else "half_pixel"), x)

    return handler


def _resize_antialiased(function: str) -> Handler:
    """Antialiased filters are separable and linear: one constant matrix per axis, read off torch itself."""

    def handler(cx: Context, x: str, output_size: Any, align_corners: bool = False, *_: Any, **__: Any) -> str:
        for axis in (2, 3):
            size = cx.static(cx.shape(x)[axis], "an interpolated axis")
            out = cx.static(cx.out.shape[axis], "an interpolated axis")
            basis = torch.eye(size, dtype=torch.float64).reshape(1, size, 1, size)
            taps = getattr(torch.ops.aten, function)(basis, [1, out], align_corners, None, None)
            x = cx.along(x, taps[0, :, 0, :].T.numpy(), axis)
        return x

    return handler


_BY_RANK = {
    name: {f"aten.{name}{n}d.default": make(n) for n in (1, 2, 3)}
    for name, make in (("max_pool", _max_pool), ("avg_pool", _avg_pool), ("adaptive_avg_pool", _adaptive_avg),
                       ("adaptive_max_pool", _adaptive_max))
}  # fmt: skip

TABLE: dict[str, Handler] = {
    **{k: h for group in _BY_RANK.values() for k, h in group.items()},
    **{f"aten.max_pool{n}d_with_indices.default": _with_indices(_max_pool(n)) for n in (1, 2, 3)},
    **{f"aten._adaptive_avg_pool{n}d.default": _adaptive_avg(n) for n in (2, 3)},
    **{f"aten.upsample_nearest{n}d.{o}": _resize("nearest") for n in (1, 2, 3) for o in ("vec", "default")},
    **{f"aten._upsample_nearest_exact{n}d.{o}": _resize("nearest", True)
       for n in (1, 2, 3) for o in ("vec", "default")},
    **{f"aten.upsample_{k}.{o}": _resize(m) for o in ("vec", "default") for k, m in (
        ("linear1d", "linear"), ("bilinear2d", "linear"), ("trilinear3d", "linear"), ("bicubic2d", "cubic"))},
    **{f"aten._upsample_{k}2d_aa.{o}": _resize_antialiased(f"_upsample_{k}2d_aa") for k in ("bilinear", "bicubic")
       for o in ("vec", "default")},
    "aten.softmax.int": _softmax(False), "aten._softmax.default": _softmax(False),
    "aten._safe_softmax.default": _softmax(False),
    "aten.log_softmax.int": _softmax(True), "aten._log_softmax.default": _softmax(True),
    "aten.batch_norm.default": _batch_norm, "aten.instance_norm.default": _instance_norm,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm_legit,
    "aten._native_batch_norm_legit.no_stats": _batch_norm_no_stats,
    "aten.layer_norm.default": _layer_norm, "aten.native_layer_norm.default": _native_layer_norm,
    "aten.group_norm.default": _group_norm, "aten.native_group_norm.default": _native_group_norm,
    "aten.rms_norm.default": _rms_norm,
}  # fmt: skip
