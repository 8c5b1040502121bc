"""Budgets and projections behind constrain-weights: exact from both sides, on all small cases."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from bitwright.ir.errors import InvalidInput
from bitwright.ir.numerics import bits_for, type_bound
from bitwright.passes.accumulators._a2q import (
    FACTORS,
    Inputs,
    Limit,
    Shrink,
    coarsest,
    fit,
    inner_bits,
    limit_of,
    tiled,
)
from bitwright.passes.accumulators._axe import greedy
from bitwright.passes.accumulators.a2q import A2QWeight

RNG = np.random.default_rng(5)
INPUTS = [Inputs(0, 255, 0), Inputs(0, 255, 97), Inputs(-128, 127, 0), Inputs(-128, 127, -128), Inputs(0, 15, 15)]


def register_extremes(row: list[int], x: Inputs) -> tuple[int, int]:
    """All values any register can hold: every subset of the terms, every way to sum, by enumeration."""
    found = {0}
    for start, zero in ((0, x.zero), (0, 0), (-x.zero * sum(row), 0)):
        choices = [{0, (x.lo - zero) * w, (x.hi - zero) * w} for w in row]
        found |= {start + sum(c) for c in product(*choices)}
    return min(found), max(found)


@pytest.mark.parametrize("x", [Inputs(0, 3, 0), Inputs(0, 3, 2), Inputs(-2, 1, 0), Inputs(-2, 1, -1), Inputs(0, 3, 3)])
def test_the_width_of_a_row_is_what_enumeration_finds(x: Inputs) -> None:
    rows = list(product(range(-2, 3), repeat=3))
    got = inner_bits(np.array(rows), x)
    assert got.tolist() == [bits_for(*register_extremes(list(r), x)) for r in rows]


def test_tiles_count_alone() -> None:
    rows = np.array([[1, 1, 1, -1, -1, 0, 2]])
    assert tiled(rows, 3).tolist() == [[[1, 1, 1], [-1, -1, 0], [2, 0, 0]]]
    assert tiled(rows, 0).shape == (1, 1, 7)
    assert inner_bits(rows, Inputs(0, 255, 0), 3).tolist() == [bits_for(-510, 765)]


@pytest.mark.parametrize("x", INPUTS)
@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("method", ["a2q", "a2q+"])
def test_every_row_within_the_limit_fits_and_the_cap_is_tight(x: Inputs, bits: int, method: str) -> None:
    limit = limit_of(bits, x, method)
    if limit.radius < 1:
        pytest.skip("nothing fits")
    whole = int(limit.radius)
    rows = []
    for _ in range(300):
        up, down = (RNG.multinomial(whole, RNG.dirichlet(np.ones(6))) for _ in range(2))
        share = 1 if limit.halves else int(RNG.integers(2))
        rows.append(np.concatenate([up * (share | limit.halves), -down * (limit.halves or not share)]))
    assert int(inner_bits(np.array(rows), x).max()) <= bits
    if limit.halves:
        one_more = np.array([[whole + 1, -(whole + 1)]])
        assert int(inner_bits(one_more, x)[0]) > bits or type_bound(x.lo, x.hi, 0, 1, 1)[1] < x.spread


def test_the_projection_is_the_nearest_row_of_sum_zero() -> None:
    for _ in range(50):
        v = RNG.normal(size=(1, 7)) * 4
        v -= v.mean()
        limit = Limit(3.0, halves=True)
        p = Shrink(v, limit).project(np.ones(1))
        assert np.maximum(p, 0).sum() <= 3 + 1e-9
        assert np.maximum(-p, 0).sum() <= 3 + 1e-9
        if np.abs(v).sum() > 6:
            assert abs(p.sum()) < 1e-9
        for _ in range(100):  # no other row of that kind is nearer
            other = RNG.normal(size=(1, 7))
            other -= other.mean()
            other *= min(1.0, 6 / np.abs(other).sum()) * RNG.uniform()
            mixed = p + 0.1 * (other - p)
            assert np.square(v - p).sum() <= np.square(v - mixed).sum() + 1e-9


def test_the_l1_ball_alone_would_overflow() -> None:
    """Centred and on the ball of the A2Q+ cap, but no longer centred: twice what a half may be."""
    v = np.array([[3.0, -1, -1, -1]])
    on_ball = Shrink(v, Limit(2.0, halves=False)).project(np.ones(1))
    np.testing.assert_allclose(on_ball, [[2, 0, 0, 0]])
    by_halves = Shrink(v, Limit(1.0, halves=True)).project(np.ones(1))
    np.testing.assert_allclose(by_halves, [[1, -1 / 3, -1 / 3, -1 / 3]])


def test_rows_inside_stay_and_factors_scale() -> None:
    v = RNG.normal(size=(5, 9))
    inside = Shrink(v, Limit(1e3, halves=True)).project(np.full(5, 2.0))
    np.testing.assert_allclose(inside, v / 2)
    a = Shrink(v * 4, Limit(2.0, halves=False)).project(np.full(5, 4.0))
    b = Shrink(v, Limit(2.0, halves=False)).project(np.ones(5))
    np.testing.assert_allclose(a, b)


def test_fit_searches_the_scale_and_keeps_zeros() -> None:
    codes = RNG.integers(-127, 128, (40, 96)).astype(float)
    kept = RNG.random(codes.shape) < 0.5
    codes[~kept] = 0
    limit = limit_of(16, Inputs(0, 255, 30), "a2q+")
    kinds = {"keep": (FACTORS[:1], False), "coarse": (FACTORS, False), "refit": (FACTORS, True)}
    errors = {}
    for name, (factors, refit) in kinds.items():
        found = fit(codes, kept, limit, factors, centre=True, refit=refit)
        assert not found.rows[~kept].any()
        assert int(inner_bits(found.rows, Inputs(0, 255, 30)).max()) <= 16
        errors[name] = float(np.square(found.rows * found.factor[:, None] - codes).sum())
    assert errors["keep"] > errors["coarse"] > errors["refit"]
    shared = fit(codes, kept, limit, FACTORS, centre=True, shared=True)
    assert len(set(shared.factor.tolist())) == len(set(shared.divisor.tolist())) == 1


@pytest.mark.parametrize("order", ["gptq", "gpfq"])
@pytest.mark.parametrize("tile", [0, 16, 50])
def test_greedy_rounding_stays_in_its_budgets_and_beats_rounding(order: str, tile: int) -> None:
    x = RNG.normal(size=(400, 140)) @ RNG.normal(size=(140, 140)) + 2
    gram = torch.from_numpy(x.T @ x)[None]
    rows = RNG.normal(size=(1, 12, 140)) * 6
    kept = RNG.random(rows.shape) < 0.7
    rows[~kept] = 0
    limit = Limit(200.4 if not tile else 3.0 * tile, halves=True, tile=tile)
    q = greedy(torch.from_numpy(rows), torch.from_numpy(kept), gram, limit, order).numpy()  # type: ignore[arg-type]
    assert (q == np.round(q)).all()
    assert not q[~kept].any()
    parts = tiled(q[0], tile)
    assert np.maximum(parts, 0).sum(-1).max() <= limit.radius
    assert np.maximum(-parts, 0).sum(-1).max() <= limit.radius
    plain = np.trunc(Shrink(rows[0], limit).project(np.ones(12)))
    missed = [float((((w - rows[0]) @ gram[0].numpy()) * (w - rows[0])).sum()) for w in (q[0], plain)]
    assert missed[0] < 0.7 * missed[1]


def test_greedy_survives_inputs_that_are_zero_or_alike() -> None:
    x = RNG.normal(size=(30, 1)) * np.array([[1.0, 1, 0, 0, 1]])
    gram = torch.from_numpy(x.T @ x)[None]
    rows = torch.from_numpy(RNG.normal(size=(1, 3, 5)) * 5)
    for order in ("gptq", "gpfq"):
        q = greedy(rows, torch.ones(1, 3, 5, dtype=torch.bool), gram, Limit(20.0, True), order)
        assert bool(q.isfinite().all())


def test_coarse_codes_are_found_again() -> None:
    few = RNG.integers(-37, 38, (6, 80))
    few[:, 0], few[0] = 37, 0
    codes = np.rint(few * 127 / np.maximum(np.abs(few).max(1, keepdims=True), 1))
    rows, factor = coarsest(codes)
    np.testing.assert_array_equal(rows, few)
    np.testing.assert_allclose(factor[1:], 127 / 37)
    dense = RNG.integers(-127, 128, (5, 300))
    rows, factor = coarsest(dense.astype(float))
    np.testing.assert_array_equal(rows, dense)
    assert (factor == 1).all()


@pytest.mark.parametrize(("bits", "weight_bits", "input_bits"), [(12, 4, 4), (14, 8, 8), (16, 8, 8), (16, 4, 4)])
def test_trained_weights_hold_their_cap_from_the_start(bits: int, weight_bits: int, input_bits: int) -> None:
    torch.manual_seed(bits)
    w = torch.randn(8, 5, 3, 3)
    kept = torch.rand(w.shape) < 0.6
    made = A2QWeight(w, bits, weight_bits, input_bits, kept)
    start = made.projected(w)
    codes = made.codes(start).detach()
    assert bool((codes == codes.round()).all())
    assert not bool(codes[~kept].any())
    half = ((1 << (bits - 1)) - 1) / ((1 << input_bits) - 1)
    assert float(codes.clamp(min=0).sum((1, 2, 3)).max()) <= half
    assert float((-codes).clamp(min=0).sum((1, 2, 3)).max()) <= half
    assert float(codes.abs().max()) <= 2 ** (weight_bits - 1) - 1
    loss = (made(start).detach() - w).square().sum()
    assert float(loss) < 0.9 * float(w.square().sum())
    start.requires_grad_()
    (made(start) - w).square().sum().backward()
    for p in (start, made.log_scale, made.log_norm):
        assert p.grad is not None
        assert bool(p.grad.isfinite().all())


def test_rows_that_fit_as_they_are_start_unchanged_and_stay_inside() -> None:
    torch.manual_seed(1)
    w = torch.randn(6, 40) + 0.7  # far from centred
    w[3:] *= 0.02
    w[3:, 0] = 3.0
    wide, kept = A2QWeight(w, 32), torch.rand(w.shape) < 0.5
    assert bool(wide.loose.all())
    assert torch.equal(wide.projected(w), w)
    unit = w.abs().amax(1, keepdim=True) / 127
    assert float(((wide(w).detach() - w) / unit).abs().max()) <= 0.5 + 1e-3
    masked = A2QWeight(w, 32, kept=kept)
    assert torch.equal(masked.projected(w), torch.where(kept, w, 0.0))

    some = A2QWeight(w, 17)  # the last rows hold one large weight each
    assert some.loose.tolist() == [False] * 3 + [True] * 3
    start, half = some.projected(w), ((1 << 16) - 1) / 255
    assert torch.equal(start[3:], w[3:])
    assert float(some.codes(start).detach()[:3].sum(1).abs().max()) < 40
    with torch.no_grad():
        some.log_norm.add_(30)  # wherever training leads
    for v in (start, torch.ones_like(w), torch.randn_like(w), -torch.rand_like(w)):
        codes = some.codes(v).detach()
        assert float(codes.clamp(min=0).sum(1).max()) <= half
        assert float((-codes).clamp(min=0).sum(1).max()) <= half


def test_the_penalty_counts_what_lies_above_the_cap() -> None:
    made = A2QWeight(torch.randn(3, 9), 16)
    assert float(made.penalty().detach()) == 0.0
    with torch.no_grad():
        made.log_norm.add_(30)
    assert float(made.penalty().detach()) > 3 * 20
    assert float(made.radius.detach().max()) <= made.cap * (1 + 1e-6)
    made.penalty().backward()  # type: ignore[no-untyped-call]
    assert made.log_norm.grad is not None
    assert bool((made.log_norm.grad == 1).all())


@pytest.mark.parametrize("widths", [(1, 8, 8), (65, 8, 8), (16, 1, 8), (16, 8, 0), (9, 8, 12)])
def test_widths_that_fit_nothing(widths: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidInput, match=r"no such widths|not even"):
        A2QWeight(torch.randn(2, 4), *widths)
