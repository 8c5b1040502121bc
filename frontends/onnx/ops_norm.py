"""Normalisation, softmax, reductions, pooling."""

from __future__ import annotations

from collections.abc import Callable

from bitwright.frontends.onnx.call import Call
from bitwright.frontends.onnx.ops_contract import windows
from bitwright.frontends.onnx.symbolic import product
from bitwright.frontends.onnx.values import Val
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import BOOL, S64


def _batch_norm(c: Call) -> object:
    c.ignore("momentum", "consumed_inputs")
    x, scale, bias, mean, var = (c.x(i) for i in range(5))
    eps = c.float_("epsilon", 1e-5)
    training = c.int_("training_mode") if c.since >= 14 else (c.since < 7 and not c.int_("is_test"))
    if training and c.since < 7 and c.outputs > 1:
        raise c.refuse("batch normalisation in training mode of an old operator set")
    if training and c.since >= 14:
        return _batch_norm_training(c, x, scale, bias, mean, var)
    if c.outputs > 1:
        raise c.refuse("batch normalisation that returns statistics", "export the model for inference")
    if c.since < 9 and not c.int_("spatial", 1):
        raise c.refuse("batch normalisation per activation (spatial=0)")
    scale, bias, mean, var = (c.cast(v, x.type.dtype) for v in (scale, bias, mean, var))
    return c.emit(ops.BatchNorm(eps), x, scale, bias, mean, var)


def _batch_norm_training(c: Call, x: Val, scale: Val, bias: Val, mean: Val, var: Val) -> object:
    axes = (0, *range(2, x.rank))
    now_mean = c.reduce("mean", x, axes, keep=True)
    now_var = c.reduce("mean", c.unary("square", c.sub(x, now_mean)), axes)
    flat = c.reshape(now_mean, (x.dims[1],))
    y = c.emit(ops.BatchNorm(c.float_("epsilon", 1e-5)), x, scale, bias, flat, now_var)
    m = c.float_("momentum", 0.9)
    running = [c.add(c.mul(old, m), c.mul(new, 1 - m)) for old, new in ((mean, flat), (var, now_var))]
    return (y, *running)


def _layer_norm(c: Call) -> object:
    x, scale, bias = c.x(0), c.x(1), c.opt(2)
    axis = c.axis(c.int_("axis", -1), x.rank)
    if c.outputs > 1 or scale.shape != x.shape[axis:] or (bias is not None and bias.shape != x.shape[axis:]):
        return c.by_function_body()
    op = ops.LayerNorm(x.rank - axis, c.float_("epsilon", 1e-5))
    return c.emit(op, x, scale, *([] if bias is None else [bias]))


def _rms_norm(c: Call) -> object:
    x, scale = c.x(0), c.x(1)
    axis = c.axis(c.int_("axis", -1), x.rank)
    if scale.shape != x.shape[axis:] or scale.type.dtype != x.type.dtype:
        return c.by_function_body()
    return c.emit(ops.RmsNorm(x.rank - axis, c.float_("epsilon", 1e-5)), x, scale)


def _skip_layer_norm(rms: bool) -> Callable[[Call], object]:
    def handler(c: Call) -> object:
        x = c.add(c.x(0), c.x(1))
        scale, at = c.x(2), 3 if rms else 4
        bias = c.opt(at)
        x = x if bias is None else c.add(x, bias)
        eps, beta = c.float_("epsilon", 1e-12), None if rms else c.opt(3)
        op: ops.Op = ops.RmsNorm(1, eps) if rms else ops.LayerNorm(1, eps)
        return (c.emit(op, x, scale, *([] if beta is None else [beta])), None, None, x)[: max(1, c.outputs)]

    return handler


def _instance_norm(c: Call) -> Val:
    x, scale, bias = c.x(0), c.x(1), c.x(2)
    return c.emit(ops.GroupNorm(c.size(x, 1), c.float_("epsilon", 1e-5)), x, scale, bias)


def _group_norm(c: Call) -> object:
    x, scale, bias, groups = c.x(0), c.x(1), c.x(2), c.int_("num_groups")
    if c.since < 21 and scale.shape != x.shape[1:2]:
        each = c.size(x, 1) // max(1, groups)
        scale, bias = (c.reshape(c.expand(c.unsqueeze(v, 1), (groups, each)), (groups * each,)) for v in (scale, bias))
    return c.emit(ops.GroupNorm(groups, c.float_("epsilon", 1e-5)), x, scale, bias)


def _lrn(c: Call) -> Val:
    x, size = c.x(), c.int_("size")
    alpha, beta, bias = c.float_("alpha", 1e-4), c.float_("beta", 0.75), c.float_("bias", 1.0)
    if not 1 <= size <= 1024:
        raise InvalidInput(f"size {size}")
    square = c.unary("square", x)
    before, after = (size - 1) // 2, size // 2
    pads = [0] * (2 * x.rank)
    pads[1], pads[x.rank + 1] = before, after
    wide, channels = c.emit(ops.Pad(tuple(pads)), square), c.size(x, 1)
    total = c.slice(wide, 1, 0, channels)
    for i in range(1, size):
        total = c.add(total, c.slice(wide, 1, i, i + channels))
    scale = c.binary("pow", c.add(c.mul(total, alpha / size), bias), beta)
    return c.div(x, scale)


