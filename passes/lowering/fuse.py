"""Group nodes into kernels: a root (contraction, norm, pool, move) with the pointwise work around it."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.ir import ops
from bitwright.ir.build import Rewriter
from bitwright.ir.graph import Graph, Node, subgraph
from bitwright.passes._pass import Context, Pass

_ROWWISE: tuple[type[ops.Op], ...] = (ops.Softmax, ops.LayerNorm, ops.RmsNorm, ops.Reduce)
_POOLS: tuple[type[ops.Op], ...] = (ops.MaxPool, ops.AvgPool)
_MOVES: tuple[type[ops.Op], ...] = (
    ops.Transpose, ops.Concat, ops.Slice, ops.Pad, ops.Expand, ops.Tile, ops.Flip, ops.Gather,
)  # fmt: skip
_SOURCES: tuple[type[ops.Op], ...] = (ops.Weight, ops.Constant)
_SCALED: tuple[type[ops.Op], ...] = (ops.Quantize, ops.Dequantize, ops.Requantize)
_LARGEST = 32
"""Nodes in one region at most: beyond it compile time and register pressure grow, speed does not."""


def role_of(op: ops.Op) -> str:
    """What a region built around this operator is called."""
    for role, types in (("contraction", ops.CONTRACTION), ("rowwise", _ROWWISE), ("pool", _POOLS), ("move", _MOVES)):
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
        return _emit(graph, _Groups(graph).of)


class _Groups:
    """Assigns every computing node to a group, walking from the last node to the first."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.position = {id(n): i for i, n in enumerate(graph.nodes)}
        self.of: dict[int, list[Node]] = {}
        for node in reversed(graph.nodes):
            if id(node) in self.of or isinstance(node.op, (*_SOURCES, ops.Reshape)):
                continue
            group = self._grow(node)
            group.sort(key=lambda n: self.position[id(n)])
            self.of.update({id(n): group for n in group})

    def _grow(self, sink: Node) -> list[Node]:
        group, root = [sink], sink
        if isinstance(sink.op, ops.POINTWISE):
            roots = self._absorb_pointwise(group, sink.type.shape)
            if not roots:
                return group
            root = max(roots, key=lambda n: (isinstance(n.op, ops.CONTRACTION), self.position[id(n)]))
            group = self._leave_to_others(group, sink, root, roots)
        if isinstance(root.op, _ROWWISE):
            before = [*group]
            roots = self._absorb_pointwise(group, self.graph.types[root.inputs[0]].shape, start=root)
            if any(isinstance(r.op, ops.CONTRACTION) for r in roots):
                group = before  # that work is the contraction's epilogue: its accumulators are in registers
        return self._around_attention(group, root)

    def _leave_to_others(self, group: list[Node], sink: Node, root: Node, roots: list[Node]) -> list[Node]:
        """The group and its root, without pointwise work that belongs behind another root and not behind this one."""
        mine, theirs = set(root.outputs), {o for r in roots if r is not root for o in r.outputs}
        kept = []
        for n in sorted(group, key=lambda n: self.position[id(n)]):
            if any(x in mine for x in n.inputs):
                mine.add(n.output)
            elif any(x in theirs for x in n.inputs):
                theirs.add(n.output)
                continue
            kept.append(n)
        while True:  # a node that only left nodes read leaves with them
            inside = [
                n for n in kept if n is sink or all(any(u is k for k in kept) for u in self.graph.users[n.output])
            ]
            if len(inside) == len(kept):
                return [root, *kept]
            kept = inside

    def _producer(self, value: str, group: list[Node]) -> Node | None:
        """The node behind a value when the group may take it in: free, and read by the group alone."""
        node = self.graph.producers.get(value)
        if node is None or id(node) in self.of or value in self.graph.outputs or len(node.outputs) > 1:
            return None
        return node if all(any(u is g for g in group) for u in self.graph.users[value]) else None

    def _absorb_pointwise(self, group: list[Node], shape: tuple[object, ...], start: Node | None = None) -> list[Node]:
        """Take in pointwise producers of that shape; returns the other producers that could be the root."""
        todo = [start] if start else list(group)
        roots: dict[int, Node] = {}
        while todo:
            for x in todo.pop().inputs:
                node = self._producer(x, group)
                if node is None or any(node is g for g in group) or node.type.shape != shape:
                    continue
                if isinstance(node.op, ops.POINTWISE) and len(group) < _LARGEST:
                    group.append(node)
                    todo.append(node)
                elif not isinstance(node.op, (*_SOURCES, *ops.POINTWISE, ops.Reshape)):
                    roots[id(node)] = node
        return list(roots.values())

    def _around_attention(self, group: list[Node], root: Node) -> list[Node]:
        """Views before attention are strides of its kernel, and so are the views (and a quantize) after it."""
        head, chain = root, list[Node]()
        while isinstance(head.op, (ops.Transpose, ops.Reshape, ops.Quantize)):
            below = self._producer(head.inputs[0], [*group, *chain])
            if below is None:
                return group
            chain.append(below)
            head = below
        if not isinstance(head.op, ops.Attention):
            return group
        group = [*group, *chain]
        for x in head.inputs[:3]:
            for _ in range(2):
                view = self._producer(x, group)
                if view is None or not isinstance(view.op, (ops.Transpose, ops.Reshape)):
                    break
                group.append(view)
                x = view.inputs[0]
        return group


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
        if rw.types.get(node.output, ...) is None:
            del rw.types[node.output]
        rw.replace(node, rw.weight(f"literal.{node.output}", array, node.type, name=node.output, origin=node.origin))  # type: ignore[arg-type]
    else:
        rw.keep(node)
