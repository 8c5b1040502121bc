"""The integer program behind ``assign-precision``: its rows of losses and costs, its answer, and what to tell of it."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.infer import bind_graph
from bitwright.ir.work import macs
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._pass import Context
from bitwright.passes.precision._choices import Choice, choices_of
from bitwright.passes.precision._held_out import Split, held_out
from bitwright.passes.precision._sensitivity import by_curvature, measured
from bitwright.passes.precision.allocation import Allocation, allocate, pareto
from bitwright.passes.precision.quantize_int8 import QuantizeInt8

if TYPE_CHECKING:
    from bitwright.passes.precision._checked import Checked
    from bitwright.passes.precision.assign_precision import AssignPrecision
    from bitwright.passes.sparsity.masks import Pattern

UNITS = {"": 1.0, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "s": 1.0, "ms": 1e-3, "us": 1e-6}
COSTS = ("size", "latency", "bitops")


@dataclass(frozen=True)
class Problem:
    """Losses and costs by layer and choice; ``costs`` are shares of the float model's, which is ``whole``."""

    layers: tuple[str, ...]
    choices: tuple[Choice, ...]
    losses: list[list[float]]
    costs: list[list[float]]
    ties: tuple[tuple[int, ...], ...]
    kind: str
    whole: float
    source: str
    budget: float
    by_loss: bool
    columns: tuple[tuple[int, ...], ...]
    """Per layer, the choices it may take; the rows of the program hold these alone."""
    time_limit: float
    evidence: str = ""
    """What the losses were found on."""

    @staticmethod
    def of(graph: Graph, context: Context, p: AssignPrecision) -> Problem:
        """Measure everything; raises :class:`InvalidInput` for a budget or a choice that makes no sense."""
        kind, share, unit = parse_budget(p.budget)
        choices = choices_of(p.choices, context.target)
        nodes = layers_of(graph, context, p)
        layers = tuple(nodes)
        fits = _fitting(graph, context, p, choices)

        def allowed(layer: str, choice: Choice) -> bool:
            return layer in fits[choice] and _end_allows(layer, choice, layers, p)

        split, quick, evidence = fitted(context, graph, p), like(p), "curvature"
        fit = Context(context.target, split.fit, facts=context.facts, price=context.price)

        def apply(layer: str, choice: Choice) -> Graph:
            return apply_choice(graph, _scratch(fit), quick, {layer: str(choice)})

        if p.sensitivity == "measured":
            at_once = _AllAtOnce(graph, fit, quick, nodes, choices, allowed)
            rows, took = measured(graph, context, nodes, choices, at_once, apply, p.metric, allowed, split.judge)
            evidence = f"measured on {took} of {len(split.judge)} batches of {split}"
        else:
            rows = by_curvature(graph, context, layers, choices, apply, allowed)
        ties = _residual_ties(graph, layers) if p.ties == "residual" else ()
        columns = _columns(layers, choices, ties, allowed)
        for layer, able in zip(layers, columns, strict=True):
            if not able:
                listed = ", ".join(map(str, choices))
                raise InvalidInput(f"assign-precision: {layer} can take none of {listed}: add f32 to choices")
        by_loss = kind == "loss"
        cost_kind = p.minimise if by_loss else kind
        price, source = _prices(graph, context, p, cost_kind)
        whole = sum(price(nodes[x], Choice(32)) for x in layers) or 1.0
        costs = [[price(nodes[x], choices[j]) / whole for j in able] for x, able in zip(layers, columns, strict=True)]
        losses = [[rows[i][j] for j in able] for i, able in enumerate(columns)]
        budget = share if by_loss or not unit else share / whole
        return Problem(
            layers,
            choices,
            losses,
            costs,
            ties,
            cost_kind,
            whole,
            source(),
            budget,
            by_loss,
            columns,
            p.time_limit,
            evidence,
        )

    def solve(self, able: Callable[[int], bool] | None = None) -> Allocation:
        """The best allocation, its columns numbered as ``choices``; of those ``able`` alone, where layers take any."""
        minimise = "cost" if self.by_loss else "loss"
        rows = [[k for k, j in enumerate(row) if able is None or able(j)] for row in self.columns]
        rows = [kept or list(range(len(row))) for kept, row in zip(rows, self.columns, strict=True)]
        losses, costs = (
            [[row[k] for k in kept] for row, kept in zip(table, rows, strict=True)]
            for table in (self.losses, self.costs)
        )
        try:
            plan = allocate(losses, costs, self.budget, self.ties, minimise, self.time_limit)  # type: ignore[arg-type]
        except InvalidInput as e:
            unit = "loss" if self.by_loss else f"{self.kind}, as a share of float"
            raise InvalidInput(f"assign-precision: budget {self.budget:g} ({unit}): {e}") from e
        choice = tuple(row[kept[c]] for row, kept, c in zip(self.columns, rows, plan.choice, strict=True))
        return Allocation(choice, plan.loss, plan.cost, plan.bound, plan.gap, plan.budget, plan.minimise)

    def front(self, points: int) -> list[tuple[float, float]]:
        """(cost share, loss) of the best allocations from the cheapest to the most exact one."""
        if points < 2:
            return []
        found = pareto(self.losses, self.costs, self.ties, points, self.time_limit)
        return [(a.cost, a.loss) for a in found]


