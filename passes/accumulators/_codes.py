"""Operands that are small floats times a scale: sums are those of the codes, and the scales come behind them."""

from __future__ import annotations

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter
from bitwright.ir.graph import Node
from bitwright.ir.types import F32, TensorType


def codes_of(rw: Rewriter, value: str) -> tuple[str, float] | None:
    """The small floats (new value name) and the one scale behind an old value; None where there are none."""
    node = rw.defined_by.get(rw.of(value)[0])
    if node is None or not isinstance(node.op, ops.Dequantize) or len(node.inputs) != 2:
        return None
    scale = rw.value_of(node.inputs[1])
    if not rw.types[node.inputs[0]].dtype.is_small_float or scale is None or scale.size != 1:
        return None
    return node.inputs[0], float(scale.reshape(-1)[0])


def sum_codes(rw: Rewriter, node: Node, op: ops.Op, x: tuple[str, float], w: tuple[str, float]) -> None:
    """Put ``op`` over the codes in the place of a contraction, then the scale and, behind it, the bias."""
    names = [f"{node.output}.sums", f"{node.output}.real", node.output]
    bias = rw.of(*node.inputs[2:])
    value = rw.emit(op, x[0], w[0], name=names[0], origin=node.origin)
    scale = rw.constant(np.float32(x[1] * w[1]), TensorType(F32, ()), name=f"{node.output}.scale", origin=node.origin)
    rw.free(node)
    value = rw.emit(ops.Binary("mul"), value, scale, name=names[1] if bias else names[2], origin=node.origin)
    if bias:
        shape = rw.types[bias[0]].shape + (1,) * (node.type.rank - 2 if isinstance(node.op, ops.Conv) else 0)
        known = rw.value_of(bias[0])
        if known is not None:
            column = rw.constant(known.reshape(shape), name=f"{node.output}.bias", origin=node.origin)
        else:
            column = rw.emit(ops.Reshape(shape), bias[0], origin=node.origin)
        value = rw.emit(ops.Binary("add"), value, column, name=names[2], origin=node.origin)
    rw.replace(node, value)
