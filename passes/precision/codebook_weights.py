"""Weights with few different values: codebooks that groups of outputs share, the best ones there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._pass import Context, Pass
from bitwright.passes.precision._integer_codes import Codes, levels
from bitwright.passes.precision._qdq import quantize_weight
from bitwright.passes.precision._weight_writer import relative_change, snr_db, why_not_low, write_codes

REACH = 127


@dataclass(frozen=True)
class CodebookWeights(Pass):
    """Weights as 8-bit codes of which a group of outputs has at most ``entries`` different ones, 2 to 256.

    Each output keeps its own scale. ``groups`` of outputs whose weights are alike in distribution have a codebook each;
    its values are those of least squared error (solved exactly, by dynamic programming over the codes). Masks survive.
    Activations stay float; quantize-int8 after it leaves these weights as they are. The device ``lut`` looks up their
    products; elsewhere they are 8-bit weights.

    before:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[2, 2]
          %y = linear(%x, %w) : f32[1, 2]
        }
    after:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %fc.weight = weight {ref="fc.weight.1"} : s8[2, 2]
          %fc.weight.scale = constant {values=[0.0010401956969872117, 0.0050426977686584]} : f32[2]
          %fc.weight.dq = dequantize(%fc.weight, %fc.weight.scale) {axis=0} : f32[2, 2]
          %y = linear(%x, %fc.weight.dq) : f32[1, 2]
        }
    """

    name: ClassVar[str] = "codebook-weights"
    lossy: ClassVar[bool] = True
    entries: int = 16
    groups: int = 1
    only: str = "*"
    except_: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        if not 2 <= self.entries <= 256 or self.groups < 1:
            raise InvalidInput(
                f"codebook-weights: entries is 2 to 256 and groups at least 1, not {self.entries}, {self.groups}"
            )
        found: dict[str, Codes] = {}
        chosen: list[Node] = []
        for n in graph.nodes:
            if not isinstance(n.op, ops.Linear | ops.Conv | ops.ConvTranspose | ops.MatMul):
                continue
            if not selected(self.only, self.except_, graph, n):
                continue
            if why := why_not_low(graph, n, 8, True):
                context.refuse(self.name, layer_of(graph, n), *why)
                continue
            chosen.append(n)
            w = np.asarray(graph.constant(n.inputs[1]))
            masked = graph.types[n.inputs[1]].encoding is not None
            codes, scale = with_codebooks(w, self.entries, self.groups, masked)
            made = Codes(torch.from_numpy(codes), torch.from_numpy(scale), torch.zeros(len(w)), levels(8), axis=0)
            found[n.inputs[1]] = made
            snr = snr_db(relative_change(w, made))
            groups = min(self.groups, len(w))
            context.remark(self.name, layer_of(graph, n), groups=groups, weight_snr_db=round(snr, 1))
        return write_codes(graph, chosen, found)


def with_codebooks(w: Array, entries: int, groups: int, masked: bool = False) -> tuple[Array, Array]:
    """Codes s8 like ``w`` [O, ...] and the f32 scale of each output; ``masked``: zeros stay zeros."""
    codes, scale = quantize_weight(w)
    flat, out = codes.reshape(len(codes), -1), np.empty_like(codes.reshape(len(codes), -1))
    alike = np.argsort(np.abs(flat.astype(np.float64)).mean(1), kind="stable")  # of a largest code that all have
    for rows in np.array_split(alike, min(groups, len(codes))):
        mass = np.zeros(2 * REACH + 1)
        for row in rows:
            mass += np.bincount(flat[row].astype(np.int64) + REACH, minlength=len(mass)) * float(scale[row]) ** 2
        if masked:
            mass[REACH] = mass.sum() * 1e9 + 1.0  # whatever it costs the others
        nearest = codebook(mass, entries)
        out[rows] = nearest[flat[rows].astype(np.int64) + REACH] - REACH
    return out.reshape(codes.shape), scale


def codebook(mass: Array, entries: int) -> Array:
    """For each place the whole number that stands for it: ``entries`` runs of places, each by the number next to its
    mean, of the least sum of mass times squared distance there is (to within that rounding)."""
    n = len(mass)
    at = np.arange(n, dtype=np.float64) - n // 2
    sums = [np.concatenate([[0.0], np.cumsum(mass * at**p)]) for p in range(3)]

    def costs(last: int) -> Array:
        """Of the runs [first, last] for every first."""
        m, s, q = (t[last + 1] - t[: last + 1] for t in sums)
        mean = np.rint(np.divide(s, m, out=np.zeros_like(s), where=m > 0))
        return np.asarray(np.maximum(q - 2 * mean * s + mean**2 * m, 0.0))

    runs = [costs(last) for last in range(n)]
    best = np.concatenate([[0.0], [r[0] for r in runs]])
    firsts = []
    for _ in range(1, min(entries, n)):
        first = [int(np.argmin(best[: last + 1] + r)) for last, r in enumerate(runs)]
        best = np.concatenate([[0.0], [best[f] + r[f] for f, r in zip(first, runs, strict=True)]])
        firsts.append(first)
    out, end = np.zeros(n, np.int64), n
    for first in [*reversed(firsts), [0] * n]:
        if end:
            start = first[end - 1]
            m, s = (sums[p][end] - sums[p][start] for p in (0, 1))
            out[start:end] = np.rint(s / m) + n // 2 if m > 0 else start
            end = start
    return out


__all__ = ["CodebookWeights", "codebook", "with_codebooks"]
