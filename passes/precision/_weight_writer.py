"""Codes written into a graph: a weight of the low format, its scales, and dequantize in front of the layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_numpy
from bitwright.ir.types import F32, TensorType
from bitwright.passes._layers import stem
from bitwright.passes.precision._integer_codes import PIECE, Codes, Width, levels


def write_codes(graph: Graph, layers: list[Node], found: dict[str, Codes]) -> Graph:
    """Let the layers read their weights through dequantize; a weight that several share is written once."""
    chosen = {n.output for n in layers}
    made: dict[str, str] = {}

    def step(rw: Rewriter, node: Node) -> bool:
        if node.output not in chosen or node.inputs[1] not in found:
            return False
        old = node.inputs[1]
        if old not in made:
            made[old] = _dequantized(rw, old, found[old])
        rw.keep_as(node, node.op, (rw.of(node.inputs[0])[0], made[old], *rw.of(*node.inputs[2:])))
        return True

    return rewrite(graph, step)[0]


def _dequantized(rw: Rewriter, old: str, codes: Codes) -> str:
    source, dtype = rw.graph.producers[old], codes.levels.dtype
    key, origin = stem(source.op.ref) if isinstance(source.op, ops.Weight) else old, source.origin
    kept = source.type.encoding if codes.levels.symmetric else None
    values = to_numpy(codes.codes).astype(dtype.numpy)
    w = rw.weight(key, values, source.type.with_dtype(dtype).with_encoding(kept), name=key, origin=origin)
    s = rw.constant(to_numpy(codes.scale), name=f"{key}.scale", origin=origin)
    parameters = [s]
    if not codes.levels.symmetric:
        zeros = to_numpy(codes.zero).astype(dtype.numpy)
        parameters.append(rw.constant(zeros, TensorType(dtype, zeros.shape), name=f"{key}.zero", origin=origin))
    return rw.emit(ops.Dequantize(codes.axis, codes.group), w, *parameters, name=f"{key}.dq", origin=origin)


def relative_change(weight: object, codes: Codes) -> float:
    """Squared difference of the weights over their squared sum."""
    w = np.asarray(weight)
    change = power = 0.0
    step = max(1, PIECE * len(w) // max(1, w.size))
    for i in range(0, len(w), step):
        part = w[i : i + step].astype(np.float64)
        change += float(np.square(to_numpy(codes.real(slice(i, i + step))) - part).sum())
        power += float(np.square(part).sum())
    return change / max(power, 1e-300)


def snr_db(change: float) -> float:
    """Signal over noise in decibels, of a squared error relative to the signal; at most 300, for no error at all."""
    return -10 * math.log10(max(change, 1e-30))


def checked_width(bits: object, symmetric: bool, group: int, iterations: int, rounding: str) -> Width:
    """The width named by ``bits``; raises :class:`InvalidInput` for options that do not fit together."""
    text = str(bits)
    width: Width = int(text) if text.isdigit() else text  # type: ignore[assignment]
    levels(width, symmetric)
    if group and not 32 <= group <= 128:
        raise InvalidInput(f"quantize-weights: group is 0 (one scale per output) or 32 to 128, not {group}")
    if iterations < 0:
        raise InvalidInput(f"quantize-weights: iterations is at least 0, not {iterations}")
    if rounding == "adaround" and width == "bipolar":
        raise InvalidInput("quantize-weights: bipolar codes cannot round up or down; use another rounding")
    return width


def why_not_low(graph: Graph, n: Node, width: Width, symmetric: bool) -> tuple[str, ...]:
    """Why a layer's weight keeps its format, and the cure; empty when it can be quantized."""
    source = graph.producers.get(n.inputs[1])
    if isinstance(n.op, ops.ConvTranspose | ops.MatMul):
        kind = "transposed convolution" if isinstance(n.op, ops.ConvTranspose) else "matmul"
        return (f"{kind}: its weight has no scale per output",)
    if source is None or not isinstance(source.op, ops.Weight | ops.Constant):
        low = source is not None and isinstance(source.op, ops.Dequantize)
        return ("quantized already",) if low else ("weight is computed, not constant",)
    if source.type.dtype != F32:
        return (f"weight is {source.type.dtype}: cast the model to f32 first",)
    if source.type.encoding is not None and width == "bipolar":
        return ("bipolar codes have no zero, and the weight is masked", "use ternary")
    if source.type.encoding is not None and not symmetric:
        return ("a zero point would hide the zeros of the mask", "use symmetric=true for masked layers")
    return ()


def why_not_small(graph: Graph, n: Node, ranges: Mapping[str, tuple[float, float]]) -> str:
    """Why the operands of a contraction do not become small floats, or the empty string."""
    if isinstance(n.op, ops.ConvTranspose | ops.Attention):
        return f"{n.op.spelling} is not computed from small floats"
    for v in n.inputs[:2]:
        source = graph.producers.get(v)
        if source is not None and isinstance(source.op, ops.Dequantize):
            return "quantized already"
        if graph.types[v].dtype != F32:
            return f"an operand is {graph.types[v].dtype}: cast the model to f32 first"
        if not graph.is_constant(v) and not all(map(math.isfinite, ranges.get(v, (math.nan,)))):
            return f"no finite range was observed for %{v}"
    return ""


__all__ = ["checked_width", "relative_change", "snr_db", "why_not_low", "why_not_small", "write_codes"]