def _lp_normalization(c: Call) -> Val:
    x, axis, p = c.x(), c.int_("axis", -1), c.int_("p", 2)
    norm = c.reduce("l1" if p == 1 else "l2", x, (c.axis(axis, x.rank),), keep=True)
    zero = c.binary("eq", norm, 0)
    return c.where(zero, c.scalar(0, x.type.dtype), c.div(x, norm))


def _softmax(log: bool) -> Callable[[Call], Val]:
    def handler(c: Call) -> Val:
        x = c.x()
        if c.since >= 13:
            return c.emit(ops.Softmax(c.axis(c.int_("axis", -1), x.rank), log), x)
        axis = c.axis(c.int_("axis", 1), x.rank)  # older: over all axes from ``axis`` on, as a matrix
        flat = c.reshape(x, (product(x.dims[:axis]), product(x.dims[axis:])))
        return c.reshape(c.emit(ops.Softmax(1, log), flat), x.dims)

    return handler


def _hardmax(c: Call) -> Val:
    x = c.x()
    axis, shape = c.axis(c.int_("axis", -1 if c.since >= 13 else 1), x.rank), x.dims
    if c.since < 13:
        x, axis = c.reshape(x, (product(shape[:axis]), product(shape[axis:]))), 1
    best = c.emit(ops.ArgReduce("argmax", axis, True), x)
    places = c.reshape(c.iota(x.dims[axis], S64), [x.dims[axis] if i == axis else 1 for i in range(x.rank)])
    return c.reshape(c.cast(c.binary("eq", places, best), x.type.dtype), shape)


_REDUCE = {
    "ReduceSum": "sum", "ReduceMean": "mean", "ReduceMax": "max", "ReduceMin": "min", "ReduceProd": "prod",
    "ReduceL1": "l1", "ReduceL2": "l2", "ReduceLogSum": "logsum", "ReduceLogSumExp": "logsumexp",
    "ReduceSumSquare": "sumsq",
}  # fmt: skip
_NEUTRAL = {"max": float("-inf"), "min": float("inf"), "prod": 1.0, "logsum": float("-inf"), "logsumexp": float("-inf")}


def _reduce(fn: str) -> Callable[[Call], Val]:
    def handler(c: Call) -> Val:
        x = c.x()
        axes = c.ints_at("axes", 1)
        if not axes:
            if c.int_("noop_with_empty_axes"):
                return _reduce_nothing(c, fn, x)
            axes = tuple(range(x.rank))
        axes, keep = c.axes(axes, x.rank), bool(c.int_("keepdims", 1))
        if x.type.dtype == BOOL:
            return c.reduce({"max": "any", "min": "all"}[fn], x, axes, keep)
        if 0 in [x.shape[a] for a in axes]:
            return _reduce_empty(c, fn, x, axes, keep)
        return c.reduce(fn, x, axes, keep)

    return handler


def _reduce_nothing(c: Call, fn: str, x: Val) -> Val:
    """No axes: each element on its own."""
    unary = {"l1": "abs", "l2": "abs", "logsum": "log", "sumsq": "square"}
    return c.unary(unary[fn], x) if fn in unary else x


def _reduce_empty(c: Call, fn: str, x: Val, axes: tuple[int, ...], keep: bool) -> Val:
    dims = [1 if i in axes else d for i, d in enumerate(x.dims) if keep or i not in axes]
    value, dtype = _NEUTRAL.get(fn, 0.0), x.type.dtype
    if not dtype.is_float and value in (float("inf"), float("-inf")):
        value = dtype.hi if value > 0 else dtype.lo
    if fn == "mean":
        raise c.refuse("the mean of no elements is NaN")
    return c.expand(c.scalar(value, dtype), dims)


def _arg(fn: str) -> Callable[[Call], Val]:
    def handler(c: Call) -> Val:
        x, last = c.x(), bool(c.int_("select_last_index"))
        return c.emit(ops.ArgReduce(fn, c.axis(c.int_("axis"), x.rank), bool(c.int_("keepdims", 1)), last), x)

    return handler


# --- pooling ----------------------------------------------------------------------------------------------------


