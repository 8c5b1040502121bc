"""Writes quantize and dequantize where a plan wants them; scales and zero points from ranges."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import F32, S8, DType, TensorType, integer
from bitwright.ir.weights import Array
from bitwright.passes._layers import stem
from bitwright.passes.precision._regions import Regions, moved_operands

_BLOCK = 1 << 15
"""Weights that are in f64 at a time."""


def parameters(lo: float, hi: float, dtype: DType) -> tuple[float, int]:
    """Scale (an f32 value) and zero point that cover [lo, hi] and represent 0 exactly.

    >>> from bitwright.ir.types import U8
    >>> parameters(0.0, 2.55, U8)[1], parameters(-1.0, 3.0, U8)[1]
    (0, 64)
    """
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = float(np.float32((hi - lo) / (dtype.hi - dtype.lo)))
    if not scale >= float(np.finfo(np.float32).tiny):  # constant zero, or so small that its inverse overflows
        return 1.0, max(dtype.lo, 0)
    return scale, int(np.clip(round(dtype.lo - lo / scale), dtype.lo, dtype.hi))


def quantize_weight(weight: Array, per_tensor: bool = False) -> tuple[Array, Array]:
    """s8 values in [-127, 127] and the f32 scale of each index of axis 0, or the one scale. Zeros stay zeros."""
    axes = None if per_tensor else tuple(range(1, weight.ndim))
    scale = np.abs(weight).max(axis=axes, initial=0.0).astype(np.float64) / 127
    scale = np.where(scale < np.finfo(np.float32).tiny, 1.0, scale).astype(np.float32)
    codes = np.empty(weight.shape, np.int8)
    for rows in _blocks(weight):
        q = np.round(weight[rows].astype(np.float64) / _of_rows(scale, rows, weight.ndim))
        codes[rows] = np.clip(q, -127, 127)
    return codes, scale


def relative_error(weight: Array, codes: Array, scale: Array) -> float:
    """Squared error of codes and scales by output (or one for all) over the squared sum of the weight."""
    missed = total = 0.0
    for rows in _blocks(weight):
        w = weight[rows].astype(np.float64)
        missed += float(np.square(w - codes[rows] * _of_rows(scale, rows, w.ndim)).sum())
        total += float(np.square(w).sum())
    return missed / max(total, 1e-300)


def _blocks(weight: Array) -> list[slice]:
    """Rows that fit a cache together in f64."""
    if not weight.size:
        return []
    step = max(1, _BLOCK * len(weight) // weight.size)
    return [slice(i, i + step) for i in range(0, len(weight), step)]


def _of_rows(scale: Array, rows: slice, rank: int) -> Array:
    """The scales of these rows, or the one scale, to go with them."""
    some = scale.reshape(-1)[rows] if scale.size > 1 else scale
    return some.astype(np.float64).reshape(-1, *[1] * (rank - 1))


def codes_behind(graph: Graph, node: Node) -> Node | None:
    """The dequantize of constant integer codes that a contraction reads as its weight, or None."""
    source = graph.producers.get(node.inputs[1])
    held = source is not None and isinstance(source.op, ops.Dequantize) and graph.is_constant(source.inputs[0])
    return source if held and graph.types[source.inputs[0]].dtype.is_integer else None  # type: ignore[union-attr]


def why_not_codes(graph: Graph, node: Node) -> str:
    """Why the activation of a layer with a dequantized weight stays as it is, or the empty string."""
    source, x = codes_behind(graph, node), graph.producers.get(node.inputs[0])
    if source is None or (x is not None and isinstance(x.op, ops.Dequantize)):
        return "quantized already"
    assert isinstance(source.op, ops.Dequantize)
    if source.op.group:
        return f"weight scales per {source.op.group} inputs: no integer kernel, activations stay float"
    return ""


@dataclass
class Writer:
    """Writes the plan: 8-bit forms after their producers, contractions over dequantized operands."""

    graph: Graph
    regions: Regions
    dtype: DType
    per_tensor: bool = False
    """One scale for all of a weight instead of one for each output."""
    low: dict[str, str] = field(default_factory=dict)
    """New 8-bit value, and new dequantized value, by old value."""
    back: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    """Squared error over squared sum, by old weight."""

    def write(self) -> Graph:
        self.rw, self.ranges = Rewriter(self.graph), self.regions.groups()
        for v in self.graph.inputs:
            self.hold(v.name, self.rw.of(v.name)[0], "")
        for node in self.graph.nodes:
            self.node(node)
        return self.rw.done()

    def node(self, node: Node) -> None:
        rw, r = self.rw, self.regions
        if node.output in r.carried:
            op, moved = node.op, moved_operands(node)
            if isinstance(op, ops.Pad) and op.mode == "constant":
                op = replace(op, value=float(self.parameters(node.output)[1]))
            inputs = (*(self.low[x] for x in moved), *rw.of(*node.inputs[len(moved) :]))
            self.low[node.output] = rw.emit(op, *inputs, name=f"{node.output}.q", origin=node.origin)
            self.restore(node.output, node.origin)
            rw.replace(node, self.back[node.output])
            return
        inputs = tuple(
            self.back[x] if x in self.back and r.reads_quantized(node, x) else rw.of(x)[0] for x in node.inputs
        )
        if node.output in r.layers and self.graph.is_constant(node.inputs[1]):
            inputs = (inputs[0], self.weight(node), *inputs[2:])
        out = rw.keep_as(node, node.op, inputs, node.types)
        for old, new in zip(node.outputs, out, strict=True):
            self.hold(old, new, node.origin)

    def format(self, value: str) -> DType:
        """The value's number format: of the kernels' signedness, in as many bits as its readers want."""
        return integer(self.ranges[value][1], signed=self.dtype.lo < 0)

    def parameters(self, value: str) -> tuple[float, int]:
        return parameters(*self.ranges[value][0], self.format(value))

    def constants(self, value: str) -> tuple[str, str]:
        scale, zero = self.parameters(value)
        s = self.rw.constant(scale, TensorType(F32, ()), name=f"{value}.scale")
        return s, self.rw.constant(zero, TensorType(self.format(value), ()), name=f"{value}.zero")

    def hold(self, old: str, new: str, origin: str) -> None:
        """Give a wanted value its 8-bit form."""
        if old in self.regions.wanted:
            constants = self.constants(old)
            q = self.rw.emit(ops.Quantize(self.format(old)), new, *constants, name=f"{old}.q", origin=origin)
            self.low[old] = q
            self.back[old] = self.rw.emit(ops.Dequantize(), q, *constants, name=f"{old}.dq", origin=origin)

    def restore(self, old: str, origin: str) -> None:
        back = self.rw.emit(ops.Dequantize(), self.low[old], *self.constants(old), name=f"{old}.dq", origin=origin)
        self.back[old] = back

    def weight(self, node: Node) -> str:
        """The dequantized s8 weight of a contraction; once for all that share it."""
        old = node.inputs[1]
        if old not in self.weights:
            source, g = self.graph.producers[old], self.graph
            key = stem(source.op.ref) if isinstance(source.op, ops.Weight) else old
            q, scale = quantize_weight(g.constant(old), self.per_tensor)  # type: ignore[arg-type]
            self.noise[old] = relative_error(g.constant(old), q, scale)  # type: ignore[arg-type]
            w = self.rw.weight(key, q, source.type.with_dtype(S8), name=key, origin=source.origin)
            s = self.rw.constant(scale, name=f"{key}.scale", origin=source.origin)
            back = ops.Dequantize(axis=None if self.per_tensor else 0)
            self.weights[old] = self.rw.emit(back, w, s, name=f"{key}.dq", origin=source.origin)
        return self.weights[old]
