"""Number formats on tensors: codes of every width, exact zeros, lognormal tables, small floats, range norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.ir.errors import InvalidInput
from bitwright.passes.precision.formats import (
    levels,
    log2_spread,
    lognormal_cosine,
    lognormal_error,
    lognormal_format,
    lognormal_sparsity,
    lognormal_threshold,
    mse_format,
    quantize_codes,
    quantize_float,
    range_norm_constant,
    range_norm_fold,
    range_norm_scale,
    stochastic_prune,
)

WIDTHS: list[Any] = [2, 3, 4, 5, 6, 7, 8, "ternary", "bipolar"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(WIDTHS), st.booleans(), st.sampled_from([None, 0, 1, -1]), st.sampled_from([0, 3, 32, 128]),
    st.sampled_from(["float", "pow2"]), st.sampled_from(["minmax", "mse", 99.0]), st.integers(0, 99),
)  # fmt: skip
def test_codes(bits: Any, symmetric: bool, axis: Any, group: int, scale: Any, rule: Any, seed: int) -> None:
    """Codes stay in the format, zeros stay exact, scales are usable and of the promised shape."""
    if not symmetric and isinstance(bits, str):
        symmetric = True
    group = 0 if axis is None else group
    w = normal(6, 70, 2, seed=seed) * normal(6, 1, 1, seed=seed + 1).exp()
    w[seed % 6] = 0.0
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) < (1.0 if bits == "bipolar" else 0.5)
    c = quantize_codes(w, bits, symmetric, axis=axis, group=group, scale=scale, range=rule, mask=mask)
    form = levels(bits, symmetric)
    assert set(c.codes.flatten().tolist()) <= set(range(form.lo, form.hi + 1, form.step))
    assert c.codes.dtype == (torch.int8 if symmetric else torch.uint8)
    assert bool(((c.scale > 0) & c.scale.isfinite()).all())
    assert bool(((c.zero >= min(form.lo, 0)) & (c.zero <= form.hi)).all())
    if axis is None:
        assert c.scale.shape == ()
    elif not group:
        assert c.scale.shape == (w.shape[axis],)
    else:
        assert c.scale.shape == torch.Size(-(-n // group) if a == axis % 3 else n for a, n in enumerate(w.shape))
    if scale == "pow2":
        assert bool((torch.frexp(c.scale)[0] == 0.5).all())
    if bits != "bipolar":
        assert bool((c.real()[~mask] == 0).all())
    if rule == "minmax" and not isinstance(bits, str):
        step = c.spread(c.scale)
        kept = torch.where(mask, w, torch.zeros(()))
        assert bool(((c.real() - kept).abs() <= 0.5001 * step + (0.0 if symmetric else 0.5) * step).all())


def error(w: torch.Tensor, *args: Any, **options: Any) -> float:
    return float((quantize_codes(w, *args, **options).real() - w).square().mean())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", ["float", "pow2"])
def test_mse_ranges_beat_extremes(symmetric: bool, scale: Any) -> None:
    w = normal(8, 512)
    w[:, 0] = 12.0
    for bits in (2, 3, 4, 6, 8):
        best = error(w, bits, symmetric, scale=scale, range="mse")
        assert best <= error(w, bits, symmetric, scale=scale, range="minmax")
    assert error(w, 4, symmetric, range="mse") < 0.85 * error(w, 4, symmetric, range="minmax")


def test_known_optima() -> None:
    """Normal values: the best uniform quantizers (Max 1960), ternary 0.190; bipolar mean |w| gives 1 - 2 / pi."""
    w = normal(4, 50_000)
    assert error(w, "bipolar", range="mse") == pytest.approx(1 - 2 / math.pi, rel=0.02)
    assert error(w, "ternary", range="mse") == pytest.approx(0.1902, rel=0.02)
    assert error(w, 4, False, range="mse") == pytest.approx(0.01154, rel=0.05)
    c = quantize_codes(w, "bipolar", range="mse")
    assert c.scale.tolist() == pytest.approx(w.abs().mean(1).tolist(), rel=1e-5)


def test_more_bits_and_smaller_groups_lose_less() -> None:
    w = normal(16, 256) * normal(16, 256, seed=1).exp()
    errors = [error(w, bits) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    by_group = [error(w, 4, axis=1, group=g) for g in (128, 64, 32)]
    assert by_group == sorted(by_group, reverse=True)
    assert by_group[0] < error(w, 4) < error(w, 4, axis=None)


def test_percentile_clips_the_tails() -> None:
    w = torch.linspace(-1, 1, 1001).reshape(1, -1)
    assert float(quantize_codes(w, 8, range=90.0).scale) == pytest.approx(0.9 / 127, rel=1e-4)
    assert float(quantize_codes(w, 8, range=100.0).scale) == pytest.approx(1 / 127, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits is 2 to 8"), ({"bits": 9}, "bits is 2 to 8"), ({"bits": "binary"}, "bits is 2 to 8"),
        ({"bits": "ternary", "symmetric": False}, "ternary is symmetric"),
        ({"range": 40.0}, r"lies in \(50, 100\]"), ({"range": "best"}, "range is 'minmax', 'mse' or a percentage"),
        ({"scale": "half"}, "scale is 'float' or 'pow2'"), ({"axis": None, "group": 32}, "groups lie along an axis"),
        ({"axis": 5}, "do not fit a tensor of shape"), ({"w": torch.tensor([float("nan")])}, "only finite"),
        ({"w": torch.ones(2, dtype=torch.int32)}, "only finite floating-point"),
        ({"bits": "bipolar", "mask": torch.tensor([True, False])}, "use ternary"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        quantize_codes(**{"w": torch.ones(2), **options})


# sigma (natural log): alpha at sparsity .50 .80 .85 .90 .95, cosine at .80 and .90 (arXiv 2006.08173)
PRUNING = {
    1: ((2.401, 7.822, 10.69, 16.31, 32.92), (0.713, 0.518)),
    2: ((2.575, 16.99, 26.69, 47.66, 115.8), (0.997, 0.982)),
    3: ((2.640, 38.06, 71.14, 157.1, 515.2), (1.0, 1.0)),
    4: ((2.670, 86.33, 193.9, 538.5, 2464), (1.0, 1.0)),
}
SHARES = (0.5, 0.8, 0.85, 0.9, 0.95)


@pytest.mark.parametrize("sigma", PRUNING)
def test_pruning_thresholds(sigma: int) -> None:
    alphas, cosines = PRUNING[sigma]
    for share, alpha in zip(SHARES, alphas, strict=True):
        found = lognormal_threshold(sigma, share)
        assert found == pytest.approx(alpha, rel=3e-4)
        assert lognormal_sparsity(found, sigma) == pytest.approx(share, abs=1e-12)
    for share, cosine in zip((0.8, 0.9), cosines, strict=True):
        assert lognormal_cosine(lognormal_threshold(sigma, share), sigma) == pytest.approx(cosine, abs=6e-4)


def test_pruning_meets_its_expectation() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (0.7 + 1.2 * torch.randn(400_000, generator=generator)).exp() * torch.where(
        torch.rand(400_000, generator=generator) < 0.5, 1.0, -1.0
    )
    x[:40_000] = 0.0
    for share in (0.5, 0.85):
        pruned, threshold = stochastic_prune(x, share, generator)
        assert float((pruned == 0).double().mean()) == pytest.approx(share, abs=0.003)
        assert float((pruned - x).mean()) == pytest.approx(0.0, abs=0.03)
        big = x.abs() > threshold
        assert bool((pruned[big] == x[big]).all())
        assert float((pruned[~big & (pruned != 0)].abs() - threshold).abs().max()) < 1e-5 * threshold
    assert stochastic_prune(x, 0.05)[1] == 0.0  # a tenth is zero already
    spread = float(x[40_000:].abs().log().std())
    pruned = stochastic_prune(x[40_000:], 0.8, generator)[0]
    cosine = float(torch.cosine_similarity(x[40_000:], pruned, dim=0))
    assert cosine == pytest.approx(lognormal_cosine(lognormal_threshold(spread, 0.8), spread), abs=0.02)


def test_bad_thresholds() -> None:
    for call, message in [
        (lambda: lognormal_threshold(0.0, 0.5), "sigma is a standard deviation"),
        (lambda: lognormal_threshold(1.0, 1.0), r"sparsity lies in \[0, 1\)"),
        (lambda: lognormal_sparsity(-1.0, 1.0), "alpha is a threshold"),
        (lambda: stochastic_prune(torch.tensor([1.0, float("nan")]), 0.5), "only finite"),
        (lambda: stochastic_prune(torch.ones(5), 0.5), "two different"),
        (lambda: lognormal_format(1.0, 2), "3 to 8 bits"),
        (lambda: lognormal_error(1.0, 0, 3), "at least one exponent bit"),
        (lambda: mse_format(torch.zeros(3), 4), "all values are zero"),
        (lambda: log2_spread(torch.zeros(3)), "two non-zero"),
        (lambda: quantize_float(torch.tensor([float("inf")]), 3, 2), "only finite"),
        (lambda: quantize_float(torch.ones(3), 3, 2, "min"), "scale is 'log'"),  # type: ignore[arg-type]
        (lambda: range_norm_constant(1), "at least two values"),
        (lambda: range_norm_scale(torch.ones(3, 2)), "do not divide into 16"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            call()  # type: ignore[no-untyped-call]


# bits: (exponent bits, sigmas in log2 at which that split is best)
SPLITS = {
    4: [(2, (1.0,)), (3, (1.5, 2.0, 4.0, 6.0))],
    5: [(2, (1.0,)), (3, (1.5, 2.0, 2.5)), (4, (3.0, 5.0))],
    6: [(3, (1.0, 1.5, 2.0)), (4, (2.5, 4.0, 5.0)), (5, (6.0, 8.0))],
    8: [(3, (1.0, 1.5)), (4, (2.0, 2.5, 3.0)), (5, (4.0, 5.0, 8.0))],
}


@pytest.mark.parametrize("bits", SPLITS)
def test_best_split(bits: int) -> None:
    for exponent, sigmas in SPLITS[bits]:
        for sigma in sigmas:
            f = lognormal_format(sigma, bits)
            assert (f.exponent, f.mantissa) == (exponent, bits - 1 - exponent), sigma


@pytest.mark.parametrize(("sigma", "least"), [(2, 0.023), (3, 0.028), (4, 0.045), (5, 0.046)])
def test_smallest_errors_of_8_bits(sigma: float, least: float) -> None:
    assert lognormal_format(sigma, 8).error == pytest.approx(least, abs=6e-4)


@pytest.mark.parametrize(("bits", "within"), [(8, 0.01), (6, 0.02), (4, 0.06)])
def test_error_formula_against_sampling(bits: int, within: float) -> None:
    x = torch.exp2(2.5 * normal(400_000).double())
    f = lognormal_format(2.5, bits)
    back = quantize_float(x, f.exponent, f.mantissa).real()
    assert float(((back - x).abs() / x).mean()) == pytest.approx(f.error, rel=within)


def test_measured_split_is_the_best_of_all() -> None:
    x = torch.exp2(2.0 * normal(20_000)) * torch.sign(normal(20_000, seed=1))
    x[:5000] = 0.0
    assert log2_spread(x) == pytest.approx(2.0, rel=0.03)
    f = mse_format(x, 6)
    power = float(x.square().sum())
    for e in range(1, 6):
        c = quantize_float(x, e, 5 - e, "mse")
        assert float((c.real() - x).square().sum()) / power >= f.error * (1 - 1e-6)
        assert bool((c.real()[:5000] == 0).all())
    assert f.error < 0.01


@pytest.mark.parametrize(("n", "ratio"), [(16, 0.81), (64, 0.88), (512, 0.93), (3136, 0.956), (12544, 0.979)])
def test_range_estimates_the_deviation(n: int, ratio: float) -> None:
    x = 3.0 * normal(n, 40 * 16)
    scale = range_norm_scale(x.reshape(n, 40, 16).permute(2, 1, 0).contiguous(), 16)
    assert float(scale.mean()) / 3.0 == pytest.approx(ratio, abs=0.012)


def test_range_constants() -> None:
    sizes = (16, 64, 256, 1024, 12544)
    ranges = (3.531, 4.692, 5.652, 6.503, 7.875)  # expected range of n standard normal values
    found = [range_norm_constant(n) * r for n, r in zip(sizes, ranges, strict=True)]
    assert found == sorted(found)
    assert all(0.8 <= f <= 1.0 for f in found)
    paper = [range_norm_constant(n, "paper") * r for n, r in zip(sizes, ranges, strict=True)]
    assert paper[0] == pytest.approx(1.5, abs=0.01)
    assert paper[-1] == pytest.approx(1.81, abs=0.01)


def test_range_norm_folds_into_a_factor_and_an_offset() -> None:
    x = normal(64, 5) * torch.tensor([0.1, 1.0, 2.0, 5.0, 30.0]) + 4.0
    gamma, beta = normal(5, seed=1), normal(5, seed=2)
    mean, scale = x.mean(0), range_norm_scale(x)
    want = (x - mean) / scale * gamma + beta
    for given_scale, inverse in ((scale, False), (1 / scale, True)):
        factor, offset = range_norm_fold(gamma, beta, mean, given_scale, inverse=inverse)
        torch.testing.assert_close(x * factor + offset, want, rtol=1e-4, atol=1e-4)
