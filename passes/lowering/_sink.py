"""Layout operators on dequantized tensors move the integers instead."""

from __future__ import annotations

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node

_LAYOUT = (
    ops.Reshape, ops.Transpose, ops.Flip, ops.MaxPool, ops.Concat, ops.Slice, ops.Gather, ops.Expand, ops.Tile,
)  # fmt: skip


def sink_dequantize(graph: Graph) -> Graph:
    """Move dequantize behind layout operators whose operands all share its parameters: the integers are moved."""

    def step(rw: Rewriter, node: Node) -> bool:
        moved = node.inputs[:1] if isinstance(node.op, ops.Gather) else node.inputs
        sources = [rw.defined_by.get(x) for x in rw.of(*moved)]
        low = [s for s in sources if s is not None and isinstance(s.op, ops.Dequantize)]
        if not isinstance(node.op, _LAYOUT) or len(low) < len(moved) or len(node.outputs) > 1:
            return False
        first = low[0]
        small = all(rw.types[s.inputs[0]].dtype.is_integer and rw.types[s.inputs[0]].dtype.bits <= 16 for s in low)
        if not small or any(rw.value_of(x) is None or rw.types[x].size != 1 for s in low for x in s.inputs[1:]):
            return False
        if any(rw.types[s.inputs[0]].dtype != rw.types[first.inputs[0]].dtype for s in low[1:]):
            return False
        if not all(_agree(rw, first, s) for s in low[1:]) or any(s.op.group for s in low):  # type: ignore[attr-defined]
            return False
        rest = rw.of(*node.inputs[len(moved) :])
        low_value = rw.emit(node.op, *(s.inputs[0] for s in low), *rest, name=f"{node.output}.q", origin=node.origin)
        rw.keep_as(node, ops.Dequantize(), (low_value, *first.inputs[1:]))
        return True

    return rewrite(graph, step)[0]


def _agree(rw: Rewriter, a: Node, b: Node) -> bool:
    """True when two new per-tensor dequantize nodes have equal constant parameters."""
    for i in (1, 2):
        x, y = (rw.value_of(n.inputs[i]) if len(n.inputs) > i else np.zeros(()) for n in (a, b))
        if x is None or y is None or float(x.reshape(-1)[0]) != float(y.reshape(-1)[0]):
            return False
    return True
