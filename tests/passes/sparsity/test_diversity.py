"""How many masks a pattern admits (algorithms.md 1.4) and the pattern of a density (1.5)."""

from __future__ import annotations

import itertools
import math

import pytest

from bitwright.ir.errors import InvalidInput
from bitwright.passes.sparsity.masks import mask_diversity, pattern_from_density


@pytest.mark.parametrize(
    ("size", "keep", "exact", "paper"),
    [
        (2, 1, 2, 2),
        (4, 1, 24, 24),
        (4, 2, 90, 144),
        (8, 2, 187_530_840, 203_212_800),
        (8, 4, 116_963_796_250, 17_557_585_920_000),
    ],
)
def test_transposable_counts(size: int, keep: int, exact: int, paper: int) -> None:
    assert mask_diversity((size, size), keep, size, transposable=True) == exact
    assert mask_diversity((size, size), keep, size, True, "paper") == paper


def test_counts_on_an_8_by_8_tensor() -> None:
    shape = (8, 8)
    assert mask_diversity((64,), 32, 64) == math.comb(64, 32)
    assert mask_diversity(shape, 4, 8) == 70**8
    assert mask_diversity(shape, 2, 4) == 6**16
    assert mask_diversity(shape, 1, 2) == 2**32
    assert mask_diversity(shape, 2, 4, True, "paper") == 144**4
    assert mask_diversity(shape, 2, 4, True) == 90**4
    assert mask_diversity(shape, 1, 2, True) == mask_diversity(shape, 1, 2, True, "paper") == 65_536
    assert mask_diversity((16, 16), 8, 16, True) == pytest.approx(3.481e55, rel=1e-3)
    assert mask_diversity((16, 16), 8, 16, True, "paper") == pytest.approx(3.74e74, rel=1e-2)
    by_formula, by_count = mask_diversity(shape, 4, 8, True, "paper"), mask_diversity(shape, 4, 8, True)
    assert by_formula > mask_diversity(shape, 2, 4) > by_count


@pytest.mark.parametrize(("size", "keep"), [(3, 1), (3, 2), (4, 3), (4, 4), (5, 2)])
def test_equals_enumeration(size: int, keep: int) -> None:
    rows = list(itertools.combinations(range(size), keep))
    count = sum(
        all(sum(j in r for r in m) == keep for j in range(size)) for m in itertools.product(rows, repeat=size)
    )  # fmt: skip
    assert mask_diversity((size, size), keep, size, transposable=True) == count


def test_a_ragged_row_and_leading_axes() -> None:
    assert mask_diversity((3, 2, 6), 2, 4) == (6 * 2) ** 6


@pytest.mark.parametrize(
    ("shape", "keep", "group", "transposable", "formula", "why"),
    [
        ((8, 6), 2, 4, True, "exact", "is not tiled by 4x4 blocks"),
        ((8,), 2, 4, True, "exact", "is not tiled by 4x4 blocks"),
        ((), 2, 4, False, "exact", "a shape has positive sizes"),
        ((4, 4), 5, 4, False, "exact", "1 <= keep <= group"),
        ((64, 64), 32, 64, True, "exact", "takes too long"),
        ((4, 4), 2, 4, False, "approx", "formula is exact or paper"),
    ],
)
def test_diversity_refuses(
    shape: tuple[int, ...], keep: int, group: int, transposable: bool, formula: str, why: str
) -> None:
    with pytest.raises(InvalidInput, match=why):
        mask_diversity(shape, keep, group, transposable, formula)  # type: ignore[arg-type]


def test_pattern_from_density_follows_the_binomial_tail() -> None:
    eight = {0.5: 6, 0.6: 5, 0.7: 5, 0.75: 4, 0.8: 4, 0.85: 3, 0.9: 2, 0.0: 8, 1.0: 1}
    assert {p: pattern_from_density(p, 8) for p in eight} == eight
    four = {0.6: 3, 0.75: 3, 0.8: 2, 0.95: 1}
    assert {p: pattern_from_density(p, 4) for p in four} == four


@pytest.mark.parametrize("zeros", [-0.1, 1.1, float("nan")])
def test_pattern_from_density_refuses(zeros: float) -> None:
    with pytest.raises(InvalidInput, match="between 0 and 1"):
        pattern_from_density(zeros, 8)
    with pytest.raises(InvalidInput, match="at least one"):
        pattern_from_density(0.5, 0)
