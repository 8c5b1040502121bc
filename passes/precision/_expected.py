"""The mean of a value by channel as folded batch norms imply it: a normal distribution through relu, clamps, pools."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.weights import Array
from bitwright.passes._norms import Norm


def clipped_normal_mean(mean: Array, std: Array, lo: float = -np.inf, hi: float = np.inf) -> Array:
    """E[min(max(x, lo), hi)] for x normal by channel; relu is lo = 0 (Nagel et al. 2019, appendix C)."""
    import torch

    spread = np.maximum(std, 1e-12)

    def above(bound: float) -> Array:
        """E[max(x, bound)]."""
        if not np.isfinite(bound):
            return mean
        z = (mean - bound) / spread
        density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
        share: Array = torch.special.ndtr(torch.from_numpy(z)).numpy()
        total: Array = bound + (mean - bound) * share + density * spread
        return total

    found = above(lo)
    if np.isfinite(hi):
        found = found - (above(hi) - hi)
    return found


def expected_mean(graph: Graph, value: str, norms: Mapping[str, Norm]) -> Array | None:
    """Mean of each channel of a value, or None when no norm tells it."""
    if value in norms:
        return norms[value].beta
    node = graph.producers.get(value)
    if node is None or len(node.inputs) != 1:
        return None
    op, x = node.op, node.inputs[0]
    if x in norms and isinstance(op, ops.Clamp):
        return clipped_normal_mean(norms[x].beta, norms[x].std, op.lo, op.hi)
    if x in norms and isinstance(op, ops.Unary) and op.fn == "relu":
        return clipped_normal_mean(norms[x].beta, norms[x].std, 0.0)
    if isinstance(op, ops.AvgPool) and not any(op.padding) and not any(op.extra) and not op.channels_last:
        return expected_mean(graph, x, norms)
    if isinstance(op, ops.Reduce) and op.fn == "mean" and not {1, 1 - graph.types[x].rank} & set(op.axes):
        return expected_mean(graph, x, norms)
    if isinstance(op, ops.Reshape) and _drops_ones(graph, x, value):
        return expected_mean(graph, x, norms)
    return None


def _drops_ones(graph: Graph, x: str, y: str) -> bool:
    """True for [N, C, 1, 1] to [N, C]."""
    a, b = graph.types[x].shape, graph.types[y].shape
    return a[:2] == b[:2] and all(d == 1 for d in a[2:])


__all__ = ["clipped_normal_mean", "expected_mean"]
