"""Will it pay? What each number format and sparsity pattern would gain per layer, before anything is pruned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bitwright.codegen.cost import cost_of
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node, Value, subgraph
from bitwright.ir.infer import bind_graph
from bitwright.ir.target import Target
from bitwright.ir.types import NM, S8, S32, DType
from bitwright.ir.work import macs

PATTERNS = ((2, 4), (4, 8), (2, 8), (2, 16))


@dataclass(frozen=True, slots=True)
class Advice:
    """Predicted seconds of one contraction in float, and speed-ups over it; 0.0 where the target has no kernel.

    ``gains``: format or pattern name to speed-up over the float layer. ``reason``: why the best choice is the best,
    or why nothing pays.
    """

    layer: str
    origin: str
    shape: str
    seconds: float
    share: float
    gains: dict[str, float]
    reason: str


def advise(graph: Graph, target: Target, batch: int = 1) -> list[Advice]:
    """One row per contraction of a graph-level program, with its share of the predicted time of all of them."""
    bound = bind_graph(graph, dict.fromkeys(graph.symbols, batch))
    rows = [_row(n, bound, target) for n in bound.nodes if macs(n, bound)]
    total = sum(r.seconds for r in rows) or 1.0
    return [replace(r, share=r.seconds / total) for r in rows]


def _row(node: Node, graph: Graph, target: Target) -> Advice:
    body, _ = subgraph(graph, [node], node.outputs)
    base = cost_of(body, target).seconds
    gains = {name: base / cost_of(other, target).seconds for name, other in _variants(node, body, target)}
    w = graph.types[node.inputs[1]]
    return Advice(node.output, node.origin, f"{w}", base, 0.0, gains, _reason(node, graph, gains))


def _reason(node: Node, graph: Graph, gains: dict[str, float]) -> str:
    if not gains:
        constant = graph.is_constant(node.inputs[1])
        return "no low-bit kernel for this operator" if constant else "both operands are computed: stays float"
    best = max(gains, key=lambda k: gains[k])
    if gains[best] < 1.05:
        return "nothing pays: the layer is bound by memory or by call overhead"
    dense = gains.get("int8", 0.0)
    if best != "int8" and gains[best] < 1.1 * dense:
        return "int8 pays; sparsity adds less than a tenth"
    return f"{best} pays {gains[best]:.1f}x over float" + ("" if best == "int8" else "; check what the mask costs")


def _variants(node: Node, body: Graph, target: Target) -> Iterator[tuple[str, Graph]]:
    """The layer in int8, dense and with every pattern that fits its reduction and has a kernel."""
    low = integer_form(node, body, target, None)
    if low is None:
        return
    yield "int8", low
    depth = int(body.types[node.inputs[1]].shape[1])
    for keep, group in PATTERNS:
        encoding = NM(keep, group, 1)
        fits = depth % group == 0 and getattr(node.op, "groups", 1) == 1
        if fits and target.sparse_gain(target.activation, encoding) > 1.0:
            sparse = integer_form(node, body, target, encoding)
            assert sparse is not None
            yield f"int8 {keep}:{group}", sparse


def integer_form(node: Node, body: Graph, target: Target, encoding: NM | None, bits: int = 8) -> Graph | None:
    """The body of a linear layer or convolution in integers, its weight of ``bits`` bits (2 to 8) with a pattern; None
    without such a kernel."""
    op = node.op
    if isinstance(op, ops.Linear):
        low: ops.Op = ops.IntLinear()
    elif isinstance(op, ops.Conv):
        low = ops.IntConv(op.stride, op.padding, op.dilation, op.groups, op.channels_last)
    else:
        return None
    if not target.rate(target.activation, S8):
        return None
    x, w = node.inputs[:2]
    inputs = (
        Value(x, body.types[x].with_dtype(target.activation)),
        Value(w, body.types[w].with_dtype(DType("int", min(bits, 8))).with_encoding(encoding)),
    )
    node8 = Node(low, (x, w), node.outputs, (node.type.with_dtype(S32),))
    return Graph("body", inputs, (node8,), node.outputs, node.outputs, level="integer")


def with_pattern(node: Node, body: Graph, encoding: NM) -> Graph:
    """The float body with a pattern on the weight."""
    w = node.inputs[1]
    inputs = tuple(Value(v.name, v.type.with_encoding(encoding)) if v.name == w else v for v in body.inputs)
    return replace(body, inputs=inputs)
