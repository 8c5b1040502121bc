"""Rebuilding layers from the first to the last: inputs gathered, each layer solved once, solutions kept on disk."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_torch
from bitwright.passes._pass import Context
from bitwright.passes.sparsity._frontier import walk
from bitwright.passes.sparsity._inputs import Moments, finite, kernel_of, rows
from bitwright.passes.sparsity._reconstruction import Layer, dense_bias, dense_of, rebuild
from bitwright.passes.sparsity._resume import Store, digest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Options:
    """How layers are solved."""

    least_squares: bool
    update: bool
    """The mask is chosen again."""
    inputs: Literal["sequential", "local", "parallel"]
    damping: float
    resume: str
    spelling: str
    """All of the above but ``resume``, as text."""


def sweep(graph: Graph, context: Context, layers: list[Layer], options: Options, who: str) -> None:
    """Solve the layers in place, in order of execution. One layer's Gram matrix and the live values are held."""
    import torch

    if not layers:
        return
    by_node = {n.output: x for x in layers for n in x.nodes}
    order = {x.ref: i for i, x in enumerate(layers)}
    before, store = dense_values(graph, context), Store(options.resume)
    tied = _tied(graph, context, {o: x for o, x in by_node.items() if len(x.nodes) > 1}, before)

    def visit(node: Node, xs: list[torch.Tensor], twins: list[torch.Tensor]) -> dict[int, torch.Tensor]:
        layer = by_node[node.output]
        if node is layer.nodes[0]:
            if context.progress is not None:
                context.progress(f"reconstruct {layer.name}", order[layer.ref] / len(layers))
            seen = tied.pop(layer.ref, None)
            if seen is None:
                seen = Moments.empty(layer.size)
                if all(torch.equal(x, z) for x, z in zip(xs, twins, strict=False)):
                    twins = []  # nothing before this layer changed
                for i, x in enumerate(xs):
                    _gather(graph, node, x, i, seen, twins[i] if twins else None)
            _rebuild(layer, seen, store, options, context, who)
        return layer.operands(dense=options.inputs == "parallel")

    given, twin = before if options.inputs == "parallel" else None, before if options.inputs == "sequential" else None
    walk(graph, context.calibration, set(by_node), visit, given, twin)


def _gather(
    graph: Graph, node: Node, x: torch.Tensor, batch: int, into: Moments, twin: torch.Tensor | None = None
) -> None:
    kernel = kernel_of(graph, node)
    if twin is None:
        for part in rows(node.op, x, kernel):
            into.add(finite(graph, node, part, batch))
        return
    for part, dense in zip(rows(node.op, x, kernel), rows(node.op, twin, kernel), strict=True):
        into.add_pair(finite(graph, node, part, batch), finite(graph, node, dense, batch))


def _tied(
    graph: Graph, context: Context, by_node: dict[str, Layer], before: dict[str, torch.Tensor]
) -> dict[str, Moments]:
    """The inputs of weights with several readers, summed over these, in the dense model; by weight key."""
    found: dict[str, Moments] = {}
    for i, batch in enumerate(context.calibration if by_node else ()):

        def look(node: Node, xs: list[torch.Tensor], _: list[torch.Tensor], i: int = i) -> None:
            layer = by_node[node.output]
            _gather(graph, node, xs[0], i, found.setdefault(layer.ref, Moments.empty(layer.size)))

        walk(graph, [batch], set(by_node), look, before)
    return found


def dense_values(graph: Graph, context: Context) -> dict[str, torch.Tensor]:
    """Every weight and bias that a mask or an earlier reconstruction changed, as it was, by value name."""
    found = {}
    for n in graph.nodes:
        if isinstance(n.op, ops.Weight):
            known = dense_of(graph, n.op.ref, context) if n.type.rank > 1 else dense_bias(graph, n.output, context)
            if known is not None:
                found[n.output] = to_torch(known.array)
    return found


def _rebuild(layer: Layer, seen: Moments, store: Store, options: Options, context: Context, who: str) -> None:
    start = time.perf_counter()
    old = [a for a in (layer.weight, layer.bias, layer.dense_bias) if a is not None]
    words = (options.spelling, str(layer.encoding), str(seen.rows))
    sums = [seen.gram, seen.total]
    if seen.other is not None and seen.cross is not None:
        sums += [seen.cross, seen.other.gram, seen.other.total]
    key = digest([*words, layer.dense.array, *old, *(s.numpy() for s in sums)])
    like = {"weight": layer.weight} | ({} if layer.bias is None else {"bias": layer.bias})
    saved = store.read(layer.name, key, like)
    if isinstance(saved, str):
        why = rebuild(layer, seen, options.least_squares, options.update, options.damping)
        if why:
            context.refuse(who, layer.name, why)
            return
        now = {"weight": layer.weight} | ({} if layer.bias is None else {"bias": layer.bias})
        store.write(layer.name, key, now, layer.facts)
        layer.facts |= {"resume": saved} if saved else {}
    else:
        arrays, layer.facts = saved
        layer.weight, layer.bias, layer.solved = arrays["weight"], arrays.get("bias"), True
        layer.facts["resume"] = "read"
    if seen.rows < layer.size:
        layer.facts["note"] = f"{seen.rows} rows for {layer.size} inputs: more calibration data would help"
    seconds = round(time.perf_counter() - start, 3)
    context.remark(who, layer.name, **layer.facts, rows=seen.rows, seconds=seconds)
