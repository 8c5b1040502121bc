"""SmoothQuant on arrays: the scale of each channel, and which strength loses least in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import evaluate, to_torch
from bitwright.ir.types import U8
from bitwright.ir.weights import Array
from bitwright.passes._match import array
from bitwright.passes._pass import Context
from bitwright.passes.precision._qdq import parameters, quantize_weight
from bitwright.passes.sparsity._inputs import need_calibration

if TYPE_CHECKING:
    import torch

ROWS = 512
"""Rows of each value that the search keeps."""
GRID = tuple(i / 10 for i in range(1, 11))
"""Strengths that the search tries, beside no smoothing at all."""


def smoothing_scale(values: Array, weights: Array, alpha: float = 0.5) -> Array:
    """values^alpha / weights^(1 - alpha) by channel: what the values are divided by and the weights multiplied by.

    ``values``, ``weights``: largest magnitude of each channel [C]. Channels where either is zero keep 1. Xiao et
    al. 2023, equation 4.
    """
    alive = (values > 1e-12) & (weights > 1e-12)
    found: Array = np.where(
        alive, np.where(alive, values, 1.0) ** alpha / np.where(alive, weights, 1.0) ** (1 - alpha), 1.0
    )
    return found


@dataclass
class Seen:
    """Extremes of each channel (last axis) of a stream of values, and some of its rows."""

    lo: Array | None = None
    hi: Array | None = None
    rows: list[Array] = field(default_factory=list)

    def add(self, value: torch.Tensor, keep: int) -> None:
        """Take a batch in; ``keep`` of its rows, evenly spread, stay."""
        flat = value.detach().reshape(-1, value.shape[-1])
        if not len(flat):
            return
        lo, hi = (v.numpy().astype(np.float64) for v in (flat.amin(0), flat.amax(0)))
        self.lo = lo if self.lo is None else np.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else np.maximum(self.hi, hi)
        if keep:
            at = np.unique(np.linspace(0, len(flat) - 1, min(keep, len(flat))).astype(int))
            self.rows.append(flat[at].numpy().astype(np.float64))

    @property
    def largest(self) -> Array:
        """Largest magnitude by channel."""
        assert self.lo is not None
        assert self.hi is not None
        return np.maximum(np.abs(self.lo), np.abs(self.hi))


def int8_error(seen: Seen, weights: Sequence[Array], scale: Array) -> float:
    """Squared error of x @ w.T over the kept rows when x / scale is u8 per tensor and w * scale s8 per output,
    summed over the weights [O, C], each relative to its exact result."""
    assert seen.lo is not None
    assert seen.hi is not None
    x = np.concatenate(seen.rows)
    step, zero = parameters(float((seen.lo / scale).min()), float((seen.hi / scale).max()), U8)
    coarse = (np.clip(np.round(x / scale / step) + zero, 0, 255) - zero) * step
    error = 0.0
    for w in weights:
        q, s = quantize_weight(w * scale)
        want = x @ w.T
        got = coarse @ (q * s.reshape(-1, 1).astype(np.float64)).T
        error += float(np.square(got - want).sum()) / max(float(np.square(want).sum()), 1e-300)
    return error


def best_scale(seen: Seen, weights: Sequence[Array], grid: Sequence[float] = GRID) -> tuple[Array, float, float, float]:
    """(scale, alpha, error with it, error without): the strength of least 8-bit error; alpha 0 stands for none."""
    largest = np.max([np.abs(w).max(0) for w in weights], axis=0).astype(np.float64)
    ones = np.ones(len(largest))
    plain = int8_error(seen, weights, ones)
    best = (ones, 0.0, plain, plain)
    for alpha in grid:
        scale = smoothing_scale(seen.largest, largest, alpha)
        error = int8_error(seen, weights, scale)
        if error < best[2]:
            best = (scale, alpha, error, plain)
    return best


def observe(graph: Graph, context: Context, who: str, values: set[str], rows: bool) -> dict[str, Seen]:
    """Channel extremes, and with ``rows`` some rows, of values on the calibration batches."""
    need_calibration(context, who)
    seen, keep = {v: Seen() for v in values}, -(-ROWS // len(context.calibration)) if rows else 0

    def watch(name: str, value: torch.Tensor) -> None:
        if name in seen:
            seen[name].add(value, keep)

    names = [v.name for v in graph.inputs]
    for i, batch in enumerate(context.calibration):
        if context.progress is not None:
            context.progress(who, i / len(context.calibration))
        for name, value in (batch if isinstance(batch, dict) else dict(zip(names, batch, strict=False))).items():
            watch(str(name), to_torch(value))
        evaluate(graph, batch, observe=watch)
    return seen


def moves(scale: Array) -> bool:
    """True when a scale is not one throughout."""
    return bool((np.abs(np.log(scale)) > 1e-3).any())


def weight_of(graph: Graph, reader: str, divide: Array | None = None) -> Array:
    """The constant weight [O, C] of a linear layer, its rows divided."""
    weight = array(graph, graph.producers[reader].inputs[1])
    assert weight is not None
    return weight if divide is None else weight / divide[:, None]


def insert(graph: Graph, scales: dict[str, Array], readers: set[str]) -> Graph:
    """Multiply values by 1 / scale for some of their readers."""
    done: dict[str, str] = {}

    def step(rw: Rewriter, node: Node) -> bool:
        value = node.inputs[0] if node.inputs else ""
        if node.output not in readers or value not in scales:
            return False
        if value not in done:
            inverse = rw.constant((1 / scales[value]).astype(np.float32), name=f"{value}.inverse", origin=node.origin)
            done[value] = rw.emit(
                ops.Binary("mul"), rw.of(value)[0], inverse, name=f"{value}.smooth", origin=node.origin
            )
        rw.keep_as(node, node.op, (done[value], *rw.of(*node.inputs[1:])), node.types)
        return True

    return rewrite(graph, step)[0] if scales else graph


__all__ = [
    "GRID",
    "ROWS",
    "Seen",
    "best_scale",
    "insert",
    "int8_error",
    "moves",
    "observe",
    "smoothing_scale",
    "weight_of",
]
