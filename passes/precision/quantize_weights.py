"""Weights of contractions as integer codes of 2 to 8 bits, ternary or bipolar, written as dequantize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_torch
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._memory import give_back
from bitwright.passes._pass import Context, Pass
from bitwright.passes.precision._integer_codes import Codes, Width, quantize_codes
from bitwright.passes.precision._weight_codes import ROWS, Inputs, Method, groups_of, round_layer, with_result
from bitwright.passes.precision._weight_writer import checked_width, relative_change, snr_db, why_not_low, write_codes
from bitwright.passes.sparsity._frontier import walk
from bitwright.passes.sparsity._inputs import need_calibration

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Weights to ``bits`` (2 to 8, ternary, bipolar), one scale per output or per ``group`` of inputs; masks survive.

    Activations stay float; quantize-int8 after it quantizes them and leaves these weights as they are. ``rounding``
    other than nearest needs calibration data; with ``sequential`` each layer sees what the rounded ones before it give.

    before:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[2, 2]
          %y = linear(%x, %w) : f32[1, 2]
        }
    after:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %fc.weight = weight {ref="fc.weight.1"} : s8[2, 2]
          %fc.weight.scale = constant {values=[0.0010396708967164159, 0.005041434895247221]} : f32[2]
          %fc.weight.dq = dequantize(%fc.weight, %fc.weight.scale) {axis=0} : f32[2, 2]
          %y = linear(%x, %fc.weight.dq) : f32[1, 2]
        }
    """

    name: ClassVar[str] = "quantize-weights"
    lossy: ClassVar[bool] = True
    bits: str = "8"
    group: int = 0
    symmetric: bool = True
    scale: Literal["float", "pow2"] = "float"
    range: Literal["minmax", "mse"] = "mse"
    rounding: Literal["nearest", "adaround", "adaquant", "gptq", "gpfq"] = "nearest"
    sequential: bool = False
    iterations: int = 0
    damping: float = 0.01
    seed: int = 0
    only: str = "*"
    except_: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        return self.on_inputs_of(graph, context, {})

    def on_inputs_of(self, graph: Graph, context: Context, given: Mapping[str, torch.Tensor]) -> Graph:
        """:meth:`run`, with the inputs that layers have in a model of the weights ``given`` by value name."""
        width = checked_width(self.bits, self.symmetric, self.group, self.iterations, self.rounding)
        if self.rounding != "nearest":
            need_calibration(context, f"quantize-weights{{rounding={self.rounding}}}")
        layers = [n for n in graph.nodes if isinstance(n.op, (ops.Linear, ops.Conv, ops.ConvTranspose, ops.MatMul))]
        chosen: list[Node] = []
        for n in layers:
            if not selected(self.only, self.except_, graph, n):
                continue
            if why := why_not_low(graph, n, width, self.symmetric):
                context.refuse(self.name, layer_of(graph, n), *why)
            else:
                chosen.append(n)
        if not chosen:
            return graph
        found = self._found(graph, chosen, context, width, given)
        return write_codes(graph, chosen, found)

    def _codes(self, graph: Graph, n: Node, width: Width) -> Codes:
        """The nearest codes of a layer's weight."""
        w, masked = to_torch(graph.constant(n.inputs[1])), graph.types[n.inputs[1]].encoding is not None
        return quantize_codes(
            w, width, self.symmetric, axis=1 if self.group else 0, group=self.group, scale=self.scale,
            range=self.range, mask=w != 0 if masked else None,
        )  # fmt: skip

    def _found(
        self, graph: Graph, chosen: list[Node], context: Context, width: Width, given: Mapping[str, torch.Tensor]
    ) -> dict[str, Codes]:
        """Codes by weight value; each layer's error is remarked."""
        found: dict[str, Codes] = {}
        left = {w: sum(n.inputs[1] == w for n in chosen) for w in (n.inputs[1] for n in chosen)}
        seen: dict[str, Inputs] = {}
        keep = ROWS if self.rounding == "adaquant" else 0
        method = Method(self.rounding, self.iterations, self.damping, self.seed, self.scale == "pow2")

        def visit(node: Node, xs: list[torch.Tensor], *_: object) -> Mapping[int, torch.Tensor] | None:
            key = node.inputs[1]
            inputs = seen.setdefault(key, Inputs(groups_of(node.op), keep))
            for i, x in enumerate(xs):
                inputs.add(graph, node, x, i, len(xs))
            left[key] -= 1
            if not left[key]:
                if context.progress is not None:
                    context.progress(f"rounding {layer_of(graph, node)}", len(found) / len(left))
                give_back()
                found[key] = self._rounded(graph, node, seen.pop(key), method, context, width)
                give_back()
            return {1: found[key].real()} if self.sequential and key in found else None

        if context.calibration:
            walk(graph, context.calibration, {n.output for n in chosen}, visit, given)
            return found
        for n in chosen:
            if n.inputs[1] not in found:
                codes = found[n.inputs[1]] = self._codes(graph, n, width)
                change = relative_change(graph.constant(n.inputs[1]), codes)
                self._remark(graph, n, context, codes, weight_error=change)
        return found

    def _rounded(self, graph: Graph, n: Node, inputs: Inputs, method: Method, context: Context, width: Width) -> Codes:
        weight, start = np.asarray(graph.constant(n.inputs[1])), self._codes(graph, n, width)
        readers = graph.users[n.output]
        relu = len(readers) == 1 and isinstance(readers[0].op, ops.Unary) and readers[0].op.fn == "relu"
        result = round_layer(n.op, weight, start, inputs, method, relu)
        codes = with_result(n.op, weight, start, result)
        self._remark(graph, n, context, codes, error=result.error, error_nearest=result.error_nearest)
        return codes

    def _remark(self, graph: Graph, n: Node, context: Context, codes: Codes, **errors: float) -> None:
        facts = {k: float(f"{v:.3g}") for k, v in errors.items()}
        snr = snr_db(relative_change(graph.constant(n.inputs[1]), codes))
        context.remark(
            self.name, layer_of(graph, n), format=str(codes.levels.dtype), rounding=self.rounding, **facts,
            weight_snr_db=round(snr, 1),
        )  # fmt: skip
