"""Error per layer: the float graph against the quantized one (float meaning), value by value; and what was clipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import evaluate, to_torch

_ROWS = 4


@dataclass(frozen=True)
class Measured:
    """What a few calibration rows tell of each value of the quantized graph, by name.

    ``errors``: relative RMS error that has accumulated up to it. ``clipped``: of a contraction, the share of the values
    it reads that lay outside their format's range.
    """

    errors: Mapping[str, float] = field(default_factory=dict)
    clipped: Mapping[str, float] = field(default_factory=dict)


def measure_layers(
    graph: Graph, quantized: Graph | None, calibration: Sequence[Any], extended: Sequence[Any] = ()
) -> Measured:
    """Run both graphs on a few rows of the first calibration batch; nothing without one.

    ``extended``: the batches with values for the inputs that passes added.
    """
    if quantized is None or not calibration:
        return Measured()
    import torch

    batch = calibration[0]
    if not isinstance(batch, dict) and graph.symbols:
        batch = tuple(a[:_ROWS] for a in batch)
    wanted = {n.output for n in quantized.nodes if isinstance(n.op, (*ops.CONTRACTION, ops.Attention))}
    wanted |= set(quantized.outputs)
    kept: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        if name in wanted and value.is_floating_point():
            kept[name] = value

    evaluate(graph, batch, observe=keep)
    errors: dict[str, float] = {}
    clipped = _Clipped(quantized)

    def compare(name: str, value: Any) -> None:
        clipped.see(name, value)
        want = kept.get(name)
        if want is not None and want.shape == value.shape and value.is_floating_point():
            norm = float(torch.linalg.vector_norm(want))
            if norm > 0:
                errors[name] = float(torch.linalg.vector_norm(value - want)) / norm

    given = extended[0] if len(quantized.inputs) > len(graph.inputs) else batch
    names = [v.name for v in quantized.inputs]
    for name, value in given.items() if isinstance(given, Mapping) else zip(names, given, strict=False):
        clipped.see(name, to_torch(value))
    evaluate(quantized, given, observe=compare)
    return Measured(errors, clipped.by_layer())


class _Clipped:
    """Counts what quantize cuts off, where its parameters are constant and for the whole tensor."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.share: dict[str, float] = {}
        """By quantized value."""
        self.readers: dict[str, list[tuple[Node, float, int]]] = {}
        for n in graph.nodes:
            if isinstance(n.op, ops.Quantize):
                constants = [graph.constant(x) for x in n.inputs[1:]]
                arrays = [np.asarray(a) for a in constants if a is not None]
                if len(arrays) == len(constants) and all(a.size == 1 for a in arrays):
                    scale, *zero = (float(a.reshape(())) for a in arrays)
                    self.readers.setdefault(n.inputs[0], []).append((n, scale, int(zero[0]) if zero else 0))

    def see(self, name: str, value: Any) -> None:
        for n, scale, zero in self.readers.get(name, ()):
            assert isinstance(n.op, ops.Quantize)
            dtype = n.op.dtype
            if value.numel():
                codes = (value / scale).round() + zero
                self.share[n.output] = float(((codes < dtype.lo) | (codes > dtype.hi)).float().mean())

    def by_layer(self) -> dict[str, float]:
        """The share for each contraction's first operand, looked up through what only moves codes."""
        out = {}
        for n in self.graph.nodes:
            if not isinstance(n.op, ops.CONTRACTION):
                continue
            value = n.inputs[0]
            while value not in self.share and (node := self.graph.producers.get(value)) is not None and node.inputs:
                if isinstance(node.op, ops.CONTRACTION) or not (
                    isinstance(node.op, ops.Dequantize) or self.graph.types[value].dtype.is_integer
                ):
                    break
                value = node.inputs[0]
            if value in self.share:
                out[n.output] = self.share[value]
        return out
