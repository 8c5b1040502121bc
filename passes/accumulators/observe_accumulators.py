"""Counts, as remarks, of what a narrower accumulator would lose in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from bitwright.ir.graph import Graph
from bitwright.passes._pass import Context, Pass
from bitwright.passes.accumulators.attribution import attribute_accumulator


@dataclass(frozen=True)
class ObserveAccumulators(Pass):
    """Run the calibration batches and count overflow, underflow and swamping per layer; the graph stays as it is.

    ``accumulator``: an integer register (``s16``) for quantized layers, or a small float (``f4m3b8``) for
    floating-point ones, which rounds every product and sum. ``sample`` rows of each layer and batch are looked at.

    before:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[2, 2]
          %y = linear(%x, %w) : f32[1, 2]
        }
    after:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[2, 2]
          %y = linear(%x, %w) : f32[1, 2]
        }
    """

    name: ClassVar[str] = "observe-accumulators"
    establishes: ClassVar[tuple[str, ...]] = ("accumulator_losses",)
    accumulator: str = "s16"
    register: Literal["wrap", "saturate"] = "wrap"
    chunk: int = 16
    rounding: Literal["floor", "nearest"] = "floor"
    sample: int = 64

    def run(self, graph: Graph, context: Context) -> Graph:
        found = attribute_accumulator(
            graph, context.calibration, self.accumulator, register=self.register, chunk=self.chunk,
            rounding=self.rounding, sample=self.sample,
        )  # fmt: skip
        context.facts["accumulator_losses"] = found
        if not found:
            kind = "integer" if self.accumulator.startswith("s") else "floating-point"
            context.refuse(self.name, "model", f"no {kind} layer to sum in {self.accumulator}")
        for name, x in found.items():
            context.remark(
                self.name, name, accumulator=self.accumulator, overflow=x.overflow / max(x.sums, 1),
                underflow=x.underflow / max(x.terms, 1), swamped=x.swamped / max(x.terms, 1), sums=x.sums,
                sum_error=x.error,
            )  # fmt: skip
        return graph
