"""Recognition of N:M patterns that weights already obey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.patterns import density, violation
from bitwright.ir.types import NM
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of
from bitwright.passes._pass import Context, Pass

PATTERNS = ((1, 16), (1, 8), (2, 16), (1, 4), (2, 8), (4, 16), (2, 4), (4, 8))
"""keep, group: sparsest first; of equal density the one with the smaller group, which implies the larger."""


@dataclass(frozen=True)
class DetectSparsity(Pass):
    """Give weights that already obey an N:M pattern along the reduction axis the encoding that says so.

    before:
        graph @g (%x: f32[2, 4]) -> (y = %y) level=graph {
          %w = constant {values=[1.0, 0.0, 2.0, 0.0, 0.0, 3.0, 0.0, 4.0]} : f32[2, 4]
          %y = linear(%x, %w) : f32[2, 2]
        }
    after:
        graph @g (%x: f32[2, 4]) -> (y = %y) level=graph {
          %w = weight {ref="w"} : f32[2, 4] nm<2:4, axis=1>
          %y = linear(%x, %w) : f32[2, 2]
        }
    """

    name: ClassVar[str] = "detect-sparsity"

    def run(self, graph: Graph, context: Context) -> Graph:
        found: dict[str, NM] = {}
        for node in graph.nodes:
            weight = _weight(graph, node)
            if weight is None or weight.output in found or weight.type.encoding is not None:
                continue
            nm = tightest(graph.constant(weight.output), _axis(node))  # type: ignore[arg-type]
            if nm is not None:
                found[weight.output] = nm
                context.remark(self.name, layer_of(graph, node), pattern=f"{nm.keep}:{nm.group}", axis=nm.axis)

        def step(rw: Rewriter, node: Node) -> bool:
            if node.output not in found:
                return False
            t = node.type.with_encoding(found[node.output])
            if isinstance(node.op, ops.Weight):
                rw.keep_as(node, node.op, (), (t,))
            else:
                rw.free(node)
                rw.replace(node, rw.weight(node.output, rw.graph.constant(node.output), t, name=node.output))  # type: ignore[arg-type]
            return True

        return rewrite(graph, step)[0]


def _weight(graph: Graph, node: Node) -> Node | None:
    """The constant behind a contraction whose kernels know N:M, through a symmetric dequantize."""
    plain = isinstance(node.op, ops.Linear) or (isinstance(node.op, ops.Conv) and node.op.groups == 1)
    if not plain and not (isinstance(node.op, ops.MatMul) and graph.types[node.inputs[1]].rank == 2):
        return None
    source = graph.producers.get(node.inputs[1])
    if source is not None and isinstance(source.op, ops.Dequantize) and len(source.inputs) == 2:
        source = graph.producers.get(source.inputs[0])
    if source is None or not isinstance(source.op, (ops.Weight, ops.Constant)):
        return None
    sharers = {type(u.op) for u in graph.users[source.output]}
    return source if len(sharers) == 1 else None


def _axis(node: Node) -> int:
    return 0 if isinstance(node.op, ops.MatMul) and not node.op.transpose_b else 1


def tightest(weight: Array, axis: int) -> NM | None:
    """The sparsest listed pattern that the weight obeys along the axis, whose size must be a multiple of the group."""
    if weight.ndim < 2 or not weight.any() or density(weight) > 0.5:
        return None
    for keep, group in PATTERNS:
        nm = NM(keep, group, axis)
        if weight.shape[axis] % group == 0 and density(weight) <= nm.density and not violation(weight, nm):
            return nm
    return None
