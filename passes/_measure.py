"""How much outputs changed: the relative RMS error of a graph against another on one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING

from bitwright.ir import work
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.infer import bind_graph
from bitwright.ir.interpret import bind_symbols, evaluate
from bitwright.passes._pass import Batch
from bitwright.passes._trace import LayerErrors, Measured, Trace, compared, rows_of

if TYPE_CHECKING:
    import torch

MAC_LIMIT = 20_000_000_000
"""Above this many multiply-accumulates for a batch, measuring an output error is not cheap."""


def relative_rms(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """sqrt(sum of squared differences / sum of squares) over all outputs; 0.0 for two zero results."""
    import torch

    square = norm = 0.0
    for a, b in zip(got, want, strict=True):
        x, y = a.to(torch.float64), b.to(torch.float64)
        both = torch.isfinite(x) & torch.isfinite(y)
        square += float((x - y)[both].square().sum())
        norm += float(y[both].square().sum())
    return math.sqrt(square / norm) if norm else math.sqrt(square)


def macs(graph: Graph, batch: Batch) -> int:
    """Multiply-accumulates of the contractions for one batch."""
    names = [v.name for v in graph.inputs]
    arrays = [batch[n] for n in names] if isinstance(batch, Mapping) else list(batch)
    bound = bind_graph(graph, bind_symbols(graph, [tuple(a.shape) for a in arrays]))
    return sum(work.macs(n, bound) for n in bound.nodes)


class OutputError:
    """Measures graphs against a reference graph; the reference runs once, when first needed, or not at all where a
    pass has evaluated the same meaning (:meth:`adopt`). ``layers``: the last graph-level graph, and its layers."""

    def __init__(self, reference: Graph, calibration: Sequence[Batch]) -> None:
        self.reference, self.calibration = reference, calibration
        self.trace: Trace | None = None
        self.layers: tuple[Graph, Measured] | None = None
        self.touched = False
        self._refused: str | None = None

    def adopt(self, trace: Trace, calibration: Sequence[Batch]) -> None:
        """Take a pass's evaluation of the first batch, if all passes before it kept the meaning."""
        if self.trace is None and not self.touched and calibration is self.calibration:
            self.trace = trace

    def of(
        self, graph: Graph, calibration: Sequence[Batch] = (), later: Executor | None = None
    ) -> tuple[Future[float] | None, str]:
        """(error, "") or (None, why it is not measured); ``calibration`` fits a graph that got further inputs.

        ``later``: an executor of one thread that evaluates meanwhile; else the error is there at once.
        """
        self.touched = True
        if not self.calibration:
            return None, "output error not measured: no calibration data"
        if self._refused is None:
            self._refused = self._too_much(self.calibration[0])
        if self._refused:
            return None, self._refused
        given = (calibration or self.calibration)[0]
        if later is not None:
            return later.submit(self._error, graph, given), ""
        found: Future[float] = Future()
        found.set_result(self._error(graph, given))
        return found, ""

    def _error(self, graph: Graph, given: Batch) -> float:
        if self.trace is None:
            batch = self.calibration[0]
            trace = Trace(compared(self.reference) | compared(graph), rows_of(batch))
            trace.outputs = evaluate(self.reference, batch, observe=trace.see)
            self.trace = trace
        if graph.level != "graph":
            return relative_rms(evaluate(graph, given), self.trace.outputs)
        layers = LayerErrors(graph, self.trace, given)
        error = relative_rms(evaluate(graph, given, observe=layers.see), self.trace.outputs)
        self.layers = graph, layers.measured()
        return error

    def _too_much(self, batch: Batch) -> str:
        """Why evaluating is not cheap, or the empty string."""
        try:
            cost = macs(self.reference, batch)
        except (InvalidInput, KeyError, ValueError, TypeError) as e:
            return f"output error not measured: {e}"
        return f"output error not measured: a batch costs {cost / 1e9:.0f} G multiply-accumulates" * (cost > MAC_LIMIT)


__all__ = ["MAC_LIMIT", "OutputError", "macs", "relative_rms"]
