"""Error per layer: the float graph against the quantized one (float meaning), value by value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate

_ROWS = 4


def layer_errors(
    graph: Graph, quantized: Graph | None, calibration: Sequence[Any], extended: Sequence[Any] = ()
) -> dict[str, float]:
    """Relative RMS error of every value both graphs compute, on a few rows of the first calibration batch.

    The error is what has accumulated up to that value. Empty without calibration data. ``extended``: the batches with
    values for the inputs that passes added.
    """
    if quantized is None or not calibration:
        return {}
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
    out: dict[str, float] = {}

    def compare(name: str, value: Any) -> None:
        want = kept.get(name)
        if want is not None and want.shape == value.shape and value.is_floating_point():
            norm = float(torch.linalg.vector_norm(want))
            if norm > 0:
                out[name] = float(torch.linalg.vector_norm(value - want)) / norm

    more = len(quantized.inputs) > len(graph.inputs)
    evaluate(quantized, extended[0] if more else batch, observe=compare)
    return out
