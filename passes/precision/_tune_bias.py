"""Biases of a quantized model learnt by gradients, on the difference of its outputs from the float model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.infer import bind_op
from bitwright.ir.interpret import bind_symbols, evaluate, to_torch
from bitwright.ir.weights import Array
from bitwright.passes._measure import macs
from bitwright.passes._pass import Batch
from bitwright.passes.precision._statistics import channel_axis

if TYPE_CHECKING:
    import torch

EPOCHS = 20
"""Passes over the calibration data; the paper's code takes 200 over a thousand images."""
EFFORT = 600_000_000_000
"""Multiply-accumulates that learning may take, three times forward for each pass: half a minute or so of one core."""
RATE = 0.01
"""Of Adam, falling to zero, in deviations of the layer's output."""


class Tuned(NamedTuple):
    """Shifts by layer and channel, f64, and the relative squared error of the outputs before and after, on all data."""

    shifts: dict[str, Array]
    before: float
    after: float


def tune_biases(
    graph: Graph, reference: Graph, batches: Sequence[Batch], layers: Mapping[str, Array], epochs: int = 0
) -> Tuned:
    """Learn what is added to the output channels of ``layers`` (output to the deviation of its channels in the float
    model, f64) so that the outputs come nearer to the reference's; the best state seen at an epoch's end counts,
    the first included.

    Bias tuning of Hubara et al. 2021 (section 4.4 of their pipeline), with the squared error of the outputs, which any
    model has, for the divergence of class probabilities. ``epochs`` 0: as many of :data:`EPOCHS` as :data:`EFFORT`
    lets, three at least. Rounding passes gradients straight through, clipping none.
    """
    import torch

    wanted = [evaluate(reference, b) for b in batches]
    norm = sum(float(y.double().square().sum()) for want in wanted for y in want if y.is_floating_point()) or 1.0
    free = {x: torch.zeros(d.shape, requires_grad=True) for x, d in layers.items()}
    model = _Straight(graph, {x: to_torch(d).float() for x, d in layers.items()}, free)
    optimizer = torch.optim.Adam(list(free.values()), lr=RATE)

    def state() -> tuple[float, dict[str, Array]]:
        with torch.no_grad():
            total = sum(float(_square(model(b), w)) for b, w in zip(batches, wanted, strict=True)) / norm
        return total, {x: t.detach().numpy().astype(np.float64) * layers[x] for x, t in free.items()}

    if not epochs:
        epochs = max(3, min(EPOCHS, EFFORT // max(1, 3 * sum(macs(reference, b) for b in batches))))
    (first, best), steps = state(), epochs * len(batches)
    least = first
    for epoch in range(epochs):
        for i, (batch, want) in enumerate(zip(batches, wanted, strict=True)):
            optimizer.param_groups[0]["lr"] = RATE * (1 - (epoch * len(batches) + i) / steps)
            with torch.enable_grad():
                loss = _square(model(batch), want) / norm
                grads = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
            for t, g in zip(free.values(), grads, strict=True):
                t.grad = g
            optimizer.step()
        now, shifts = state()
        if now < least:
            least, best = now, shifts
    return Tuned(best, first, least)


def _square(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack([(a - b).square().sum() for a, b in zip(got, want, strict=True) if b.is_floating_point()]).sum()


class _Straight:
    """The quantized graph in floats, codes included, so that gradients go through rounding."""

    def __init__(self, graph: Graph, units: Mapping[str, torch.Tensor], free: Mapping[str, torch.Tensor]) -> None:
        self.graph, self.units, self.free = graph, units, free
        self.constants: dict[str, torch.Tensor] = {}
        for n in graph.nodes:
            if isinstance(n.op, (ops.Weight, ops.Constant)):
                self.constants[n.output] = to_torch(graph.constant(n.output))
            elif isinstance(n.op, ops.Dequantize) and all(
                x in self.constants for x in n.inputs
            ):  # weights behind their codes: once
                self._put(n, self.constants, {})

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        names = [v.name for v in self.graph.inputs]
        given: Any = batch if isinstance(batch, Mapping) else dict(zip(names, batch, strict=True))
        values = self.constants | {n: to_torch(given[n]) for n in names}
        sizes = bind_symbols(self.graph, [tuple(values[n].shape) for n in names])
        for n in self.graph.nodes:
            if n.output not in self.constants:
                self._put(n, values, sizes)
        return tuple(values[o] for o in self.graph.outputs)

    def _put(self, n: Node, values: dict[str, torch.Tensor], sizes: dict[str, int]) -> None:
        from bitwright.ir.semantics import apply

        operands = [values[x] for x in n.inputs]
        if isinstance(n.op, ops.Quantize) and all(t.numel() == 1 for t in operands[1:]):
            zero = operands[2].float() if len(operands) > 2 else 0.0
            at = operands[0] / operands[1] + zero
            results: Sequence[torch.Tensor] = [(at + (at.round() - at).detach()).clamp(n.op.dtype.lo, n.op.dtype.hi)]
        else:
            results = apply(bind_op(n.op, sizes), *operands)
        values.update(zip(n.outputs, results, strict=True))
        if n.output in self.free:
            y, shape = values[n.output], [1] * values[n.output].dim()
            shape[channel_axis(n.op)] = -1
            values[n.output] = y + (self.free[n.output] * self.units[n.output]).reshape(shape)


__all__ = ["Tuned", "tune_biases"]
