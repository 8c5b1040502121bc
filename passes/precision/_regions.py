"""Which values of a graph are worth holding in 8 bits or fewer, given the contractions that will be integer.

Demand flows backwards from the contractions' operands: through layout operators (the quantized tensor is moved
instead), through pools and residual additions whose operands can all be integers, never through anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node

MOVES = (ops.Reshape, ops.Transpose, ops.Flip)
"""Only move elements: the quantized tensor is moved, whoever made it."""
PICKS = (ops.MaxPool, ops.Concat, ops.Slice, ops.Gather, ops.Expand, ops.Tile, ops.Pad)
"""Keep values but change how many: carried on integers when their operands can be."""
Range = tuple[float, float]


@dataclass
class Regions:
    """What will be integer. ``layers``: operands by contraction. ``wanted``: values held in 8 bits. ``carried``:
    layout operators that run on the quantized tensor. ``joined``: additions and pools that read quantized values."""

    graph: Graph
    layers: dict[str, tuple[str, ...]]
    ranges: dict[str, Range]
    widths: Mapping[str, int] = field(default_factory=dict)
    """Bits of what a layer reads, by layer; 8 where none are given."""
    narrow: Mapping[int, Mapping[str, Range]] = field(default_factory=dict)
    """Ranges that suit a width below 8 bits better than ``ranges``, by width."""
    wanted: dict[str, None] = field(default_factory=dict)
    carried: set[str] = field(default_factory=set)
    joined: set[str] = field(default_factory=set)
    _order: dict[str, int] = field(default_factory=dict)

    def plan(self) -> Regions:
        """Let demand flow until nothing is added."""
        self._order = {o: i for i, n in enumerate(self.graph.nodes) for o in n.outputs}
        for operands in self.layers.values():
            self.wanted.update(dict.fromkeys(operands))
        size = -1
        while size != len(self.wanted) + len(self.carried) + len(self.joined):
            size = len(self.wanted) + len(self.carried) + len(self.joined)
            known: dict[str, bool] = {}
            for node in reversed(self.graph.nodes):
                self._visit(node, known)
        return self

    def reads_quantized(self, node: Node, value: str) -> bool:
        """True when ``node`` takes the 8-bit form of an operand."""
        if node.output in self.layers:
            return value in self.layers[node.output]
        return node.output in self.carried or node.output in self.joined

    def groups(self) -> dict[str, tuple[Range, int]]:
        """Range and bits of every wanted value; values that layout operators connect share both.

        The bits are the most that a layer among the readers wants. Additions and pools take what layers left them: 8
        bits where no layer reads the value.
        """
        leader = {v: v for v in self.wanted}

        def find(v: str) -> str:
            while leader[v] != v:
                leader[v] = leader[leader[v]]
                v = leader[v]
            return v

        for out in self.carried:
            for x in moved_operands(self.graph.producers[out]):
                leader[find(out)] = find(x)
        bits: dict[str, int] = {}
        for layer, operands in self.layers.items():
            for x in map(find, operands):
                bits[x] = max(bits.get(x, 0), self.widths.get(layer, 8))
        union: dict[str, Range] = {}
        for v in self.wanted:
            known = self.narrow.get(bits.get(find(v), 8), {})
            lo, hi = known.get(v, self.ranges[v])
            have = union.get(find(v), (lo, hi))
            union[find(v)] = min(lo, have[0]), max(hi, have[1])
        return {v: (union[find(v)], bits.get(find(v), 8)) for v in self.wanted}

    def _visit(self, node: Node, known: dict[str, bool]) -> None:
        out, g = node.output, self.graph
        if out in self.carried or out in self.joined or len(node.outputs) != 1:
            return
        if isinstance(node.op, (*MOVES, *PICKS)):
            operands = moved_operands(node)
            readers = g.users[out]
            if out not in self.wanted or out in g.outputs or not all(self.reads_quantized(n, out) for n in readers):
                return
            possible = isinstance(node.op, MOVES) or all(self.could(x, known) for x in operands)
            if possible and self._observed(operands) and carriable(node):
                self.carried.add(out)
                self.wanted.update(dict.fromkeys(operands))
        elif self.after_activation(out) in self.wanted:
            if is_mean(g, node) and self.could(node.inputs[0], known) and self._observed(node.inputs):
                self.joined.add(out)
                self.wanted[node.inputs[0]] = None
            elif is_residual(g, node) and all(self.could(x, known) for x in node.inputs):
                held = [x for x in node.inputs if x not in self._raw(node)]
                if self._observed(held):
                    self.joined.add(out)
                    self.wanted.update(dict.fromkeys(held))

    def _observed(self, values: tuple[str, ...] | list[str]) -> bool:
        return all(v in self.ranges for v in values)

    def _raw(self, node: Node) -> list[str]:
        """The operand of an addition that stays an accumulator: the contraction made last, if only we read it."""
        able = [x for x in node.inputs if x in self.layers and len(self.graph.users[x]) == 1 and x not in self.wanted]
        able = [x for x in able if x not in self.graph.outputs]
        return sorted(able, key=lambda x: self._order[x])[-1:]

    def after_activation(self, value: str) -> str:
        """The value behind relu and clamp that alone read the one before."""
        while len(self.graph.users[value]) == 1 and value not in self.graph.outputs and value not in self.wanted:
            (reader,) = self.graph.users[value]
            if not is_activation(reader):
                break
            value = reader.output
        return value

    def could(self, value: str, known: dict[str, bool]) -> bool:
        """True when the value can be computed from integers alone."""
        if value in self.wanted or value in self.layers:
            return True
        if value not in known:
            known[value] = False
            node = self.graph.producers.get(value)
            if node is not None and len(node.outputs) == 1:
                operands = moved_operands(node) if isinstance(node.op, (*MOVES, *PICKS)) else node.inputs
                passes = is_activation(node) or is_mean(self.graph, node) or is_residual(self.graph, node)
                passes = passes or (isinstance(node.op, (*MOVES, *PICKS)) and carriable(node))
                known[value] = passes and all(self.could(x, known) for x in operands)
        return known[value]


def moved_operands(node: Node) -> tuple[str, ...]:
    """The operands whose elements a layout operator moves (not the indices of a gather)."""
    return node.inputs[:1] if isinstance(node.op, ops.Gather) else node.inputs


def carriable(node: Node) -> bool:
    """True when the operator means the same on quantized values."""
    return not isinstance(node.op, ops.Pad) or node.op.mode != "constant" or node.op.value == 0


def is_activation(node: Node) -> bool:
    """relu or clamp: a bound on the integers."""
    return isinstance(node.op, ops.Clamp) or (isinstance(node.op, ops.Unary) and node.op.fn == "relu")


def is_residual(graph: Graph, node: Node) -> bool:
    """An addition of two computed f32 tensors of one shape."""
    if not isinstance(node.op, ops.Binary) or node.op.fn != "add" or len(set(node.inputs)) != 2:
        return False
    same = all(graph.types[x] == node.type for x in node.inputs)
    return same and not any(graph.is_constant(x) for x in node.inputs)


def is_mean(graph: Graph, node: Node) -> bool:
    """A mean over a known number of elements: reduce_mean, or pooling whose windows all count alike."""
    t = graph.types[node.inputs[0]] if node.inputs else None
    if isinstance(node.op, ops.Reduce) and t is not None:
        return node.op.fn == "mean" and bool(node.op.axes) and all(isinstance(t.shape[a], int) for a in node.op.axes)
    if isinstance(node.op, ops.AvgPool) and t is not None:
        plain = not any(node.op.extra) and (node.op.count_padding or not any(node.op.padding))
        return plain and isinstance(t.shape[-1 if node.op.channels_last else 1], int)
    return False
