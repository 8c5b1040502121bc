"""Bounds are exact from both sides: equal to enumeration, never only at least as large."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import chain, combinations, product
from typing import Any

import numpy as np
import pytest
import torch

from bitwright.ir.errors import InvalidInput
from bitwright.ir.numerics import (
    a2q_cap,
    a2q_plus_cap,
    accumulator_bits,
    accumulator_range,
    bits_for,
    kept_terms,
    prefix_range,
    round_small_float,
    safe_terms,
    small_float_dot,
    small_float_range,
    type_bound,
    witness,
)
from bitwright.ir.patterns import violation
from bitwright.ir.types import BIPOLAR, NM, TERNARY, DType, integer

SMALL = [integer(n, s) for n in (1, 2, 3, 4) for s in (True, False)] + [TERNARY, BIPOLAR]
Pair = tuple[int, int]
Format = tuple[int, int, int]


def brute_bits(lo: int, hi: int) -> int:
    return next(n for n in range(1, 200) if -(2 ** (n - 1)) <= lo and hi < 2 ** (n - 1))


def values(t: DType) -> list[int]:
    return [-1, 1] if t == BIPOLAR else list(range(t.lo, t.hi + 1))


@pytest.mark.parametrize("x", SMALL, ids=str)
def test_type_bounds_equal_enumeration(x: DType) -> None:
    for w in SMALL:
        products = {a * b for a in values(x) for b in values(w)}
        sums, seen = {0}, {0}
        for terms in range(1, 6):
            sums = {s + p for s in sums for p in products}
            seen |= sums
            bound = type_bound(x.lo, x.hi, w.lo, w.hi, terms)
            assert bound == (min(sums), max(sums))
            assert bits_for(*bound) == brute_bits(min(sums), max(sums))
            saturating = type_bound(x.lo, x.hi, w.lo, w.hi, terms, register="saturate")
            assert saturating == (min(seen), max(seen))


def test_bits() -> None:
    for lo in range(-70, 70):
        for hi in range(lo, 70):
            assert bits_for(lo, hi) == brute_bits(lo, hi)
    for n in (31, 63, 64, 100):
        assert bits_for(-(2 ** (n - 1)), 2 ** (n - 1) - 1) == n
        assert bits_for(0, 2 ** (n - 1)) == n + 1


def test_the_signed_corner_that_finn_missed() -> None:
    bound = type_bound(-8, 7, -128, 127, 64)
    assert (bound, bits_for(*bound)) == ((-65024, 65536), 18)
    assert type_bound(-8, 7, -8, 7, 1) == (-56, 64)


WIDTHS = {9: (20, 19, 12), 64: (22, 22, 14), 576: (26, 25, 18), 1152: (27, 26, 19), 4608: (29, 28, 21)}
"""Terms: W8 A8 unsigned, W8 A8 signed, W4 A4 unsigned. The formula of A2Q (log2 of rounded-up magnitudes) gives one bit
more than needed for 64 terms with unsigned inputs, 23 and 15; elsewhere it is the same."""


@pytest.mark.parametrize("terms", WIDTHS)
def test_width_table(terms: int) -> None:
    sides = ((0, 255, -128, 127), (-128, 127, -128, 127), (0, 15, -8, 7))
    assert tuple(bits_for(*type_bound(*s, terms)) for s in sides) == WIDTHS[terms]
    formula = []
    for n, m, signed in ((8, 8, 0), (8, 8, 1), (4, 4, 0)):
        a = math.log2(terms) + n + m - 1 - signed
        formula.append(math.ceil(a + math.log2(1 + 2**-a) + 1))
    assert formula == ([23, 22, 15] if terms == 64 else list(WIDTHS[terms]))


def outcomes(row: list[int], lo: list[int], hi: list[int], x_zero: int, w_zero: int) -> tuple[Pair, Pair]:
    """By enumeration of all inputs: the range of final sums, and that of the sums of all subsets of terms."""
    final, partial = [], [0]
    ranges = [range(a, b + 1) for a, b in zip(lo, hi, strict=True)]
    for x in product(*ranges):
        terms = [(v - x_zero) * (w - w_zero) for v, w in zip(x, row, strict=True)]
        final.append(sum(terms))
        partial += [sum(c) for c in chain.from_iterable(combinations(terms, n) for n in range(len(terms) + 1))]
    return (min(final), max(final)), (min(partial), max(partial))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_ranges_of_known_weights_equal_enumeration(k: int) -> None:
    rng = np.random.default_rng(k)
    for per_input, zeros in product((False, True), ((0, 0), (1, 0), (2, -1))):
        w = rng.integers(-8, 8, (3, k)).astype(np.int8)
        lo = rng.integers(-3, 2, k)
        hi = lo + rng.integers(0, 3, k)
        x_lo, x_hi = (lo, hi) if per_input else (int(lo[0]), int(hi[0]))
        lo_k, hi_k = (np.broadcast_to(b, k).tolist() for b in (x_lo, x_hi))
        named = {"x_zero": zeros[0], "w_zero": zeros[1]}
        found = [outcomes(row, lo_k, hi_k, *zeros) for row in w.tolist()]
        final, partial = accumulator_range(w, x_lo, x_hi, **named), prefix_range(w, x_lo, x_hi, **named)
        assert list(zip(*final, strict=True)) == [f for f, _ in found]
        assert list(zip(*partial, strict=True)) == [p for _, p in found]
        assert all(type(v) is int for v in chain(*final, *partial))
        for register, which in (("wrap", 0), ("saturate", 1)):
            want = brute_bits(min(f[which][0] for f in found), max(f[which][1] for f in found))
            assert accumulator_bits(w, x_lo, x_hi, register=register, **named) == want  # type: ignore[arg-type]
        for i, row in enumerate(w):
            at = witness(row, x_lo, x_hi, w_zero=zeros[1])
            for x, want in zip(at, reversed(found[i][0]), strict=True):
                assert all(a <= v <= b for a, v, b in zip(lo_k, x, hi_k, strict=True))
                assert sum((v - zeros[0]) * (int(q) - zeros[1]) for v, q in zip(x, row, strict=True)) == want


@pytest.mark.parametrize("bits", [8, 31, 62, 63, 64])
@pytest.mark.parametrize("signed", [True, False])
def test_wide_values_stay_exact(bits: int, signed: bool) -> None:
    t = integer(bits, signed)
    w = np.array([[t.lo, t.hi, 1, t.hi], [t.hi] * 4], t.numpy)
    for x_lo, x_hi in ((0, 255), (-(2**63), 2**64), ([0, -1, 2**62, 5], [2**63, 0, 2**62 + 1, 5])):
        lo, hi = (np.broadcast_to(np.array(b, object), 4).tolist() for b in (x_lo, x_hi))
        ends = [[(int(v) * a, int(v) * b) for v, a, b in zip(row, lo, hi, strict=True)] for row in w]
        want = [sum(map(min, row)) for row in ends], [sum(map(max, row)) for row in ends]
        assert accumulator_range(w, x_lo, x_hi) == want
        assert accumulator_range(w.tolist(), x_lo, x_hi) == want


def test_many_rows_and_tensors() -> None:
    w = np.random.default_rng(0).integers(-128, 128, (3000, 600)).astype(np.int8)
    x_lo, x_hi = -128, 127
    ends = np.stack([w.astype(np.int64) * x_lo, w.astype(np.int64) * x_hi])
    want = ends.min(0).sum(1).tolist(), ends.max(0).sum(1).tolist()
    assert accumulator_range(torch.from_numpy(w), x_lo, x_hi) == want
    assert accumulator_range(w, [x_lo] * 600, [x_hi] * 600) == want
    assert accumulator_range(w[:0], 0, 1) == ([], [])
    assert accumulator_range(w[:2, :0], 0, 1) == ([0, 0], [0, 0])


@pytest.mark.parametrize("pattern", [NM(2, 4, 1), NM(1, 4, 1), NM(1, 2, 1, block=2), NM(3, 4, 1)])
def test_kept_terms_are_what_a_pattern_allows(pattern: NM) -> None:
    for k in range(1, 10):
        rows = np.array(list(product((0, 1), repeat=k)))
        allowed = max(int(r.sum()) for r in rows if not violation(r[None], pattern))
        assert kept_terms(k, pattern) == allowed


def test_safe_terms_are_the_last_that_fit() -> None:
    for x, w in product(SMALL, SMALL):
        for bits in (4, 8, 12):
            n = safe_terms(bits, x.lo, x.hi, w.lo, w.hi)
            assert n is not None
            assert bits_for(*type_bound(x.lo, x.hi, w.lo, w.hi, n, register="saturate")) <= bits
            assert bits_for(*type_bound(x.lo, x.hi, w.lo, w.hi, n + 1, register="saturate")) > bits
    assert safe_terms(16, 0, 255, -128, 127) == 1  # the plain AVX2 u8 x s8 instruction adds two


CAPS = [(12, 4, 127.9, 272.9), (16, 4, 2047.9, 4368.9), (16, 8, 128.0, 257.0)]


@pytest.mark.parametrize(("p", "n", "a2q", "plus"), CAPS)
def test_caps_of_the_papers(p: int, n: int, a2q: float, plus: float) -> None:
    assert a2q_cap(p, n, False) == pytest.approx(a2q, abs=0.05)
    assert a2q_plus_cap(p, n) == pytest.approx(plus, abs=0.05)
    assert a2q_cap(p, n, True) == 2 * a2q_cap(p, n, False)


def test_a_cap_is_never_rounded_up() -> None:
    for p, n in product((1, 2, 16, 54, 63, 64), (1, 3, 8, 53, 64)):
        assert Fraction(a2q_cap(p, n, False)) <= Fraction(2 ** (p - 1) - 1, 2**n)
        assert Fraction(a2q_plus_cap(p, n)) <= Fraction(2**p - 2, 2**n - 1)


@pytest.mark.parametrize(("p", "n"), [(8, 2), (10, 4), (12, 4), (16, 8)])
def test_capped_rows_fit_in_any_order(p: int, n: int) -> None:
    rng = np.random.default_rng(p)
    half = int(a2q_plus_cap(p, n)) // 2  # zero-sum rows: each half of the norm on one sign
    rows = np.zeros((500, 16), np.int64)
    for row in rows:
        cut = rng.integers(1, 16)
        for part, sign in ((row[:cut], 1), (row[cut:], -1)):
            part += sign * rng.multinomial(half, rng.dirichlet(np.ones(len(part))))
    assert not rows.sum(1).any()
    assert accumulator_bits(rows, 0, 2**n - 1) <= p
    assert accumulator_bits([[half + 1, -half - 1]], 0, 2**n - 1) > p
    norm = int(a2q_cap(p, n, True))
    signed = rng.choice((-1, 1), (500, 16)) * rng.multinomial(norm, np.ones(16) / 16, 500)
    assert accumulator_bits(signed, -(2 ** (n - 1)), 2 ** (n - 1) - 1) <= p
    assert accumulator_bits([[-norm - 1]], -(2 ** (n - 1)), 2 ** (n - 1) - 1) > p
    assert accumulator_bits(signed // 2, 0, 2**n - 1) <= p


HALF: Any = 0.5
BAD: list[Any] = [
    lambda: bits_for(1, 0), lambda: bits_for(HALF, 1), lambda: type_bound(1, 0, 0, 1, 2),
    lambda: type_bound(0, 1, 0, 1, -1),
    lambda: type_bound(0, 1, 2, 1, 2), lambda: accumulator_range(np.ones((2, 2)), 0, 1),
    lambda: accumulator_range([[1.5]], 0, 1), lambda: accumulator_range(np.ones((2, 2), bool), 0, 1),
    lambda: accumulator_range([1, 2], 0, 1), lambda: accumulator_range([[1], [2, 3]], 0, 1),
    lambda: accumulator_range([[1]], 2, 1), lambda: accumulator_range([[1, 2]], [0, 2], [1, 1]),
    lambda: accumulator_range([[1, 2]], [0], [1]), lambda: accumulator_range([[1]], HALF, 1),
    lambda: accumulator_range([[1]], None, 1), lambda: accumulator_bits([[1]], 0, 1, register="round"),  # type: ignore
    lambda: a2q_cap(0, 8, True), lambda: a2q_cap(65, 8, True), lambda: a2q_plus_cap(16, 0),
    lambda: a2q_plus_cap(16, 65),
    lambda: safe_terms(0, 0, 1, 0, 1), lambda: safe_terms(65, 0, 1, 0, 1), lambda: witness([0.5], 0, 1),
    lambda: round_small_float(float("nan"), 4, 7, 10), lambda: round_small_float(1.0, 0, 7, 10),
    lambda: round_small_float(1.0, 4, 60, 10), lambda: round_small_float(1.0, 4, 7, 10, "up"),  # type: ignore[arg-type]
    lambda: round_small_float("x", 4, 7, 10), lambda: small_float_dot([1.0], [1.0, 2.0], (4, 7, 12), (4, 7, 10)),
    lambda: small_float_dot([1.0], [1.0], (4, 7, 12), (4, 7, 10), chunk=0),
    lambda: small_float_dot(np.ones((2, 3)), np.ones((3, 3)), (4, 7, 12), (4, 7, 10)),
]  # fmt: skip


@pytest.mark.parametrize("call", BAD)
def test_bad_input(call: Any) -> None:
    with pytest.raises(InvalidInput):
        call()


# --- small floats --------------------------------------------------------------------------------------------

PRODUCT, SUM = (4, 7, 12), (4, 7, 10)
FORMATS = [PRODUCT, SUM, (5, 10, 16), (5, 6, 16), (4, 3, 7), (3, 2, 3), (8, 7, 127), (2, 0, 1)]


def exact_round(x: Fraction, f: Format, rounding: str) -> Fraction:
    """One value by the definition, in rationals."""
    e, m, b = f
    size = abs(x)
    if size < Fraction(2) ** -b:
        return Fraction(0)
    top = next(
        t
        for t in range(max(-b, size.numerator.bit_length() - size.denominator.bit_length() - 1), 2000)
        if size < Fraction(2) ** (t + 1)
    )
    unit = Fraction(2) ** (top - m)
    count = size // unit if rounding == "floor" or not m else Fraction(round(size / unit))
    largest = Fraction(2) ** (2**e - b - 1) * (2 - Fraction(1, 2**m))
    result: Fraction = min(count * unit, largest)
    return result if x > 0 else -result


def exact_dot(x: Any, w: Any, p: Format, a: Format, chunk: int, rounding: str) -> Fraction:
    total = Fraction(0)
    for first in range(0, len(x), chunk):
        inner = Fraction(0)
        for u, v in zip(x[first : first + chunk], w[first : first + chunk], strict=True):
            inner = exact_round(inner + exact_round(Fraction(float(u)) * Fraction(float(v)), p, rounding), a, rounding)
        total = exact_round(total + inner, a, rounding)
    return total


def samples(f: Format) -> np.ndarray[Any, Any]:
    """Random magnitudes over the whole range, all short mantissas, and the neighbours of every edge."""
    e, _, b = f
    rng = np.random.default_rng(0)
    top = 2**e - b
    wide = rng.uniform(1, 2, 2000) * 2.0 ** rng.integers(-b - 2, min(top + 2, 1000), 2000)
    steps = np.outer(1 + np.arange(64) / 64, 2.0 ** np.arange(-b - 1, min(top + 1, -b + 12))).ravel()
    a = np.concatenate([wide, steps, [0.0, 2.0**-b, *small_float_range(*f)]])
    a = np.concatenate([a, np.nextafter(a, 0), np.nextafter(a, np.inf)])
    return np.concatenate([a, -a])


def test_endpoints() -> None:
    assert small_float_range(*SUM) == (2.0**-10, 63.75)
    assert small_float_range(*PRODUCT) == (2.0**-12, 15.9375)
    got = round_small_float([2.0**-10, np.nextafter(2.0**-10, 0), 63.75, 63.99, 64.0, np.inf, -np.inf], *SUM)
    assert got.tolist() == [2.0**-10, 0.0, 63.75, 63.75, 63.75, 63.75, -63.75]
    assert round_small_float(-(2.0**-11), *SUM) == 0
    assert not np.signbit(round_small_float([-0.0, -1e-9], *SUM)).any()


@pytest.mark.parametrize("rounding", ["floor", "nearest"])
@pytest.mark.parametrize("f", FORMATS, ids=str)
def test_rounding_follows_the_definition(f: Format, rounding: Any) -> None:
    a = samples(f) if f[1] or rounding == "floor" else np.array([0.0, 1.0, -2.0])
    q = round_small_float(a, *f, rounding)
    some = slice(None, None, 5)
    assert [Fraction(v) for v in q[some].tolist()] == [exact_round(Fraction(v), f, rounding) for v in a[some].tolist()]
    np.testing.assert_array_equal(round_small_float(q, *f, rounding), q)
    np.testing.assert_array_equal(round_small_float(-a, *f, rounding), -q)
    assert (np.diff(q[np.argsort(a)]) >= 0).all()
    if rounding == "floor":
        assert (np.abs(q) <= np.abs(a)).all()


def test_kinds_of_arrays() -> None:
    for dtype, want in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        q = round_small_float(torch.tensor([1.999, 2.0**-20], dtype=dtype), *SUM)
        assert q.dtype == want
        assert q[1] == 0
    assert round_small_float(np.array([1.7], np.float32), *SUM).dtype == np.float32
    assert round_small_float(np.array([1.7], np.float32), 10, 30, 511).dtype == np.float64
    x, w = torch.randn(3, 20), torch.randn(5, 20)
    both = small_float_dot(x[:, None], w, PRODUCT, SUM)
    assert both.shape == (3, 5)
    np.testing.assert_array_equal(both.numpy(), small_float_dot(x.numpy()[:, None], w.numpy(), PRODUCT, SUM))
    assert both[1, 2] == small_float_dot(x[1], w[2], PRODUCT, SUM)
    assert small_float_dot(x[:, :0], w[:3, :0], PRODUCT, SUM).tolist() == [0, 0, 0]


@pytest.mark.parametrize("rounding", ["floor", "nearest"])
@pytest.mark.parametrize("f", [(PRODUCT, SUM), ((5, 10, 16), (5, 10, 16)), ((4, 3, 9), (4, 3, 7)), ((8, 7, 127),) * 2,
                               ((10, 40, 500),) * 2], ids=str)  # fmt: skip
def test_dot_follows_the_definition(f: tuple[Format, Format], rounding: Any) -> None:
    rng = np.random.default_rng(0)
    near = rng.standard_normal((40, 37))
    far = near * 2.0 ** rng.integers(-45, 20, near.shape)  # sums that f64 cannot hold
    powers = np.sign(near) * 2.0 ** rng.integers(-30, 5, near.shape)  # borrows across powers of two
    for x in (near, near.astype(np.float32), far, powers):
        w = x[::-1].copy()
        for chunk in (1, 16, 100):
            got = small_float_dot(x, w, *f, chunk, rounding)
            for i in range(0, 40, 13):
                want = exact_dot(x[i], w[i], *f, chunk, rounding)
                assert Fraction(float(got[i])) == want


def test_infinite_factors_saturate() -> None:
    assert small_float_dot([np.inf, 1.0], [0.0, 1.0], PRODUCT, SUM) == 1.0
    assert small_float_dot([1e300, 1e-300], [1e300, 1e-300], PRODUCT, SUM) == 15.9375


ERRORS = {  # terms: M10E5, M7E4 floor, M7E4 nearest, M7E4 in one chunk, M6E5
    64: (0.0025, 0.0197, 0.0049, 0.051, 0.039),
    576: (0.0081, 0.062, 0.0084, 0.342, 0.119),
    2304: (0.029, 0.200, 0.015, 0.740, 0.352),
}


@pytest.mark.parametrize("k", ERRORS)
def test_error_table(k: int) -> None:
    rng = np.random.default_rng(k)
    x = np.maximum(rng.standard_normal((2000, k)), 0).astype(np.float32)
    w = (rng.standard_normal((2000, k)) * math.sqrt(2 / k)).astype(np.float32)
    want = (x.astype(np.float64) * w).sum(1)

    def error(p: Format, a: Format, chunk: int = 16, rounding: Any = "floor") -> float:
        got = small_float_dot(x, w, p, a, chunk, rounding).astype(np.float64)
        return math.sqrt(float(((got - want) ** 2).mean() / (want**2).mean()))

    got = (
        error((5, 10, 16), (5, 10, 16)), error(PRODUCT, SUM), error(PRODUCT, SUM, rounding="nearest"),
        error(PRODUCT, SUM, chunk=k), error((5, 6, 16), (5, 6, 16)),
    )  # fmt: skip
    assert got == pytest.approx(ERRORS[k], rel=0.08)
    assert got[0] < got[1] < got[4]
    assert 2.3 <= got[3] / got[1] <= 5.9
