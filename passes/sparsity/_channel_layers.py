"""The weights that read channels, as matrices whose column order a mask depends on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_torch
from bitwright.ir.weights import Array
from bitwright.passes.sparsity._channels import Coupling, Ints, Label
from bitwright.passes.sparsity._permutation import View, top_sum
from bitwright.passes.sparsity.masks import Pattern


def why_not(graph: Graph, node: Node, pattern: Pattern) -> str:
    """Why no mask of this pattern fits a contraction, or the empty string."""
    weight, op = graph.types[node.inputs[1]], node.op
    if not graph.is_constant(node.inputs[1]):
        return "weight is computed, not constant"
    if isinstance(op, ops.ConvTranspose):
        return "transposed convolution: no sparse kernel"
    if isinstance(op, ops.Conv) and op.groups != 1:
        depthwise = weight.shape[1] == 1
        return "depthwise convolution has no reduction over channels" if depthwise else "grouped convolution"
    if not weight.dtype.is_float:
        return f"weight is {weight.dtype}: reorder before quantization"
    if weight.rank < 2 or (isinstance(op, ops.MatMul) and weight.rank != 2):
        return f"weight of rank {weight.rank}"
    size = weight.static_shape[_axis(node)]
    return f"{size} input channels are not a multiple of {pattern.group}" if size % pattern.group else ""


def _axis(node: Node) -> int:
    return 0 if isinstance(node.op, ops.MatMul) and not node.op.transpose_b else 1


@dataclass(frozen=True, eq=False)
class Layer:
    """A contraction and the label of the channels it sums over."""

    node: Node
    label: Label

    def matrix(self, coupling: Coupling, to: Ints) -> Array:
        """Magnitudes float32[outputs and taps, input channels] after the channels moved to ``to``."""
        w: Array = np.moveaxis(coupling.graph.constant(self.node.inputs[1]), _axis(self.node), -1)  # type: ignore[arg-type]
        m = np.abs(w.reshape(-1, w.shape[-1]).astype(np.float32))
        return m[:, coupling.order(self.label, to)]

    def kept(self, graph: Graph, coupling: Coupling, to: Ints, pattern: Pattern) -> tuple[float, float, float]:
        """Share of magnitude that a mask keeps before and after, and that the best columns of each row would."""
        total, out = 0.0, []
        for t in (np.arange(len(to), dtype=np.int64), to):
            m = to_torch(self.matrix(coupling, t))
            total = float(m.double().sum())
            out.append(float(top_sum(m.reshape(len(m), -1, pattern.group), pattern.keep).double().sum()))
        most = float(top_sum(m, m.shape[1] * pattern.keep // pattern.group).double().sum())
        return out[0] / (total or 1.0), out[1] / (total or 1.0), most / (total or 1.0)


def layer_views(coupling: Coupling, layer: Layer, channels: Ints, to: Ints, pattern: Pattern) -> list[View] | str:
    """How a layer sees the channels of one group; several positions of a channel are a view each.

    A sentence instead where a run of columns holds several positions of the group's channels: no exchange of two
    channels has then a price of its own.
    """
    roots, offsets = coupling.channels(layer.label).reshape(-1), coupling.places(layer.label)
    seat = np.searchsorted(channels, roots)
    ours = channels[np.minimum(seat, len(channels) - 1)] == roots
    stripes = np.arange(len(roots)).reshape(-1, pattern.group)
    of_stripe = np.where(ours, offsets, -1).reshape(stripes.shape)
    mixed = (of_stripe != of_stripe.max(1, keepdims=True)) & (of_stripe >= 0)
    if mixed.any():
        size = int(ours.sum()) // len(channels)
        return f"its columns come in blocks of {size} for each channel, which the search does not divide"
    matrix, out = layer.matrix(coupling, to), []
    for offset in np.unique(offsets[ours]):
        mine = stripes[(of_stripe == offset).any(1)]
        at = np.flatnonzero(ours & (offsets == offset))
        others = np.setdiff1d(mine.reshape(-1), at)
        number = np.zeros(len(roots), np.int64)
        number[at], number[others] = seat[at], len(channels) + np.arange(len(others))
        columns = np.empty((len(matrix), len(channels)), np.float32)
        columns[:, seat[at]] = matrix[:, at]
        out.append(View(to_torch(columns), to_torch(number[mine]), to_torch(matrix[:, others])))
    return out


__all__ = ["Layer", "layer_views", "why_not"]
