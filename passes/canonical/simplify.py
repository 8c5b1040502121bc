"""Identities: one spelling for each computation. The rules are in the files that start with an underscore."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.passes._pass import Context, Pass
from bitwright.passes.canonical import _attention as heads
from bitwright.passes.canonical import _contractions as around
from bitwright.passes.canonical import _identities as same

Rule = Callable[[Rewriter, Node], bool]

RULES: Mapping[type[ops.Op], tuple[Rule, ...]] = {
    ops.Binary: (same.binary, same.expanded, around.add_bias),
    ops.Unary: (same.unary, same.rising),
    ops.Clamp: (same.clamp, same.rising),
    ops.Cast: (same.cast,),
    ops.Transpose: (same.transpose,),
    ops.Reshape: (same.reshape, around.linear_views),
    ops.Expand: (same.reshape,),
    ops.Concat: (same.nothing_moves,),
    ops.Slice: (same.nothing_moves,),
    ops.Pad: (same.nothing_moves,),
    ops.Tile: (same.nothing_moves,),
    ops.Quantize: (same.quantize,),
    ops.Gather: (same.gather,),
    ops.Attention: (heads.causal_mask, heads.shared_heads),
    ops.MatMul: (around.matmul,),
    ops.Conv: (around.pad_into,),
    ops.MaxPool: (around.pad_into,),
    ops.AvgPool: (around.pad_into,),
}
"""Rules by operator; the first that applies wins. Each one lowers the number of nodes or moves toward the canonical
spelling, so repeating them ends."""

ROUNDS = 50


@dataclass(frozen=True)
class Simplify(Pass):
    """Apply identities until none applies: casts, transposes, reshapes, neutral constants, biases, padding.

    before:
        graph @g (%x: f32[2, 3]) -> (y = %y) level=graph {
          %one = constant {values=[1.0]} : f32[1]
          %a = transpose(%x) {perm=[1, 0]} : f32[3, 2]
          %b = mul(%a, %one) : f32[3, 2]
          %c = transpose(%b) {perm=[1, 0]} : f32[2, 3]
          %y = clamp(%c) {lo=0.0} : f32[2, 3]
        }
    after:
        graph @g (%x: f32[2, 3]) -> (y = %y) level=graph {
          %y = relu(%x) : f32[2, 3]
        }
    """

    name: ClassVar[str] = "simplify"

    def run(self, graph: Graph, context: Context) -> Graph:
        def step(rw: Rewriter, node: Node) -> bool:
            return any(rule(rw, node) for rule in RULES.get(type(node.op), ()))

        for _ in range(ROUNDS):
            after, _moved = rewrite(graph, step)
            if not after.changed_from(graph):
                return graph
            graph = after
        return graph
