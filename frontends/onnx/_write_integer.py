"""Writes exact contractions of shifted 8-bit codes, spelled in s32, as MatMulInteger and ConvInteger."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bitwright.frontends.onnx._write_context import Writing
from bitwright.ir import ops
from bitwright.ir.types import S8, S32, U8, DType


class Codes(NamedTuple):
    """An s32 value that is ``value - zero``: 8-bit codes (an IR value) and the name of their zero point, if any."""

    value: str
    zero: str


def codes(w: Writing, value: str) -> Codes | None:
    """The 8-bit codes behind an s32 value, or None: a cast of them, or that less one zero point."""
    n = w.graph.producers.get(value)
    if n is None or w.type(value).dtype != S32:
        return None
    if isinstance(n.op, ops.Cast):
        return Codes(n.inputs[0], "") if w.type(n.inputs[0]).dtype in (S8, U8) else None
    if not (isinstance(n.op, ops.Binary) and n.op.fn == "sub"):
        return None
    inner = w.graph.producers.get(n.inputs[0])
    if inner is None or not isinstance(inner.op, ops.Cast) or w.type(inner.inputs[0]).dtype not in (S8, U8):
        return None
    zero = _zero(w, n.inputs[1], w.type(inner.inputs[0]).dtype)
    return Codes(inner.inputs[0], zero) if zero else None


def _zero(w: Writing, zero: str, dtype: DType) -> str:
    """A zero point that is one number, in the format of the codes; empty when it is not."""
    t = w.type(zero)
    if not t.is_static or t.size != 1:
        return ""
    if w.graph.is_constant(zero):
        number = int(np.asarray(w.array(zero)).reshape(()))
        return w.literal(number, dtype, f"{dtype}.{number}") if dtype.lo <= number <= dtype.hi else ""
    n = w.graph.producers.get(zero)
    if n is not None and isinstance(n.op, ops.Cast) and w.type(n.inputs[0]).dtype == dtype:
        name = w.name(n.inputs[0])
        return name if t.rank == 0 else w.emit("Reshape", name, w.ints([]))
    return ""


def operands(w: Writing, a: str, b: str) -> tuple[Codes, Codes] | None:
    """Codes behind both operands of a contraction in s32."""
    left = codes(w, a)
    right = codes(w, b) if left else None
    return (left, right) if left and right else None


def zeros(left: Codes, right: Codes) -> list[str]:
    """The trailing operands of MatMulInteger and ConvInteger."""
    return [left.zero, right.zero] if right.zero else [left.zero] if left.zero else []
