"""How much outputs changed: the relative RMS error of a graph against another on one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bitwright.ir import work
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.infer import bind_graph
from bitwright.ir.interpret import bind_symbols, evaluate
from bitwright.passes._pass import Batch, Pass

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
    """Measures graphs against a reference graph; the reference runs once, when first needed."""

    def __init__(self, reference: Graph, calibration: Sequence[Batch]) -> None:
        self.reference, self.calibration = reference, calibration
        self.want: tuple[torch.Tensor, ...] | None = None

    def of(self, graph: Graph, p: Pass, calibration: Sequence[Batch] = ()) -> tuple[float | None, str]:
        """(error, "") or (None, why it was not measured); ``calibration`` fits a graph that got further inputs."""
        if not self.calibration:
            return None, "output error not measured: no calibration data"
        batch = self.calibration[0]
        if self.want is None:
            try:
                cost = macs(self.reference, batch)
            except (InvalidInput, KeyError, ValueError, TypeError) as e:
                return None, f"output error not measured: {e}"
            if cost > MAC_LIMIT:
                return None, f"output error not measured: a batch costs {cost / 1e9:.0f} G multiply-accumulates"
            self.want = evaluate(self.reference, batch)
        return relative_rms(evaluate(graph, (calibration or self.calibration)[0]), self.want), ""


__all__ = ["MAC_LIMIT", "OutputError", "macs", "relative_rms"]
