"""Evaluation of what is known at compile time, with limits on how much it may grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_numpy, to_torch
from bitwright.passes._pass import Context, Pass

LARGEST = 64 << 20
GROWTH = 4
SMALL = 1 << 16
"""Bytes: results up to LARGEST, and unless SMALL at most GROWTH times their operands."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate operators whose operands are all constant, except the dequantization of low-bit weights.

    before:
        graph @g (%x: f32[2]) -> (y = %y) level=graph {
          %a = constant {values=[3.0]} : f32[1]
          %b = sqrt(%a) : f32[1]
          %c = square(%b) : f32[1]
          %y = mul(%x, %c) : f32[2]
        }
    after:
        graph @g (%x: f32[2]) -> (y = %y) level=graph {
          %c = constant {values=[3.0]} : f32[1]
          %y = mul(%x, %c) : f32[2]
        }
    """

    name: ClassVar[str] = "fold-constants"

    def run(self, graph: Graph, context: Context) -> Graph:
        def step(rw: Rewriter, node: Node) -> bool:
            if not node.inputs or not all(t.is_static for t in node.types) or _keeps_meaning(graph, node):
                return False
            arrays = [rw.value_of(x) for x in rw.of(*node.inputs)]
            if any(a is None for a in arrays):
                return False
            return self._fold(rw, node, [a for a in arrays if a is not None], context)

        return rewrite(graph, step)[0]

    def _fold(self, rw: Rewriter, node: Node, arrays: list[Array], context: Context) -> bool:
        from bitwright.ir.semantics import apply

        size = sum(t.size * t.dtype.numpy.itemsize for t in node.types)
        if size > LARGEST or (size > SMALL and size > GROWTH * sum(a.nbytes for a in arrays)):
            context.refuse(self.name, node.output, f"its constant value would take {size >> 10} KiB")
            return False
        results = [to_numpy(t) for t in apply(node.op, *map(to_torch, arrays))]
        if any(r.dtype.kind not in "iub" and bool(np.isnan(r.astype(np.float32)).any()) for r in results):
            return False
        rw.free(node)
        values = zip(results, node.types, node.outputs, strict=True)
        rw.replace(node, *(rw.constant(r, t, name=name, origin=node.origin) for r, t, name in values))
        return True


def _keeps_meaning(graph: Graph, node: Node) -> bool:
    """True for nodes that carry a decision constant folding would lose: low-bit weights and encodings."""
    if isinstance(node.op, ops.Dequantize):
        t = graph.types[node.inputs[0]]
        return t.rank >= 2 and t.dtype.bits <= 16
    return any(graph.types[x].encoding is not None for x in node.inputs)
