"""The whole pipeline of one compilation: canonical passes, the recipe, lowering, layout, certificates, fusion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.passes._instruments import Diff, Dump, Instrument
from bitwright.passes._manager import Pipeline, PipelineReport, run_pipeline
from bitwright.passes._pass import Context, Pass, Price
from bitwright.passes._spec import parse_passes
from bitwright.passes.accumulators.bound_accumulators import BoundAccumulators
from bitwright.passes.accumulators.lower_accumulators import LowerAccumulators
from bitwright.passes.lowering.channels_last import ChannelsLast
from bitwright.passes.lowering.fold_views import FoldViews
from bitwright.passes.lowering.fuse import Fuse
from bitwright.passes.pipelines import standard


@dataclass(frozen=True, slots=True)
class Lowered:
    """A kernel-level graph and how it came about.

    ``quantized`` is the last graph-level form, before integers replace its float meaning (None: there was none).
    ``diffs``: pass as text to unified diff.
    """

    graph: Graph
    report: PipelineReport
    context: Context
    diffs: dict[str, str]
    quantized: Graph | None

    def settled(self) -> Lowered:
        """With a complete report."""
        return replace(self, report=self.report.settled())


class _KeepBefore(Instrument):
    """Keeps the graph that a pass was given."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.graph: Graph | None = None

    def before(self, index: int, p: Pass, graph: Graph) -> None:
        if p.name == self.name:
            self.graph = graph


def lower(
    graph: Graph,
    recipe: str | Iterable[Pass],
    target: Target,
    calibration: Sequence[Any] = (),
    *,
    dump: str | Path | None = None,
    progress: Callable[[str, float], None] | None = None,
    price: Price | None = None,
    wait: bool = True,
) -> Lowered:
    """Run everything down to the kernel level; a graph of a lower level gets only what is left to do, of the recipe
    its passes for the integer level. A recipe with ``lower-accumulators`` has decided on the accumulators. Without
    ``wait`` the report may still lack output errors (:meth:`Lowered.settled`)."""
    context = Context(target, calibration, progress, price)
    passes = parse_passes(recipe) if isinstance(recipe, str) else tuple(recipe)
    sums = () if any(isinstance(p, LowerAccumulators) for p in passes) else (LowerAccumulators(),)
    backend = (ChannelsLast(), FoldViews(), BoundAccumulators(), *sums, Fuse())
    if graph.level == "graph":
        pipeline = standard(passes) + backend
    else:
        late = tuple(p for p in passes if p.takes == "integer")
        pipeline = Pipeline((*late, *backend) if graph.level == "integer" else (), graph.level)
    diff, quantized = Diff(), _KeepBefore("lower-to-integer")
    instruments: list[Instrument] = [diff, quantized, *([Dump(Path(dump))] if dump else [])]
    lowered, report = run_pipeline(graph, pipeline, context, instruments=instruments, wait=wait)
    return Lowered(lowered, report, context, dict(diff.diffs), quantized.graph)
