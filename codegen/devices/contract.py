"""A contraction by steps of an instruction: rows unfolded, terms cut into its depth, its meaning run on each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bitwright.codegen.devices.schema import Instruction
from bitwright.codegen.devices.select import taps
from bitwright.codegen.devices.words import Words, pack, unpack
from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.interpret import evaluate
from bitwright.ir.semantics import torch_dtype

Tensor = torch.Tensor
Sums = Callable[[Instruction, Tensor, Tensor, int], Tensor]


def product(
    node: Node, i: Instruction, x: Tensor, w: Tensor, bias: Tensor | None = None, sums: Sums | None = None
) -> Tensor:
    """The contraction's result, as its operator means it, computed by the instruction (by ``sums``: in another way)."""
    sums = sums or _sums
    op = node.op
    if isinstance(op, ops.IntMatMul | ops.MatMul | ops.SmallMatMul):
        y = _matmul(op, i, x, w, sums)
    elif isinstance(op, ops.Conv | ops.IntConv | ops.SmallConv):
        y = _conv(op, i, x, w, sums)
    else:
        rows = x.reshape(-1, 1, x.shape[-1])
        y = sums(i, rows, w.reshape(w.shape[0], 1, -1), getattr(op, "x_zero", 0)).reshape(*x.shape[:-1], -1)
    y = y.to(torch_dtype(node.type.dtype))
    return y if bias is None else y + bias


def product_in_words(node: Node, words: Words, x: Tensor, w: Tensor) -> Tensor:
    """The contraction's result from packed words: each instruction multiplies its outputs' weights, as unpacked."""
    taps_last = w.flatten(2).transpose(1, 2) if w.dim() > 2 else w
    flat = taps_last.reshape(len(w), -1)
    codes = torch.from_numpy(unpack(pack(flat.numpy(), words), words, flat.shape[1])).reshape(taps_last.shape)
    codes = (codes.transpose(1, 2) if w.dim() > 2 else codes).reshape(w.shape).to(w.dtype)
    last = not isinstance(node.op, ops.IntConv) or node.op.channels_last
    axis = node.type.rank - 1 if last else 1
    out = torch.zeros(node.type.static_shape, dtype=torch_dtype(node.type.dtype))
    for i, outputs in words.runs():
        rows = torch.tensor(outputs)
        if len(words.order) == 1:
            out.index_copy_(axis, rows, product(node, i, x, codes[rows]))
        else:
            alone = torch.zeros_like(codes).index_copy_(0, rows, codes[rows])
            out.index_copy_(axis, rows, product(node, i, x, alone).index_select(axis, rows))
    return out


def _sums(i: Instruction, rows: Tensor, w: Tensor, zero: int) -> Tensor:
    """[rows, outputs] from rows [rows, taps, channels] and weights [outputs, taps, channels]."""
    m = i.parsed
    if m.acc is None:
        (y,) = evaluate(m.graph, {"x": rows.flatten(1), "w": w.flatten(1)})
        return y
    nm = m.pattern
    if nm is not None and rows.shape[1] > 1 and rows.shape[2] % (nm.group * nm.block):
        rows, w = (F.pad(t, (0, -t.shape[2] % i.depth)) for t in (rows, w))
    x, k = rows.flatten(1), w.flatten(1)
    x, k = (F.pad(t, (0, -t.shape[1] % i.depth)) for t in (x, k))
    acc = torch.zeros(x.shape[0], k.shape[0], dtype=torch_dtype(m.acc))
    for start in range(0, x.shape[1], i.depth):
        part = slice(start, start + i.depth)
        (acc,) = evaluate(m.graph, {"x": x[:, part].contiguous(), "w": k[:, part].contiguous(), "acc": acc})
    if zero:  # the vector unit takes off what the zero point added
        return acc.to(torch.int64) - zero * k.to(torch.int64).sum(1)
    return acc


def _matmul(op: Any, i: Instruction, a: Tensor, b: Tensor, sums: Sums) -> Tensor:
    b = b if op.transpose_b else b.transpose(-1, -2)
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = a.expand(*lead, *a.shape[-2:]), b.expand(*lead, *b.shape[-2:])
    flat_a, flat_b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    zeros = getattr(op, "a_zero", 0), getattr(op, "b_zero", 0)
    out = []
    for left, right in zip(flat_a, flat_b, strict=True):
        y = sums(i, left[:, None], right[:, None], zeros[0]).to(torch.int64 if any(zeros) else left.dtype)
        if zeros[1]:
            y = y - zeros[1] * (left.to(torch.int64) - zeros[0]).sum(1, keepdim=True)
        out.append(y)
    return torch.stack(out).reshape(*lead, a.shape[-2], b.shape[-2])


def _conv(op: Any, i: Instruction, x: Tensor, w: Tensor, sums: Sums) -> Tensor:
    n, zero, groups = w.dim() - 2, getattr(op, "x_zero", 0), getattr(op, "groups", 1)
    x = x if op.channels_last else x.movedim(1, -1)
    pads = [p for a in reversed(range(n)) for p in ((op.padding[a], op.padding[n + a]) if op.padding else (0, 0))]
    x = F.pad(x, (0, 0, *pads), value=zero) if any(pads) else x
    stride, spread = op.stride or (1,) * n, op.dilation or (1,) * n
    size = [(x.shape[1 + a] - spread[a] * (w.shape[2 + a] - 1) - 1) // stride[a] + 1 for a in range(n)]
    parts = []
    for tap in taps(tuple(w.shape[2:])):
        cut = x
        for a in range(n):
            start = tap[a] * spread[a]
            index = torch.arange(start, start + stride[a] * size[a], stride[a])
            cut = cut.index_select(1 + a, index)
        parts.append(cut.reshape(-1, x.shape[-1]))
    rows = torch.stack(parts, 1)  # [rows, taps, channels]
    weights = w.flatten(2).transpose(1, 2)  # [outputs, taps, channels of a group]
    inside, outside = x.shape[-1] // groups, w.shape[0] // groups
    made = [
        sums(i, rows[..., g * inside : (g + 1) * inside], weights[g * outside : (g + 1) * outside], zero)
        for g in range(groups)
    ]
    y = torch.cat(made, 1).reshape(x.shape[0], *size, -1)
    return y if op.channels_last else y.movedim(-1, 1)
