"""Writes quantize and dequantize as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import numpy as np

from bitwright.frontends.onnx._write_context import Handler, Writing, container
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import F16, F32, S32, DType, integer

_STORED = {integer(b, s) for b in (4, 8, 16) for s in (True, False)}
"""What QuantizeLinear gives and DequantizeLinear takes."""


def is_constant_dequantize(graph: Graph, value: str) -> bool:
    """True for weights in codes: everything the dequantize reads is constant."""
    n = graph.producers.get(value)
    return n is not None and isinstance(n.op, ops.Dequantize) and all(graph.is_constant(x) for x in n.inputs)


def nibbles(graph: Graph) -> set[str]:
    """Computed integers of up to four bits that only dequantize reads: those can be INT4 and UINT4."""
    return {
        n.output
        for n in graph.nodes
        if isinstance(n.op, ops.Quantize)
        and n.op.dtype.is_integer
        and n.op.dtype.bits <= 4
        and n.output not in graph.outputs
        and all(isinstance(u.op, ops.Dequantize) and u.inputs[0] == n.output for u in graph.users[n.output])
    }


def _zero(w: Writing, zero: str, held: DType, turned: bool = False) -> str:
    """A zero point in the format of the codes it belongs to."""
    if w.graph.is_constant(zero):
        return w.constant(zero, held=held, turned=turned)
    return w.name(zero) if container(w.type(zero).dtype) == held else w.cast(w.name(zero), held)


def _scale_dtype(w: Writing, scale: str) -> None:
    if w.type(scale).dtype not in (F32, F16):
        w.refuse(f"ONNX runtimes know no scale of type {w.type(scale).dtype}")


def _block(n: Node) -> int | None:
    group: int = n.op.group  # type: ignore[attr-defined]
    return group or None


def quantize(w: Writing, n: Node, op: ops.Quantize) -> str:
    """QuantizeLinear; a format ONNX has not is clipped to its range after it."""
    if not op.dtype.is_integer:
        w.refuse(f"ONNX has no format {op.dtype}", "quantize activations to integers")
    held = container(op.dtype, n.output in w.nibbles)
    _scale_dtype(w, n.inputs[1])
    if held not in _STORED:
        w.refuse(f"QuantizeLinear gives 4, 8 or 16 bits, not {op.dtype}")
    zero = _zero(w, n.inputs[2], held) if len(n.inputs) > 2 else None
    scale = w.name(n.inputs[1])
    if zero is None:
        shape = w.type(n.inputs[1]).static_shape
        zero = w.initializer(f"{n.output}.zero", np.zeros(shape, np.int64), held)
    axis = {} if w.type(n.inputs[1]).rank == 0 else {"axis": op.axis}
    q = w.emit("QuantizeLinear", w.name(n.inputs[0]), scale, zero, block_size=_block(n), **axis)
    if (op.dtype.lo, op.dtype.hi) == (held.lo, held.hi):
        return q
    return clipped(w, q, held, op.dtype.lo, op.dtype.hi)


def clipped(w: Writing, q: str, held: DType, lo: int | None, hi: int | None) -> str:
    """Clip integers; runtimes know no Clip of 4 and 16 bits, so these go through s32."""
    wide = held.bits in (4, 16)
    kind = S32 if wide else held
    ends = ["" if v is None else w.literal(v, kind) for v in (lo, hi)]
    y = w.emit("Clip", w.cast(q, S32) if wide else q, *ends)
    return w.cast(y, held) if wide else y


def dequantize(w: Writing, n: Node, op: ops.Dequantize) -> str:
    """DequantizeLinear of computed codes."""
    dtype = w.type(n.inputs[0]).dtype
    _scale_dtype(w, n.inputs[1])
    x, held = w.name(n.inputs[0]), container(dtype, n.inputs[0] in w.nibbles)
    if dtype.is_float:
        w.refuse(f"codes of format {dtype} that are computed have no ONNX form")
    zero = [_zero(w, z, held) for z in n.inputs[2:]]
    if held not in _STORED | {S32}:
        w.refuse(f"DequantizeLinear takes 4, 8, 16 or 32 bits, not {dtype}")
    if held == S32 and zero and not _is_zero(w, n.inputs[2]):
        w.refuse("DequantizeLinear of s32 has no zero point")
    axis = {} if w.type(n.inputs[1]).rank == 0 else {"axis": op.axis}
    zero = [] if held == S32 else zero
    return w.emit("DequantizeLinear", x, w.name(n.inputs[1]), *zero, block_size=_block(n), **axis)


def _is_zero(w: Writing, value: str) -> bool:
    return w.graph.is_constant(value) and not np.any(w.array(value))


def constant_dequantize(w: Writing, n: Node, turned: bool) -> str:
    """A weight in codes: an initializer and its DequantizeLinear; ``turned`` writes the transposed matrix."""
    op = n.op
    assert isinstance(op, ops.Dequantize)
    q, scale = n.inputs[:2]
    dtype = w.type(q).dtype
    _scale_dtype(w, scale)
    if dtype.is_float:  # ONNX has no such format: the values themselves
        from bitwright.ir.interpret import to_torch
        from bitwright.ir.semantics import apply

        values = apply(op, *(to_torch(w.array(x)) for x in n.inputs))[0].numpy()
        return w.initializer(n.output, values.T if turned else values, w.type(n.output).dtype)
    held = container(dtype, nibble=True)
    if held not in _STORED | {S32}:
        w.refuse(f"DequantizeLinear takes 4, 8, 16 or 32 bits, not {dtype}")
    zero = [_zero(w, z, held, turned and w.type(z).rank == 2) for z in n.inputs[2:] if not _is_zero(w, z)]
    if held == S32 and zero:
        w.refuse("DequantizeLinear of s32 has no zero point")
    codes = w.constant(q, held=held, turned=turned)
    factor = w.constant(scale, turned=turned and w.type(scale).rank == 2)
    if held.bits == 8 and not zero and w.type(scale).rank < 2:  # onnxruntime fuses no Gemm without it
        zero = [w.literal(np.zeros(w.type(scale).static_shape), held, f"{held}.zeros")]
    axis = {}
    if w.type(scale).rank:
        assert op.axis is not None
        at = op.axis % w.type(q).rank
        axis = {"axis": 1 - at if turned else at}
    y = w.emit("DequantizeLinear", codes, factor, *zero, block_size=_block(n), **axis)
    w.label(n.output)
    return y


TABLE: dict[type[ops.Op], Handler] = {ops.Quantize: quantize, ops.Dequantize: dequantize}

__all__ = ["TABLE", "clipped", "constant_dequantize", "is_constant_dequantize", "nibbles"]
