"""Torch operators that contract: linear, matrix products, convolutions, attention."""

from __future__ import annotations

import math
from typing import Any

from bitwright.frontends.torch_context import Context, Handler, per_axis
from bitwright.ir import ops


def _transposed_matrix(cx: Context, w: str) -> str | None:
    """The matrix [O, K] behind a right-hand side [K, O] that is fixed, or None when it is computed."""
    node = cx.b.defined_by.get(w)
    if node is None or cx.rank(w) != 2:
        return None
    if isinstance(node.op, ops.Transpose) and node.op.perm == (1, 0) and cx.is_parameter(node.inputs[0]):
        return node.inputs[0]
    return cx.transpose(w, (1, 0)) if cx.is_parameter(w) else None


def _linear(cx: Context, x: str, w: str, bias: str | None = None) -> str:
    dtype = cx.out.dtype
    operands = [cx.cast(v, dtype) for v in (x, w, bias) if v is not None]
    if cx.rank(w) == 1:  # torch allows a vector: one output without an axis
        operands[1] = cx.unsqueeze(operands[1], 0)
        return cx.squeeze(cx.emit(ops.Linear(), *operands), cx.rank(x) - 1)
    return cx.emit(ops.Linear(), *operands)


def _matmul(cx: Context, a: str, b: str, *_: Any) -> str:
    dtype = cx.out.dtype
    a, b = cx.cast(a, dtype), cx.cast(b, dtype)
    rank_a, rank_b = cx.rank(a), cx.rank(b)
    if rank_b == 2 and (w := _transposed_matrix(cx, b)) is not None:
        return cx.emit(ops.Linear(), a, w)
    a = cx.unsqueeze(a, 0) if rank_a == 1 else a
    b = cx.unsqueeze(b, 1) if rank_b == 1 else b
    y = cx.emit(ops.MatMul(), a, b)
    y = cx.squeeze(y, cx.rank(y) - 1) if rank_b == 1 else y
    return cx.squeeze(y, cx.rank(y) - (1 if rank_b == 1 else 2)) if rank_a == 1 else y


def _scaled(cx: Context, x: str, factor: Any) -> str:
    return x if factor == 1 else cx.binary("mul", x, cx.as_value(factor, cx.dtype(x)))


def _addmm(cx: Context, bias: str, a: str, b: str, *, beta: Any = 1, alpha: Any = 1) -> str:
    w = _transposed_matrix(cx, b) if alpha == beta == 1 and cx.rank(bias) == 1 else None
    if w is not None and cx.shape(bias)[0] == cx.shape(w)[0]:
        return cx.emit(ops.Linear(), a, w, bias)
    product = _scaled(cx, _matmul(cx, a, b), alpha)
    return product if beta == 0 else cx.binary("add", product, _scaled(cx, bias, beta))


def _outer(cx: Context, a: str, b: str) -> str:
    dtype = cx.out.dtype
    return cx.binary("mul", cx.unsqueeze(cx.cast(a, dtype), 1), cx.unsqueeze(cx.cast(b, dtype), 0))


def _batched(cx: Context, x: str, n: int) -> tuple[str, bool]:
    """x with a batch axis, and whether it was added."""
    return (x, False) if cx.rank(x) == n + 2 else (cx.unsqueeze(x, 0), True)


def _conv(cx: Context, x: str, w: str, bias: str | None, stride: Any, padding: Any, dilation: Any, groups: int) -> str:
    n = cx.rank(w) - 2
    x, added = _batched(cx, x, n)
    strides, dilations = per_axis(stride, n, 1), per_axis(dilation, n, 1)
    if isinstance(padding, str):
        kernel = [cx.static(k, "a kernel size") for k in cx.shape(w)[2:]]
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
        begin, end = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    else:
        begin = end = per_axis(padding, n, 0)
    op = ops.Conv(strides, begin + end, dilations, int(groups))
    y = cx.emit(op, *(v for v in (x, w, bias) if v is not None))
    return cx.squeeze(y, 0) if added else y


def _convnd(
    cx: Context, x: str, w: str, bias: str | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> str:  # fmt: skip
    return _conv(cx, x, w, bias, stride, padding, dilation, groups)


def _conv_transpose(
    cx: Context, x: str, w: str, bias: str | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> str:  # fmt: skip
    n = cx.rank(w) - 2
    x, added = _batched(cx, x, n)
    pad = per_axis(padding, n, 0)
    op = ops.ConvTranspose(
        per_axis(stride, n, 1), pad + pad, per_axis(output_padding, n, 0), per_axis(dilation, n, 1), int(groups)
    )
    y = cx.emit(op, *(v for v in (x, w, bias) if v is not None))
    return cx.squeeze(y, 0) if added else y


def _convolution(
    cx: Context, x: str, w: str, bias: str | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> str:  # fmt: skip
    if transposed:
        return _conv_transpose(cx, x, w, bias, stride, padding, output_padding, groups, dilation)
    return _conv(cx, x, w, bias, stride, padding, dilation, groups)


def _attention(
    cx: Context, q: str, k: str, v: str, attn_mask: str | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> str:  # fmt: skip
    if dropout_p:
        raise cx.refuse("attention dropout is active", "export the module in eval() mode")
    groups = 1
    if enable_gqa:
        heads, shared = cx.shape(q)[-3], cx.shape(k)[-3]
        groups = cx.static(heads, "the head axis") // cx.static(shared, "the head axis")
    if scale is None:
        scale = 1.0 / math.sqrt(cx.static(cx.shape(q)[-1], "the head size"))
    operands = [q, k, v] if attn_mask is None else [q, k, v, attn_mask]
    return cx.emit(ops.Attention(float(scale), bool(is_causal), groups), *operands)


def _bilinear(cx: Context, x: str, y: str, w: str, bias: str | None = None) -> str:
    """out[o] = x^T w[o] y as one linear layer over the outer products."""
    outs, n, m = cx.shape(w)
    width = cx.static(n, "a size") * cx.static(m, "a size")
    pairs = cx.binary("mul", cx.unsqueeze(x, cx.rank(x)), cx.unsqueeze(y, cx.rank(y) - 1))
    flat = cx.reshape(pairs, (*cx.shape(x)[:-1], width))
    return _linear(cx, flat, cx.reshape(w, (outs, width)), bias)


TABLE: dict[str, Handler] = {
    "aten.linear.default": _linear, "aten.matmul.default": _matmul, "aten.mm.default": _matmul,
    "aten.bmm.default": _matmul, "aten.mv.default": _matmul, "aten.dot.default": _matmul, "aten.vdot.default": _matmul,
    "aten.addmm.default": _addmm, "aten.baddbmm.default": _addmm, "aten.addmv.default": _addmm,
    "aten.outer.default": _outer, "aten.bilinear.default": _bilinear,
    **{f"aten.conv{n}d.{o}": _convnd for n in (1, 2, 3) for o in ("default", "padding")},
    "aten.conv_transpose1d.default": _conv_transpose, "aten.conv_transpose2d.input": _conv_transpose,
    "aten.conv_transpose3d.input": _conv_transpose, "aten.convolution.default": _convolution,
    "aten.scaled_dot_product_attention.default": _attention,
}  # fmt: skip
