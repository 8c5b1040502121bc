"""What a choice for one layer costs the model: measured on calibration data, or by curvature times perturbation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import evaluate, to_torch
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of
from bitwright.passes._match import array
from bitwright.passes._measure import macs
from bitwright.passes._pass import Batch, Context
from bitwright.passes.precision._apart import Apart, Bodies, body_of
from bitwright.passes.precision._choices import Choice

if TYPE_CHECKING:
    import torch

PROBES = 8
"""Random output directions per batch for the trace: its relative error falls with the root of probes times outputs."""
EFFORT = 500_000_000_000
"""Multiply-accumulates that measuring may take: a minute or so of one core."""
Apply = Callable[[str, Choice], Graph]
Outputs = Sequence["torch.Tensor"]


def relative_error(got: Outputs, want: Outputs) -> float:
    """Sum of squared differences of all floating outputs over the sum of squares: 0 is exact, 1 is as bad as zero."""
    square = norm = 0.0
    for a, b in zip(got, want, strict=True):
        if b.is_floating_point():
            square += float((a.double() - b.double()).square().sum())
            norm += float(b.double().square().sum())
    return square / norm if norm else square


def divergence(got: Outputs, want: Outputs) -> float:
    """Mean Kullback-Leibler divergence (nats) of softmax(got) from softmax(want) along the last axis of output 0."""
    import torch

    p, q = (torch.log_softmax(t[0].double(), -1) for t in (want, got))
    return float((p.exp() * (p - q)).sum(-1).mean())


LOSSES: Mapping[str, Callable[[Outputs, Outputs], float]] = {"mse": relative_error, "kl": divergence}


def measured(
    graph: Graph,
    context: Context,
    layers: Mapping[str, Sequence[Node]],
    choices: Sequence[Choice],
    whole: Callable[[Choice], Graph],
    apply: Apply,
    loss: str,
    allowed: Callable[[str, Choice], bool],
    judge: Sequence[Batch],
) -> tuple[list[list[float]], int]:
    """Loss of the model on the batches ``judge`` with one layer at a time changed, infinite where not ``allowed``, and
    the number of batches it was taken on: as many as :data:`EFFORT` lets.

    ``whole`` gives the graph with all layers changed, each as if it were the only one, ``apply`` that with one changed.
    """
    rows = [[0.0 if c.is_float else math.inf for c in choices] for _ in layers]
    bodies: dict[tuple[int, int], Bodies] = {}
    for j, choice in enumerate(choices):
        if choice.is_float or not any(allowed(x, choice) for x in layers):
            continue
        _tell(context, f"{choice} for every layer", j / len(choices) / 2)
        changed = whole(choice)
        for i, (layer, nodes) in enumerate(layers.items()):
            if not allowed(layer, choice):
                continue
            rows[i][j] = 0.0
            found = {n.output: body_of(graph, changed, n.output) for n in nodes}
            if any(b is None for b in found.values()):
                alone = apply(layer, choice)
                found = {x: body_of(graph, alone, x, through=True) for x in found}
            bodies[i, j] = {x: b for x, b in found.items() if b is not None}
    first = [nodes[0].output for nodes in layers.values()]
    apart, batches = Apart(graph, tuple(bodies.values())), few(graph, judge, len(bodies))
    for number, batch in enumerate(batches):

        def changes(value: str, number: int = number) -> list[tuple[Any, Bodies]]:
            if value not in first:
                return []
            i = first.index(value)
            _tell(context, f"sensitivity of {[*layers][i]}", 0.5 + (number + i / len(layers)) / len(batches) / 2)
            return [((i, j), bodies[i, j]) for j in range(len(choices)) if (i, j) in bodies]

        want = evaluate(graph, batch)
        for (i, j), got in apart.outputs(batch, changes):
            rows[i][j] += LOSSES[loss](got, want) / len(batches)
    return rows, len(batches)


def _tell(context: Context, what: str, share: float) -> None:
    if context.progress is not None:
        context.progress(what, share)


def few(graph: Graph, batches: Sequence[Batch], runs: int) -> list[Batch]:
    """The first batches, as many as ``runs`` halves of the model can be computed on within :data:`EFFORT`; one at
    least."""
    chosen, left = list[Batch](), EFFORT
    for batch in batches:
        left -= runs * macs(graph, batch) // 2
        if chosen and left < 0:
            break
        chosen.append(batch)
    return chosen


def curvature(graph: Graph, batches: Sequence[Batch], seed: int = 0) -> dict[str, float]:
    """Mean diagonal of the Gauss-Newton matrix of the squared output error by weight (value name).

    E over random signs v of |d(v . y)/dW|^2, averaged over the entries of W: Hutchinson's estimate (HAWQ-V2) for the
    loss |y - y0|^2 / 2 at y0, whose Hessian is J'J, so that no labels are needed. Divided by |y0|^2, in the unit of
    :func:`relative_error` / 2.
    """
    import torch

    weights = {n.inputs[1] for n in graph.nodes if len(n.inputs) > 1 and graph.is_constant(n.inputs[1])}
    names = [w for w in sorted(weights) if graph.types[w].dtype.is_float and graph.types[w].rank > 1]
    generator = torch.Generator().manual_seed(seed)
    total, norm = dict.fromkeys(names, 0.0), 0.0
    for batch in batches:
        leaves = {w: to_torch(graph.constant(w)).detach().clone().requires_grad_() for w in names}
        outputs = [y for y in evaluate(graph, batch, overrides=leaves, grad=True) if y.is_floating_point()]
        norm += sum(float(y.detach().double().square().sum()) for y in outputs)
        for probe in range(PROBES):
            signs = [torch.randint(0, 2, y.shape, generator=generator).to(y.dtype) * 2 - 1 for y in outputs]
            dot = torch.stack([(y * s).sum() for y, s in zip(outputs, signs, strict=True)]).sum()
            keep = probe + 1 < PROBES
            grads = torch.autograd.grad(dot, list(leaves.values()), retain_graph=keep, allow_unused=True)
            for w, g in zip(names, grads, strict=True):
                total[w] += 0.0 if g is None else float(g.double().square().mean()) / PROBES
    return {w: t / norm if norm else t for w, t in total.items()}


def activation_losses(
    graph: Graph, batches: Sequence[Batch], ranges: Mapping[tuple[str, int], tuple[float, float]], seed: int = 0
) -> dict[tuple[str, int], float]:
    """What holding a value in so many bits over a range costs, by (value, bits), in the unit of :func:`relative_error`.

    E over random signs v of (dv . y/dx . d)^2 / |y|^2 with the change d of rounding x on that grid: |J d|^2, the same
    second-order estimate as :func:`curvature`, with the change itself in place of its mean square.
    """
    import torch

    generator, norm = torch.Generator().manual_seed(seed), 0.0
    total, names = dict.fromkeys(ranges, 0.0), sorted({x for x, _ in ranges})
    for batch in batches:
        given = batch if isinstance(batch, Mapping) else dict(zip((v.name for v in graph.inputs), batch, strict=True))
        inputs = {n: to_torch(a).detach() for n, a in given.items()}
        seen = {n: t.requires_grad_() for n, t in inputs.items() if t.is_floating_point()}
        weights = {
            n.output: to_torch(graph.constant(n.output)).detach().requires_grad_()
            for n in graph.nodes
            if isinstance(n.op, ops.Weight) and n.type.dtype.is_float
        }
        results = evaluate(graph, inputs, overrides=weights, grad=True, observe=seen.__setitem__)
        outputs = [y for y in results if y.is_floating_point()]
        norm += sum(float(y.detach().double().square().sum()) for y in outputs)
        values = [seen[x] for x in names]
        for probe in range(PROBES):
            signs = [torch.randint(0, 2, y.shape, generator=generator).to(y.dtype) * 2 - 1 for y in outputs]
            dot = torch.stack([(y * s).sum() for y, s in zip(outputs, signs, strict=True)]).sum()
            grads = torch.autograd.grad(dot, values, retain_graph=probe + 1 < PROBES, allow_unused=True)
            slopes = dict(zip(names, grads, strict=True))
            for (x, bits), (lo, hi) in ranges.items():
                if (slope := slopes[x]) is not None:
                    along = slope.double() * _rounding(seen[x].detach().double(), bits, lo, hi)
                    total[x, bits] += float(along.sum().square()) / PROBES
    return {k: t / norm if norm else t for k, t in total.items()}


def _rounding(x: torch.Tensor, bits: int, lo: float, hi: float) -> torch.Tensor:
    """The change of values rounded to a grid over [lo, hi] with zero on it."""
    lo, hi, steps = min(lo, 0.0), max(hi, 0.0), (1 << bits) - 1
    scale = (hi - lo) / steps or 1.0
    zero = round(-lo / scale)
    return ((x / scale).round() + zero).clamp(0, steps).sub(zero) * scale - x


def by_curvature(
    graph: Graph,
    context: Context,
    layers: Sequence[str],
    choices: Sequence[Choice],
    apply: Apply,
    allowed: Callable[[str, Choice], bool],
) -> list[list[float]]:
    """Mean curvature of the layer's weight times the squared change of the weight (HAWQ-V3), and what activations below
    8 bits cost by the same estimate; no model is run again."""
    trace = curvature(graph, context.calibration)
    nodes = {layer_of(graph, n): n for n in graph.nodes if len(n.inputs) > 1 and n.inputs[1] in trace}
    held = {(nodes[x].inputs[0], c.activation) for x in layers for c in choices if c.activation < 8 and allowed(x, c)}
    known = {(x, bits): (context.facts.get(f"ranges-{bits}") or context.facts["ranges"])[x] for x, bits in sorted(held)}
    narrow = activation_losses(graph, context.calibration, known) if known else {}
    rows = []
    for layer in layers:
        row, value = [], nodes[layer].inputs[1]
        before = np.asarray(array(graph, value), np.float64)
        for choice in choices:
            if not allowed(layer, choice) or str(choice) == "f32":
                row.append(0.0 if str(choice) == "f32" else float("inf"))
                continue
            change = _changed(apply(layer, choice), nodes[layer].output) - before
            lost = trace[value] * float(np.square(change).sum())
            row.append(lost + narrow.get((nodes[layer].inputs[0], choice.activation), 0.0))
        rows.append(row)
    return rows


def _changed(graph: Graph, output: str) -> Array:
    """The weight a contraction reads, with its dequantize computed."""
    from bitwright.ir.graph import subgraph

    value = graph.producers[output].inputs[1]
    if graph.is_constant(value):
        return np.asarray(array(graph, value), np.float64)
    node = graph.producers[value]
    body, _ = subgraph(graph, [node], (value,))
    (made,) = evaluate(body, {v.name: np.asarray(array(graph, v.name)) for v in body.inputs})
    return np.asarray(made.numpy(), np.float64)
