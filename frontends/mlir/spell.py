"""A graph as a torch module whose operators are the ones torch-mlir knows: what :func:`to_mlir` exports.

Each operator runs its one meaning (``ir/semantics.py``), except for those that torch has a whole operator for with the
same meaning: that one keeps the structure (a ``layer_norm`` stays one) and comes back as the same operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
import torch.nn.functional as F
from torch.fx.traceback import annotate

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.infer import bind_op
from bitwright.ir.interpret import to_torch
from bitwright.ir.semantics import apply, pad_space
from bitwright.ir.types import DType, symbols_of

Tensor = torch.Tensor
Spelling = Callable[..., "Tensor | None"]
"""Operator and operands to a result; None where torch's own operator cannot say it."""

PLACE = "bitwright_node"
"""The key under which traced operators carry the number of their graph node."""

HELD = {"int8": (-128, 127), "uint8": (0, 255)}
"""The torch dtypes of 8-bit codes, and their range."""


def _wide(x: Tensor) -> bool:
    """True where the meaning computes in the operand's own format."""
    return x.dtype in (torch.float32, torch.float64)


def _relu(op: ops.Unary, x: Tensor) -> Tensor | None:
    return torch.relu(x) if op.fn == "relu" and x.is_floating_point() else None


def _conv(op: ops.Conv, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor | None:
    n = w.dim() - 2
    begin, end = op.padding[:n], op.padding[n:]
    if op.channels_last or not _wide(x) or begin != end:
        return None
    run = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    return run(x, w, bias, op.stride or (1,) * n, begin or (0,) * n, op.dilation or (1,) * n, op.groups)


def _batch_norm(op: ops.BatchNorm, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor | None:
    return F.batch_norm(x, mean, var, scale, bias, eps=op.eps) if _wide(x) else None


def _layer_norm(op: ops.LayerNorm, x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor | None:
    shape = x.shape[x.dim() - op.axes :]
    affine = all(t is None or t.shape == shape for t in (scale, bias))
    return F.layer_norm(x, shape, scale, bias, op.eps) if _wide(x) and affine else None


def _group_norm(op: ops.GroupNorm, x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor | None:
    return F.group_norm(x, op.groups, scale, bias, op.eps) if _wide(x) else None


def _max_pool(op: ops.MaxPool, x: Tensor) -> Tensor | None:
    n = len(op.kernel)
    if op.channels_last or n > 2:
        return None
    begin, end = op.padding[:n] or (0,) * n, op.padding[n:] or (0,) * n
    if begin != end or any(2 * p > k for p, k in zip(begin, op.kernel, strict=True)):
        fill = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
        x, begin = pad_space(x, begin, end, fill), (0,) * n
    run: Any = (F.max_pool1d, F.max_pool2d)[n - 1]
    wide = x if x.is_floating_point() else x.to(torch.int32)  # torch-mlir 20261001 compares unsigned codes as signed
    return run(wide, op.kernel, op.stride or (1,) * n, begin, op.dilation or (1,) * n).to(x.dtype)  # type: ignore[no-any-return]


def _avg_pool(op: ops.AvgPool, x: Tensor) -> Tensor | None:
    n = len(op.kernel)
    begin, end = op.padding[:n] or (0,) * n, op.padding[n:] or (0,) * n
    small = all(2 * p <= k for p, k in zip(begin, op.kernel, strict=True))
    if op.channels_last or n > 2 or not _wide(x) or any(op.extra) or begin != end or not small:
        return None
    run: Any = (F.avg_pool1d, F.avg_pool2d)[n - 1]
    return run(x, op.kernel, op.stride or (1,) * n, begin, False, op.count_padding)  # type: ignore[no-any-return]


def code_range(dtype: DType) -> tuple[torch.dtype, int, int] | None:
    """The torch dtype of codes and their range; None for what is no integer of up to 8 bits."""
    if not dtype.is_integer or dtype.bits > 8:
        return None
    return (torch.uint8 if dtype.kind == "uint" else torch.int8), dtype.lo, dtype.hi


class Spelled(torch.nn.Module):
    """Runs ``graph``; weights are buffers ``w0``, ``w1``, ... whose keys :attr:`keys` has.

    ``forward`` takes the graph's inputs in order, and gives its outputs.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.keys: dict[str, Node] = {}
        self._held: dict[str, str] = {}
        for n in graph.nodes:
            if isinstance(n.op, (ops.Weight, ops.Constant)):
                buffer = f"w{len(self.keys)}"
                array = graph.constant(n.output)
                assert array is not None
                self.register_buffer(buffer, to_torch(array))
                self.keys[buffer] = n
                self._held[n.output] = buffer

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip((v.name for v in self.graph.inputs), inputs, strict=True))
        values.update({v: getattr(self, b) for v, b in self._held.items()})
        sizes = self._sizes(values)
        for i, n in enumerate(self.graph.nodes):
            if n.output in self._held:
                continue
            with annotate({PLACE: i}):
                results = self._run(n, [values[x] for x in n.inputs], sizes)
            values.update(zip(n.outputs, results, strict=True))
        return tuple(values[o] for o in self.graph.outputs)

    def _sizes(self, values: dict[str, Tensor]) -> dict[str, Any]:
        sizes: dict[str, Any] = {}
        for v in self.graph.inputs:
            for axis, d in enumerate(v.type.shape):
                if isinstance(d, str) and symbols_of(d) == (d,):
                    sizes.setdefault(d, values[v.name].shape[axis])
        return sizes

    def _run(self, n: Node, xs: list[Tensor], sizes: dict[str, Any]) -> tuple[Tensor, ...]:
        spelling = IDIOMS.get(type(n.op))
        found: Tensor | None = None
        if isinstance(n.op, (ops.Quantize, ops.Dequantize)):
            found = self._codes(n, n.op, xs)
        elif isinstance(n.op, (ops.Reshape, ops.Expand)) and sizes:
            shape = [_bound(d, sizes) for d in n.op.shape]
            found = xs[0].reshape(shape) if isinstance(n.op, ops.Reshape) else xs[0].expand(shape)
        elif spelling is not None:
            found = spelling(n.op, *xs)
        return apply(bind_op(n.op, {}), *xs) if found is None else (found,)

    def _number(self, value: str) -> float:
        found = self.graph.constant(value)
        assert found is not None
        return float(np.asarray(found).item())

    def _codes(self, n: Node, op: ops.Quantize | ops.Dequantize, xs: list[Tensor]) -> Tensor | None:
        """8-bit codes with constant scales, which torch-mlir has quantized types for."""
        types = self.graph.types
        kind = code_range(op.dtype if isinstance(op, ops.Quantize) else types[n.inputs[0]].dtype)
        if kind is None or op.group or not all(self.graph.is_constant(x) for x in n.inputs[1:]):
            return None
        if types[n.inputs[1]].dtype.bits != 32 or types[n.inputs[1]].rank > 1:
            return None
        word = "quantize" if isinstance(op, ops.Quantize) else "dequantize"
        dtype, low, high = kind
        if types[n.inputs[1]].rank == 0:
            scale, *shift = (self._number(x) for x in n.inputs[1:])
            zero = int(shift[0]) if shift else 0
            run: Any = getattr(torch.ops.quantized_decomposed, f"{word}_per_tensor").default
            return run(xs[0], scale, zero, low, high, dtype)  # type: ignore[no-any-return]
        if op.axis is None or (isinstance(op, ops.Quantize)):
            return None
        zeros = xs[2].to(torch.int64) if len(xs) > 2 else torch.zeros(xs[1].shape, dtype=torch.int64)
        run = torch.ops.quantized_decomposed.dequantize_per_channel.default
        return run(xs[0], xs[1], zeros, op.axis % xs[0].dim(), low, high, dtype)  # type: ignore[no-any-return]


def _bound(dim: Any, sizes: dict[str, Any]) -> Any:
    if isinstance(dim, int):
        return dim
    out: Any = 1
    for part in dim.split("*"):
        out = out * (int(part) if part.isdigit() else sizes[part])
    return out


IDIOMS: dict[type[ops.Op], Spelling] = {
    ops.Unary: _relu, ops.Conv: _conv, ops.BatchNorm: _batch_norm, ops.LayerNorm: _layer_norm,
    ops.GroupNorm: _group_norm, ops.MaxPool: _max_pool, ops.AvgPool: _avg_pool,
}  # fmt: skip
"""Operators that torch has whole, and torch-mlir lowers to linalg (attention it lowers to an operator of its own)."""
