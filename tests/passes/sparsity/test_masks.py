"""N:M masks: the largest magnitudes win, ties go to the lower index, tails keep their share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.ir.errors import InvalidInput
from bitwright.ir.patterns import keep_in_tail, violation
from bitwright.ir.types import NM
from bitwright.passes.sparsity.masks import Pattern, nm_mask, nm_mask_array


def reference(row: list[float], keep: int, group: int) -> list[bool]:
    """One row, group by group, by sorting: the plainest statement of the rule."""
    out: list[bool] = []
    for start in range(0, len(row), group):
        part = row[start : start + group]
        kept = keep if len(part) == group else -(-keep * len(part) // group)
        best = sorted(range(len(part)), key=lambda i: (-abs(part[i]), i))[:kept]
        out += [i in best for i in range(len(part))]
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    group = draw(st.integers(1, 20))
    keep = draw(st.integers(1, group))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 50))
    few = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0])  # many ties
    values = draw(st.lists(few, min_size=rows * columns, max_size=rows * columns))
    return np.array(values, np.float32).reshape(rows, columns), keep, group


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_the_plain_statement(case: tuple[np.ndarray, int, int]) -> None:
    weight, keep, group = case
    mask = nm_mask_array(weight, keep, group)
    assert mask.tolist() == [reference(row, keep, group) for row in weight.tolist()]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(0, 2**31),
)
def test_obeys_its_encoding(keep: int, group: int, shared: int, block: int, axis: int, seed: int) -> None:
    keep, group = sorted((keep, group))
    if shared > 1 and axis == 0:
        axis = 1  # a pattern is shared between outputs, which lie along axis 0
    shape = tuple(np.random.default_rng(seed).integers(1, 30, 3))
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    mask = nm_mask_array(weight, keep, group, axis, shared, block)
    assert violation(weight * mask, NM(keep, group, axis, shared, block)) == ""
    full = shape[axis] // (group * block) * group * block
    counts = np.moveaxis(mask, axis, -1)[..., :full].sum(-1)
    assert (counts == full // group * keep).all()


def test_shared_rows_carry_one_mask_and_blocks_live_together() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
    shared = nm_mask_array(weight, 2, 4, 1, shared=4)
    assert (shared[:4] == shared[0]).all()
    assert (shared[4:] == shared[4]).all()
    block = nm_mask_array(weight, 2, 4, 1, block=4).reshape(6, 8, 4)
    assert (block == block[..., :1]).all()


def test_sharing_sums_magnitudes() -> None:
    weight = np.array([[1.0, 0.0], [0.0, 3.0]], np.float32)
    assert nm_mask_array(weight, 1, 2, 1).tolist() == [[True, False], [False, True]]
    assert nm_mask_array(weight, 1, 2, 1, shared=2).tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize(("size", "kept"), [(4, 2), (5, 3), (6, 3), (7, 4)])
def test_a_ragged_tail_keeps_its_share_rounded_up(size: int, kept: int) -> None:
    weight = np.arange(1, size + 1, dtype=np.float32)[None]
    assert int(nm_mask_array(weight, 2, 4).sum()) == kept
    assert keep_in_tail(NM(2, 4, 1), size) in (1, 2)


def test_retained_magnitude_of_normal_weights() -> None:
    """The table of algorithms.md section 1.3: .745 at 2:4, .768 at 4:8, .782 at 8:16, .707 at 1:2."""
    weight = np.abs(np.random.default_rng(0).standard_normal((256, 256)))
    for keep, group, kept in ((1, 2, 0.707), (2, 4, 0.745), (4, 8, 0.768), (8, 16, 0.782)):
        assert (weight * nm_mask_array(weight, keep, group)).sum() / weight.sum() == pytest.approx(kept, abs=0.005)


def test_half_precision_and_wide_groups() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert int(nm_mask(weight, 3, 64).sum()) == 8 * 2 * 3


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4, 4, dtype=torch.int8), "fc.weight is torch.int8: masks are made on float weights"),
        (torch.tensor([[1.0, float("nan")]]), "fc.weight contains NaN"),
        (torch.tensor([[1.0, float("inf")]]), "fc.weight contains an infinity"),
        (torch.tensor(1.0), "fc.weight has rank 0, no axis -1"),
    ],
)
def test_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        nm_mask(weight, 2, 4, name="fc.weight")


@pytest.mark.parametrize(("keep", "group"), [(0, 4), (5, 4), (1, 65)])
def test_patterns_that_are_none(keep: int, group: int) -> None:
    with pytest.raises(InvalidInput, match="1 <= keep <= group <= 64"):
        Pattern(keep, group)
    with pytest.raises(InvalidInput, match="1 <= keep <= group <= 64"):
        nm_mask(torch.ones(4), keep, group)


def test_shared_and_block_are_positive() -> None:
    with pytest.raises(InvalidInput, match="at least 1"):
        nm_mask(torch.ones(4), 2, 4, shared=0)
