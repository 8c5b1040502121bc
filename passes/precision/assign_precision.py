"""Mixed precision: the best number format and pattern for each layer within a budget, found exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.passes._pass import Context, Pass
from bitwright.passes.precision._assignment import Problem, apply_choice, layers_of, report
from bitwright.passes.precision._checked import best_of, measure, plan_of
from bitwright.passes.precision._choices import Rounding


@dataclass(frozen=True)
class AssignPrecision(Pass):
    """Choose each layer's format and pattern by an integer program over measured losses and costs, and apply it.

    ``budget``: ``size=0.16`` (share of the float bytes), ``latency=0.5`` (share of the float seconds) or ``2ms``,
    ``bitops=0.1``, or ``loss=0.01`` (relative squared error of the outputs, nats with ``metric=kl``), which makes
    ``minimise`` (size, latency or bitops) the objective. Latency is measured on this machine with ``prices=measured``,
    else taken from the target's cost model; the report says which. Losses are measured on a fourth of the calibration
    data, layers fitted to the rest; the plan of the program is then measured as a whole, against one without patterns
    and those of a single format within the budget, and the best is taken.

    before:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[2, 2]
          %y = linear(%x, %w) : f32[1, 2]
        }
    after:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %x.scale = constant {values=[0.01568627543747425]} : f32[]
          %x.zero = constant {values=[64]} : u8[]
          %x.q = quantize(%x, %x.scale, %x.zero) {dtype=u8} : u8[1, 2]
          %x.dq = dequantize(%x.q, %x.scale, %x.zero) : f32[1, 2]
          %fc.weight = weight {ref="fc.weight.1"} : s8[2, 2]
          %fc.weight.scale = constant {values=[0.0010401956969872117, 0.0050426977686584]} : f32[2]
          %fc.weight.dq = dequantize(%fc.weight, %fc.weight.scale) {axis=0} : f32[2, 2]
          %y = linear(%x.dq, %fc.weight.dq) : f32[1, 2]
        }
    """

    name: ClassVar[str] = "assign-precision"
    lossy: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("ranges",)
    establishes: ClassVar[tuple[str, ...]] = ("precision",)
    budget: str = "size=0.25"
    minimise: Literal["size", "latency", "bitops"] = "size"
    choices: str = "auto"
    sensitivity: Literal["measured", "curvature"] = "measured"
    metric: Literal["mse", "kl"] = "mse"
    prices: Literal["model", "measured"] = "model"
    rounding: Rounding = "nearest"
    reconstruct: bool = True
    first: str = ""
    last: str = ""
    ties: Literal["shared", "residual"] = "shared"
    only: str = "*"
    except_: str = ""
    time_limit: float = 60.0
    front: int = 8

    def run(self, graph: Graph, context: Context) -> Graph:
        if not context.calibration:
            raise InvalidInput("assign-precision needs calibration data to measure what each choice costs")
        if recorded := context.facts.get("recorded-precision"):  # a compilation is repeated
            plan = {x: recorded[x] for x in layers_of(graph, context, self) if x in recorded}
            return apply_choice(graph, context, self, plan)
        problem = Problem.of(graph, context, self)
        if not problem.layers:
            context.refuse(self.name, "model", f"only={self.only} except={self.except_} selects no layer it could set")
            return graph
        found = best_of(problem, measure(graph, context, self))
        report(problem, found, context, self)
        plan = plan_of(problem, found.plan)
        context.facts["precision"] = context.facts.get("precision", {}) | plan
        return apply_choice(graph, context, self, plan)
