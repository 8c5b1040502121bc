"""What observe-ranges keeps of each value: extremes and histograms, for the tensor and for its channels or groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_torch
from bitwright.ir.weights import Array
from bitwright.passes.precision._histogram import Histogram

if TYPE_CHECKING:
    import torch

FULL = 1 << 14
"""Values of a row that its histogram counts one by one; of those that follow every :data:`STRIDE`-th, as so many. The
extremes are of all values. Of n values counted, the share below any bound is known to 0.5 / sqrt(n): 0.4 % of 2^14."""
PENDING = 1 << 14
"""Values of a tensor that wait for its histogram."""
STRIDE = 33
"""Odd: does not stay in step with sizes that are powers of two."""
_SPATIAL = (ops.Conv, ops.ConvTranspose, ops.BatchNorm, ops.GroupNorm, ops.MaxPool, ops.AvgPool)


def channel_axis(graph: Graph, value: str) -> int:
    """1 for what spatial operators make or read (the last axis where they are channels-last), else the last axis."""
    near = [n for n in (graph.producers.get(value), *graph.users.get(value, ())) if n is not None]
    spatial = [n for n in near if isinstance(n.op, _SPATIAL)]
    rank = graph.types[value].rank
    return 1 if spatial and rank > 2 and not getattr(spatial[0].op, "channels_last", False) else rank - 1


@dataclass
class Observed:
    """The ranges of one value, all of it (``rows`` 1) or row by row."""

    rows: int
    counted: bool
    """True when a histogram is kept, not only extremes."""
    lo: torch.Tensor | None = None
    hi: torch.Tensor | None = None
    histogram: Histogram | None = None
    least: float = math.inf
    """With ``most``: the extremes where there is one row."""
    most: float = -math.inf
    taken: int = 0
    step: int = 1
    pending: list[torch.Tensor] = field(default_factory=list)
    waiting: int = 0

    def add(self, values: torch.Tensor) -> bool:
        """Take in [rows, n] values; infinite ones make the range infinite. False: they have NaN."""
        import torch

        if self.rows == 1:
            low, high = (float(v) for v in values.aminmax())  # numbers: cheaper than tensors of one element
            if math.isnan(low):
                return False
            self.least, self.most = min(self.least, low), max(self.most, high)
            finite = low > -math.inf and high < math.inf
        else:
            lo, hi = values.aminmax(dim=1)
            if bool(lo.isnan().any()):
                return False
            self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
            self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)
            finite = bool((lo > -torch.inf).all() and (hi < torch.inf).all())
        if self.counted and finite:
            self._sample(values)
        return True

    def _sample(self, values: torch.Tensor) -> None:
        """Keep evenly spread values for the histogram, which counts some batches at a time."""
        few = FULL - self.taken
        step = max(1, values.shape[1] // few) | 1 if few > 0 else STRIDE
        self.taken += -(-values.shape[1] // step)
        if step != self.step:
            self.count()
        self.step = step
        self.pending.append(values[:, ::step].clone() if step > 1 or self.rows == 1 else values)
        self.waiting += self.pending[-1].shape[1]
        if self.waiting >= PENDING or self.rows > 1:
            self.count()

    def count(self) -> None:
        """Bring what was kept into the histogram."""
        import torch

        if self.pending:
            self.histogram = self.histogram or Histogram(self.rows)
            self.histogram.add(torch.cat(self.pending, 1), weight=self.step)
            self.pending, self.waiting = [], 0

    def range(self, method: str, percent: float, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper ends, [rows]."""
        import torch

        self.count()
        if self.rows == 1:
            self.lo, self.hi = (torch.tensor([v], dtype=torch.float32) for v in (self.least, self.most))
        assert self.lo is not None
        assert self.hi is not None
        if self.histogram is not None:
            self.histogram.lo, self.histogram.hi = self.lo.double(), self.hi.double()
        infinite = not bool(torch.isfinite(self.lo).all() and torch.isfinite(self.hi).all())
        if self.histogram is None or infinite or method == "minmax":
            return self.lo, self.hi
        if method == "percentile":
            return self.histogram.range(percent)
        return self.histogram.mse(steps) if method == "mse" else self.histogram.entropy(steps)


@dataclass
class Ranges:
    """Observes every float value of a graph; with ``per`` channel or group, the operands of contractions in parts."""

    graph: Graph
    method: str
    per: str
    group: int
    histograms: bool = False
    """Keep histograms of tensors whatever the method."""
    tensors: dict[str, Observed] = field(default_factory=dict)
    parts: dict[str, Observed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        contractions = (ops.Linear, ops.Conv, ops.ConvTranspose, ops.MatMul)
        read = [x for n in self.graph.nodes if isinstance(n.op, contractions) for x in n.inputs[:2]]
        self.operands = {x for x in read if not self.graph.is_constant(x)} if self.per != "tensor" else set()
        moved = [n for n in self.graph.nodes if isinstance(n.op, (ops.Reshape, ops.Transpose, ops.Flip))]
        self.same = {n.output: n.inputs[0] for n in moved if not self.graph.is_constant(n.inputs[0])}
        """Values that hold the elements of another one: their range is not measured twice."""

    def see_inputs(self, inputs: Mapping[str, Array], batch: int) -> None:
        """Take in what a batch gives the graph."""
        for name, value in inputs.items():
            self.see(str(name), to_torch(value), batch)

    def see_all(self, inputs: Mapping[str, Array], batch: int) -> None:
        """Run a batch and take in its inputs and all that is computed; errors as those of :meth:`see` and the
        interpreter."""
        self.see_inputs(inputs, batch)
        evaluate(self.graph, inputs, observe=partial(self.see, batch=batch))

    def see(self, name: str, value: torch.Tensor, batch: int) -> None:
        """Take in a value of a batch; raises :class:`InvalidInput` for NaN."""
        if not value.is_floating_point() or not value.numel():
            return
        value, counted = value.detach().float(), self.method != "minmax"
        if name not in self.same and not self.tensors.setdefault(name, Observed(1, counted or self.histograms)).add(
            value.reshape(1, -1)
        ):
            raise InvalidInput(f"%{name} has NaN in calibration batch {batch}: check the model and the data")
        if name in self.operands and value.dim():
            rows = self._rows(name, value)
            self.parts.setdefault(name, Observed(len(rows), counted)).add(rows)

    def _rows(self, name: str, value: torch.Tensor) -> torch.Tensor:
        import torch

        rows = value.movedim(channel_axis(self.graph, name), 0).flatten(1)
        if self.per == "channel":
            return rows
        rows = torch.nn.functional.pad(rows.T, (0, -len(rows) % self.group), mode="replicate").T  # repeats a channel
        return rows.reshape(-1, self.group * rows.shape[1])

    def found(self, percent: float, steps: int, method: str = "") -> dict[str, tuple[float, float]]:
        """The range of each value, by another method than the observer's if one is given."""
        out = {}
        for name, seen in self.tensors.items():
            lo, hi = seen.range(method or self.method, percent, steps)
            out[name] = float(lo), float(hi)
        for name, source in self.same.items():  # in the graph's order: sources come first
            if source in out:
                out[name] = out[source]
        return out

    def found_parts(self, percent: float, steps: int) -> dict[str, tuple[Array, Array]]:
        """The range of each channel or group of the operands of contractions, f32 arrays."""
        out = {}
        for name, seen in self.parts.items():
            lo, hi = seen.range(self.method, percent, steps)
            out[name] = np.asarray(lo, np.float32), np.asarray(hi, np.float32)
        return out


__all__ = ["Ranges", "channel_axis"]
