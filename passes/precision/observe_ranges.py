"""Value ranges from calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_torch
from bitwright.passes._pass import Context, Pass

if TYPE_CHECKING:
    import torch

BINS = 2048


class Histogram:
    """Counts of a stream of values in equal bins over [-reach, reach]; the reach doubles when values leave it."""

    def __init__(self) -> None:
        self.reach = 0.0
        self.counts: torch.Tensor | None = None
        self.lo = self.hi = 0.0

    def add(self, values: torch.Tensor) -> None:
        """Count a tensor's values."""
        import torch

        values = values.detach().float().flatten()
        lo, hi = float(values.min()), float(values.max())
        far = max(-lo, hi, 1e-30)
        if self.counts is None:
            self.reach, self.counts, self.lo, self.hi = far, torch.zeros(BINS, dtype=torch.float64), lo, hi
        while far > self.reach:
            middle = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.cat([middle.new_zeros(BINS // 4), middle, middle.new_zeros(BINS // 4)])
            self.reach *= 2
        self.counts += torch.histc(values, BINS, -self.reach, self.reach).double()
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)

    def range(self, percent: float) -> tuple[float, float]:
        """The interval that leaves (100 - percent) / 2 percent of the values on either side, within the extremes."""
        import torch

        assert self.counts is not None
        share = torch.cumsum(self.counts, 0) / self.counts.sum()
        cut, width = (1 - percent / 100) / 2, 2 * self.reach / BINS
        first = int(torch.searchsorted(share, cut, right=True))
        last = int(torch.searchsorted(share, 1 - cut))
        return max(self.lo, -self.reach + first * width), min(self.hi, -self.reach + (last + 1) * width)


@dataclass(frozen=True)
class ObserveRanges(Pass):
    """Run the calibration batches and note the range of every float value; the graph stays as it is.

    ``minmax`` takes the extremes, ``percentile`` leaves out the outermost (100 - percentile) percent.

    before:
        graph @g (%x: f32[2]) -> (y = %y) level=graph {
          %y = relu(%x) : f32[2]
        }
    after:
        graph @g (%x: f32[2]) -> (y = %y) level=graph {
          %y = relu(%x) : f32[2]
        }
    """

    name: ClassVar[str] = "observe-ranges"
    establishes: ClassVar[tuple[str, ...]] = ("ranges",)
    method: Literal["minmax", "percentile"] = "minmax"
    percentile: float = 99.99

    def run(self, graph: Graph, context: Context) -> Graph:
        if not context.calibration:
            raise InvalidInput(
                "observe-ranges needs calibration data, a few batches of typical inputs: "
                "pass calibration=... in Python or --calibrate FILE on the command line"
            )
        if not 50 < self.percentile <= 100:
            raise InvalidInput(f"observe-ranges: percentile lies in (50, 100], not {self.percentile}")
        histograms: dict[str, Histogram] = {}
        extremes: dict[str, tuple[float, float]] = {}

        def observe(name: str, value: torch.Tensor) -> None:
            if not value.is_floating_point() or not value.numel():
                return
            if self.method == "percentile":
                histograms.setdefault(name, Histogram()).add(value)
            else:
                lo, hi = map(float, value.aminmax())
                old = extremes.get(name, (lo, hi))
                extremes[name] = min(lo, old[0]), max(hi, old[1])

        names = [v.name for v in graph.inputs]
        for i, batch in enumerate(context.calibration):
            if context.progress is not None:
                context.progress("calibrating", i / len(context.calibration))
            given = batch if isinstance(batch, dict) else dict(zip(names, batch, strict=False))
            for name, value in given.items():
                observe(str(name), to_torch(value))
            evaluate(graph, batch, observe=observe)
        extremes.update({name: h.range(self.percentile) for name, h in histograms.items()})
        context.facts["ranges"] = extremes
        context.remark(self.name, "model", values=len(extremes), batches=len(context.calibration))
        return graph
