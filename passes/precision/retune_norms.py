"""Para-normalization: an already folded, quantized network gets the channel statistics of the float one back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._norms import known_norms
from bitwright.passes._pass import Context, Pass
from bitwright.passes.precision._affine import affine, why_no_gain, why_no_shift
from bitwright.passes.precision._statistics import (
    Moments,
    along,
    channel_axis,
    moments,
    nearer,
    quantized_layers,
    reference_of,
    run_mended,
)
from bitwright.passes.sparsity._inputs import need_calibration

if TYPE_CHECKING:
    import torch


def retuned(
    mean: Array, variance: Array, target_mean: Array, target_variance: Array, eps: float = 1e-5
) -> tuple[Array, Array]:
    """(gain, shift) by channel of the norm that gives a value of these statistics the target's.

    It is ``(y - mean) / sqrt(variance + eps) * gamma_r + target_mean`` with gamma_r = sqrt(target_variance + eps):
    the identity while the statistics agree (Hubara et al. 2021, para-normalization).
    """
    alive = variance > 1e-12 * (mean**2 + variance)  # a constant channel has no deviation to stretch
    gain: Array = np.where(alive, np.sqrt((target_variance + eps) / (variance + eps)), 1.0)
    return gain, target_mean - mean * gain


@dataclass(frozen=True)
class RetuneNorms(Pass):
    """Give the outputs of quantized layers the mean and deviation by channel that the float model has.

    Layer after layer, on what the retuned layers before it give: W' = W g, b' = (b - mean) g + target mean with
    g = sqrt(target variance + eps) / sqrt(variance + eps). g goes into the weight's scale, so that no integer code
    changes. ``target=norms`` takes mean and deviation from folded batch norms instead of from the float model. A graph
    whose outputs that would take further from the float model's on the calibration data stays as it is.

    before:
        graph @g (%x: f32[4, 2]) -> (y = %y) level=graph {
          %q = weight {ref="fc.weight"} : s8[2, 2]
          %s = weight {ref="fc.scale"} : f32[2]
          %b = weight {ref="fc.bias"} : f32[2]
          %w = dequantize(%q, %s) {axis=0} : f32[2, 2]
          %y = linear(%x, %w, %b) : f32[4, 2]
        }
    after:
        graph @g (%x: f32[4, 2]) -> (y = %y) level=graph {
          %q = weight {ref="fc.weight"} : s8[2, 2]
          %s = weight {ref="fc.scale.1"} : f32[2]
          %b = weight {ref="fc.bias.1"} : f32[2]
          %w = dequantize(%q, %s) {axis=0} : f32[2, 2]
          %y = linear(%x, %w, %b) : f32[4, 2]
        }
    """

    name: ClassVar[str] = "retune-norms"
    lossy: ClassVar[bool] = True
    uses: ClassVar[tuple[str, ...]] = ("reference",)
    target: Literal["float", "norms"] = "float"
    eps: float = 1e-5
    only: str = "*"
    except_: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        need_calibration(context, self.name)
        if not self.eps > 0:
            raise InvalidInput(f"retune-norms: eps is greater than 0, not {self.eps}")
        targets, told = self._targets(graph, context), len(context.remarks)
        gains: dict[str, Array] = {}
        shifts: dict[str, Array] = {}

        def mend(node: Node, results: list[torch.Tensor]) -> list[torch.Tensor]:
            found, axis = Moments(), channel_axis(node.op)
            for r in results:
                found.add(r, axis)
            mean, variance = targets[node.output]
            gain, shift = retuned(found.mean, found.variance, mean, variance, self.eps)
            apart = np.abs(found.mean - mean) / np.sqrt(variance + self.eps)
            if max(float(np.abs(gain - 1).max()), float(apart.max())) < 1e-4:
                return results
            gains[node.output], shifts[node.output] = gain, shift
            context.remark(
                self.name, layer_of(graph, node), smallest_gain=float(gain.min()), largest_gain=float(gain.max()),
                mean_error=float(apart.max()),
            )  # fmt: skip
            return [r * along(gain, axis, r) + along(shift, axis, r) for r in results]

        run_mended(graph, context, self.name, set(targets), mend)
        mended = affine(graph, shifts, gains) if shifts else graph
        reference = context.facts.get("reference") if self.target == "float" else None
        return nearer(graph, mended, reference, context, self.name, told) if reference is not None else mended

    def _targets(self, graph: Graph, context: Context) -> dict[str, tuple[Array, Array]]:
        """Mean and variance by channel that each layer's result shall have."""
        layers, norms = {}, known_norms(context)
        reference = reference_of(context, self.name) if self.target == "float" else graph
        for node in quantized_layers(graph):
            if not selected(self.only, self.except_, graph, node):
                continue
            why = why_no_gain(graph, node) or why_no_shift(graph, node)
            if self.target == "float" and reference.types.get(node.output) != node.type:
                why = why or "the float model has no such value"
            if self.target == "norms" and node.output not in norms:
                why = why or "no batch norm was folded into it"
            if why:
                context.refuse(self.name, layer_of(graph, node), why)
            else:
                layers[node.output] = channel_axis(node.op)
        if self.target == "norms":
            return {x: (norms[x].beta, norms[x].std ** 2) for x in layers}
        found = moments(reference, context, self.name, layers)
        return {x: (m.mean, m.variance) for x, m in found.items()}
