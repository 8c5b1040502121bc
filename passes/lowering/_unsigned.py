"""Signed 8-bit activations as unsigned ones, where the target's contractions take unsigned: every code plus 128."""

from __future__ import annotations

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import S8, U8, DType, TensorType

_MOVES = (
    ops.Reshape, ops.Transpose, ops.Flip, ops.MaxPool, ops.Concat, ops.Slice, ops.Expand, ops.Tile,
)  # fmt: skip
"""Operators that give out the codes they are given."""
_SHIFT = 128


def unsigned_codes(graph: Graph, activation: DType) -> Graph:
    """Move s8 codes from their quantize to their dequantize into u8: codes and zero points 128 higher, the same reals.

    Only codes that begin in a quantize with a known zero point and that nobody but dequantize and layout operators
    reads; exporters that quantize symmetrically give such models. Nothing happens unless ``activation`` is u8.
    """
    codes = _movable(graph) if activation == U8 else set()
    if not codes:
        return graph

    def step(rw: Rewriter, node: Node) -> bool:
        op = node.op
        if node.output in codes:
            if isinstance(op, ops.Quantize):
                new = ops.Quantize(U8, op.axis, op.group)
                rw.keep_as(node, new, (*rw.of(*node.inputs[:2]), _zero(rw, node)))
            else:
                rw.keep_as(node, op, rw.of(*node.inputs))
            return True
        if isinstance(op, ops.Dequantize) and node.inputs[0] in codes:
            rw.keep_as(node, op, (*rw.of(*node.inputs[:2]), _zero(rw, node)))
            return True
        return False

    return rewrite(graph, step)[0]


def _zero(rw: Rewriter, node: Node) -> str:
    """The zero point of a quantize or dequantize, 128 higher."""
    if len(node.inputs) > 2:
        have = np.asarray(rw.graph.constant(node.inputs[2])).astype(np.int64)
    else:
        have = np.zeros(rw.graph.types[node.inputs[1]].static_shape, np.int64)
    return rw.constant(have + _SHIFT, TensorType(U8, have.shape), name=f"{node.output}.zero", origin=node.origin)


def _movable(graph: Graph) -> set[str]:
    """The largest set of s8 values that can change together."""
    found = {n.output for n in graph.nodes if n.type.dtype == S8 and _begins_or_moves(graph, n)}
    while True:
        kept = {v for v in found if _closed(graph, v, found)}
        if kept == found:
            return found
        found = kept


def _begins_or_moves(graph: Graph, n: Node) -> bool:
    if isinstance(n.op, ops.Quantize):
        static = graph.types[n.inputs[1]].is_static
        return static and all(graph.is_constant(z) for z in n.inputs[2:])
    return isinstance(n.op, _MOVES)


def _closed(graph: Graph, value: str, found: set[str]) -> bool:
    """True when the operands that hold codes, and all users, are part of the set or end it."""
    n = graph.producers[value]
    sources = () if isinstance(n.op, ops.Quantize) else n.inputs
    return (
        value not in graph.outputs
        and all(x in found for x in sources)
        and all(u.output in found or _ends(graph, u, value) for u in graph.users[value])
    )


def _ends(graph: Graph, user: Node, value: str) -> bool:
    if not isinstance(user.op, ops.Dequantize) or user.inputs[0] != value:
        return False
    return graph.types[user.inputs[1]].is_static and all(graph.is_constant(z) for z in user.inputs[2:])
