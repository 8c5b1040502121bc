"""Torch reductions, order statistics and running sums."""

from __future__ import annotations

import math
from typing import Any

from bitwright.frontends.torch_context import Context, Handler
from bitwright.ir import ops
from bitwright.ir.types import BOOL, S64, Dim


def _axes(cx: Context, x: str, dim: Any) -> tuple[int, ...]:
    """Axes of a reduction: None and the empty list mean all."""
    if dim is None or dim == []:
        return tuple(range(cx.rank(x)))
    return tuple(sorted(cx.axis(x, d) for d in ([dim] if isinstance(dim, int) else dim)))


def _reduced(cx: Context, fn: str, x: str, axes: tuple[int, ...], keepdim: bool) -> str:
    return x if cx.rank(x) == 0 else cx.emit(ops.Reduce(fn, axes, bool(keepdim)), x)


def _reduce(fn: str) -> Handler:
    def handler(cx: Context, x: str, dim: Any = None, keepdim: bool = False, **_: Any) -> str:
        return _reduced(cx, fn, cx.cast(x, cx.out.dtype), _axes(cx, x, dim), keepdim)

    return handler


def _truth(fn: str) -> Handler:
    def handler(cx: Context, x: str, dim: Any = None, keepdim: bool = False) -> str:
        return cx.cast(_reduced(cx, fn, cx.cast(x, BOOL), _axes(cx, x, dim), keepdim), cx.out.dtype)

    return handler


def _all_axes(fn: str) -> Handler:
    def handler(cx: Context, x: str, **_: Any) -> str:
        return _reduced(cx, fn, cx.cast(x, cx.out.dtype), tuple(range(cx.rank(x))), False)

    return handler


def _arg(fn: str) -> Handler:
    def handler(cx: Context, x: str, dim: int | None = None, keepdim: bool = False) -> str:
        if dim is not None and cx.rank(x):
            return cx.emit(ops.ArgReduce(fn, cx.axis(x, dim), bool(keepdim)), x)
        y = cx.emit(ops.ArgReduce(fn, 0, False), cx.reshape(x, (_total(cx, cx.shape(x)),)))
        return cx.reshape(y, cx.out.shape)

    return handler


def _total(cx: Context, shape: tuple[Dim, ...]) -> Dim:
    symbols = [d for d in shape if isinstance(d, str)]
    if len(symbols) > 1:
        raise cx.refuse("several symbolic sizes are flattened", "name the axes to reduce")
    fixed = math.prod(d for d in shape if isinstance(d, int))
    if not symbols:
        return fixed
    factor, _, rest = symbols[0].partition("*")
    if factor.isdigit():
        return f"{fixed * int(factor)}*{rest}"
    return symbols[0] if fixed == 1 else f"{fixed}*{symbols[0]}"


def _extreme(fn: str) -> Handler:
    """max/min along one axis: values and indices."""

    def handler(cx: Context, x: str, dim: int, keepdim: bool = False) -> tuple[str, str]:
        if cx.rank(x) == 0:
            return x, cx.constant(0, S64)
        axis = cx.axis(x, dim)
        values = cx.emit(ops.Reduce(fn, (axis,), bool(keepdim)), x)
        return values, cx.emit(ops.ArgReduce(f"arg{fn}", axis, bool(keepdim)), x)

    return handler


def _variance(cx: Context, x: str, dim: Any, correction: Any, keepdim: bool) -> tuple[str, str]:
    """Variance and mean."""
    axes = _axes(cx, x, dim)
    mean = _reduced(cx, "mean", x, axes, True)
    var = _reduced(cx, "mean", cx.unary("square", cx.binary("sub", x, mean)), axes, True)
    correction = 1 if correction is None else correction
    if correction:
        n = math.prod(cx.static(cx.shape(x)[a], "an axis of an unbiased variance") for a in axes)
        var = cx.binary(
            "mul", var, cx.constant(n / max(n - correction, 0) if n > correction else math.inf, cx.dtype(x))
        )
    if keepdim:
        return var, mean
    shape = tuple(d for i, d in enumerate(cx.shape(x)) if i not in axes)
    return cx.reshape(var, shape), cx.reshape(mean, shape)


def _var(root: bool, both: bool) -> Handler:
    def handler(cx: Context, x: str, dim: Any = None, *_: Any, correction: Any = None, keepdim: bool = False) -> Any:
        var, mean = _variance(cx, x, dim, correction, keepdim)
        var = cx.unary("sqrt", var) if root else var
        return (var, mean) if both else var

    return handler


