"""observe-ranges: facts about every float value, from all batches; the graph stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.passes import Context
from bitwright.passes.precision.observe_ranges import Histogram, ObserveRanges

Read = Callable[..., Graph]
TEXT = """
graph @g (%x: f32[b, 2]) -> (y = %y) level=graph {
  %n = neg(%x) : f32[b, 2]
  %y = relu(%n) : f32[b, 2]
  %i = argmax(%y) : s64[b]
}
"""


def batches(*values: list[list[float]]) -> list[list[np.ndarray]]:
    return [[np.array(v, np.float32)] for v in values]


def test_extremes_over_all_batches(read: Read) -> None:
    graph = read(TEXT)
    context = Context(calibration=batches([[1.0, -2.0]], [[3.0, 0.5], [0.0, 0.0]]))
    assert ObserveRanges().run(graph, context) is graph
    assert context.facts["ranges"] == {"x": (-2.0, 3.0), "n": (-3.0, 2.0), "y": (0.0, 2.0)}
    assert context.remarks == [("observe-ranges", "model", {"values": 3, "batches": 2})]


def test_batches_by_name(read: Read) -> None:
    context = Context(calibration=[{"x": np.array([[4.0, 5.0]], np.float32)}])
    ObserveRanges().run(read(TEXT), context)
    assert context.facts["ranges"]["x"] == (4.0, 5.0)


def test_percentile_leaves_out_the_outermost(read: Read) -> None:
    values = np.random.default_rng(0).standard_normal((5000, 2)).astype(np.float32)
    values[0, 0] = 1000.0
    context = Context(calibration=[[values[:1]], [values[1:]]])
    ObserveRanges(method="percentile", percentile=99.0).run(read(TEXT), context)
    lo, hi = context.facts["ranges"]["x"]
    assert lo == pytest.approx(np.percentile(values, 0.5), abs=1.1)
    assert hi == pytest.approx(np.percentile(values, 99.5), abs=1.1)


def test_histogram_grows_and_stays_within_the_extremes() -> None:
    h = Histogram()
    parts = [torch.linspace(-1, 1, 1001), torch.linspace(-5, 7, 1001), torch.full((3,), 0.25)]
    for p in parts:
        h.add(p)
    assert h.counts is not None
    assert int(h.counts.sum()) == 2005
    assert h.reach == 8.0
    assert h.range(100.0) == (-5.0, 7.0)
    lo, hi = h.range(50.0)
    everything = torch.cat(parts)
    assert lo == pytest.approx(float(torch.quantile(everything, 0.25)), abs=0.02)
    assert hi == pytest.approx(float(torch.quantile(everything, 0.75)), abs=0.02)


def test_a_constant_stream_has_a_point_range() -> None:
    h = Histogram()
    h.add(torch.zeros(4))
    assert h.range(99.0) == (0.0, 0.0)


def test_without_data_the_message_says_what_to_do(read: Read) -> None:
    with pytest.raises(InvalidInput, match=r"calibration=\.\.\. in Python or --calibrate"):
        ObserveRanges().run(read(TEXT), Context())


def test_batches_that_do_not_fit_are_named(read: Read) -> None:
    with pytest.raises(InvalidInput, match="takes 1 inputs"):
        ObserveRanges().run(read(TEXT), Context(calibration=[[np.zeros((1, 2), np.float32)] * 2]))
    with pytest.raises(InvalidInput, match="percentile"):
        ObserveRanges(percentile=3.0).run(read(TEXT), Context(calibration=batches([[1.0, 2.0]])))


def test_twice_is_once(read: Read) -> None:
    context = Context(calibration=batches([[1.0, -2.0]]))
    graph = read(TEXT)
    ObserveRanges().run(graph, context)
    first = dict(context.facts["ranges"])
    ObserveRanges().run(graph, context)
    assert context.facts["ranges"] == first
