"""The meaning of a device's instruction: a small graph in the IR's text, matched by selection, run by simulation."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.ir import ops
from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.text import parse
from bitwright.ir.types import NM, DType
from bitwright.ir.verify import verify

PRODUCTS = (ops.IntLinear, ops.Linear, ops.SmallLinear)


@dataclass(frozen=True, slots=True)
class Meaning:
    """``graph`` over x [b, depth], w [o, depth] and, if ``acc`` is not None, the running sums [b, o] in that format.

    ``product`` is its one contraction; ``pattern`` the mask its weights must obey.
    """

    graph: Graph
    product: Node
    x: DType
    w: DType
    acc: DType | None
    pattern: NM | None

    @property
    def density(self) -> float:
        return self.pattern.density if self.pattern else 1.0

    @property
    def saturates(self) -> bool:
        """Whether sums that do not fit are clamped (they wrap otherwise)."""
        return any(isinstance(n.op, ops.Saturate) for n in self.graph.nodes)


def read_meaning(text: str, depth: int) -> Meaning:
    """Parse and check; raises :class:`InvalidInput` that says what a meaning must look like."""
    try:
        graph = parse(f"graph @meaning {text}" if not text.lstrip().startswith("graph") else text)
        verify(graph)
    except BitwrightError as e:
        raise InvalidInput(f"the meaning is no graph: {e}") from e
    names = [v.name for v in graph.inputs]
    if names not in (["x", "w", "acc"], ["x", "w"]):
        raise InvalidInput(f"a meaning takes (%x, %w, %acc) or (%x, %w), not ({', '.join('%' + n for n in names)})")
    x, w = graph.inputs[0].type, graph.inputs[1].type
    acc = graph.inputs[2].type if len(names) > 2 else None
    long = "k" if acc is None else depth
    if x.shape != ("b", long) or w.shape != ("o", long):
        raise InvalidInput(f"a meaning takes x[b, {long}] and w[o, {long}], not {x} and {w}")
    if acc is not None and acc.shape != ("b", "o"):
        raise InvalidInput(f"the running sums are [b, o], not {acc}")
    if len(graph.outputs) != 1 or graph.types[graph.outputs[0]].shape != ("b", "o"):
        raise InvalidInput("a meaning gives one result [b, o]")
    if acc is not None and graph.types[graph.outputs[0]].dtype != acc.dtype:
        raise InvalidInput(f"the result is {graph.types[graph.outputs[0]].dtype}, the running sums are {acc.dtype}")
    products = [n for n in graph.nodes if isinstance(n.op, ops.CONTRACTION)]
    if len(products) != 1 or not isinstance(products[0].op, PRODUCTS) or products[0].inputs[:2] != ("x", "w"):
        raise InvalidInput("a meaning has one product of %x and %w: int_linear, linear or small_linear")
    pattern = w.encoding
    if pattern is not None and (not isinstance(pattern, NM) or pattern.axis % 2 != 1):
        raise InvalidInput(f"weights of an instruction are dense or N:M along axis 1, not {pattern}")
    if isinstance(pattern, NM) and acc is not None and depth % (pattern.group * pattern.block):
        raise InvalidInput(f"{depth} terms a step are no whole groups of {pattern.group * pattern.block}")
    return Meaning(graph, products[0], x.dtype, w.dtype, acc.dtype if acc else None, pattern)
