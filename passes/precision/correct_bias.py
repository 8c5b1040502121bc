"""Bias correction: what quantization adds to the mean of each output channel is taken off its bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_numpy, to_torch
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._match import array
from bitwright.passes._norms import known_norms
from bitwright.passes._pass import Context, Pass
from bitwright.passes.precision._affine import affine, why_no_shift
from bitwright.passes.precision._equalize import absorbed
from bitwright.passes.precision._expected import expected_mean
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
from bitwright.passes.precision._tune_bias import tune_biases
from bitwright.passes.sparsity._inputs import need_calibration

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Add to each quantized layer's bias what its mean output lost against the float model (Nagel et al. 2019).

    ``empirical``: measured on calibration data, layer after layer, each on what the corrected layers before it give;
    a graph whose outputs there that would take further from the float model's stays as it is.
    ``analytic``: without data, (W - W_q) E[x] with the E[x] that a batch norm (and relu or clamp behind it) implies;
    zero padding is left out of account. ``tuned``: all biases are learnt together by gradients, on what the model gives
    (bias tuning of Hubara et al. 2021); never further from the float model's outputs on the calibration data.

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
          %s = weight {ref="fc.scale"} : f32[2]
          %b = weight {ref="fc.bias.1"} : f32[2]
          %w = dequantize(%q, %s) {axis=0} : f32[2, 2]
          %y = linear(%x, %w, %b) : f32[4, 2]
        }
    """

    name: ClassVar[str] = "correct-bias"
    lossy: ClassVar[bool] = True
    uses: ClassVar[tuple[str, ...]] = ("reference",)
    method: Literal["empirical", "analytic", "tuned"] = "empirical"
    only: str = "*"
    except_: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        reference, layers = reference_of(context, self.name), {}
        for node in quantized_layers(graph):
            if not selected(self.only, self.except_, graph, node):
                continue
            why = why_no_shift(graph, node)
            if reference.types.get(node.output) != node.type:
                why = why or "the float model has no such value"
            if why:
                context.refuse(self.name, layer_of(graph, node), why)
            else:
                layers[node.output] = node
        measure = {"empirical": self._measured, "analytic": self._implied, "tuned": self._tuned}[self.method]
        told = len(context.remarks)
        shifts = measure(graph, reference, context, layers)
        mended = affine(graph, shifts) if shifts else graph
        measured = self.method == "empirical"
        return nearer(graph, mended, reference, context, self.name, told) if measured else mended

    def _measured(self, graph: Graph, reference: Graph, context: Context, layers: dict[str, Node]) -> dict[str, Array]:
        need_calibration(context, self.name)
        wanted = moments(reference, context, self.name, {x: channel_axis(n.op) for x, n in layers.items()})
        shifts: dict[str, Array] = {}

        def mend(node: Node, results: list[torch.Tensor]) -> list[torch.Tensor]:
            found, want, axis = Moments(), wanted[node.output], channel_axis(node.op)
            for r in results:
                found.add(r, axis)
            shift = want.mean - found.mean
            scale = np.sqrt(want.variance + want.mean**2).max()
            if float(np.abs(shift).max()) <= 1e-6 * float(scale):
                return results
            mended = [r + along(shift, axis, r) for r in results]
            after = Moments()
            for r in mended:
                after.add(r, axis)
            shifts[node.output] = shift
            context.remark(
                self.name, layer_of(graph, node), mean_error=_rms(shift), mean_error_after=_rms(want.mean - after.mean)
            )
            return mended

        run_mended(graph, context, self.name, set(layers), mend)
        return shifts

    def _tuned(self, graph: Graph, reference: Graph, context: Context, layers: dict[str, Node]) -> dict[str, Array]:
        need_calibration(context, self.name)
        if not layers:
            return {}
        found = moments(reference, context, self.name, {x: channel_axis(n.op) for x, n in layers.items()})
        units = {x: np.full_like(m.variance, np.sqrt(m.variance.mean())) for x, m in found.items()}
        tuned = tune_biases(graph, reference, context.calibration, units)
        context.remark(self.name, "model", output_error=tuned.before**0.5, output_error_after=tuned.after**0.5)
        return tuned.shifts if tuned.after < tuned.before else {}

    def _implied(self, graph: Graph, reference: Graph, context: Context, layers: dict[str, Node]) -> dict[str, Array]:
        from bitwright.ir.semantics import apply

        norms, shifts, done = known_norms(context), {}, context.facts.setdefault("corrected", set())
        for name, node in layers.items():
            source, plain = graph.producers[node.inputs[1]], array(reference, reference.producers[name].inputs[1])
            mean = expected_mean(reference, reference.producers[name].inputs[0], norms)
            operands = [array(graph, x) for x in source.inputs]
            if mean is None or plain is None or any(a is None for a in operands):
                why = "no batch norm tells the mean of what it reads" if mean is None else "its weight is computed"
                context.refuse(self.name, layer_of(graph, node), why, "method=empirical measures it")
                continue
            low = to_numpy(apply(source.op, *(to_torch(a) for a in operands))[0]) if operands else plain
            shift = absorbed(node.op, plain.astype(np.float64) - low.astype(np.float64), mean)
            if name not in done and shift.any():
                context.remark(self.name, layer_of(graph, node), mean_error=_rms(shift))
                shifts[name] = shift
                done.add(name)
        return shifts


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
