"""Will it pay? What each number format and sparsity pattern would gain per layer, before anything is pruned.

Gains come from the cost model (``codegen/cost.py``) and are cautious: 15 % is taken off a predicted gain, since nine of
ten measured layers are that close to their prediction (``benchmarks/predictions.py`` shows both).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bitwright.codegen.cost import cost_of, weight_bytes, working_set
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node, Value, subgraph
from bitwright.ir.infer import bind_graph
from bitwright.ir.target import Target
from bitwright.ir.types import BF16, NM, S8, S32, DType, TensorType
from bitwright.ir.work import macs
from bitwright.passes._layers import layer_of

if TYPE_CHECKING:
    from bitwright.advice_plan import Plan

CAUTION = 0.85
"""Share of a predicted gain that advice promises."""
PAYS = 1.05
"""The promised gain from which on something is worth its trouble."""


@dataclass(frozen=True, slots=True)
class Option:
    """Something a layer could become: ``bits`` of its weights (32: float, 16: bf16) and a pattern along the inputs."""

    name: str
    bits: int
    recipe: str
    pattern: NM | None = None


def _options() -> tuple[Option, ...]:
    def masked(text: str, pattern: NM, name: str = "") -> Option:
        return Option(name or text, 8, f"nm-mask{{pattern={text}}}, int8", pattern)

    return (
        Option("bf16", 16, "bf16"),
        Option("int8", 8, "int8"),
        Option("4 bit", 4, "quantize-weights{bits=4}, int8"),
        Option("2 bit", 2, "quantize-weights{bits=2}, int8"),
        masked("2:4", NM(2, 4, 1)),
        masked("2:4 shared=64", NM(2, 4, 1, shared=64), "2:4 /64"),
        Option("2:4 bf16", 16, "nm-mask{pattern=2:4}, bf16", NM(2, 4, 1)),
        masked("1:4", NM(1, 4, 1)),
        masked("2:8", NM(2, 8, 1)),
        masked("2:16", NM(2, 16, 1)),
        masked("2:4 block=4 shared=4", NM(2, 4, 1, shared=4, block=4), "2:4 4x4"),
        masked("1:4 block=4 shared=4", NM(1, 4, 1, shared=4, block=4), "1:4 4x4"),
    )


OPTIONS = _options()


@dataclass(frozen=True, slots=True)
class Advice:
    """One contraction: predicted seconds in float, its share of all of them, and what each option would make of it.

    ``gains``: option to speed-up over the float layer, without options that have no kernel or do not fit; ``bytes``:
    of its weights by option, ``float`` among them. ``reason``: why the best option is the best, or why nothing pays.
    ``form``: operator and sizes; layers of the same form have the same figures.
    """

    layer: str
    origin: str
    shape: str
    seconds: float
    share: float
    gains: dict[str, float]
    reason: str
    form: str = ""
    bytes: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The option that gains most, "" when none pays."""
        name = max(self.gains, key=lambda k: self.gains[k], default="")
        return name if name and self.gains[name] >= PAYS else ""


@dataclass(frozen=True, slots=True)
class Advised:
    """What :func:`bitwright.advise` returns: an :class:`Advice` per contraction, in order, and the plan of a budget."""

    rows: list[Advice]
    plan: Plan | None = None

    def __iter__(self) -> Iterator[Advice]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def advise(graph: Graph, target: Target, batch: int = 1) -> list[Advice]:
    """One row per contraction of a graph-level program, with its share of the predicted time of all of them."""
    bound = bind_graph(graph, dict.fromkeys(graph.symbols, batch))
    weights = working_set(bound, target)
    rows = [_row(n, bound, target, weights) for n in bound.nodes if macs(n, bound)]
    total = sum(r.seconds for r in rows) or 1.0
    return [replace(r, share=r.seconds / total) for r in rows]


