"""Weights whose outputs have 4, 2 or 1 bits each, for devices whose words hold several widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_torch
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._pass import Context, Pass
from bitwright.passes.precision._channel_codes import BITS, by_average, by_counts, codes_by_width, merged, row_errors
from bitwright.passes.precision._integer_codes import Codes
from bitwright.passes.precision._weight_writer import relative_change, snr_db, why_not_low, write_codes


@dataclass(frozen=True)
class QuantizeChannels(Pass):
    """Weights to 4, 2 or 1 bits, chosen output by output: ``bits`` on average, or ``counts=8/4/4`` outputs of each.

    The format stays s4; outputs of fewer bits hold only the codes -1, 0, 1 or -1, 1. Which outputs get more bits: those
    whose squared error falls most. quantize-int8 after it quantizes the activations.

    before:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[2, 2]
          %y = linear(%x, %w) : f32[1, 2]
        }
    after:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %fc.weight = weight {ref="fc.weight.1"} : s4[2, 2]
          %fc.weight.scale = constant {values=[0.12891754508018494, 0.6404226422309875]} : f32[2]
          %fc.weight.dq = dequantize(%fc.weight, %fc.weight.scale) {axis=0} : f32[2, 2]
          %y = linear(%x, %fc.weight.dq) : f32[1, 2]
        }
    """

    name: ClassVar[str] = "quantize-channels"
    lossy: ClassVar[bool] = True
    bits: float = 2.0
    counts: str = ""
    only: str = "*"
    except_: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        if not 1 <= self.bits <= 4:
            raise InvalidInput(f"quantize-channels: bits is 1 to 4 on average, not {self.bits}")
        counts = _counts(self.counts)
        chosen: list[Node] = []
        found: dict[str, Codes] = {}
        for n in graph.nodes:
            if not isinstance(n.op, ops.Linear | ops.Conv) or not selected(self.only, self.except_, graph, n):
                continue
            if why := why_not_low(graph, n, 4, True):
                context.refuse(self.name, layer_of(graph, n), *why)
                continue
            chosen.append(n)
            if n.inputs[1] not in found:
                found[n.inputs[1]] = self._codes(graph, n, counts, context)
        return write_codes(graph, chosen, found) if chosen else graph

    def _codes(self, graph: Graph, n: Node, counts: tuple[int, ...], context: Context) -> Codes:
        w, masked = to_torch(graph.constant(n.inputs[1])), graph.types[n.inputs[1]].encoding is not None
        codes = codes_by_width(w, w != 0 if masked else None)
        errors, name = row_errors(w, codes), layer_of(graph, n)
        if counts and (sum(counts) != len(w) or any(counts[len(codes) :])):
            one = " none of which can have one bit, for they are masked" if len(codes) < len(BITS) else ""
            raise InvalidInput(f"quantize-channels: counts={self.counts} do not fit {name}: {len(w)} outputs{one}")
        choice = by_counts(errors, counts[: len(codes)]) if counts else by_average(errors, self.bits)
        made = merged(codes, choice)
        held = {f"outputs_{b}_bits": int((choice == i).sum()) for i, b in enumerate(BITS)}
        snr = snr_db(relative_change(graph.constant(n.inputs[1]), made))
        context.remark(
            self.name, name, **held, bits=round(float(np.asarray(BITS)[choice].mean()), 2), weight_snr_db=round(snr, 1)
        )  # fmt: skip
        return made


def _counts(text: str) -> tuple[int, ...]:
    if not text:
        return ()
    parts = text.split("/")
    if len(parts) != len(BITS) or not all(p.isdigit() for p in parts):
        raise InvalidInput(f"quantize-channels: counts are outputs of 4, 2 and 1 bits, as 8/4/4, not {text!r}")
    return tuple(map(int, parts))
