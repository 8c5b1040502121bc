"""How many products fit a narrow register, against every choice of products and every extreme input."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from bitwright.ir.errors import InvalidInput
from bitwright.ir.partial_sums import Reach, safe_products


def brute(weights: np.ndarray, x_hi: int, bits: int) -> Reach:
    """Sums of every subset, every input at one end or the other."""
    top, length = 1 << (bits - 1), weights.shape[1]

    def sums(n: int) -> list[int]:
        rows = weights.tolist()
        return [x_hi * sum(v for v in part if v * sign > 0) for r in rows for part in combinations(r, n)
                for sign in (1, -1)]  # fmt: skip

    terms = next((n - 1 for n in range(1, length + 1) if not all(-top <= s < top for s in sums(n))), length)
    return Reach(terms, max([0, *sums(min(2, length))], key=abs))


@pytest.mark.parametrize("bits", [6, 8, 9])
@pytest.mark.parametrize("x_hi", [1, 3, 15])
def test_exact_from_both_sides(bits: int, x_hi: int) -> None:
    rng = np.random.default_rng(bits * x_hi)
    seen = set()
    for _ in range(60):
        hi = int(rng.integers(1, 9))
        weights = rng.integers(-hi, hi + 1, (int(rng.integers(1, 4)), int(rng.integers(1, 6)))).astype(np.int8)
        got, want = safe_products(weights, x_hi, bits), brute(weights, x_hi, bits)
        assert got.terms == want.terms
        assert abs(got.pair) == abs(want.pair)
        seen.add(got.terms)
    assert len(seen) > 2


def test_known_cases() -> None:
    full = np.full((1, 300), 127, np.int8)
    assert safe_products(full, 255, 16) == (1, 64770)
    assert safe_products(-full, 255, 16) == (1, -64770)
    assert safe_products(np.full((1, 300), -128, np.int8), 1, 16) == (256, -256)
    assert safe_products(np.full((1, 300), 7, np.int8), 255, 16) == (18, 3570)
    assert safe_products(np.full((1, 300), -8, np.int8), 255, 16) == (16, -4080)
    assert safe_products(np.full((1, 300), 1, np.int8), 255, 16) == (128, 510)
    spread = np.zeros((2, 3000), np.int8)
    spread[1, ::24] = 1
    assert safe_products(spread, 255, 16).terms == 3000, "125 ones fit, wherever they are"
    assert safe_products(np.zeros((0, 7), np.int8), 255, 16) == (7, 0)


@pytest.mark.parametrize(
    ("weights", "x_hi", "bits", "why"),
    [
        (np.zeros(3, np.int8), 255, 16, "array"), (np.zeros((1, 3), np.float32), 255, 16, "float32"),
        (np.zeros((1, 3), np.int8), 0, 16, "1 to 65535"), (np.zeros((1, 3), np.int8), 255, 0, "1 to 32 bits"),
    ],
)  # fmt: skip
def test_bad_input(weights: np.ndarray, x_hi: int, bits: int, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        safe_products(weights, x_hi, bits)
