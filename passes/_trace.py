"""What an evaluation tells besides its outputs: values of the float model, and how far a lossy graph is from them.

Evaluating a model on a calibration batch is most of a compilation from a warm cache, so those who need it share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_torch

if TYPE_CHECKING:
    import torch

ROWS = 4
"""Rows of a batch that layers are compared on."""


@dataclass(frozen=True)
class Measured:
    """What a few calibration rows tell of each value of the quantized graph, by name.

    ``errors``: relative RMS error that has accumulated up to it. ``clipped``: of a contraction, the share of the values
    it reads that lay outside their format's range.
    """

    errors: Mapping[str, float] = field(default_factory=dict)
    clipped: Mapping[str, float] = field(default_factory=dict)


def compared(graph: Graph) -> set[str]:
    """Values that layers are compared by: results of contractions and attention, and the outputs."""
    found = {n.output for n in graph.nodes if isinstance(n.op, (*ops.CONTRACTION, ops.Attention))}
    return found | set(graph.outputs)


def rows_of(batch: Any) -> int:
    """Rows of a calibration batch: the first axis of its first array, 0 if that has none."""
    first: Any = next(iter(batch.values() if isinstance(batch, Mapping) else batch), 0)
    return int(np.shape(first)[0]) if np.ndim(first) else 0


def few(value: torch.Tensor, rows: int) -> torch.Tensor:
    """The first :data:`ROWS` of a value that has the batch's ``rows`` along its first axis."""
    return value[:ROWS] if rows > ROWS and value.dim() and value.shape[0] == rows else value


@dataclass
class Trace:
    """Float values ``wanted`` by name, a few rows of each, of the batch with so many ``rows``; and the outputs."""

    wanted: set[str]
    rows: int
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: tuple[torch.Tensor, ...] = ()

    def see(self, name: str, value: torch.Tensor) -> None:
        """An observer of :func:`evaluate`."""
        if name in self.wanted and value.is_floating_point():
            part = few(value, self.rows)
            self.kept[name] = part if part is value else part.clone()  # a part would hold the whole


class LayerErrors:
    """Compares the values of a lossy graph with a :class:`Trace` while it is evaluated on the same batch."""

    def __init__(self, graph: Graph, trace: Trace, batch: Mapping[str, Any] | Sequence[Any]) -> None:
        self.trace, self.errors, self.clipped = trace, dict[str, float](), _Clipped(graph)
        self.last = compared(graph)
        names = [v.name for v in graph.inputs]
        for name, value in batch.items() if isinstance(batch, Mapping) else zip(names, batch, strict=False):
            self.clipped.see(name, few(to_torch(value), trace.rows))

    def see(self, name: str, value: torch.Tensor) -> None:
        """An observer of :func:`evaluate`."""
        import torch

        value = few(value, self.trace.rows)
        self.clipped.see(name, value)
        want = self.trace.kept.get(name) if name in self.last else None
        if want is not None and want.shape == value.shape and value.is_floating_point():
            norm = float(torch.linalg.vector_norm(want))
            if norm > 0:
                self.errors[name] = float(torch.linalg.vector_norm(value - want)) / norm

    def measured(self) -> Measured:
        """What was found."""
        return Measured(self.errors, self.clipped.by_layer())


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

    def see(self, name: str, value: torch.Tensor) -> None:
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


__all__ = ["LayerErrors", "Measured", "Trace", "compared", "few", "rows_of"]
