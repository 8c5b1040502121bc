"""Least squares and SparseGPT on matrices: against numpy's solution, both solvers, patterns chosen again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.ir.patterns import violation
from bitwright.ir.types import NM, Block, Encoding, Unstructured
from bitwright.passes.sparsity import _least_squares
from bitwright.passes.sparsity._least_squares import _conjugate_gradients, damped, errors, solve
from bitwright.passes.sparsity._sparsegpt import inverse_root, prune, rule
from bitwright.passes.sparsity.masks import nm_mask

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def problem(outputs: int, inputs: int, rows: int, seed: int = 0, dead: int = 0) -> Problem:
    """Correlated inputs, a weight, and its 2:4 mask by magnitude."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=g, dtype=torch.float64) / torch.arange(1, inputs + 1)[:, None].sqrt()
    x = torch.randn(rows, inputs, generator=g, dtype=torch.float64) @ mix
    x[:, :dead] = 0.0
    dense = torch.randn(outputs, inputs, generator=g, dtype=torch.float64)
    kept = nm_mask(dense, 2, 4)
    return x, x.T @ x, dense, kept


def by_numpy(x: torch.Tensor, dense: torch.Tensor, kept: torch.Tensor) -> np.ndarray[Any, Any]:
    """Row by row, the least-squares solution on the kept columns."""
    out = np.zeros(dense.shape)
    for row, mask in enumerate(kept.numpy()):
        out[row, mask] = np.linalg.lstsq(x.numpy()[:, mask], (x @ dense[row]).numpy(), rcond=None)[0]
    return out


@pytest.mark.parametrize("shape", [(6, 16, 64), (1, 4, 9), (3, 20, 200)])
def test_solution_is_that_of_numpy(shape: tuple[int, int, int]) -> None:
    x, gram, dense, kept = problem(*shape)
    got = solve(gram, dense @ gram, dense * kept, kept)
    np.testing.assert_allclose(got.numpy(), by_numpy(x, dense, kept), rtol=1e-8, atol=1e-8)


def test_both_solvers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gram, dense, kept = problem(24, 64, 300)
    kept[8:16] = kept[0]  # outputs with one mask share a factor
    kept[20] = False
    want = by_numpy(x, dense, kept)
    np.testing.assert_allclose(solve(gram, dense @ gram, dense * kept, kept).numpy(), want, rtol=1e-7, atol=1e-7)
    monkeypatch.setattr(_least_squares, "DIRECT", 0)
    iterated = solve(gram, dense @ gram, dense * kept, kept)
    assert bool((iterated[~kept] == 0).all())
    np.testing.assert_allclose(iterated.numpy(), want, rtol=1e-3, atol=1e-4)
    best = errors(gram, dense - torch.from_numpy(want)).sum()
    assert float(errors(gram, dense - iterated).sum()) <= float(best) * (1 + 1e-8)


def test_a_singular_matrix_is_solved_by_iteration_and_dead_inputs_keep_their_weight() -> None:
    x, gram, dense, kept = problem(8, 32, 12, dead=3)  # fewer rows than inputs
    start = dense * kept
    got = solve(gram, dense @ gram, start, kept)
    assert bool(got.isfinite().all())
    assert torch.equal(got[:, :3], start[:, :3])
    residual = torch.from_numpy(by_numpy(x, dense, kept))
    left = float(errors(gram, dense - got).sum()) - float(errors(gram, dense - residual).sum())
    assert left <= 1e-4 * float(errors(gram, dense - start).sum())
    assert not bool(_conjugate_gradients(torch.zeros_like(gram), torch.zeros_like(dense), kept).any())


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 9), groups=st.integers(1, 8), rows=st.integers(1, 80), seed=st.integers(0, 2**31),
    damping=st.sampled_from([0.0, 1e-4, 0.01, 1.0]), direct=st.sampled_from([0, 30]),
)  # fmt: skip
def test_the_error_never_rises(outputs: int, groups: int, rows: int, seed: int, damping: float, direct: int) -> None:
    _, gram, dense, kept = problem(outputs, 4 * groups, rows, seed, dead=seed % 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_least_squares, "DIRECT", direct)
        hold = damped(gram, damping * float(gram.diagonal().mean()))
        got = solve(hold, dense @ hold, dense * kept, kept)
    before, after = errors(gram, dense - dense * kept), errors(gram, dense - got)
    assert bool((got[~kept] == 0).all())
    assert bool((after <= before * (1 + 1e-6) + 1e-9 * float(errors(gram, dense).sum())).all())


