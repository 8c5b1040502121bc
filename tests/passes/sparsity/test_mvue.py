"""Unbiased stochastic masks: inclusion probabilities, variances, unbiasedness (algorithms.md section 2)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.ir.errors import InvalidInput
from bitwright.passes.sparsity._mvue import inclusion, two_draw_inclusion
from bitwright.passes.sparsity.masks import mvue_mask

Method = Literal["optimal", "two-draw"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def variance(a: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Of the estimate a_i/p_i with probability p_i, summed over the group."""
    return torch.where(a > 0, a * a / torch.where(p > 0, p, 1.0), 0.0).sum(-1) - (a * a).sum(-1)


@pytest.mark.parametrize(
    ("a", "p", "optimal", "two_draw"),
    [
        ((1, 1, 1, 1), (0.5, 0.5, 0.5, 0.5), 4.0, 4.0),
        ((1, 2, 3, 4), (0.2, 0.4, 0.6, 0.8), 20.0, 20.474),
        ((1, 1, 1, 10), (1 / 3, 1 / 3, 1 / 3, 1), 6.0, 9.667),
        ((0, 0, 1, 1), (0, 0, 1, 1), 0.0, 0.0),
        ((0, 0, 0, 5), (0, 0, 0, 1), 0.0, 0.0),
    ],
)
def test_examples(a: tuple[float, ...], p: tuple[float, ...], optimal: float, two_draw: float) -> None:
    t = torch.tensor([a], dtype=torch.float64)
    assert inclusion(t, 2)[0].tolist() == pytest.approx(p)
    assert float(variance(t, inclusion(t, 2))) == pytest.approx(optimal, abs=1e-9)
    assert float(variance(t, two_draw_inclusion(t))) == pytest.approx(two_draw, abs=5e-4)


def test_two_draw_inclusion_of_the_example() -> None:
    got = two_draw_inclusion(torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64))
    assert got[0].tolist() == pytest.approx([0.2345, 0.4413, 0.6083, 0.7159], abs=1e-4)


def quadruples(kind: str, n: int = 40_000) -> torch.Tensor:
    rng = np.random.default_rng(0)
    match kind:
        case "normal":
            made = rng.standard_normal((n, 4))
        case "Laplace":
            made = rng.laplace(size=(n, 4))
        case "lognormal":
            made = rng.lognormal(0.0, 2.0, (n, 4))
        case _:
            made = rng.random((n, 4))
    return torch.from_numpy(np.abs(made))


@pytest.mark.parametrize(
    ("kind", "optimal", "two_draw", "one_of_two", "greedy"),
    [
        ("normal", 0.475, 0.504, 0.637, 0.133),
        ("Laplace", 0.305, 0.339, 0.497, 0.077),
        ("lognormal", 0.004, 0.006, 0.0183, 0.001),
        ("uniform", 0.628, 0.644, 0.749, 0.199),
    ],
)
def test_table_of_variances(kind: str, optimal: float, two_draw: float, one_of_two: float, greedy: float) -> None:
    # Lognormal 1:2 is printed as .030, a sample of a heavy tail; the expectation is exp(-sigma**2) = .0183.
    a = quadruples(kind)
    energy = (a * a).sum()
    pairs = a.reshape(-1, 2)
    lightest = (a.sort(-1).values[:, :2] ** 2).sum()
    got = [variance(a, inclusion(a, 2)).sum(), variance(a, two_draw_inclusion(a)).sum()]
    got += [variance(pairs, inclusion(pairs, 1)).sum(), lightest]
    assert [float(x / energy) for x in got] == pytest.approx([optimal, two_draw, one_of_two, greedy], abs=0.01)


