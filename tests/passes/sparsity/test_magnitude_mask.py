"""magnitude-mask: the share of zeros asked for, in blocks or not; the encoding that says so; refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.patterns import violation
from bitwright.ir.types import Unstructured, parse_encoding
from bitwright.passes import Context
from bitwright.passes._spec import parse_pass
from bitwright.passes.sparsity.magnitude_mask import MagnitudeMask, unstructured_mask_array

Read = Callable[..., Graph]
TWO = """
    graph @g (%x: f32[2, 300]) -> (y = %y) level=graph {
      %w = weight {ref="wide.weight"} : f32[24, 300]
      %v = weight {ref="short.weight"} : f32[8, 24]
      %h = linear(%x, %w) : f32[2, 24]
      %y = linear(%h, %v) : f32[2, 8]
    }
"""


def test_blocks_lie_along_the_inputs_of_each_tap(check: Any) -> None:
    after = check(
        MagnitudeMask(sparsity=0.8, block=4),
        before="""
            graph @g (%x: f32[1, 20, 5, 5]) -> (y = %y) level=graph {
              %w = weight {ref="c.weight"} : f32[6, 20, 3, 3]
              %y = conv(%x, %w) : f32[1, 6, 3, 3]
            }
        """,
        after="""
            graph @g (%x: f32[1, 20, 5, 5]) -> (y = %y) level=graph {
              %c.weight = weight {ref="c.weight.1"} : f32[6, 20, 3, 3] unstructured<0 per 0, axis=1, block=4, kept=0.2>
              %y = conv(%x, %c.weight) : f32[1, 6, 3, 3]
            }
        """,
        tolerance=None,
    )  # fmt: skip
    (weight,) = (h.array for h in after.weights.values())
    blocks = (weight != 0).reshape(6, 5, 4, 3, 3)
    assert (blocks.all(2) == blocks.any(2)).all()
    assert blocks.any(2).sum() == 54  # a fifth of 6 x 5 x 9 blocks


def test_the_largest_magnitudes_stay(read: Read) -> None:
    graph, context = read(TWO), Context()
    p = parse_pass("magnitude-mask{sparsity=0.9}")
    after = p.run(graph, context)
    before, masked = graph.constant("w"), after.constant("wide.weight")
    assert isinstance(before, np.ndarray)
    assert isinstance(masked, np.ndarray)
    assert np.count_nonzero(masked) == 720
    assert np.abs(before[masked == 0]).max() <= np.abs(masked[masked != 0]).min()
    told = {place: facts for _, place, facts in context.remarks}
    assert told["wide"]["pattern"] == "90% zeros"
    assert told["wide"]["kept_magnitude"] == told["wide"]["kept_unstructured"]
    assert not p.run(after, Context()).changed_from(after)


def test_the_encoding_is_checked_and_written() -> None:
    encoding = Unstructured(0, 0, 1, 4, 0.25)
    assert parse_encoding(str(encoding)) == encoding
    weight = np.zeros((2, 8), np.float32)
    weight[0, 5] = 1
    assert violation(weight, encoding) == ""
    weight[1, :2] = 1
    assert "50.0000% of the blocks are kept" in violation(weight, encoding)
    with pytest.raises(InvalidInput, match="share of all blocks without a fixed count"):
        Unstructured(1, 4, 1, 1, 0.5)


def test_ties_keep_the_first() -> None:
    kept = unstructured_mask_array(np.ones((2, 4)), Unstructured(0, 0, 1, 1, 0.5))
    assert kept.tolist() == [[True] * 4, [False] * 4]


def test_refusals(read: Read) -> None:
    context = Context()
    MagnitudeMask(sparsity=0.9999, only="short").run(read(TWO), context)
    assert "192 blocks are too few for 99.99% zeros" in context.refusals[0].reason
    with pytest.raises(InvalidInput, match="between 0 and 1"):
        MagnitudeMask(sparsity=1.0)
    with pytest.raises(InvalidInput, match="not finite"):
        unstructured_mask_array(np.array([[np.inf, 1.0]]), Unstructured(0, 0, 1, 1, 0.5))
