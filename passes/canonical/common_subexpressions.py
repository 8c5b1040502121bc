"""One node for each distinct computation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.passes._pass import Context, Pass

HASHED = 1 << 14
"""Weights up to this many elements are compared by content, larger ones by handle: no pass reads gigabytes."""


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Merge nodes that apply one operator to the same operands.

    before:
        graph @g (%x: f32[2]) -> (y = %y) level=graph {
          %a = exp(%x) : f32[2]
          %b = exp(%x) : f32[2]
          %y = add(%a, %b) : f32[2]
        }
    after:
        graph @g (%x: f32[2]) -> (y = %y) level=graph {
          %a = exp(%x) : f32[2]
          %y = add(%a, %a) : f32[2]
        }
    """

    name: ClassVar[str] = "common-subexpressions"

    def run(self, graph: Graph, context: Context) -> Graph:
        seen: dict[tuple[object, ...], tuple[str, ...]] = {}

        def step(rw: Rewriter, node: Node) -> bool:
            if isinstance(node.op, ops.Region):
                return False
            key = (_identity(graph, node), rw.of(*node.inputs), node.types)
            if key in seen:
                rw.replace(node, *seen[key])
                return True
            seen[key] = rw.keep(node)
            return True

        return rewrite(graph, step)[0]


def _identity(graph: Graph, node: Node) -> object:
    """What must agree beside operands and types. The text of an operator tells 0.0 from -0.0 and 1 from 1.0."""
    if isinstance(node.op, ops.Weight):
        handle = graph.weights[node.op.ref]
        return handle.digest if node.type.size <= HASHED else id(handle)
    return repr(node.op)