def test_closed_forms_and_the_factor_two() -> None:
    a = torch.cat([quadruples("normal"), quadruples("lognormal"), quadruples("uniform") ** 12])
    s, top, energy = a.sum(-1), a.amax(-1), (a * a).sum(-1)
    level = s * s / 2 - energy
    above = top * top + (s - top) ** 2 - energy
    best = variance(a, inclusion(a, 2))
    formula = torch.where(top <= s / 2, level, above)
    assert torch.allclose(best, formula, rtol=1e-9, atol=float(energy.max()) * 1e-14)
    ratio = variance(a, two_draw_inclusion(a)) / best
    assert float(ratio[best > 1e-9 * energy].max()) <= 2.0 + 1e-6
    pairs = a.reshape(-1, 2)
    assert torch.allclose(variance(pairs, inclusion(pairs, 1)), 2 * pairs.prod(-1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("keep", "group", "method"),
    [(2, 4, "optimal"), (2, 4, "two-draw"), (1, 2, "optimal"), (3, 8, "optimal"), (2, 8, "two-draw")],
)
def test_unbiased_within_four_standard_errors_and_of_the_variance_promised(
    keep: int, group: int, method: Method
) -> None:
    n = 100_000
    a = torch.randn(group, generator=seeded(3), dtype=torch.float64)
    got = mvue_mask(a.expand(n, group), keep, group, generator=seeded(), method=method)
    error = (got.mean(0) - a).abs() / (got.std(0) / n**0.5).clamp(min=1e-15)
    certain = got.std(0) < 1e-9
    assert bool(((error < 4) | (certain & ((got.mean(0) - a).abs() < 1e-9))).all())
    p = inclusion(a.abs()[None], keep) if method == "optimal" else two_draw_inclusion(a.abs()[None])
    assert float(got.var(0).sum()) == pytest.approx(float(variance(a.abs()[None], p)), rel=0.03)
    assert int((got != 0).sum(-1).max()) <= keep


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 30),
    st.integers(0, 1),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from(["normal", "zeros", "ties", "tiny", "spread"]),
    st.integers(0, 2**31),
)
def test_groups_hold_at_most_keep(
    keep: int, group: int, size: int, axis: int, dtype: torch.dtype, kind: str, seed: int
) -> None:
    keep, group = sorted((keep, group))
    v = torch.randn(size, 7, generator=seeded(seed)) if axis == 0 else torch.randn(7, size, generator=seeded(seed))
    match kind:
        case "zeros":
            v = torch.where(v.abs() < 1.0, 0.0, v)
        case "ties":
            v = v.round()
        case "tiny":
            v = v * 1e-6
        case "spread":
            v = v**9
    v = v.clamp(-6e4, 6e4).to(dtype)  # finite in f16
    methods: tuple[Method, ...] = ("optimal", "two-draw") if keep == 2 else ("optimal",)
    for method in methods:
        out = mvue_mask(v, keep, group, axis, seeded(seed), method)
        assert out.dtype == v.dtype
        assert out.shape == v.shape
        assert bool(torch.isfinite(out).all())
        assert torch.equal(out, mvue_mask(v, keep, group, axis, seeded(seed), method))
        rows, before = out.movedim(axis, -1), v.movedim(axis, -1)
        assert bool(((rows == 0) | (rows.sign() == before.sign())).all())
        for start in range(0, size, group):
            part = rows[:, start : start + group]
            allowed = -(-keep * part.shape[1] // group)
            assert int((part != 0).sum(-1).max()) <= allowed
            few = (before[:, start : start + group] != 0).sum(-1) <= allowed
            if method == "optimal":
                assert torch.equal(part[few], before[:, start : start + group][few])


def test_a_kept_entry_above_the_level_is_unscaled() -> None:
    out = mvue_mask(torch.tensor([[0.5, -0.5, 1.0, 5.0]]).expand(50, 4), 2, 4, generator=seeded())
    assert bool((out[:, 3] == 5.0).all())
    assert sorted({float(x) for x in out[:, :3].flatten()}) == [-2.0, 0.0, 2.0]


def test_refused() -> None:
    for values, message in (
        (torch.ones(4, dtype=torch.int32), r"values is torch.int32"),
        (torch.tensor([1.0, float("nan")]), "values contains NaN"),
        (torch.tensor([1.0, float("inf")]), "values contains an infinity"),
        (torch.tensor(1.0), "values has rank 0, no axis -1"),
    ):
        with pytest.raises(InvalidInput, match=message):
            mvue_mask(values, 2, 4)
    with pytest.raises(InvalidInput, match="two-draw keeps 2 of a group, not 1"):
        mvue_mask(torch.ones(4), 1, 4, method="two-draw")
    with pytest.raises(InvalidInput, match="method is optimal or two-draw"):
        mvue_mask(torch.ones(4), 1, 4, method="best")  # type: ignore[arg-type]
    assert mvue_mask(torch.zeros(3, 0), 2, 4).shape == (3, 0)