def parse_budget(text: str) -> tuple[str, float, str]:
    """``size=0.16`` to ("size", 0.16, ""); ``latency=2ms`` to ("latency", 0.002, "ms")."""
    m = re.fullmatch(r"(size|latency|bitops|loss)=([0-9.eE+-]+)(B|kB|MB|GB|s|ms|us)?", text.strip())
    try:
        value = float(m[2]) if m else -1.0
    except ValueError:
        value = -1.0
    if m is None or not 0 < value < float("inf"):
        raise InvalidInput(
            f"a budget is size=, latency=, bitops= (shares of the float model, or an amount such as 1.5MB or 2ms) or "
            f"loss= with a number above zero, not {text!r}"
        )
    return m[1], value * UNITS[m[3] or ""], m[3] or ""


def fitted(context: Context, graph: Graph, p: AssignPrecision) -> Split:
    """The calibration data that layers are fitted to while choices are compared, and those that compare them."""
    return held_out(graph, context.calibration)


def like(p: AssignPrecision) -> AssignPrecision:
    """What stands for ``p`` while choices are compared: learning every layer in every choice would take longer than
    all that follows, and GPTQ comes near it."""
    return replace(p, rounding="gptq") if p.rounding in ("adaround", "adaquant") else p


def apply_choice(graph: Graph, context: Context, p: AssignPrecision, plan: Mapping[str, str]) -> Graph:
    """The graph with each layer in its format: masks and weight codes first, then the activations' integers."""
    groups: dict[str, list[str]] = {}
    for layer, choice in plan.items():
        groups.setdefault(choice, []).append(glob.escape(layer))
    low: list[str] = []
    for choice, layers in groups.items():
        c = Choice.parse(choice)
        for step in c.steps(layers, p.rounding, p.reconstruct):
            graph = step.run(graph, context)
        low += layers if c.bits < 32 else []
    bits = {layer: Choice.parse(choice).activation for layer, choice in plan.items()}
    return QuantizeInt8(only="|".join(low)).with_bits(graph, context, lambda x: bits.get(x, 8)) if low else graph


@dataclass
class _AllAtOnce:
    """The graph with every layer in a choice, each as if it were the only one; masks are made once a pattern."""

    graph: Graph
    context: Context
    p: AssignPrecision
    layers: Collection[str]
    choices: Sequence[Choice]
    allowed: Callable[[str, Choice], bool]
    masked: dict[Pattern, tuple[Graph, Context]] = field(default_factory=dict)

    def __call__(self, choice: Choice) -> Graph:
        from bitwright.passes.sparsity._sweep import dense_values

        graph, context = self._masked(choice) if choice.pattern else (self.graph, _scratch(self.context))
        if choice.bits == 32:
            return graph
        mine = [glob.escape(x) for x in self.layers if self.allowed(x, choice)]
        for step in choice.code_steps(mine, self.p.rounding):
            graph = step.on_inputs_of(graph, context, dense_values(graph, context))
        return QuantizeInt8(only="|".join(mine)).with_bits(graph, context, lambda x: choice.activation)

    def _masked(self, choice: Choice) -> tuple[Graph, Context]:
        assert choice.pattern is not None
        if choice.pattern not in self.masked:
            same = [c for c in self.choices if c.pattern == choice.pattern]
            some = [glob.escape(x) for x in self.layers if any(self.allowed(x, c) for c in same)]
            graph, context = self.graph, _scratch(self.context)
            for step in choice.mask_steps(some, self.p.reconstruct, alone=True):
                graph = step.run(graph, context)
            self.masked[choice.pattern] = graph, context
        graph, context = self.masked[choice.pattern]
        return graph, _scratch(context)


def report(problem: Problem, checked: Checked, context: Context, p: AssignPrecision) -> None:
    """A remark per layer, why it got what it got, and one for the model."""
    plan = checked.plan
    for i, layer in enumerate(problem.layers):
        able = problem.columns[i]
        told = [
            f"{problem.choices[j]}: loss {problem.losses[i][k]:.3g}, cost {problem.costs[i][k]:.2%}"
            for k, j in enumerate(able)
        ]
        at = able.index(plan.choice[i])
        context.remark(
            p.name, layer, choice=str(problem.choices[plan.choice[i]]), loss=problem.losses[i][at],
            loss_share=problem.losses[i][at] / plan.loss if plan.loss > 0 else 0.0, cost=problem.costs[i][at],
            of="; ".join(told),
        )  # fmt: skip
    points = problem.front(p.front)
    front = "; ".join(f"{cost:.1%} at loss {loss:.3g}" for cost, loss in points)
    context.facts["precision-front"] = {
        "cost_of": problem.kind, "points": [list(x) for x in points], "chosen": [plan.cost, plan.loss],
    }  # fmt: skip
    context.remark(
        p.name, "model", budget=p.budget, cost_of=problem.kind, cost=plan.cost, loss=plan.loss, bound=plan.bound,
        gap=plan.gap, float_cost=problem.whole, prices=problem.source, losses=problem.evidence,
        measured_loss=checked.loss, plans=str(checked), front=front,
    )  # fmt: skip


