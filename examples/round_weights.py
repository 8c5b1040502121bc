"""A pass of your own in one file, used as ``examples/round_weights.py:RoundWeights{bits=4}`` in any list of passes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.passes._pass import Context, Pass


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round every floating-point weight matrix to ``bits`` bits, one scale per output."""

    name: ClassVar[str] = "round-weights"
    lossy: ClassVar[bool] = True
    bits: int = 4

    def run(self, graph: Graph, context: Context) -> Graph:
        rounded = {}
        for node in graph.nodes:
            if not isinstance(node.op, ops.Weight) or not node.type.dtype.is_float:
                continue
            if node.type.rank < 2:
                context.refuse(self.name, node.op.ref, "a vector: rounding it saves nothing and costs accuracy")
                continue
            weight = graph.weights[node.op.ref].array
            top = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
            scale = np.where(top > 0, top, 1.0) / (2 ** (self.bits - 1) - 1)
            new = (np.round(weight / scale) * scale).astype(weight.dtype)
            if not np.allclose(new, weight, rtol=1e-6, atol=0.0):
                rounded[node.op.ref] = new
                context.remark(self.name, node.op.ref, bits=self.bits)
        return replace(graph, weights=graph.weights.with_items(rounded)) if rounded else graph