def _row(node: Node, graph: Graph, target: Target, weights: int) -> Advice:
    body, _ = subgraph(graph, [node], node.outputs)
    base = cost_of(body, target, working_set=weights).seconds
    w = graph.types[node.inputs[1]]
    gains, sizes = {}, {"float": weight_bytes(w, target.isa)} if graph.is_constant(node.inputs[1]) else {}
    for option, other in _variants(node, body, graph, target):
        lower = other.types[node.inputs[1]]
        sizes[option.name] = weight_bytes(lower, target.isa)
        share = sizes[option.name] / sizes["float"]
        gain = base / cost_of(other, target, working_set=int(weights * share)).seconds
        gains[option.name] = gain * CAUTION if gain > 1 else gain
    form = f"{node.op.spelling} {graph.types[node.inputs[0]]} {w} {node.op}"
    return Advice(
        layer_of(graph, node), node.origin, f"{w}", base, 0.0, gains, _reason(node, graph, gains), form, sizes
    )


def _reason(node: Node, graph: Graph, gains: dict[str, float]) -> str:
    if not gains:
        constant = graph.is_constant(node.inputs[1])
        return "no low-bit kernel for this operator" if constant else "both operands are computed: stays float"
    best = max(gains, key=lambda k: gains[k])
    if gains[best] < PAYS:
        return "nothing pays: the layer is bound by memory or by call overhead"
    dense = max(gains.get("int8", 0.0), gains.get("bf16", 0.0))
    plain = "int8" if gains.get("int8", 0.0) == dense else "bf16"
    if best == plain:
        return f"{plain} pays"
    if gains[best] < 1.1 * dense:
        return f"{plain} pays; fewer bits or weights add less than a tenth"
    return f"{plain} pays, {best} is {gains[best] / dense:.1f}x faster still"


def _variants(node: Node, body: Graph, graph: Graph, target: Target) -> Iterator[tuple[Option, Graph]]:
    """The layer as each option that has a kernel on the target and fits its reduction."""
    if not isinstance(node.op, ops.Linear | ops.Conv) or not graph.is_constant(node.inputs[1]):
        return
    depth, grouped = int(body.types[node.inputs[1]].shape[1]), getattr(node.op, "groups", 1) > 1
    for option in OPTIONS:
        nm = option.pattern
        if option.bits == 16:
            halves = _retyped(body, {v.name: BF16 for v in body.inputs[:2]})
            if target.rate(BF16, BF16) and nm is None:
                yield option, halves
            elif nm is not None and not grouped and depth % nm.group == 0 and target.gain(BF16, nm) > 1.0:
                yield option, with_pattern(node, halves, nm)
            continue
        if nm is not None and (grouped or depth % (nm.group * nm.block) or target.gain(target.activation, nm) <= 1.0):
            continue
        if grouped and option.bits < 8:
            continue
        low = integer_form(node, body, target, nm, option.bits)
        if low is not None:
            yield option, low


def _retyped(body: Graph, dtypes: dict[str, DType]) -> Graph:
    inputs = tuple(Value(v.name, v.type.with_dtype(dtypes.get(v.name, v.type.dtype))) for v in body.inputs)
    return replace(body, inputs=inputs)


def integer_form(node: Node, body: Graph, target: Target, encoding: NM | None, bits: int = 8) -> Graph | None:
    """The body of a linear layer or convolution in integers, its weight of ``bits`` bits (2 to 8) with a pattern; None
    without such a kernel. What follows the sums is requantization to 8 bits, as between layers of a network."""
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
    outputs, axis = body.types[w].shape[0], node.type.rank - 1 if isinstance(op, ops.Linear) else 1
    factors = TensorType(S32, (outputs,))
    inputs = (
        Value(x, body.types[x].with_dtype(target.activation)),
        Value(w, body.types[w].with_dtype(DType("int", min(bits, 8))).with_encoding(encoding)),
        Value("multiplier", factors), Value("shift", factors),
    )  # fmt: skip
    sums = Node(low, (x, w), ("sums",), (node.type.with_dtype(S32),))
    back = ops.Requantize(target.activation, 0, axis)
    scaled = Node(back, ("sums", "multiplier", "shift"), node.outputs, (node.type.with_dtype(target.activation),))
    return Graph("body", inputs, (sums, scaled), node.outputs, node.outputs, level="integer")


def with_pattern(node: Node, body: Graph, encoding: NM) -> Graph:
    """The float body with a pattern on the weight."""
    w = node.inputs[1]
    inputs = tuple(Value(v.name, v.type.with_encoding(encoding)) if v.name == w else v for v in body.inputs)
    return replace(body, inputs=inputs)
