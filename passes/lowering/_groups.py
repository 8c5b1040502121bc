"""Which nodes become one kernel: roots with the pointwise work that fits around them."""

from __future__ import annotations

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node

ROWWISE: tuple[type[ops.Op], ...] = (ops.Softmax, ops.LayerNorm, ops.RmsNorm, ops.Reduce)
_SOURCES: tuple[type[ops.Op], ...] = (ops.Weight, ops.Constant)
_VIEWS: tuple[type[ops.Op], ...] = (ops.Transpose, ops.Reshape)
_LARGEST = 32
"""Nodes in one region at most: beyond it compile time and register pressure grow, speed does not."""


class Groups:
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
        if isinstance(root.op, ROWWISE):
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
        kept = self._from_narrowest(kept, theirs)
        while True:  # a node that only left nodes read leaves with them
            inside = [
                n for n in kept if n is sink or all(any(u is k for k in kept) for u in self.graph.users[n.output])
            ]
            if len(inside) == len(kept):
                return [root, *kept]
            kept = inside

    def _from_narrowest(self, kept: list[Node], theirs: set[str]) -> list[Node]:
        """Take back the end of a chain that was left, from its narrowest value on: memory holds few bits then."""
        taken: dict[int, Node] = {}
        for value in {x for n in kept for x in n.inputs if x in theirs}:
            chain: list[Node] = []
            while value in theirs and isinstance((node := self.graph.producers[value]).op, ops.POINTWISE):
                chain.append(node)
                moving = [x for x in node.inputs if not self.graph.is_constant(x)]
                if len(moving) != 1 or len(self.graph.users[value]) > 1:
                    break
                value = moving[0]
            bits = [self.graph.types[n.inputs[0]].dtype.bits for n in chain]
            if bits and min(bits) < chain[0].type.dtype.bits:
                taken.update({id(n): n for n in chain[: bits.index(min(bits)) + 1]})
        return sorted([*kept, *taken.values()], key=lambda n: self.position[id(n)])

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
        """Views before attention are strides of its kernel, and so are the views (and a quantize or cast) after it."""
        head, chain = root, list[Node]()
        while isinstance(head.op, (ops.Transpose, ops.Reshape, ops.Quantize, ops.Cast)):
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
                if view is None or not isinstance(view.op, _VIEWS):
                    break
                if not any(view is g for g in group):
                    group.append(view)
                x = view.inputs[0]
        return group
