"""A pass of your own, in one file: round contraction weights to a few levels per output channel.

Use it without changing bitwright: ``--passes "examples/round_weights.py:RoundWeights{bits=4}"``, or in Python
``parse_passes("round-weights{bits=4}", extra=[RoundWeights])``.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.passes import Context, Pass


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round the weights of linear layers and convolutions to ``bits`` bits, symmetric, per output channel."""

    name: ClassVar[str] = "round-weights"
    lossy: ClassVar[bool] = True
    bits: int = 8

    def run(self, graph: Graph, context: Context) -> Graph:
        layers = [n for n in graph.nodes if isinstance(n.op, (ops.Linear, ops.Conv))]
        names = {n.inputs[1] for n in layers}

        def step(rw: Rewriter, node: Node) -> bool:
            if node.output not in names or not isinstance(node.op, ops.Weight):
                return False
            w = graph.weights[node.op.ref].array
            top = 2 ** (self.bits - 1) - 1
            scale = np.abs(w).max(axis=tuple(range(1, w.ndim)), keepdims=True) / top
            rounded = (np.round(w / np.where(scale == 0, 1, scale)) * scale).astype(w.dtype)
            rw.free(node)
            rw.replace(node, rw.weight(node.op.ref, rounded, node.type, name=node.output, origin=node.origin))
            return True

        return rewrite(graph, step)[0]


if __name__ == "__main__":
    from bitwright.passes import parse_passes

    print(*parse_passes("round-weights{bits=4}", extra=[RoundWeights]))
