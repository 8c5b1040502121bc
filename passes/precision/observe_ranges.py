"""Value ranges from calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Literal

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import Observer, evaluate
from bitwright.passes._pass import Batch, Context, Pass
from bitwright.passes._trace import Trace, compared, rows_of
from bitwright.passes.precision._joined import joined
from bitwright.passes.precision._observe import Ranges
from bitwright.passes.precision._statistics import keep_reference
from bitwright.passes.sparsity._inputs import need_calibration

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ObserveRanges(Pass):
    """Run the calibration batches and note the range of every float value; the graph stays as it is.

    ``minmax`` takes the extremes, ``percentile`` leaves out the outermost (100 - percentile) percent, ``mse`` gives
    ``bits`` bits their smallest squared error, ``entropy`` their smallest divergence. ``per`` channel or group (of
    ``group`` channels) also notes the ranges of these parts of what contractions read. ``also=4`` (or ``4|6``) notes
    beside them the range that suits activations of so many bits, by ``mse``. One batch is held at a time; small ones
    are joined where the graph treats their rows one by one.

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
    establishes: ClassVar[tuple[str, ...]] = ("ranges", "reference")
    method: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"
    percentile: float = 99.99
    bits: int = 8
    per: Literal["tensor", "channel", "group"] = "tensor"
    group: int = 32
    also: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        need_calibration(context, self.name)
        if not 50 < self.percentile <= 100:
            raise InvalidInput(f"observe-ranges: percentile lies in (50, 100], not {self.percentile}")
        if not 2 <= self.bits <= 8 or self.group < 1:
            raise InvalidInput(f"observe-ranges: bits is 2 to 8 and group at least 1, not {self.bits}, {self.group}")
        also = self._also()
        seen = Ranges(graph, self.method, self.per, self.group, bool(also))
        count = self._watch(graph, context, seen)
        ranges = seen.found(self.percentile, (1 << self.bits) - 1)
        if not ranges:
            raise InvalidInput("observe-ranges saw no values: the calibration batches are empty")
        context.facts["ranges"] = ranges
        for bits in also:
            context.facts[f"ranges-{bits}"] = seen.found(self.percentile, (1 << bits) - 1, "mse")
        keep_reference(graph, context)
        if self.per != "tensor":
            context.facts[f"{self.per}-ranges"] = seen.found_parts(self.percentile, (1 << self.bits) - 1)
        context.remark(self.name, "model", values=len(ranges), batches=count)
        return graph

    def _watch(self, graph: Graph, context: Context, seen: Ranges) -> int:
        """Run all batches before ``seen``: their number."""
        names, batches, count = [v.name for v in graph.inputs], iter(context.calibration), 0
        tell = context.progress or (lambda label, share: None)
        for first in islice(batches, 1):  # alone: others look at what it gives
            tell("calibrating", 0.0)
            given = first if isinstance(first, Mapping) else dict(zip(names, first, strict=False))
            seen.see_inputs(given, 0)
            self._first(graph, first, partial(seen.see, batch=0), context)
            count = 1
        for batch, parts in joined(graph, batches):
            tell("calibrating", count / len(context.calibration))
            try:
                seen.see_all(batch, count)
            except InvalidInput:
                for i, part in enumerate(parts):  # names the one to blame
                    seen.see_all(part, count + i)
                raise
            count += len(parts)
        return count

    def _first(self, graph: Graph, batch: Batch, see: Observer, context: Context) -> None:
        """Evaluate the first batch, and leave its trace for those who would evaluate it again."""
        trace = context.trace = Trace(compared(graph), rows_of(batch))

        def both(name: str, value: torch.Tensor) -> None:
            see(name, value)
            trace.see(name, value)

        trace.outputs = evaluate(graph, batch, observe=both)

    def _also(self) -> tuple[int, ...]:
        """The widths of ``also``."""
        try:
            widths = tuple(int(x) for x in str(self.also).split("|") if x.strip())
        except ValueError:
            widths = (0,)
        if not all(2 <= b < 8 for b in widths):
            raise InvalidInput(f"observe-ranges: also lists widths of 2 to 7 bits, as in 4 or 4|6, not {self.also!r}")
        return widths