def _columns(
    layers: Sequence[str],
    choices: Sequence[Choice],
    ties: Sequence[Sequence[int]],
    allowed: Callable[[str, Choice], bool],
) -> tuple[tuple[int, ...], ...]:
    """The choices each layer may take; tied layers those that all of them may."""
    able = [[j for j, c in enumerate(choices) if allowed(x, c)] for x in layers]
    for group in ties:
        common = [j for j in able[group[0]] if all(j in able[i] for i in group)]
        for i in group:
            able[i] = common
    return tuple(map(tuple, able))


def _scratch(context: Context) -> Context:
    return Context(context.target, context.calibration, None, facts=dict(context.facts), price=context.price)


def layers_of(graph: Graph, context: Context, p: AssignPrecision) -> dict[str, list[Node]]:
    """Contractions that can be quantized at all, by layer; a shared weight is one layer."""
    scratch = _scratch(context)
    QuantizeInt8().run(graph, scratch)
    refused = {r.place: r.reason for r in scratch.refusals}
    found: dict[str, list[Node]] = {}
    for n in graph.nodes:
        if isinstance(n.op, (ops.Linear, ops.Conv, ops.MatMul)) and selected(p.only, p.except_, graph, n):
            layer = layer_of(graph, n)
            if layer in refused or not graph.is_constant(n.inputs[1]):
                context.refuse(p.name, layer, refused.get(layer, "weight is computed, not constant"))
            else:
                found.setdefault(layer, []).append(n)
    return found


def _fitting(graph: Graph, context: Context, p: AssignPrecision, choices: Sequence[Choice]) -> dict[Choice, set[str]]:
    """The layers that can take each choice: those its passes do not refuse."""
    names = {layer_of(graph, n) for n in graph.nodes if len(n.inputs) > 1}
    fits = {}
    for c in choices:
        scratch, g = _scratch(context), graph
        scratch.calibration = ()  # what is refused does not depend on it
        for step in c.steps(["*"], "nearest", rebuild=False):
            g = step.run(g, scratch)
        fits[c] = names - {r.place for r in scratch.refusals}
    return fits


def _end_allows(layer: str, choice: Choice, layers: Sequence[str], p: AssignPrecision) -> bool:
    """``first`` and ``last`` fix the outer layers."""
    fixed = {layers[-1]: p.last} if p.last else {}
    fixed |= {layers[0]: p.first} if p.first else {}
    return layer not in fixed or Choice.parse(fixed[layer]) == choice


def _prices(
    graph: Graph, context: Context, p: AssignPrecision, kind: str
) -> tuple[Callable[[list[Node], Choice], float], Callable[[], str]]:
    """What a choice for the contractions of a layer costs, and (once asked) where the figures come from."""
    bound = bind_graph(graph, dict.fromkeys(graph.symbols, 1))
    if kind == "size":
        return (lambda nodes, c: c.size(graph.types[nodes[0].inputs[1]].size)), lambda: "counted"
    if kind == "bitops":
        work = {n.output: macs(n, bound) for n in bound.nodes}
        return (lambda nodes, c: sum(c.bit_operations(work[n.output]) for n in nodes)), lambda: "counted"
    if context.price is None:
        raise InvalidInput("assign-precision: a latency budget needs a target; compile for one, or budget the size")
    seconds, sources = context.price, list[str]()

    def latency(nodes: list[Node], c: Choice) -> float:
        axis = 0 if isinstance(nodes[0].op, ops.MatMul) and not nodes[0].op.transpose_b else 1
        total = 0.0
        for n in nodes:
            took, source = seconds(bound, n.output, c.bits, c.encoding(axis), p.prices == "measured")
            sources.append(source)
            total += took
        return total

    return latency, lambda: ", ".join(f"{sources.count(s)} {s}" for s in dict.fromkeys(sources))


def _residual_ties(graph: Graph, layers: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Layers whose results meet in an addition of two computed tensors, as groups of indices."""
    at = {layer: i for i, layer in enumerate(layers)}
    leader = list(range(len(layers)))

    def find(i: int) -> int:
        while leader[i] != i:
            i = leader[i]
        return i

    def behind(value: str) -> int | None:
        node = graph.producers.get(value)
        while node is not None and isinstance(node.op, (ops.Unary, ops.Clamp, ops.Reshape, ops.Transpose)):
            node = graph.producers.get(node.inputs[0])
        return at.get(layer_of(graph, node)) if node is not None and len(node.inputs) > 1 else None

    for n in graph.nodes:
        if isinstance(n.op, ops.Binary) and n.op.fn == "add":
            met = [i for i in map(behind, n.inputs) if i is not None]
            for a, b in itertools.pairwise(met):
                leader[find(a)] = find(b)
    groups: dict[int, list[int]] = {}
    for i in range(len(layers)):
        groups.setdefault(find(i), []).append(i)
    return tuple(tuple(g) for g in groups.values() if len(g) > 1)
