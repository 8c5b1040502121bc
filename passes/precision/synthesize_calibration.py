"""Data-free calibration: inputs made from the statistics that the model's batch norms remember."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bitwright.ir.graph import Graph
from bitwright.passes._norms import known_norms
from bitwright.passes._pass import Context, Pass
from bitwright.passes.precision._synthesize import Scheme, calibration_score, synthesize


@dataclass(frozen=True)
class SynthesizeCalibration(Pass):
    """Make calibration data when none was given: images on which batch norms see what they remember.

    ``bns`` moves noise by gradient until they do, ``logit`` until the model sees evenly drawn classes, ``gaussian``
    takes the noise. Data that was given is kept, and scored: 0 is data like that of training. Stands after
    fold-batch-norm, which keeps the statistics, and before the passes that need data. A model without batch norm
    tells nothing of its data: ``bns`` then fails and says what to do.

    before:
        graph @g (%x: f32[b, 2]) -> (y = %y) level=graph {
          %y = relu(%x) : f32[b, 2]
        }
    after:
        graph @g (%x: f32[b, 2]) -> (y = %y) level=graph {
          %y = relu(%x) : f32[b, 2]
        }
    """

    name: ClassVar[str] = "synthesize-calibration"
    count: int = 64
    scheme: Scheme = "bns"
    steps: int = 200
    seed: int = 0

    def run(self, graph: Graph, context: Context) -> Graph:
        norms = {k: n for k, n in known_norms(context).items() if k in graph.types}
        if context.calibration:
            batch = context.calibration[0]
            names = [v.name for v in graph.inputs]
            named: Any = batch if isinstance(batch, Mapping) else dict(zip(names, batch, strict=True))
            facts = {"score": calibration_score(graph, norms, named)} if norms else {}
            context.remark(self.name, "model", given=len(context.calibration), **facts)
            return graph

        def progress(fraction: float) -> None:
            if context.progress is not None:
                context.progress("synthesizing calibration data", fraction)

        data, first, last = synthesize(graph, norms, self.count, self.scheme, self.steps, self.seed, progress)
        context.calibration = [data]
        context.remark(self.name, "model", rows=self.count, scheme=self.scheme, loss_before=first, loss=last)
        return graph
