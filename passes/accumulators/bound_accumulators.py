"""How wide the accumulator of every integer contraction must be, with the inputs that prove it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Level
from bitwright.ir.interpret import evaluate, to_torch
from bitwright.passes._pass import Context, Pass
from bitwright.passes.accumulators._certify import CONTRACTIONS, Bounds, certify

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BoundAccumulators(Pass):
    """Exact range and width of every integer accumulator, as a certificate by value name; the graph stays as it is.

    ``range``: smallest and largest final sum that any input of the proven bounds gives; ``bits`` for it (a register
    that wraps), ``partial_bits`` for every partial sum in any order (one that saturates), ``type_bits`` when only the
    formats are known; ``headroom``: bits of the accumulator that stay unused, partial sums included. ``kind`` says
    what the proof rests on: ``type``, ``weights``, ``weights+ranges``. ``ranges=observed`` takes the input codes that
    the calibration batches gave for the bounds: such a certificate is of the kind ``calibrated``, a figure to look at
    and no proof; later certificates of the same run tell it beside their own.

    before:
        graph @g (%x: u8[1, 4]) -> (y = %y) level=integer {
          %w = constant {values=[1, 2, -3, 4]} : s8[1, 4]
          %y = int_linear(%x, %w) {x_zero=8} : s32[1, 1]
        }
    after:
        graph @g (%x: u8[1, 4]) -> (y = %y) level=integer {
          %w = constant {values=[1, 2, -3, 4]} : s8[1, 4]
          %y = int_linear(%x, %w) {x_zero=8} : s32[1, 1]
        }
    """

    name: ClassVar[str] = "bound-accumulators"
    takes: ClassVar[Level] = "integer"
    gives: ClassVar[Level] = "integer"
    establishes: ClassVar[tuple[str, ...]] = ("certificates",)
    ranges: Literal["type", "observed"] = "type"

    def run(self, graph: Graph, context: Context) -> Graph:
        trust = self.ranges == "observed"
        nodes = [n for n in graph.nodes if isinstance(n.op, CONTRACTIONS)]
        if trust:
            context.facts["observed_codes"] = _observed(graph, context)
        seen: dict[str, Bounds] = context.facts.get("observed_codes", {})
        found = context.facts["certificates"] = {}
        for i, node in enumerate(nodes):
            if context.progress is not None:
                context.progress("bounding accumulators", i / len(nodes))
            codes = seen.get(node.inputs[0], seen.get(node.inputs[0].removesuffix(".last")))
            found[node.output] = certificate = certify(graph, node, codes, trust=trust)
            context.remark(self.name, node.output, **_remark(certificate))
        return graph


def _observed(graph: Graph, context: Context) -> dict[str, Bounds]:
    """The smallest and largest code of every input of a contraction over the calibration batches."""
    if not context.calibration:
        raise InvalidInput(
            "bound-accumulators{ranges=observed} needs calibration data: pass calibration=... or --calibrate FILE, "
            "or leave the option out for bounds that hold for every input"
        )
    wanted = {n.inputs[0] for n in graph.nodes if isinstance(n.op, CONTRACTIONS)}
    seen: dict[str, Bounds] = {}

    def observe(name: str, value: torch.Tensor) -> None:
        if name in wanted and value.numel():
            lo, hi = (int(v) for v in value.aminmax())
            old = seen.get(name, (lo, hi))
            seen[name] = min(lo, old[0]), max(hi, old[1])

    inputs = [v.name for v in graph.inputs]
    for batch in context.calibration:
        given = batch if isinstance(batch, dict) else dict(zip(inputs, batch, strict=False))
        for name, value in given.items():
            observe(str(name), to_torch(value))
        evaluate(graph, batch, observe=observe)
    return seen


def _remark(c: dict[str, Any]) -> dict[str, Any]:
    """The certificate in words for the report."""
    if c["terms"] is None:
        return {"safe terms": c["safe_terms"], "accumulator bits": c["acc_bits"]}
    told = {"range": f"{c['range'][0]}..{c['range'][1]}", "bits by types": c["type_bits"], "bits": c["bits"]}
    told |= {"partial sums": c["partial_bits"], "headroom": c["headroom"], "proof": c["kind"]}
    return told | ({"witness": f"row {c['rows'][1]}"} if "rows" in c else {})
