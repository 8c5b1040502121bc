"""Mean and deviation of values by channel on calibration data, of a graph or of one that is mended as it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.infer import bind_op
from bitwright.ir.interpret import bind_symbols, evaluate, to_torch
from bitwright.ir.weights import Array
from bitwright.passes._pass import Context

if TYPE_CHECKING:
    import torch

LAYERS = (ops.Linear, ops.Conv)


def channel_axis(op: ops.Op) -> int:
    """The axis of a layer's output channels, from the end for linear layers."""
    return -1 if isinstance(op, ops.Linear) or getattr(op, "channels_last", False) else 1


class Moments:
    """Mean and population variance of each channel of a stream of values, in f64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Array = np.zeros(0)
        self.square: Array = np.zeros(0)

    def add(self, value: torch.Tensor, axis: int) -> None:
        """Take a batch in (Chan et al.'s update: no cancellation)."""
        import torch

        flat = value.detach().to(torch.float64).movedim(axis, 0).flatten(1)
        n = flat.shape[1]
        if not n:
            return
        mean = flat.mean(1)
        square = (flat - mean[:, None]).square().sum(1).numpy()
        if not self.count:
            self.count, self.mean, self.square = n, mean.numpy(), square
            return
        total, apart = self.count + n, mean.numpy() - self.mean
        self.mean = self.mean + apart * n / total
        self.square = self.square + square + apart**2 * self.count * n / total
        self.count = total

    @property
    def variance(self) -> Array:
        """Population variance by channel."""
        found: Array = self.square / max(self.count, 1)
        return found


def moments(graph: Graph, context: Context, who: str, layers: dict[str, int]) -> dict[str, Moments]:
    """Moments of values, by name with their channel axis, over the calibration batches."""
    found = {name: Moments() for name in layers}

    def observe(name: str, value: torch.Tensor) -> None:
        if name in found:
            found[name].add(value, layers[name])

    for i, batch in enumerate(context.calibration):
        if context.progress is not None:
            context.progress(who, i / len(context.calibration) / 2)
        evaluate(graph, batch, observe=observe)
    return found


Mend = Callable[[Node, "list[torch.Tensor]"], "list[torch.Tensor]"]


def run_mended(graph: Graph, context: Context, who: str, layers: set[str], mend: Mend) -> None:
    """Run all calibration batches side by side, node after node; ``mend`` sees the results of a layer on every batch
    and gives those that the nodes after it read. Holds the live values of the whole set."""
    from bitwright.ir.semantics import apply

    runs: list[dict[str, Any]] = []
    sizes: list[dict[str, int]] = []
    names = [v.name for v in graph.inputs]
    for batch in context.calibration:
        given = batch if isinstance(batch, dict) else dict(zip(names, batch, strict=True))
        runs.append({n: to_torch(given[n]) for n in names})
        sizes.append(bind_symbols(graph, [tuple(runs[-1][n].shape) for n in names]))
    last = {x: i for i, n in enumerate(graph.nodes) for x in n.inputs}
    for i, node in enumerate(graph.nodes):
        if isinstance(node.op, ops.Weight | ops.Constant):
            value = to_torch(graph.constant(node.output))
            for run in runs:
                run[node.output] = value
            continue
        for run, size in zip(runs, sizes, strict=True):
            run.update(zip(node.outputs, apply(bind_op(node.op, size), *(run[x] for x in node.inputs)), strict=True))
        if node.output in layers:
            if context.progress is not None:
                context.progress(who, 0.5 + i / len(graph.nodes) / 2)
            for run, new in zip(runs, mend(node, [run[node.output] for run in runs]), strict=True):
                run[node.output] = new
        for x in {*node.inputs}:
            if last[x] == i:
                for run in runs:
                    run.pop(x, None)


def nearer(graph: Graph, mended: Graph, reference: Graph, context: Context, who: str, told: int) -> Graph:
    """``mended`` if its outputs on the calibration data are no further from the reference's than those of ``graph``.

    Else ``graph``, with a refusal in place of the remarks from number ``told`` on: what channels have on average tells
    little where most rows are padding, or where a norm behind the layer takes the mean off anyway.
    """
    if mended is graph:
        return graph
    before = after = norm = 0.0
    for batch in context.calibration:
        want = evaluate(reference, batch)
        norm += squares(want)
        before += squares(evaluate(graph, batch), want)
        after += squares(evaluate(mended, batch), want)
    norm = norm or 1.0
    if after <= before:
        facts = {"output_error": (before / norm) ** 0.5, "output_error_after": (after / norm) ** 0.5}
        context.remarks.insert(told, (who, "model", facts))
        return mended
    del context.remarks[told:]
    change = f"{(before / norm) ** 0.5:.3g} to {(after / norm) ** 0.5:.3g}"
    context.refuse(who, "model", f"it would take the outputs' error from {change}: all layers stay as they are")
    return graph


def squares(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor] = ()) -> float:
    """Sum of the squared differences of all floating outputs, or of their squares."""
    floats = [(i, y.double()) for i, y in enumerate(got) if y.is_floating_point()]
    return sum(float((y - want[i].double() if want else y).square().sum()) for i, y in floats)


def along(values: Array, axis: int, like: torch.Tensor) -> torch.Tensor:
    """A value for each channel, shaped and typed to broadcast over a layer's result."""
    shape = [1] * like.ndim
    shape[axis] = -1
    return to_torch(values).to(like.dtype).reshape(shape)


def keep_reference(graph: Graph, context: Context) -> None:
    """Remember the graph as the float model that a quantized one is held against; one with integers is none."""
    if not any(isinstance(n.op, ops.Quantize | ops.Dequantize) for n in graph.nodes):
        context.facts["reference"] = graph


def reference_of(context: Context, who: str) -> Graph:
    """The float model; raises :class:`InvalidInput` when no pass before kept it."""
    found = context.facts.get("reference")
    if not isinstance(found, Graph):
        raise InvalidInput(
            f"{who} compares with the float model, which observe-ranges keeps: run that before quantizing"
        )
    return found


def quantized_layers(graph: Graph) -> list[Node]:
    """Linear and convolution layers that read a dequantized operand, in order."""
    found = []
    for n in graph.nodes:
        sources = [graph.producers.get(x) for x in n.inputs[:2]]
        if isinstance(n.op, LAYERS) and any(s is not None and isinstance(s.op, ops.Dequantize) for s in sources):
            found.append(n)
    return found


__all__ = [
    "LAYERS", "Moments", "along", "channel_axis", "keep_reference", "moments", "nearer",
    "quantized_layers", "reference_of", "run_mended", "squares",
]  # fmt: skip
