"""Calibration data in a part to fit to and a part to judge by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitwright.ir.graph import Graph
from bitwright.passes._batches import LazyBatches
from bitwright.passes.precision._held_out import held_out

Read = Callable[..., Graph]
FREE = """
graph @g (%x: f32[b, 2], %m: f32[b]) -> (y = %y) level=graph {
  %y = relu(%x) : f32[b, 2]
}
"""
FIXED = """
graph @g (%x: f32[4, 2]) -> (y = %y) level=graph {
  %y = relu(%x) : f32[4, 2]
}
"""


def firsts(batches: Any) -> list[int]:
    """The first number of each batch."""
    return [int(b[0][0, 0]) for b in batches]


@pytest.mark.parametrize("count", range(2, 12))
def test_no_row_is_in_both_parts(read: Read, count: int) -> None:
    batch = {"x": np.arange(2.0 * count).reshape(count, 2), "m": np.arange(float(count))}
    split = held_out(read(FREE), [batch])
    assert split.apart
    fit, judge = ({float(v) for b in part for v in b["m"]} for part in (split.fit, split.judge))  # type: ignore[call-overload]
    assert fit | judge == set(range(count))
    assert not fit & judge
    assert len(judge) == max(1, count // 4)
    assert all((b["x"][:, 0] == 2 * b["m"]).all() for b in (*split.fit, *split.judge))  # type: ignore[call-overload]


def test_many_batches_are_kept_whole_and_read_anew(read: Read) -> None:
    reads: list[int] = []

    def expand(i: Any) -> list[Any]:
        reads.append(i)
        return [(np.full((4, 2), i),)]

    split = held_out(read(FIXED), LazyBatches(range(9), expand, [1] * 9))
    assert not reads
    assert firsts(split.judge) == [3, 7]
    assert firsts(split.fit) == [0, 1, 2, 4, 5, 6, 8]
    assert (len(split.judge), len(split.fit)) == (2, 7)
    assert firsts([split.judge[1], split.fit[-2]]) == [7, 6]
    assert firsts(split.fit[:2]) == [0, 1]


def test_few_batches_of_a_fixed_size(read: Read) -> None:
    batches = [(np.full((4, 2), i),) for i in range(3)]
    split = held_out(read(FIXED), batches)
    assert split.apart
    assert firsts(split.judge) == [2]
    assert firsts(split.fit) == [0, 1]
    alone = held_out(read(FIXED), batches[:1])
    assert not alone.apart
    assert alone.fit is alone.judge
    assert "fitted to" in str(alone)
    assert "no layer" in str(split)


def test_one_row_of_any_number_is_not_divided(read: Read) -> None:
    one = {"x": np.zeros((1, 2)), "m": np.zeros(1)}
    assert not held_out(read(FREE), [one]).apart
    assert held_out(read(FREE), [one, one]).apart