def test_sparsegpt_stands_between_magnitude_and_least_squares_and_its_own_mask_is_better() -> None:
    _, gram, dense, kept = problem(64, 256, 2000)
    gram = damped(gram, 0.01 * float(gram.diagonal().mean()))
    root = inverse_root(gram)
    assert root is not None
    torch.testing.assert_close(root.T @ root @ gram, torch.eye(256, dtype=torch.float64), rtol=0, atol=1e-9)

    def error(w: torch.Tensor) -> float:
        return float((errors(gram, dense - w).sum() / errors(gram, dense).sum()) ** 0.5)

    magnitude, best = error(dense * kept), error(solve(gram, dense @ gram, dense * kept, kept))
    once, mask = prune(root, dense, kept)
    assert torch.equal(mask, kept)
    assert best < error(once) < 0.8 * magnitude
    assert error(once) < 1.7 * best  # columns already passed cannot make up for later ones
    choice = rule(NM(2, 4, 1), kept, 1, 2)
    assert not isinstance(choice, str)
    again, chosen = prune(root, dense, kept, choose=choice)
    assert error(again) < error(once)
    assert error(solve(gram, dense @ gram, again, chosen)) < best


def test_sparsegpt_is_optimal_brain_surgeon_for_one_weight() -> None:
    _, gram, dense, _ = problem(1, 5, 40)
    kept = torch.tensor([[True, True, False, True, True]])
    root = inverse_root(gram)
    assert root is not None
    got, _ = prune(root, dense, kept)
    # Columns before the pruned one stay: the rest follows the inverse of the submatrix that is left.
    rest = torch.linalg.inv(gram[2:, 2:])
    want = dense[0, 2:] - dense[0, 2] / rest[0, 0] * rest[0]
    torch.testing.assert_close(got[0, 2:], want, rtol=1e-9, atol=1e-9)
    assert torch.equal(got[0, :2], dense[0, :2])


@pytest.mark.parametrize(
    ("encoding", "taps"),
    [
        (NM(2, 4, 1), 1), (NM(2, 4, 1), 9), (NM(4, 8, 1, transposable=True), 1), (NM(1, 4, 1, shared=4), 1),
        (NM(2, 4, 1, block=2), 1), (Unstructured(5, 16, 1), 1), (Unstructured(9, 16, 1), 9), (Unstructured(), 1),
    ],
)  # fmt: skip
def test_patterns_are_chosen_again(encoding: Encoding, taps: int) -> None:
    inputs = 24 if isinstance(encoding, Unstructured) else 16  # of which the last run of 16 holds 8
    _, gram, dense, kept = problem(16, taps * inputs, 400)
    shape = (16, inputs) if taps == 1 else (16, inputs, 3, 3)
    choose = rule(encoding, kept, 1, len(shape))
    root = inverse_root(damped(gram, 0.01 * float(gram.diagonal().mean())))
    assert not isinstance(choose, str)
    assert root is not None
    w, mask = prune(root, dense, kept, taps, choose)
    full = w.reshape(16, taps, inputs).transpose(1, 2).reshape(shape).numpy()
    assert violation(full, encoding) == ""
    assert bool((w[~mask] == 0).all())
    if encoding == Unstructured():
        assert int(mask.sum()) == int(kept.sum())
    assert float(errors(gram, dense - w).sum()) < 0.95 * float(errors(gram, dense - dense * mask).sum())


@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        (NM(2, 4, 0), "does not lie along the inputs"),
        (Unstructured(1, 4, 0), "does not lie along the inputs"),
        (NM(2, 4, 1, block=2, transposable=True), "is not chosen by saliency"),
        (Block(4, 4), "is not chosen by saliency"),
    ],
)
def test_patterns_that_are_not(encoding: Encoding, reason: str) -> None:
    why = rule(encoding, torch.ones(4, 4, dtype=torch.bool), 1, 2)
    assert isinstance(why, str)
    assert reason in why


def test_dependent_inputs_have_no_root_unless_damped_and_dead_ones_do() -> None:
    _, gram, _, _ = problem(1, 16, 8)
    assert inverse_root(gram) is None
    assert inverse_root(damped(gram, 0.01 * float(gram.diagonal().mean()))) is not None
    _, gram, dense, kept = problem(4, 16, 64, dead=2)
    root = inverse_root(gram)
    assert root is not None
    assert bool(prune(root, dense, kept)[0].isfinite().all())
