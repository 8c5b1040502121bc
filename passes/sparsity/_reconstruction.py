"""One layer rebuilt: which layers qualify, the solution in the weight's own format, and its error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_torch
from bitwright.ir.types import Encoding
from bitwright.ir.weights import Array, Handle
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._pass import Context
from bitwright.passes.sparsity._inputs import Moments, lowered, raised, reduction_axis
from bitwright.passes.sparsity._least_squares import damped, errors, solve
from bitwright.passes.sparsity._masking import CONTRACTIONS
from bitwright.passes.sparsity._sparsegpt import inverse_root, prune, rule

if TYPE_CHECKING:
    import torch


@dataclass
class Layer:
    """A masked weight with all its readers, what it was before, and what becomes of it."""

    name: str
    ref: str
    nodes: tuple[Node, ...]
    dense: Handle
    encoding: Encoding | None
    weight: Array
    """The weight as it is: masked, then solved."""
    bias: Array | None = None
    """The constant bias of a layer that is the only reader of its weight."""
    dense_bias: Array | None = None
    solved: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> ops.Op:
        return self.nodes[0].op

    @property
    def size(self) -> int:
        """Lowered inputs: taps * inputs."""
        return int(self.weight.size // self.weight.shape[1 - reduction_axis(self.op)])

    def operands(self, dense: bool) -> dict[int, torch.Tensor]:
        """Weight and, where it is ours, bias, by their place among the operands."""
        pair = (self.dense.array, self.dense_bias) if dense else (self.weight, self.bias)
        return {k: to_torch(a) for k, a in enumerate(pair, 1) if a is not None}


def dense_of(graph: Graph, ref: str, context: Context) -> Handle | None:
    """The values of a weight or bias before masks, when they are known and nobody changed it since."""
    dense, now = context.facts.get("dense", {}).get(ref), graph.weights[ref]
    if not isinstance(dense, Handle) or dense.array.shape != now.array.shape:
        return None
    record = context.facts.get("reconstructed", {}).get(ref)
    if record is not None and record[0] is now:
        return dense
    return dense if np.array_equal(now.array, np.where(now.array != 0, dense.array, now.array)) else None


def plan(graph: Graph, context: Context, who: str, only: str, except_: str) -> list[Layer]:
    """The layers to rebuild, in order of execution; the others that are selected are refused with the reason."""
    layers: list[Layer] = []
    seen: set[str] = set()
    for n in graph.nodes:
        if not isinstance(n.op, CONTRACTIONS) or not selected(only, except_, graph, n) or n.inputs[1] in seen:
            continue
        seen.add(n.inputs[1])
        why, cure = _why_not(graph, n, context, only, except_)
        if why:
            context.refuse(who, layer_of(graph, n), why, cure)
        else:
            layers.append(_layer(graph, n, context))
    if not seen:
        context.refuse(who, "model", f"only={only} except={except_} selects no contraction")
    return layers


def _why_not(graph: Graph, node: Node, context: Context, only: str, except_: str) -> tuple[str, str]:
    weight = graph.producers.get(node.inputs[1])
    if weight is None or not isinstance(weight.op, ops.Weight):
        return "its weight is computed, not a float constant", ""
    if isinstance(node.op, ops.ConvTranspose):
        return "transposed convolution", ""
    if isinstance(node.op, ops.Conv) and node.op.groups != 1:
        return "grouped convolution", ""
    if weight.type.rank < 2 or (not isinstance(node.op, ops.Conv) and weight.type.rank != 2):
        return f"weight of rank {weight.type.rank}", ""
    if dense_of(graph, weight.op.ref, context) is None:
        if weight.op.ref in context.facts.get("dense", {}):
            return "its weight was changed after it was masked", "reconstruct right after the mask"
        if weight.type.encoding is None:
            return "its weight has no mask", ""
        return "the dense values of its weight are unknown", "mask and reconstruct in one run"
    for user in graph.users[weight.output]:
        if user.op != node.op or user.inputs[1] != weight.output or not selected(only, except_, graph, user):
            return f"its weight is also read by %{user.output}", ""
    return "", ""


def _layer(graph: Graph, node: Node, context: Context) -> Layer:
    weight = graph.producers[node.inputs[1]]
    assert isinstance(weight.op, ops.Weight)
    dense = dense_of(graph, weight.op.ref, context)
    assert dense is not None
    users = graph.users[weight.output]
    ref = weight.op.ref
    layer = Layer(layer_of(graph, node), ref, users, dense, weight.type.encoding, graph.weights[ref].array)
    if len(users) == 1 and len(node.inputs) > 2 and graph.is_constant(node.inputs[2]):
        bias = graph.constant(node.inputs[2])
        assert isinstance(bias, np.ndarray)
        before = dense_bias(graph, node.inputs[2], context)
        layer.bias, layer.dense_bias = bias, before.array if before is not None else bias
    return layer


def dense_bias(graph: Graph, value: str, context: Context) -> Handle | None:
    """The values of a bias before an earlier reconstruction changed it, if one did."""
    node = graph.producers[value]
    ref = node.op.ref if isinstance(node.op, ops.Weight) else ""
    record = context.facts.get("reconstructed", {}).get(ref)
    known = record is not None and record[0] is graph.weights[ref]
    return dense_of(graph, ref, context) if known else None


def rebuild(layer: Layer, seen: Moments, least_squares: bool, update: bool, damping: float) -> str:
    """Solve a layer in place; returns why it was left as it is, or the empty string.

    The error is that of W x + b against W' x + b' over all rows seen, where W and b are the dense layer's. With a bias,
    b' takes the mean of the difference, so that only the centred inputs matter to W'. An output whose error would
    rise, by rounding to the weight's format or by the one pass of SparseGPT, keeps what it had.
    """
    dense, start = lowered(layer.op, layer.dense.array), lowered(layer.op, layer.weight)
    kept = start != 0
    norm = float(errors((seen.other or seen).gram, dense).sum())
    if not seen.rows or not norm:
        return "its input is zero on all calibration data" if seen.rows else "no calibration data reaches it"
    gram, towards = seen.gram if layer.bias is None else seen.centred(), seen.towards(layer.bias is not None)
    hold = damping * float(gram.diagonal().mean())
    gram, aim = damped(gram, hold), dense @ damped(towards, hold)
    new, mask = start, kept
    if update or not least_squares:
        root = inverse_root(gram)
        if root is None:
            return f"its inputs are linearly dependent and damping={damping:g} does not help"
        taps = int(np.prod(layer.weight.shape[2:]))
        choose = rule(layer.encoding, kept, reduction_axis(layer.op), layer.weight.ndim) if update else None
        if isinstance(choose, str):
            layer.facts["mask"] = f"kept: {choose}"
            choose = None
        free = dense if seen.other is None else aim @ (root.T @ root)  # the best weight without a mask
        new, mask = prune(root, free, kept, taps, choose)
    if least_squares:
        new = solve(gram, aim, new, mask)
    before, after = _apply(layer, seen, dense, start, new, rowwise=bool((mask == kept).all()))
    layer.facts.update(error_before=_short(before / norm), error_after=_short(after / norm))
    return ""


def _apply(
    layer: Layer, seen: Moments, dense: torch.Tensor, start: torch.Tensor, new: torch.Tensor, rowwise: bool
) -> tuple[float, float]:
    """Round to the layer's formats and keep what is better, by outputs or as a whole; squared errors."""
    import torch

    weight, bias = raised(layer.op, new, layer.weight), layer.bias
    rounded = lowered(layer.op, weight)
    old_offset = new_offset = torch.zeros(len(dense), dtype=torch.float64)
    if layer.bias is not None and layer.dense_bias is not None:
        base = to_torch(layer.dense_bias).to(torch.float64)
        wanted = base + (dense @ (seen.other or seen).total - rounded @ seen.total) / seen.rows
        bias = wanted.numpy().astype(layer.bias.dtype)
        new_offset = base - to_torch(bias).to(torch.float64)
        old_offset = base - to_torch(layer.bias).to(torch.float64)
    before, after = _squared(seen, dense, start, old_offset), _squared(seen, dense, rounded, new_offset)
    worse = after > before if rowwise else (after.sum() > before.sum()).expand(len(after))
    if bool(worse.any()):
        weight = raised(layer.op, torch.where(worse[:, None], start, rounded), layer.weight)
        if bias is not None and layer.bias is not None:
            bias = np.where(worse.numpy(), layer.bias, bias)
        layer.facts["outputs_left"] = int(worse.sum())
    layer.weight, layer.bias, layer.solved = weight, bias, True
    return float(before.sum()), float(torch.where(worse, before, after).sum())


def _squared(seen: Moments, dense: torch.Tensor, new: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Sum over the rows of (W z - W' x + offset)², for each output; z is x, or what x is in the dense model."""
    if seen.other is None or seen.cross is None:
        square, total = errors(seen.gram, dense - new), (dense - new) @ seen.total
    else:
        square = errors(seen.other.gram, dense) + errors(seen.gram, new) - 2.0 * ((dense @ seen.cross) * new).sum(1)
        total = dense @ seen.other.total - new @ seen.total
    return (square + 2.0 * offset * total + seen.rows * offset.square()).clamp_min(0.0)


def _short(square: float) -> float:
    """A relative RMS to four digits."""
    return float(f"{square**0.5:.4g}")
