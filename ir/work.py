"""How much arithmetic an operator is, in multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Mapping

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import TensorType

_BY_ROWS = (
    ops.Linear, ops.IntLinear, ops.GroupLinear, ops.MatMul, ops.IntMatMul, ops.SmallLinear, ops.SmallMatMul,
)  # fmt: skip


def macs(node: Node, types: Mapping[str, TensorType] | Graph) -> int:
    """Dense multiply-accumulates of a contraction or attention node (static shapes), 0 for others."""
    table = types.types if isinstance(types, Graph) else types
    op, out = node.op, node.type.size
    if isinstance(op, _BY_ROWS):
        return out * int(table[node.inputs[0]].shape[-1])
    if isinstance(op, (ops.Conv, ops.IntConv, ops.SmallConv)):
        return out * math.prod(int(d) for d in table[node.inputs[1]].shape[1:])
    if isinstance(op, ops.ConvTranspose):
        return table[node.inputs[0]].size * math.prod(int(d) for d in table[node.inputs[1]].shape[1:])
    if isinstance(op, ops.Attention):
        q, k = table[node.inputs[0]], table[node.inputs[1]]
        return (q.size + out) * int(k.shape[-2])
    return 0
