"""Reads quantized subgraphs as integer terms: contractions over dequantized operands, sums, means, activations."""

from __future__ import annotations

import math

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter
from bitwright.ir.graph import Node
from bitwright.ir.types import F32, S8, S32, DType, TensorType
from bitwright.ir.weights import Array
from bitwright.passes.lowering._dyadic import SAFE, Emitter, Grid, Term, scalar_quantization

FINE_BITS = 8
"""Extra fractional bits of a sum's operands: each rounds to 1/512 of an output step."""


class Reader(Emitter):
    """Knows, for old float values, the integers behind them."""

    def __init__(self, rw: Rewriter) -> None:
        super().__init__(rw)
        self.rw, self.graph = rw, rw.graph
        self.contracted: dict[str, Term] = {}
        self.floats: dict[str, str] = {}
        """New f32 weights by old dequantized value."""
        self.dynamic: dict[tuple[str, DType], tuple[str, ...]] = {}
        """Codes and scales found at run time, by old value and format of the codes."""

    def low(self, value: str) -> Term | None:
        """The integer tensor of at most 16 bits behind a dequantized value with one scale."""
        node = self.graph.producers.get(value)
        if node is None or not isinstance(node.op, ops.Dequantize):
            return None
        t, found = self.graph.types[node.inputs[0]], scalar_quantization(self.graph, node)
        if found is None or not t.dtype.is_integer or t.dtype.bits > 16:
            return None
        scale, zero = found
        bound = float(max(t.dtype.hi - zero, zero - t.dtype.lo))
        return Term(self.rw.of(node.inputs[0])[0], np.float64(scale), bound, zero=zero)  # type: ignore[arg-type]

    def weight(self, value: str) -> tuple[str, Array, Array] | str:
        """(new symmetric s8 value, scales of axis 0 or a scalar, integer array), or why the operand is none."""
        node = self.graph.producers.get(value)
        if node is None or not isinstance(node.op, ops.Dequantize) or not self.graph.is_constant(node.inputs[0]):
            return "the weight is not a dequantized constant"
        scale = self.graph.constant(node.inputs[1])
        t = self.graph.types[node.inputs[0]]
        if scale is None or node.op.group or not t.dtype.is_integer or t.dtype.bits > 8:
            return f"weight of {t.dtype} with grouped or computed scales"
        scales = np.asarray(scale, np.float64)
        if scales.size != 1 and node.op.axis != 0 and node.op.axis != -t.rank:
            return f"weight scales along axis {node.op.axis}, not along the outputs"
        array = np.asarray(self.graph.constant(node.inputs[0])).astype(np.int64)
        zeros = np.asarray(self.graph.constant(node.inputs[2]) if len(node.inputs) > 2 else 0)
        if not zeros.any() and t.dtype.lo < 0:
            return self.rw.of(node.inputs[0])[0], scales.reshape(-1) if scales.size > 1 else scales.reshape(()), array
        array = array - (zeros.reshape(-1, *[1] * (t.rank - 1)) if zeros.size > 1 else zeros.reshape(())).astype(
            np.int64
        )
        if array.min(initial=0) < -128 or array.max(initial=0) > 127:
            return "weight minus its zero point does not fit s8"
        source = self.graph.producers[node.inputs[0]]
        key = source.op.ref if isinstance(source.op, ops.Weight) else node.inputs[0]
        moved = self.rw.weight(key, array.astype(np.int8), TensorType(S8, t.shape), name=key, origin=source.origin)
        return moved, scales.reshape(-1) if scales.size > 1 else scales.reshape(()), array

    def contraction(self, node: Node) -> Term | str:
        """Emit the integer form of a contraction; the term of its result, or why there is none."""
        op, x = node.op, self.low(node.inputs[0])
        if node.type.dtype != F32:
            return f"its result is {node.type.dtype}: cast the model to f32 first"
        if isinstance(op, ops.MatMul):
            return self._matmul(node, op)
        if x is None:
            return "the activation is not quantized per tensor"
        found = self.weight(node.inputs[1])
        if isinstance(found, str):
            return found
        w, scales, array = found
        bias = self.graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if len(node.inputs) > 2 and bias is None:
            return "the bias is computed"
        bound = float(np.abs(array).reshape(len(array), -1).sum(1).max(initial=0)) * x.bound
        if bound >= 1 << 31:
            return "its sums do not fit 32 bits"
        if isinstance(op, ops.Linear):
            new: ops.Op = ops.IntLinear(x.zero)
            axis = node.type.rank - 1
        else:
            assert isinstance(op, ops.Conv)
            new = ops.IntConv(op.stride, op.padding, op.dilation, op.groups, op.channels_last, x.zero)
            axis = node.type.rank - 1 if op.channels_last else 1
        acc = self.rw.emit(new, x.value, w, name=f"{node.output}.acc", origin=node.origin)
        per_channel = np.broadcast_to(x.scale * scales, (len(array),)) if bias is not None else x.scale * scales
        real = None if bias is None else np.asarray(bias, np.float64)
        return Term(acc, per_channel, bound, axis, bias=real)

    def _matmul(self, node: Node, op: ops.MatMul) -> Term | str:
        a, b = self.low(node.inputs[0]), self.low(node.inputs[1])
        inner = self.graph.types[node.inputs[0]].shape[-1]
        if a is None or b is None or not isinstance(inner, int):
            return "its operands are not both quantized per tensor"
        bound = a.bound * b.bound * inner
        if bound >= 1 << 31:
            return "its sums do not fit 32 bits"
        new = ops.IntMatMul(op.transpose_b, a.zero, b.zero)
        return Term(
            self.rw.emit(new, a.value, b.value, name=f"{node.output}.acc", origin=node.origin), a.scale * b.scale, bound
        )

    def term(self, value: str) -> Term | None:
        """The integer term behind an old float value: through relu and clamp, a contraction or a dequantized tensor."""
        if value in self.contracted:
            return self.contracted[value]
        node = self.graph.producers.get(value)
        if node is None:
            return None
        if isinstance(node.op, ops.Clamp) or (isinstance(node.op, ops.Unary) and node.op.fn == "relu"):
            inner = self.term(node.inputs[0])
            lo, hi = (node.op.lo, node.op.hi) if isinstance(node.op, ops.Clamp) else (0.0, math.inf)
            return None if inner is None else inner.clamped(lo, hi)
        return self.low(value) or self.mean(node)

    def mean(self, node: Node) -> Term | None:
        """A mean of a dequantized tensor: the sum of its centred integers, scaled by one over the count."""
        if isinstance(node.op, ops.AvgPool):
            return self._average(node, node.op)
        if not isinstance(node.op, ops.Reduce) or node.op.fn != "mean" or not node.op.axes:
            return None
        x, shape = self.low(node.inputs[0]), self.graph.types[node.inputs[0]].shape
        sizes = [shape[a] for a in node.op.axes]
        count = math.prod(s for s in sizes if isinstance(s, int))
        if x is None or not all(isinstance(s, int) for s in sizes) or x.bound * count >= SAFE:
            return None
        wide = self.biased(x, f"{node.output}.in", node.origin) if x.zero else self._wide(x, node)
        assert wide is not None
        op = ops.Reduce("sum", node.op.axes, node.op.keepdim)
        total = self.rw.emit(op, wide, name=f"{node.output}.sum", origin=node.origin)
        return Term(total, x.scale / count, x.bound * count)

    def _wide(self, x: Term, node: Node) -> str:
        return self.rw.emit(ops.Cast(S32), x.value, name=f"{node.output}.wide", origin=node.origin)

    def _average(self, node: Node, op: ops.AvgPool) -> Term | None:
        """Window means whose windows all count alike are a depthwise convolution with ones."""
        x, shape = self.low(node.inputs[0]), self.graph.types[node.inputs[0]].shape
        channels = shape[-1 if op.channels_last else 1]
        if any(op.extra) or (any(op.padding) and not op.count_padding) or not isinstance(channels, int) or x is None:
            return None
        count = math.prod(op.kernel)
        ones = self.rw.weight(f"{node.output}.ones", np.ones((channels, 1, *op.kernel), np.int8), origin=node.origin)
        new = ops.IntConv(op.stride, op.padding, (), channels, op.channels_last, x.zero)
        acc = self.rw.emit(new, x.value, ones, name=f"{node.output}.acc", origin=node.origin)
        return Term(acc, x.scale / count, x.bound * count)

    def quantized(self, value: str, to: Grid, name: str, origin: str) -> str | None:
        """An old float value on a grid, computed in integers; None when it is not made of integers."""
        lo, hi = -math.inf, math.inf
        term = self.term(value)
        if term is not None:
            return self.put(term, to, name, origin)
        while (node := self.graph.producers.get(value)) is not None and len(node.inputs) == 1:
            if isinstance(node.op, ops.Clamp):
                low, high = node.op.lo, node.op.hi
            elif isinstance(node.op, ops.Unary) and node.op.fn == "relu":
                low, high = 0.0, math.inf
            else:
                return None
            lo, hi = max(low, min(lo, high)), min(high, max(hi, low))
            value = node.inputs[0]
        if node is None or not isinstance(node.op, ops.Binary) or node.op.fn not in ("add", "sub"):
            return None
        return self._sum(node, to, (lo, hi), name, origin)

    def _sum(self, node: Node, to: Grid, limits: tuple[float, float], name: str, origin: str) -> str | None:
        """Both operands on a finer grid of s32, added exactly, and rounded once more to the output's grid."""
        if any(self.graph.types[x] != node.type for x in node.inputs):
            return None
        terms = [self.term(x) for x in node.inputs]
        found = [t for t in terms if t is not None]
        if len(found) != 2:
            return None
        room = SAFE / max(*(t.reach / to.step for t in found), 1.0)
        bits = min(FINE_BITS, math.floor(math.log2(room)) if room >= 1 else -1)
        if bits < 1:
            return None
        fine = Grid(S32, to.step / (1 << bits))
        parts = [self.put(t, fine, f"{name}.part", origin) for t in found]
        if parts[0] is None or parts[1] is None:
            return None
        total = self.rw.emit(node.op, parts[0], parts[1], name=f"{name}.sum", origin=origin)
        return self.land(total, np.float64(0.5**bits), None, to, limits, name, origin)  # type: ignore[arg-type]
