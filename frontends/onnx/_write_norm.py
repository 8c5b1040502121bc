"""Writes norms, softmax, pools and reductions."""

from __future__ import annotations

import numpy as np

from bitwright.frontends.onnx._write_context import Handler, Writing
from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.types import BF16, BOOL, F16, F32, S32, S64, DType


def batch_norm(w: Writing, n: Node, op: ops.BatchNorm) -> str:
    """BatchNormalization for inference."""
    return w.emit("BatchNormalization", *w.names(n.inputs), epsilon=op.eps)


def layer_norm(w: Writing, n: Node, op: ops.LayerNorm) -> str:
    """LayerNormalization, which always has a scale."""
    x = w.type(n.inputs[0])
    affine = w.names(n.inputs[1:])
    if not affine:
        shape = x.shape[x.rank - op.axes :]
        if not all(isinstance(d, int) for d in shape):
            w.refuse("a layer norm over a symbolic size needs a scale of its own")
        affine = [w.literal(np.ones([int(d) for d in shape]), x.dtype, "ones")]
    return w.emit("LayerNormalization", w.name(n.inputs[0]), *affine, axis=-op.axes, epsilon=op.eps)


def rms_norm(w: Writing, n: Node, op: ops.RmsNorm) -> str:
    """x / sqrt(mean(x^2) + eps) * scale, node by node (ONNX has it from operator set 23 on)."""
    dtype = w.type(n.inputs[0]).dtype
    x = w.widened(w.name(n.inputs[0]), dtype)
    kind = F32 if dtype in (F16, BF16) else dtype
    mean = w.emit("ReduceMean", w.emit("Mul", x, x), w.ints(range(-op.axes, 0)), keepdims=1)
    root = w.emit("Sqrt", w.emit("Add", mean, w.literal(op.eps, kind, "eps")))
    y = w.narrowed(w.emit("Div", x, root), dtype)
    return w.emit("Mul", y, w.name(n.inputs[1])) if len(n.inputs) > 1 else y


def group_norm(w: Writing, n: Node, op: ops.GroupNorm) -> str:
    """GroupNormalization, which always has scale and bias."""
    x = w.type(n.inputs[0])
    affine = w.names(n.inputs[1:])
    channels = x.shape[1]
    if len(affine) < 2:
        if isinstance(channels, str):
            w.refuse("a group norm over a symbolic number of channels needs a scale and a bias of its own")
        full = [w.literal(np.full(channels, v), x.dtype, s) for v, s in ((1, "ones"), (0, "zeros"))]
        affine = [*affine, *full[len(affine) :]]
    return w.emit("GroupNormalization", w.name(n.inputs[0]), *affine, num_groups=op.groups, epsilon=op.eps)


def softmax(w: Writing, n: Node, op: ops.Softmax) -> str:
    """Softmax or LogSoftmax."""
    return w.emit("LogSoftmax" if op.log else "Softmax", w.name(n.inputs[0]), axis=op.axis)


# --- pools --------------------------------------------------------------------------------------------------------


def _first(w: Writing, op: ops.MaxPool | ops.AvgPool) -> dict[str, list[int]]:
    if op.channels_last:
        w.refuse("ONNX pools have channels first", "write the graph before channels-last")
    n = len(op.kernel)
    return {
        "kernel_shape": list(op.kernel), "strides": list(op.stride or (1,) * n),
        "pads": list(op.padding or (0,) * 2 * n),
    }  # fmt: skip


def max_pool(w: Writing, n: Node, op: ops.MaxPool) -> str:
    """MaxPool."""
    return w.emit("MaxPool", w.name(n.inputs[0]), dilations=list(op.dilation) or None, **_first(w, op))


def avg_pool(w: Writing, n: Node, op: ops.AvgPool) -> str:
    """AveragePool. Padding that counts beside padding that does not: the first becomes a Pad."""
    x, given, k = w.name(n.inputs[0]), _first(w, op), len(op.kernel)
    if not any(op.extra):
        return w.emit("AveragePool", x, count_include_pad=int(op.count_padding and any(given["pads"])), **given)
    if op.count_padding and any(op.padding):
        ends = [0, 0, *op.padding[:k], 0, 0, *op.padding[k:]]
        x, given["pads"] = w.emit("Pad", x, w.ints(ends)), [0] * 2 * k
    given["pads"] = [p + e for p, e in zip(given["pads"], (*(0,) * k, *op.extra), strict=True)]
    return w.emit("AveragePool", x, count_include_pad=0, **given)


# --- reductions ---------------------------------------------------------------------------------------------------

_REDUCE = {
    "sum": "ReduceSum", "mean": "ReduceMean", "max": "ReduceMax", "min": "ReduceMin", "prod": "ReduceProd",
    "l1": "ReduceL1", "l2": "ReduceL2", "logsumexp": "ReduceLogSumExp", "logsum": "ReduceLogSum",
    "sumsq": "ReduceSumSquare", "any": "ReduceMax", "all": "ReduceMin",
}  # fmt: skip


def reduce(w: Writing, n: Node, op: ops.Reduce) -> str:
    """The reduction of that name; any and all are maximum and minimum of 0 and 1."""
    x = w.name(n.inputs[0])
    kind = w.type(n.inputs[0])
    if kind.rank and not op.axes:
        return x
    axes = [] if kind.rank == 0 else [w.ints(a % kind.rank for a in op.axes)]
    if op.fn in ("any", "all"):
        bits = w.cast(x if kind.dtype == BOOL else w.cast(x, BOOL), S32)
        return w.cast(w.emit(_REDUCE[op.fn], bits, *axes, keepdims=int(op.keepdim)), BOOL)
    return w.emit(_REDUCE[op.fn], x, *axes, keepdims=int(op.keepdim))


def _ordered(w: Writing, x: str, dtype: DType) -> str:
    """bool as s32, which the index operators compare."""
    return w.cast(x, S32) if dtype == BOOL else x


def arg_reduce(w: Writing, n: Node, op: ops.ArgReduce) -> str:
    """ArgMax or ArgMin."""
    x = _ordered(w, w.name(n.inputs[0]), w.type(n.inputs[0]).dtype)
    name = {"argmax": "ArgMax", "argmin": "ArgMin"}[op.fn]
    return w.emit(name, x, axis=op.axis, keepdims=int(op.keepdim), select_last_index=int(op.last))


def cumsum(w: Writing, n: Node, op: ops.CumSum) -> str:
    """CumSum."""
    axis = w.literal(op.axis, S64)
    return w.emit("CumSum", w.name(n.inputs[0]), axis, exclusive=int(op.exclusive), reverse=int(op.reverse))


def topk(w: Writing, n: Node, op: ops.TopK) -> tuple[str, ...]:
    """TopK in order."""
    x = w.name(n.inputs[0])
    return w.emit_many("TopK", 2, x, w.ints([op.k]), axis=op.axis, largest=int(op.largest), sorted=1)


TABLE: dict[type[ops.Op], Handler] = {
    ops.BatchNorm: batch_norm, ops.LayerNorm: layer_norm, ops.RmsNorm: rms_norm, ops.GroupNorm: group_norm,
    ops.Softmax: softmax, ops.MaxPool: max_pool, ops.AvgPool: avg_pool, ops.Reduce: reduce,
    ops.ArgReduce: arg_reduce, ops.CumSum: cumsum, ops.TopK: topk,
}  # fmt: skip
