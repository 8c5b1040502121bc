"""What holds of every mask on any tensor: valid on its axes, full, deterministic, half precision, nothing silent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.ir.errors import InvalidInput
from bitwright.ir.patterns import share, violation
from bitwright.ir.types import NM, Encoding, Unstructured
from bitwright.passes.sparsity.masks import fixed_count_mask, mvue_mask, nm_mask, transposable_mask

Array = np.ndarray[Any, Any]
Tensor = torch.Tensor
Method = Literal["exact", "fast", "greedy", "two-approx"]
METHODS: tuple[Method, ...] = get_args(Method)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Mask:
    """A mask function as (weight, keep, group, axis) -> kept or values, and the encoding its result obeys."""

    make: Callable[[Tensor, int, int, int], Tensor]
    encoding: Callable[[int, int, int], Encoding]
    matrix: bool = False
    """Two axes only, and the pattern holds along both."""

    def applied(self, weight: Tensor, keep: int, group: int, axis: int) -> Tensor:
        """The masked values."""
        made = self.make(weight, keep, group, axis)
        return torch.where(made, weight, 0.0) if made.dtype == torch.bool else made


MASKS = {
    "nm": Mask(lambda w, k, g, a: nm_mask(w, k, g, a), lambda k, g, a: NM(k, g, a)),
    "nm-shared": Mask(lambda w, k, g, a: nm_mask(w, k, g, a, shared=4), lambda k, g, a: NM(k, g, a, 4)),
    "nm-block": Mask(lambda w, k, g, a: nm_mask(w, k, g, a, block=4), lambda k, g, a: NM(k, g, a, block=4)),
    "nm-both": Mask(
        lambda w, k, g, a: nm_mask(w, k, g, a, shared=4, block=2), lambda k, g, a: NM(k, g, a, shared=4, block=2)
    ),
    "fixed-count": Mask(lambda w, k, g, a: fixed_count_mask(w, k, g, a), lambda k, g, a: Unstructured(k, g, a)),
    "fixed-count-block": Mask(
        lambda w, k, g, a: fixed_count_mask(w, k, g, a, block=4), lambda k, g, a: Unstructured(k, g, a, 4)
    ),
    "mvue": Mask(lambda w, k, g, a: mvue_mask(w, k, g, a, generator()), lambda k, g, a: NM(k, g, a)),
    **{
        f"transposable-{m}": Mask(
            lambda w, k, g, a, m=m: transposable_mask(w, k, g, m),  # type: ignore[misc]
            lambda k, g, a: NM(k, g, 1, transposable=True), matrix=True,
        )
        for m in METHODS
    },
}  # fmt: skip
every = pytest.mark.parametrize("name", MASKS)
KINDS = ("normal", "ties", "zeros", "few", "wide")


def values(kind: str, shape: tuple[int, ...], seed: int) -> Array:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(shape)
    if kind == "ties":
        a = rng.integers(-2, 3, shape).astype(float)
    elif kind == "zeros":
        a = np.zeros(shape)
    elif kind == "few":  # groups with fewer non-zeros than keep
        a = a * (rng.random(shape) < 0.1)
    elif kind == "wide":
        a = a * 10.0 ** rng.integers(-30, 30, shape)
    return a.astype(np.float32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, tuple[int, ...], int, int, int, int]:
    """(kind of values, shape, axis, keep, group, seed); the last axis of 4 is not that of the pattern with sharing."""
    group = draw(st.integers(1, 12))
    keep = draw(st.integers(1, group))
    shape = tuple(draw(st.lists(st.integers(1, 26), min_size=2, max_size=3)))
    axis = draw(st.integers(0, len(shape) - 1))
    return draw(st.sampled_from(KINDS)), shape, axis, keep, group, draw(st.integers(0, 2**31))


@every
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_valid_full_and_repeatable(name: str, case: tuple[str, tuple[int, ...], int, int, int, int]) -> None:
    mask, (kind, shape, axis, keep, group, seed) = MASKS[name], case
    shape = shape[:2] if mask.matrix else shape
    axis = min(axis, len(shape) - 1)
    encoding = mask.encoding(keep, group, axis)
    block = getattr(encoding, "block", 1)
    if isinstance(encoding, Unstructured):
        group = min(group, -(-shape[axis] // block))
        keep = min(keep, group)
        encoding = mask.encoding(keep, group, axis)
    weight = torch.from_numpy(values(kind, shape, seed))
    before = weight.clone()
    made = mask.make(weight, keep, group, axis)
    assert made.shape == weight.shape
    assert torch.equal(weight, before)
    assert torch.equal(made, mask.make(weight, keep, group, axis))
    obeyed = made.numpy() if made.dtype == torch.bool else (made != 0).numpy()
    assert violation(obeyed, encoding) == ""  # the mask itself, not only the values it leaves
    if made.dtype == torch.bool and not mask.matrix:
        counts = np.moveaxis(obeyed, axis, -1)[..., ::block].sum(-1)
        full, tail = divmod(-(-shape[axis] // block), group)
        assert (counts == full * keep + share(keep, group, tail)).all()  # never less than allowed, zeros included


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_formats(name: str, dtype: torch.dtype) -> None:
    """Half precision gives what the same values in float32 give."""
    weight = torch.from_numpy(values("normal", (24, 16), 1)).to(dtype)
    mask = MASKS[name]
    made, wide = mask.make(weight, 2, 4, 1), mask.make(weight.float(), 2, 4, 1)
    if made.dtype == torch.bool:
        assert torch.equal(made, wide) or dtype == torch.float64
        assert not violation(made.numpy(), mask.encoding(2, 4, 1))
    else:
        assert made.dtype == dtype
        assert torch.equal(made != 0, wide != 0)


@every
def test_memory_order_does_not_matter(name: str) -> None:
    mask = MASKS[name]
    weight = torch.from_numpy(values("normal", (48, 32), 2))
    wanted = mask.make(weight, 2, 4, 1)
    strided = torch.empty(32, 96).t()[::2]
    strided.copy_(weight)
    assert not strided.is_contiguous()
    assert torch.equal(mask.make(strided, 2, 4, 1), wanted)
    flipped = weight.flip(0).flip(0)[:, :]
    assert torch.equal(mask.make(flipped, 2, 4, 1), wanted)


@every
@pytest.mark.parametrize(
    ("bad", "what"), [(float("nan"), "NaN"), (float("inf"), "an infinity"), (-float("inf"), "an infinity")]
)
def test_what_cannot_be_compared_is_refused_by_name(name: str, bad: float, what: str) -> None:
    weight = torch.ones(8, 8)
    weight[3, 5] = bad
    with pytest.raises(InvalidInput, match=f"(weight|values) contains {what}"):
        MASKS[name].make(weight, 2, 4, 1)


@every
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integers_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(InvalidInput, match="masks are made on float weights"):
        MASKS[name].make(torch.ones(8, 8).to(dtype), 2, 4, 1)


@every
@pytest.mark.parametrize(("keep", "group"), [(0, 4), (-1, 4), (5, 4), (0, 0), (1, 65)])
def test_patterns_that_are_none(name: str, keep: int, group: int) -> None:
    wide = name.startswith("fixed-count") and group == 65
    if wide:  # a fixed count has no such limit, but no run is longer than the axis
        with pytest.raises(InvalidInput, match="fewer than per=65"):
            MASKS[name].make(torch.ones(64, 64), keep, group, 1)
        return
    with pytest.raises(InvalidInput, match="<="):
        MASKS[name].make(torch.ones(64, 64), keep, group, 1)


def test_a_group_of_sixty_four_is_allowed() -> None:
    weight = torch.from_numpy(values("normal", (64, 64), 3))
    assert int(nm_mask(weight, 5, 64).sum()) == 5 * 64
    assert violation(transposable_mask(weight, 5, 64, "greedy").numpy(), NM(5, 64, 1, transposable=True)) == ""


@pytest.mark.parametrize("axis", [2, -3])
@pytest.mark.parametrize("name", ["nm", "fixed-count", "mvue"])
def test_an_axis_that_is_not_there(name: str, axis: int) -> None:
    with pytest.raises(InvalidInput, match=f"rank 2, no axis {axis}"):
        MASKS[name].make(torch.ones(4, 4), 2, 4, axis)


@pytest.mark.parametrize("name", ["nm", "fixed-count", "nm-block"])
def test_the_first_index_wins_ties(name: str) -> None:
    kept = MASKS[name].make(torch.full((3, 32), 0.5), 2, 4, 1)
    block = 4 if name == "nm-block" else 1
    assert kept.tolist() == [([True] * 2 * block + [False] * 2 * block) * (8 // block)] * 3


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 5), st.data())
def test_fixed_counts_are_the_largest_of_any_run(size: int, rows: int, data: st.DataObject) -> None:
    per = data.draw(st.integers(1, size))
    count = data.draw(st.integers(1, per))
    kind, seed = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(0, 2**31))
    weight = values(kind, (rows, size), seed)
    kept = fixed_count_mask(torch.from_numpy(weight), count, per).numpy()
    for row, mask in zip(weight, kept, strict=True):
        for start in range(0, size, per):
            run = np.abs(row[start : start + per])
            best = sorted(range(len(run)), key=lambda i: (-run[i], i))[: share(count, per, len(run))]
            assert np.flatnonzero(mask[start : start + per]).tolist() == sorted(best)


def test_fixed_counts_equal_nm_where_both_exist() -> None:
    weight = torch.from_numpy(values("ties", (16, 70, 3), 4))
    for keep, group, axis, block in ((2, 4, 1, 1), (3, 7, 0, 1), (1, 16, 1, 1), (2, 5, 1, 4)):
        same = fixed_count_mask(weight, keep, group, axis, block), nm_mask(weight, keep, group, axis, block=block)
        assert torch.equal(*same)


def test_pieces_do_not_show() -> None:
    """More elements than are ranked at a time, in rows longer than that."""
    weight = torch.randn(3, 1 << 19, generator=generator())
    kept = fixed_count_mask(weight, 1000, 1 << 19)
    for row, mask in zip(weight, kept, strict=True):
        assert torch.equal(row.abs().topk(1000).indices.sort().values, mask.nonzero().flatten())
    many = torch.randn(1 << 13, 100, generator=generator())
    assert torch.equal(fixed_count_mask(many, 7, 50)[4096:], fixed_count_mask(many[4096:], 7, 50))


@every
def test_empty_tensors(name: str) -> None:
    for shape in ((0, 8), (8, 0)):
        assert MASKS[name].make(torch.zeros(shape), 2, 4, 1).shape == shape


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**31))
def test_transposable_masks_hold_on_the_transpose(rows: int, columns: int, group: int, seed: int) -> None:
    keep = 1 + seed % group
    weight = torch.from_numpy(values(KINDS[seed % 5], (rows, columns), seed))
    for method in METHODS:
        kept = transposable_mask(weight, keep, group, method).numpy()
        for view in (kept, kept.T):
            assert violation(view, NM(keep, group, 1)) == ""
            assert violation(view, NM(keep, group, 0)) == ""