def _norm(cx: Context, x: str, ord: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> str:
    x = cx.cast(x, cx.out.dtype)
    axes, ord = _axes(cx, x, dim), 2 if ord is None else ord
    if ord in (1, 2):
        return _reduced(cx, f"l{int(ord)}", x, axes, keepdim) if cx.rank(x) else cx.unary("abs", x)
    size = cx.unary("abs", x)
    if math.isinf(ord):
        return _reduced(cx, "max" if ord > 0 else "min", size, axes, keepdim)
    if ord == 0:
        nonzero = cx.cast(cx.binary("ne", x, cx.constant(0, cx.dtype(x))), cx.dtype(x))
        return _reduced(cx, "sum", nonzero, axes, keepdim)
    total = _reduced(cx, "sum", cx.binary("pow", size, cx.constant(ord, cx.dtype(x))), axes, keepdim)
    return cx.binary("pow", total, cx.constant(1 / ord, cx.dtype(x)))


def _cumsum(cx: Context, x: str, dim: int, **_: Any) -> str:
    x = cx.cast(x, cx.out.dtype)
    return x if cx.rank(x) == 0 else cx.emit(ops.CumSum(cx.axis(x, dim)), x)


def _ordered(cx: Context, x: str, k: int, axis: int, largest: bool) -> tuple[str, ...]:
    if cx.rank(x) == 0:
        return x, cx.constant(0, S64)
    return cx.emit_all(ops.TopK(k, axis, largest), x)


def _topk(cx: Context, x: str, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[str, ...]:
    if not isinstance(k, int):
        raise cx.refuse("k is symbolic", "give top-k a fixed k")
    return _ordered(cx, x, k, cx.axis(x, dim), bool(largest))


def _sort(cx: Context, x: str, dim: int = -1, descending: bool = False, *, stable: Any = None) -> tuple[str, ...]:
    axis = cx.axis(x, dim)
    size = cx.static(cx.shape(x)[axis], "the sorted axis") if cx.rank(x) else 1
    return _ordered(cx, x, size, axis, bool(descending))


def _kth(cx: Context, x: str, k: int, dim: int = -1, keepdim: bool = False) -> tuple[str, ...]:
    axis = cx.axis(x, dim)
    parts = tuple(cx.slice(v, axis, k - 1, k) for v in _ordered(cx, x, k, axis, False))
    return parts if keepdim else tuple(cx.squeeze(v, axis) for v in parts)


def _median(cx: Context, x: str, dim: int, keepdim: bool = False) -> tuple[str, ...]:
    size = cx.static(cx.shape(x)[cx.axis(x, dim)], "the axis of a median")
    return _kth(cx, x, (size + 1) // 2, dim, keepdim)


TABLE: dict[str, Handler] = {
    **{f"aten.{fn}.{o}": _reduce(fn) for fn in ("sum", "mean") for o in ("default", "dim", "dim_IntList")},
    "aten.prod.default": _all_axes("prod"), "aten.prod.dim_int": _reduce("prod"),
    "aten.amax.default": _reduce("max"), "aten.amin.default": _reduce("min"),
    "aten.max.default": _all_axes("max"), "aten.min.default": _all_axes("min"),
    "aten.max.dim": _extreme("max"), "aten.min.dim": _extreme("min"),
    **{f"aten.{fn}.{o}": _truth(fn) for fn in ("any", "all") for o in ("default", "dim", "dims")},
    "aten.argmax.default": _arg("argmax"), "aten.argmin.default": _arg("argmin"),
    "aten.var.correction": _var(False, False), "aten.std.correction": _var(True, False),
    "aten.var_mean.correction": _var(False, True), "aten.std_mean.correction": _var(True, True),
    "aten.linalg_vector_norm.default": _norm, "aten.norm.ScalarOpt_dim": _norm, "aten.norm.Scalar": _norm,
    "aten.logsumexp.default": _reduce("logsumexp"), "aten.cumsum.default": _cumsum,
    "aten.topk.default": _topk, "aten.sort.default": _sort,
    "aten.sort.stable": lambda cx, x, stable=None, dim=-1, descending=False: _sort(cx, x, dim, descending),
    "aten.kthvalue.default": _kth, "aten.median.dim": _median,
}  # fmt: skip
