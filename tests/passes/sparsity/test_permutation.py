"""best_permutation: the published ratios, never worse, deterministic, several readers, columns that stay."""

from __future__ import annotations

import pytest
import torch

from bitwright.ir.errors import InvalidInput
from bitwright.passes.sparsity._permutation import Search, View, best_permutation, best_seats, kept, top_sum
from bitwright.passes.sparsity.masks import nm_mask


def ratio(w: torch.Tensor, keep: int = 2, group: int = 4) -> float:
    return float((w.abs() * nm_mask(w, keep, group)).double().sum() / w.abs().double().sum())


def uniform(seed: int, rows: int = 128, columns: int = 64) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("search", "want"), [("swap", 0.7135), ("pairs", 0.7151), ("triples", 0.7156)])
def test_ratios_of_pool_and_yu(search: Search, want: float) -> None:
    """Uniform random 128 filters by 64 channels, as ratios of the total (the table of the reference run)."""
    found, start = [], []
    for seed in range(1 if search == "triples" else 8):
        w = uniform(seed)
        order = best_permutation(w, 2, 4, search=search)
        assert sorted(order.tolist()) == list(range(64))
        start.append(ratio(w))
        found.append(ratio(w[:, order]))
    assert sum(start) / len(start) == pytest.approx(0.6986, abs=0.005)
    gain = sum(found) / len(found) - sum(start) / len(start)
    assert gain >= want - 0.6986 - 0.003
    assert sum(found) / len(found) >= want - 0.003


def test_the_best_order_of_two_stripes_is_found() -> None:
    import itertools

    w = uniform(3, 16, 8)
    best = 0.0
    for first in itertools.combinations(range(8), 4):
        order = [*first, *(i for i in range(8) if i not in first)]
        best = max(best, ratio(w[:, order]))
    assert ratio(w[:, best_permutation(w, 2, 4, search="pairs")]) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(("keep", "group"), [(1, 2), (1, 4), (3, 4), (4, 8), (2, 8), (3, 6), (4, 4)])
def test_never_worse_and_repeatable(keep: int, group: int) -> None:
    w = uniform(1, 48, 48) - 0.5
    order = best_permutation(w, keep, group, search="pairs")
    assert torch.equal(order, best_permutation(w, keep, group, search="pairs"))
    before, after = ratio(w, keep, group), ratio(w[:, order], keep, group)
    assert after > before if keep < group else torch.equal(order, torch.arange(48))
    again = best_permutation(w[:, order], keep, group, search="swap")
    assert torch.equal(again, torch.arange(48)), "a local optimum is left alone"


def test_planted_structure_is_recovered() -> None:
    """Half of the channels carry the weight, and they stand together: the mask must lose none of it."""
    w = torch.cat([1 + uniform(0, 32, 16), 1e-3 * uniform(1, 32, 16)], 1)
    order = best_permutation(w, 2, 4)
    assert ratio(w) < 0.6
    assert ratio(w[:, order]) > 0.999


def test_readers_with_other_stripes_and_fixed_columns_are_served_together() -> None:
    a, b, fixed = uniform(0, 32, 8), uniform(1, 64, 8), uniform(2, 64, 4)
    straight = View(a, torch.arange(8).reshape(2, 4), a[:, :0])
    shifted = View(b, torch.tensor([[8, 9, 0, 1], [2, 3, 4, 5], [6, 7, 10, 11]]), fixed)
    start = torch.arange(8)
    at = best_seats([straight, shifted], 2)

    def by_hand(at: torch.Tensor) -> float:
        second = torch.cat([fixed[:, :2], b[:, at], fixed[:, 2:]], 1)
        return float((a[:, at] * nm_mask(a[:, at], 2, 4)).sum() + (second * nm_mask(second, 2, 4)).sum())

    assert kept([straight, shifted], at, 2) == pytest.approx(by_hand(at), rel=1e-5)
    assert by_hand(at) > by_hand(start)
    for i in range(8):
        for j in range(i):
            other = at.clone()
            other[i], other[j] = at[j], at[i]
            assert by_hand(other) <= by_hand(at) * (1 + 1e-5), "an exchange would still gain"


def test_rows_are_sampled_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright.passes.sparsity import _permutation

    monkeypatch.setattr(_permutation, "WORK", 1 << 18)
    w = uniform(0, 512, 64)
    order = best_permutation(w, 2, 4, search="swap", seed=3)
    assert ratio(w[:, order]) > ratio(w)
    assert not torch.equal(order, best_permutation(w, 2, 4, search="swap", seed=4))


def test_sum_of_the_largest() -> None:
    x = torch.randn(50, 4)
    for keep in (1, 2, 3):
        torch.testing.assert_close(top_sum(x, keep), x.sort(-1, descending=True).values[:, :keep].sum(-1))


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (torch.rand(4, 6), "k a multiple of 4"), (torch.rand(4), "needs"),
        (torch.ones(4, 8, dtype=torch.int32), "int32"),
        (torch.full((4, 8), float("nan")), "NaN"),
    ],
)  # fmt: skip
def test_refused(weight: torch.Tensor, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        best_permutation(weight, 2, 4)
