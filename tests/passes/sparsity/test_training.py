"""The tensor parts of sparse training: S-STE's projection and scale, lowered masks, unbiased weight gradients."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bitwright as bw
from bitwright.ir.types import NM
from bitwright.passes.sparsity._training import lowered_mask, soft_scale, soft_threshold
from bitwright.passes.sparsity.masks import transposable_mask


def test_soft_threshold_of_the_paper() -> None:
    w = torch.tensor([[1.0, -2.0, 3.0, -5.0], [1.0, 2.0, 2.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    want = torch.tensor([[0.0, 0, 1, -3], [0, 0, 0, 2], [0, 0, 0, 0]])  # a tie at the threshold leaves three zeros
    assert torch.equal(soft_threshold(w, 2, 4), want)
    assert soft_scale(w, want) == pytest.approx((3 + 15 + 8) / (1 + 9 + 4))
    assert soft_scale(w, torch.zeros_like(w)) == 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**31))
def test_soft_threshold_is_continuous_and_sparse(keep: int, group: int, size: int, seed: int) -> None:
    keep, group = sorted((keep, group))
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(5, size, generator=generator, dtype=torch.float64)
    out = soft_threshold(w, keep, group)
    for start in range(0, size, group):
        part, before = out[:, start : start + group], w[:, start : start + group]
        n = part.shape[1]
        kept = -(-keep * n // group)
        level = before.abs().sort(-1).values[:, n - kept - 1 : n - kept] if n > kept else torch.zeros(5, 1)
        assert torch.equal(part, before.sign() * (before.abs() - level).clamp(min=0))
        assert int((part != 0).sum(-1).max()) <= kept
    moved = w + 1e-6 * torch.randn(w.shape, generator=generator, dtype=torch.float64).clamp(-1, 1)
    assert float((soft_threshold(moved, keep, group) - out).abs().max()) <= 2.0000001e-6


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8)])
def test_a_transposable_mask_is_made_at_each_tap(keep: int, group: int) -> None:
    w = torch.randn(16, 8, 3, 2, generator=torch.Generator().manual_seed(0))
    mask = lowered_mask(w, NM(keep, group, 1, transposable=True), "w")
    method: Literal["exact", "fast"] = "exact" if group == 4 else "fast"
    for i in range(3):
        for j in range(2):
            assert torch.equal(mask[:, :, i, j], transposable_mask(w[:, :, i, j], keep, group, method))


@pytest.mark.parametrize("method", ["optimal", "two-draw"])
def test_the_weight_gradient_is_unbiased_and_the_others_exact(method: Literal["optimal", "two-draw"]) -> None:
    fc, count = nn.Linear(4, 8), 3000
    generator = torch.Generator().manual_seed(5)
    x, g = torch.randn(3, 5, 4, generator=generator), torch.randn(3, 5, 8, generator=generator)  # 15 rows: a tail of 3
    training = bw.sparse_training(fc, "2:4", decay=0.0, mvue=method, seed=3)
    weight, masked = training._layers[0].parameter, fc.weight.detach()
    assert fc.bias is not None
    draws: list[torch.Tensor] = []
    for _ in range(count):
        weight.grad = fc.bias.grad = None
        inputs = x.clone().requires_grad_()
        fc(inputs).backward(g)
        assert weight.grad is not None
        draws.append(weight.grad.double())
    torch.testing.assert_close(inputs.grad, g @ masked)
    torch.testing.assert_close(fc.bias.grad, g.sum((0, 1)))
    got, want = torch.stack(draws), g.reshape(-1, 8).T.double() @ x.reshape(-1, 4).double()
    assert float(((got.mean(0) - want).abs() / (got.std(0) / count**0.5)).max()) < 4.0
    sparse = training._layers[0].sparse.draws
    assert sparse is not None
    rows = sparse.sparse(g.reshape(-1, 8), "g")
    assert [int((rows[i : i + 4] != 0).sum(0).max()) for i in range(0, 15, 4)] == [2, 2, 2, 2]
    assert torch.unique(got, dim=0).shape[0] == count  # every pass has numbers of its own
