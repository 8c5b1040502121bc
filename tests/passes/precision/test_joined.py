"""Small batches become one where rows are independent, in order, and no others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.passes import Context
from bitwright.passes.precision import _joined
from bitwright.passes.precision._joined import joined
from bitwright.passes.precision.observe_ranges import ObserveRanges

Read = Callable[..., Graph]


def graph_of(read: Read, rows: str = "b") -> Graph:
    return read(f"""
        graph @g (%x: f32[{rows}, 4]) -> (y = %y) level=graph {{
          %w = weight {{ref="fc.weight"}} : f32[8, 4]
          %y = linear(%x, %w) : f32[{rows}, 8]
        }}
    """)


def data(*rows: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((n, 4)).astype(np.float32)} for n in rows]


def test_rows_stay_in_order_and_work_is_bounded(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = data(2, 3, 1, 4, 5)
    (one,) = joined(graph_of(read), batches)
    np.testing.assert_array_equal(one[0]["x"], np.concatenate([b["x"] for b in batches]))
    assert [len(p["x"]) for p in one[1]] == [2, 3, 1, 4, 5]
    monkeypatch.setattr(_joined, "VALUE", 0)
    monkeypatch.setattr(_joined, "WORK", 6 * 32)
    assert [len(b["x"]) for b, _ in joined(graph_of(read), batches)] == [6, 4, 5]


def test_what_is_held_is_bounded_where_nothing_is_multiplied(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = read("""
        graph @g (%x: f32[b, 4]) -> (y = %y) level=graph {
          %y = relu(%x) : f32[b, 4]
        }
    """)
    monkeypatch.setattr(_joined, "WORK", 8 * 4 * _joined.VALUE)
    assert [len(b["x"]) for b, _ in joined(graph, data(3, 5, 3, 4))] == [8, 7]


def test_what_does_not_fit_together_stays_apart(read: Read) -> None:
    assert len(list(joined(graph_of(read, "2"), data(2, 2)))) == 2
    odd = [*data(2), {"x": np.zeros((2, 4), np.float64)}, {"x": np.zeros((2, 5), np.float32)}, *data(2)]
    assert [b["x"].shape for b, _ in joined(graph_of(read), odd)] == [(2, 4), (2, 4), (2, 5), (2, 4)]


def test_ranges_are_those_of_the_batches_and_the_bad_one_is_named(read: Read) -> None:
    graph, batches = graph_of(read), data(2, 3, 4, 5)
    context = Context(calibration=batches)
    ObserveRanges().run(graph, context)
    whole = np.concatenate([b["x"] for b in batches])
    assert context.facts["ranges"]["x"] == (whole.min(), whole.max())
    assert context.remarks[-1][2]["batches"] == 4
    batches[2]["x"][1, 1] = np.nan
    with pytest.raises(InvalidInput, match="NaN in calibration batch 2"):
        ObserveRanges().run(graph, Context(calibration=batches))
