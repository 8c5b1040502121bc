"""Group nodes into kernels: a root (contraction, norm, pool, move) with the pointwise work around it."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.ir import ops
from bitwright.ir.build import Rewriter
from bitwright.ir.graph import Graph, Node, subgraph
from bitwright.passes._pass import Context, Pass
from bitwright.passes.lowering._groups import ROWWISE, Groups

_POOLS: tuple[type[ops.Op], ...] = (ops.MaxPool, ops.AvgPool)
_MOVES: tuple[type[ops.Op], ...] = (
    ops.Transpose, ops.Concat, ops.Slice, ops.Pad, ops.Expand, ops.Tile, ops.Flip, ops.Gather,
)  # fmt: skip
_SOURCES: tuple[type[ops.Op], ...] = (ops.Weight, ops.Constant)
_SCALED: tuple[type[ops.Op], ...] = (ops.Quantize, ops.Dequantize, ops.Requantize)


def role_of(op: ops.Op) -> str:
    """What a region built around this operator is called."""
    for role, types in (("contraction", ops.CONTRACTION), ("rowwise", ROWWISE), ("pool", _POOLS), ("move", _MOVES)):
        if isinstance(op, types):
            return role
    if isinstance(op, ops.POINTWISE):
        return "pointwise"
    return "attention" if isinstance(op, ops.Attention) else "generic"


@dataclass(frozen=True)
class Fuse(Pass):
    """Turn the graph into regions, one kernel each; reshapes stay between them as views.

    before:
        graph @g (%x: f32[2, 8]) -> (y = %r) level=integer {
          %w = weight {ref="w"} : f32[4, 8]
          %h = linear(%x, %w) : f32[2, 4]
          %r = relu(%h) : f32[2, 4]
        }
    after:
        graph @g (%x: f32[2, 8]) -> (y = %r) level=kernel {
          %w = weight {ref="w"} : f32[4, 8]
          %r = region(%x, %w) {role="contraction"} : f32[2, 4]
            graph @body (%x: f32[2, 8], %w: f32[4, 8]) -> (r = %r) level=integer {
              %h = linear(%x, %w) : f32[2, 4]
              %r = relu(%h) : f32[2, 4]
            }
        }
    """

    name = "fuse"
    takes = "integer"
    gives = "kernel"

    def run(self, graph: Graph, context: Context) -> Graph:
        if graph.level == "kernel":
            return graph
        return _emit(graph, Groups(graph).of)


def _emit(graph: Graph, groups: dict[int, list[Node]]) -> Graph:
    rw = Rewriter(graph, "kernel")
    inner = _immediates(graph)
    for node in graph.nodes:
        group = groups.get(id(node))
        if group is None:
            _keep_source(rw, node)
        elif node is group[-1]:
            literals = {id(graph.producers[x]): graph.producers[x] for n in group for x in n.inputs if x in inner}
            root = next((n for n in group if not isinstance(n.op, (*ops.POINTWISE, ops.Transpose, ops.Reshape))), node)
            body, reads = subgraph(graph, [*literals.values(), *group], node.outputs)
            rw.keep_as(node, ops.Region(body, role_of(root.op)), rw.of(*reads), node.types)
    return rw.done()


def _immediates(graph: Graph) -> set[str]:
    """Scalar literals that go into kernels as immediates; quantization parameters stay operands, so that layers
    that differ only in them share one kernel."""
    out = set()
    for n in graph.nodes:
        if isinstance(n.op, ops.Constant) and len(n.op.values) == 1:
            if not any(isinstance(u.op, _SCALED) for u in graph.users[n.output]):
                out.add(n.output)
    return out


def _keep_source(rw: Rewriter, node: Node) -> None:
    """Weights and reshapes stay; literals become weights (those inside bodies are copied there)."""
    if isinstance(node.op, ops.Constant):
        array = rw.graph.constant(node.output)
        assert array is not None
        rw.free(node)
        rw.replace(node, rw.weight(f"literal.{node.output}", array, node.type, name=node.output, origin=node.origin))  # type: ignore[arg-type]
    else:
        rw.keep(node)
