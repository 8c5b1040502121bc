"""The cost model: what it counts, and that a pattern never costs more than dense when it pays."""

from __future__ import annotations

import pytest

from bitwright.codegen.cost import cost_of
from bitwright.codegen.targets import BUILTIN
from bitwright.ir.graph import Graph
from bitwright.ir.text import parse
from bitwright.ir.types import F32, NM, S8, U8
from bitwright.ir.work import macs

LINEAR = """
graph @body (%x: u8[128, 768], %w: s8[3072, 768]{pattern}) -> (y = %y) level=integer {{
  %y = int_linear(%x, %w) : s32[128, 3072]
}}
"""
TARGET = BUILTIN["x86-avx512-vnni"]


def linear(pattern: str = "") -> Graph:
    return parse(LINEAR.format(pattern=pattern and f" nm<{pattern}, axis=1>").strip())


def test_operations_are_dense_ones() -> None:
    body = linear("2:4")
    assert macs(body.nodes[0], body) == 128 * 3072 * 768
    assert cost_of(body, TARGET).operations == 2 * 128 * 3072 * 768


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "2:16"])
def test_sparse_is_priced_below_dense_by_the_declared_gain(pattern: str) -> None:
    keep, group = map(int, pattern.split(":"))
    gain = next(s.gain for s in TARGET.sparse if (str(s.x), s.keep, s.group) == ("u8", keep, group))
    dense, sparse = cost_of(linear(), TARGET), cost_of(linear(pattern), TARGET)
    assert 0.8 * gain < dense.seconds / sparse.seconds < 1.02 * gain  # what tiles cost beside products is not halved
    assert sparse.bytes < dense.bytes
    assert sparse.limit < sparse.seconds
    assert cost_of(linear(pattern), TARGET, sparse=False).seconds == pytest.approx(dense.seconds)


def test_a_pattern_that_does_not_pay_is_not_priced_as_a_gain() -> None:
    portable = BUILTIN["x86-portable"]
    assert cost_of(linear("2:4"), portable).seconds >= 0.99 * cost_of(linear(), portable).seconds


def test_a_gathered_table_costs_the_rows_that_are_read() -> None:
    body = parse(
        "graph @body (%t: f32[30000, 64], %i: s64[8]) -> (y = %y) level=integer {\n"
        "  %y = gather(%t, %i) : f32[8, 64]\n"
        "}\n"
    )
    assert cost_of(body, TARGET).bytes == 2 * 8 * 64 * 4 + 8 * 8


def test_gains_are_declared_ones_or_the_share_of_the_next_larger_group() -> None:
    avx2 = BUILTIN["x86-avx2"]
    declared = {(str(s.x), s.keep, s.group): s.gain for s in avx2.sparse if s.shared == 1}
    assert avx2.sparse_gain(F32, NM(4, 16, 1)) == pytest.approx(declared["f32", 4, 16])
    assert avx2.sparse_gain(F32, NM(1, 4, 1, block=4)) == pytest.approx(declared["f32", 4, 16])  # the same elements
    assert avx2.sparse_gain(U8, NM(8, 16, 1)) == pytest.approx(declared["u8", 4, 16] / 2)
    assert avx2.sparse_gain(F32, NM(3, 9, 1)) == pytest.approx(declared["f32", 4, 16] / 4 * 3)  # beyond 8 lanes
    assert avx2.sparse_gain(U8, NM(4, 32, 1)) == avx2.sparse_gain(S8, NM(2, 4, 1)) == 0.0  # nothing as wide, no rate
