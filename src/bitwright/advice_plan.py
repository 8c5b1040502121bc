"""The best format and pattern for every layer within a budget, before anything is changed.

With calibration data the losses are measured, by the pass that would apply the plan (``assign-precision``). Without,
they are guessed from the weights alone: the share of a layer's squared weights that pruning and rounding take away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.infer import bind_graph
from bitwright.ir.target import Target
from bitwright.passes._layers import layer_of
from bitwright.passes.precision._assignment import COSTS, parse_budget
from bitwright.passes.precision._choices import Choice, choices_of
from bitwright.passes.precision.allocation import allocate
from bitwright.passes.precision.assign_precision import AssignPrecision
from bitwright.passes.sparsity.masks import nm_mask_array
from bitwright.prices import Prices

MEASURED = "losses measured on the calibration data (relative squared error of the outputs)"
GUESSED = (
    "no calibration data: losses are guessed from the weights alone (share of their squares that is rounded or pruned "
    "away); give data with --calibrate to measure them"
)

_OUTPUTS = 64


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one layer should become; ``cost`` is a share of the float model's."""

    layer: str
    choice: str
    loss: float
    cost: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The best choices within ``budget``. ``kind``: what the costs count (size, latency, bitops); ``whole``: the float
    model's, in bytes, seconds or bit operations; ``basis``: where the losses come from; ``recipe`` applies the plan."""

    rows: tuple[Chosen, ...]
    budget: str
    kind: str
    cost: float
    loss: float
    whole: float
    basis: str
    recipe: str


def plan(graph: Graph, target: Target, budget: str, calibration: Any = None, batch: int = 1) -> Plan:
    """Allocate; raises :class:`InvalidInput` for a budget that makes no sense or that no choice can meet.

    ``budget`` as for ``assign-precision``: ``size=0.2``, ``latency=0.5``, ``bitops=0.1`` or ``loss=0.01``, which makes
    the latency smallest. ``graph``: of level graph, batch norms folded.
    """
    kind, _, _ = parse_budget(budget)
    if calibration is not None:
        return _measured(graph, target, budget, kind, calibration)
    return _guessed(bind_graph(graph, dict.fromkeys(graph.symbols, batch)), target, budget)


def _measured(graph: Graph, target: Target, budget: str, kind: str, calibration: Any) -> Plan:
    from bitwright import driver
    from bitwright.passes._spec import parse_passes

    assign = AssignPrecision(budget=budget, minimise="latency", reconstruct=False, front=0)
    steps = (*parse_passes("observe-ranges{method=mse also=4}"), assign)
    _, report = driver.optimize(graph, steps, target=target, calibration=calibration)
    told = [(place, facts) for name, place, facts in report.remarks if name == assign.name]
    model = next((facts for place, facts in told if place == "model"), None)
    if model is None:
        raise InvalidInput("no layer of the model can take another format: there is nothing to plan")
    rows = tuple(Chosen(p, f["choice"], f["loss"], f["cost"]) for p, f in told if p != "model" and "choice" in f)
    return Plan(rows, budget, model["cost_of"], model["cost"], model["loss"], model["float_cost"], MEASURED,
                _recipe(budget, kind))  # fmt: skip


def _recipe(budget: str, kind: str) -> str:
    extra = " minimise=latency" if kind == "loss" else ""
    return f"observe-ranges{{method=mse also=4}}, assign-precision{{budget={budget}{extra}}}, retune-norms"


def _guessed(graph: Graph, target: Target, budget: str) -> Plan:
    kind, share, unit = parse_budget(budget)
    cost_kind = "latency" if kind == "loss" else kind
    layers: dict[str, list[Node]] = {}
    for n in graph.nodes:
        if isinstance(n.op, ops.Linear | ops.Conv) and graph.is_constant(n.inputs[1]):
            layers.setdefault(layer_of(graph, n), []).append(n)
    if not layers:
        raise InvalidInput("no layer of the model can take another format: there is nothing to plan")
    choices, prices = choices_of("auto", target), Prices(target)
    fits = {x: [c for c in choices if _fits(nodes[0], graph, c)] for x, nodes in layers.items()}
    costs = [[_cost(nodes, graph, c, cost_kind, prices) for c in fits[x]] for x, nodes in layers.items()]
    whole = sum(_cost(nodes, graph, Choice(32), cost_kind, prices) for nodes in layers.values()) or 1.0
    shares = [[c / whole for c in row] for row in costs]
    losses = [[guessed_loss(_weight(nodes[0], graph), c) for c in fits[x]] for x, nodes in layers.items()]
    limit = share / whole if unit and kind != "loss" else share
    found = allocate(losses, shares, limit, minimise="cost" if kind == "loss" else "loss")
    rows = tuple(
        Chosen(x, str(fits[x][j]), losses[i][j], shares[i][j])
        for i, (x, j) in enumerate(zip(layers, found.choice, strict=True))
    )
    return Plan(rows, budget, cost_kind, found.cost, found.loss, whole, GUESSED, _recipe(budget, kind))


def _weight(node: Node, graph: Graph) -> np.ndarray[Any, Any]:
    array = graph.constant(node.inputs[1])
    if not isinstance(array, np.ndarray):
        raise InvalidInput(f"{layer_of(graph, node)}: its weight has no values to judge a plan by")
    return array


def _fits(node: Node, graph: Graph, choice: Choice) -> bool:
    """Patterns need a reduction of whole groups."""
    depth = int(graph.types[node.inputs[1]].shape[1])
    return choice.pattern is None or (depth % choice.pattern.group == 0 and getattr(node.op, "groups", 1) == 1)


def _cost(nodes: Sequence[Node], graph: Graph, choice: Choice, kind: str, prices: Prices) -> float:
    assert kind in COSTS
    size = graph.types[nodes[0].inputs[1]].size
    if kind == "size":
        return choice.size(size)
    if kind == "bitops":
        from bitwright.ir.work import macs

        return sum(choice.bit_operations(macs(n, graph)) for n in nodes)
    return sum(prices(graph, n.output, choice.bits, choice.encoding(1), False)[0] for n in nodes)


def guessed_loss(weight: np.ndarray[Any, Any], choice: Choice) -> float:
    """The share of the squares of ``weight`` [outputs, inputs, ...] that the choice takes away by pruning the smallest
    of each group and rounding the others, one scale per output: 0 for float, 1 if nothing were left. Of many outputs
    it looks at some 64 spread evenly."""
    w = weight[:: max(1, len(weight) // _OUTPUTS)].astype(np.float32)
    kept = w
    if choice.pattern is not None:
        kept = np.where(nm_mask_array(w, choice.pattern.keep, choice.pattern.group, 1), w, 0)
    if choice.bits < 32:
        axes = tuple(range(1, w.ndim))
        top = 2 ** (choice.bits - 1) - 1
        scale = np.maximum(np.abs(kept).max(axis=axes, keepdims=True), 1e-30) / top
        kept = np.clip(np.round(kept / scale), -top - 1, top) * scale
    return float(np.square(w - kept).sum() / max(float(np.square(w).sum()), 1e-30))
