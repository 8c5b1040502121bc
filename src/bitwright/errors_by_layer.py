"""Error per layer: the float graph against the quantized one (float meaning), value by value; and what was clipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.passes._pass import Context
from bitwright.passes._trace import ROWS, LayerErrors, Measured, Trace, compared, rows_of


def measure_layers(
    graph: Graph, quantized: Graph | None, calibration: Sequence[Any], context: Context | None = None
) -> Measured:
    """Run both graphs on a few rows of the first calibration batch; nothing without one.

    ``context``: that of the passes, which have the batches with values for inputs they added, and mostly have
    evaluated both graphs already.
    """
    if quantized is None or not calibration:
        return Measured()
    if context is not None and context.layers is not None and context.layers[0] is quantized:
        return context.layers[1]
    batch = calibration[0]
    if not isinstance(batch, dict) and graph.symbols:
        batch = tuple(a[:ROWS] for a in batch)
    trace = Trace(compared(quantized), rows_of(batch))
    evaluate(graph, batch, observe=trace.see)
    given = context.calibration[0] if context is not None and len(quantized.inputs) > len(graph.inputs) else batch
    errors = LayerErrors(quantized, trace, given)
    evaluate(quantized, given, observe=errors.see)
    return errors.measured()


__all__ = ["Measured", "measure_layers"]
