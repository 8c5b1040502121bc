"""Writes contractions: weights in codes stay initializers with a DequantizeLinear, as QDQ fusions look for them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bitwright.frontends.onnx import _write_integer as exact
from bitwright.frontends.onnx._write_context import Handler, Writing
from bitwright.frontends.onnx._write_quant import constant_dequantize, is_constant_dequantize
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import BOOL, F32, S32, S64, Dim


def is_gemm(graph: Graph, n: Node) -> bool:
    """True where a Linear is written as Gemm, which takes the weight as it is: two axes, float.

    Weights in groups are for MatMul, the form that runtimes turn into their low-bit kernels.
    """
    x = graph.types[n.inputs[0]]
    behind = graph.producers.get(n.inputs[1])
    grouped = behind is not None and isinstance(behind.op, ops.Dequantize) and behind.op.group
    return x.rank == 2 and x.dtype.is_float and not grouped


def _turned_only(graph: Graph, value: str) -> bool:
    """True when every user reads the transposed matrix."""
    users = graph.users[value]
    return value not in graph.outputs and all(
        isinstance(u.op, ops.Linear) and u.inputs[1] == value and u.inputs[0] != value and not is_gemm(graph, u)
        for u in users
    )


def turned(w: Writing, value: str) -> str:
    """A matrix [O, K] as [K, O]: constants are stored so, unless somebody else wants them as they are."""
    graph = w.graph
    n = graph.producers.get(value)
    if n is not None and _turned_only(graph, value):
        if graph.is_constant(value):
            return w.constant(value, turned=True)
        codes = n.inputs[0]
        if is_constant_dequantize(graph, value) and len(graph.users[codes]) == 1 and codes not in graph.outputs:
            return w.cached(("turned", value), lambda: constant_dequantize(w, n, turned=True))
    return w.cached(("turned", value), lambda: w.transposed(w.name(value), w.type(value).rank))


def _bias(w: Writing, n: Node) -> str:
    """The bias; in a quantized layer as s32 codes with the product of the operands' scales, which is the format the
    integer kernels of runtimes add it in."""
    bias, x, weight = n.inputs[2], *(w.graph.producers.get(v) for v in n.inputs[:2])
    known = w.graph.is_constant(bias) and w.type(bias).dtype == F32 and bias not in w.graph.outputs
    if not known or x is None or weight is None or not _scales_known(w, x, weight):
        return w.name(bias)
    scale = (w.array(x.inputs[1]) * w.array(weight.inputs[1])).astype(np.float32)
    values = w.array(bias).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(values / scale)
    if not np.all(np.isfinite(codes)) or np.any(np.abs(codes) >= 1 << 31):
        return w.name(bias)

    def make() -> str:
        stem = w.constant_stem(bias)
        q = w.initializer(stem, codes, S32)
        s = w.initializer(f"{stem}.scale", scale, F32)
        y = w.emit("DequantizeLinear", q, s, **({"axis": 0} if scale.ndim else {}))
        w.label(f"{stem}.dq")
        return y

    return w.cached(("bias", bias, x.inputs[1], weight.inputs[1]), make)


def _scales_known(w: Writing, x: Node, weight: Node) -> bool:
    """8-bit codes on both sides: inputs per tensor, weights per tensor or output."""
    if not (isinstance(x.op, ops.Dequantize) and isinstance(weight.op, ops.Dequantize)):
        return False
    fits = all(w.type(d.inputs[0]).dtype.bits == 8 and w.type(d.inputs[1]).dtype == F32 for d in (x, weight))
    rows = w.type(weight.inputs[1]).rank == 0 or (weight.op.axis == 0 and not weight.op.group)
    return (
        fits and rows and w.type(x.inputs[1]).rank == 0 and w.graph.is_constant(x.inputs[1])
        and is_constant_dequantize(w.graph, weight.output)
    )  # fmt: skip


def linear(w: Writing, n: Node, op: ops.Linear) -> str:
    """Gemm for two axes, else MatMul and Add; MatMulInteger for codes in s32."""
    if pair := exact.operands(w, *n.inputs[:2]):
        code = pair[1].value
        right = w.constant(code, turned=True) if w.graph.is_constant(code) else w.transposed(w.name(code), 2)
        y = w.emit("MatMulInteger", w.name(pair[0].value), right, *exact.zeros(*pair))
        return w.emit("Add", y, w.name(n.inputs[2])) if len(n.inputs) > 2 else y
    x = w.name(n.inputs[0])
    if is_gemm(w.graph, n):
        weight = w.name(n.inputs[1])
        return w.emit("Gemm", x, weight, *([_bias(w, n)] if len(n.inputs) > 2 else []), transB=1)
    y = w.emit("MatMul", x, turned(w, n.inputs[1]))
    return w.emit("Add", y, _bias(w, n)) if len(n.inputs) > 2 else y


def matmul(w: Writing, n: Node, op: ops.MatMul) -> str:
    """MatMul, or MatMulInteger for codes in s32; a transposed right side gets its Transpose."""
    pair = exact.operands(w, *n.inputs)
    a, b = w.names(c.value for c in pair) if pair else w.names(n.inputs)
    rank = w.type(n.inputs[1]).rank
    b = w.transposed(b, rank) if op.transpose_b and rank > 1 else b
    return w.emit("MatMulInteger", a, b, *exact.zeros(*pair)) if pair else w.emit("MatMul", a, b)


def _windows(op: ops.Conv | ops.ConvTranspose, weight: tuple[Dim, ...]) -> dict[str, Any]:
    n = len(weight) - 2
    return {
        "kernel_shape": [int(d) for d in weight[2:]], "strides": list(op.stride or (1,) * n),
        "pads": list(op.padding or (0,) * 2 * n), "dilations": list(op.dilation or (1,) * n),
    }  # fmt: skip


def conv(w: Writing, n: Node, op: ops.Conv) -> str:
    """Conv, channels first."""
    if op.channels_last:
        w.refuse("ONNX convolutions have channels first", "write the graph before channels-last")
    given = {"group": op.groups, **_windows(op, w.type(n.inputs[1]).shape)}
    if pair := exact.operands(w, *n.inputs[:2]):
        y = w.emit("ConvInteger", *w.names(c.value for c in pair), *exact.zeros(*pair), **given)
        if len(n.inputs) == 2:
            return y
        by_channel = w.ints(range(1, w.type(n.output).rank - 1))
        return w.emit("Add", y, w.emit("Unsqueeze", w.name(n.inputs[2]), by_channel))
    if not w.type(n.inputs[0]).dtype.is_float:
        w.refuse(f"ONNX convolves 8-bit integers, not {w.type(n.inputs[0]).dtype}")
    x, weight = w.names(n.inputs[:2])
    bias = [_bias(w, n)] if len(n.inputs) > 2 else []
    return w.emit("Conv", x, weight, *bias, **given)


def conv_transpose(w: Writing, n: Node, op: ops.ConvTranspose) -> str:
    """ConvTranspose."""
    given = _windows(op, w.type(n.inputs[1]).shape)
    extra = list(op.output_padding) or None
    return w.emit("ConvTranspose", *w.names(n.inputs), group=op.groups, output_padding=extra, **given)


# --- attention ----------------------------------------------------------------------------------------------------


def _repeated(w: Writing, x: str, shape: tuple[Dim, ...], times: int) -> tuple[str, tuple[Dim, ...]]:
    """Each index of axis -3 ``times`` times in a row."""
    at = len(shape) - 3
    heads = shape[at]
    if isinstance(heads, str):
        w.refuse("grouped heads need a fixed number of heads")
    wide = w.emit("Unsqueeze", x, w.ints([at + 1]))
    tiled = w.emit("Tile", wide, w.ints([times if i == at + 1 else 1 for i in range(len(shape) + 1)]))
    after = (*shape[:at], heads * times, *shape[at + 1 :])
    return w.reshape(tiled, (*shape[: at + 1], times, *shape[at + 1 :]), after), after


def _causal(w: Writing, scores: str, queries: Dim, keys: Dim, rank: int) -> str:
    """Scores after the diagonal become -inf."""
    if isinstance(queries, int) and isinstance(keys, int):
        keep = w.literal(np.tril(np.ones((queries, keys), bool)), BOOL, f"causal.{queries}x{keys}")
    else:
        size = w.emit("Shape", scores, start=rank - 2, end=rank)
        ones = w.emit("Expand", w.literal(1, S64), size)
        keep = w.cast(w.emit("Trilu", ones, upper=0), BOOL)
    return w.emit("Where", keep, scores, w.literal(-math.inf, F32, "minus.inf"))


def attention(w: Writing, n: Node, op: ops.Attention) -> str:
    """softmax(q k^T * scale + mask) v, node by node."""
    dtype = w.type(n.inputs[0]).dtype
    if dtype.bits > 32:
        w.refuse("attention in f64 is not written", "cast the model to f32")
    q, k, v = (w.widened(x, dtype) for x in w.names(n.inputs[:3]))
    shapes = [w.type(x).shape for x in n.inputs[:3]]
    if op.kv_groups > 1:
        k, shapes[1] = _repeated(w, k, shapes[1], op.kv_groups)
        v, shapes[2] = _repeated(w, v, shapes[2], op.kv_groups)
    scores = w.emit("MatMul", q, w.transposed(k, len(shapes[1])))
    scores = w.emit("Mul", scores, w.literal(op.scale, F32, "attention.scale"))
    rank = max(len(shapes[0]), len(shapes[1]))
    if op.causal:
        scores = _causal(w, scores, shapes[0][-2], shapes[1][-2], rank)
    if len(n.inputs) > 3:
        mask, kind = w.name(n.inputs[3]), w.type(n.inputs[3]).dtype
        if kind == BOOL:
            scores = w.emit("Where", mask, scores, w.literal(-math.inf, F32, "minus.inf"))
        else:
            scores = w.emit("Add", scores, w.widened(mask, kind))
    return w.narrowed(w.emit("MatMul", w.emit("Softmax", scores, axis=-1), v), dtype)


TABLE: dict[type[ops.Op], Handler] = {
    ops.Linear: linear, ops.MatMul: matmul, ops.Conv: conv, ops.ConvTranspose: conv_transpose,
    ops.Attention: attention,
}  # fmt: skip