def _pool(c: Call, x: Val) -> tuple[tuple[int, ...], ...]:
    """kernel, stride, dilation, padding, and the further padding at the end that ceil mode needs."""
    kernel = c.ints("kernel_shape")
    if not kernel or len(kernel) > 3:
        raise c.refuse("pooling over 1 to 3 axes is supported")
    stride, dilation, pads = windows(c, x, kernel)
    n = len(kernel)
    if min(pads) < 0:
        raise c.refuse("negative padding of a pooling")
    extra = [0] * n
    for i in range(n if c.int_("ceil_mode") and c.text("auto_pad", "NOTSET") in ("NOTSET", "") else 0):
        size, reach = c.size(x, 2 + i), dilation[i] * (kernel[i] - 1) + 1
        room = size + pads[i] + pads[n + i]
        count = -(-(room - reach) // stride[i]) + 1
        if (count - 1) * stride[i] >= size + pads[i]:
            count -= 1
        extra[i] = max(0, (count - 1) * stride[i] + reach - room)
    return kernel, stride, dilation, pads, tuple(extra)


def _max_pool(c: Call) -> object:
    x = c.x()
    kernel, stride, dilation, pads, extra = _pool(c, x)
    n = len(kernel)
    pads = (*pads[:n], *(p + e for p, e in zip(pads[n:], extra, strict=True)))
    y = c.emit(ops.MaxPool(kernel, stride, pads, dilation), x)
    if not c.wants(1):
        return y
    from bitwright.frontends.onnx.ops_index import max_pool_indices

    return y, max_pool_indices(c, x, kernel, stride, dilation, pads)


def _average_pool(c: Call) -> Val:
    x = c.x()
    kernel, stride, dilation, pads, extra = _pool(c, x)
    counted = bool(c.int_("count_include_pad"))
    if set(dilation) == {1}:
        return c.emit(ops.AvgPool(kernel, stride, pads, extra, counted), x)
    return c.div(*_dilated_sums(c, x, kernel, stride, dilation, pads, extra, counted))


def window_sum(c: Call, x: Val, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...],
               pads: tuple[int, ...]) -> Val:  # fmt: skip
    """Sum over every window: a depthwise convolution with ones."""
    channels = c.size(x, 1)
    ones = c.expand(c.scalar(1, x.type.dtype), (channels, 1, *kernel))
    return c.emit(ops.Conv(stride, pads, dilation, channels), x, ones)


def _dilated_sums(c: Call, x: Val, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...],
                  pads: tuple[int, ...], extra: tuple[int, ...], counted: bool) -> tuple[Val, Val]:  # fmt: skip
    n = len(kernel)
    wide = (*pads[:n], *(p + e for p, e in zip(pads[n:], extra, strict=True)))
    inside = c.expand(c.scalar(1, x.type.dtype), (1, 1, *x.dims[2:]))
    rest = wide
    if counted:
        inside = c.emit(ops.Pad((0, 0, *pads[:n], 0, 0, *pads[n:]), 1.0), inside)
        rest = (*(0,) * n, *extra)
    return window_sum(c, x, kernel, stride, dilation, wide), window_sum(c, inside, kernel, stride, dilation, rest)


def _lp_pool(c: Call) -> Val:
    x, p = c.x(), c.int_("p", 2)
    kernel, stride, dilation, pads, extra = _pool(c, x)
    n = len(kernel)
    wide = (*pads[:n], *(a + e for a, e in zip(pads[n:], extra, strict=True)))
    total = window_sum(c, _power(c, c.unary("abs", x), p), kernel, stride, dilation, wide)
    return _root(c, total, p)


def _power(c: Call, x: Val, p: int) -> Val:
    return x if p == 1 else c.unary("square", x) if p == 2 else c.binary("pow", x, p)


def _root(c: Call, x: Val, p: int) -> Val:
    return x if p == 1 else c.unary("sqrt", x) if p == 2 else c.binary("pow", x, 1.0 / p)


def _global_pool(fn: str) -> Callable[[Call], Val]:
    return lambda c: c.reduce(fn, c.x(), tuple(range(2, c.x().rank)), keep=True)


def _global_lp_pool(c: Call) -> Val:
    x, p = c.x(), c.int_("p", 2)
    return _root(c, c.reduce("sum", _power(c, c.unary("abs", x), p), tuple(range(2, x.rank)), keep=True), p)


TABLE = {
    ("", "BatchNormalization"): _batch_norm, ("", "LayerNormalization"): _layer_norm,
    ("", "RMSNormalization"): _rms_norm, ("", "InstanceNormalization"): _instance_norm,
    ("", "GroupNormalization"): _group_norm, ("", "LRN"): _lrn, ("", "LpNormalization"): _lp_normalization,
    ("", "Softmax"): _softmax(False), ("", "LogSoftmax"): _softmax(True), ("", "Hardmax"): _hardmax,
    **{("", name): _reduce(fn) for name, fn in _REDUCE.items()},
    ("", "ArgMax"): _arg("argmax"), ("", "ArgMin"): _arg("argmin"),
    ("", "MaxPool"): _max_pool, ("", "AveragePool"): _average_pool, ("", "LpPool"): _lp_pool,
    ("", "GlobalAveragePool"): _global_pool("mean"), ("", "GlobalMaxPool"): _global_pool("max"),
    ("", "GlobalLpPool"): _global_lp_pool, ("", "SimplifiedLayerNormalization"): _rms_norm,
    ("com.microsoft", "SkipLayerNormalization"): _skip_layer_norm(False),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _skip_layer_norm(True),
}  # fmt: skip
