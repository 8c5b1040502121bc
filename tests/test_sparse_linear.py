"""One packed transposable weight serves both products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.ir.errors import InvalidInput
from bitwright.passes.sparsity._transposable import transposable_mask
from bitwright.sparse_linear import TransposableWeight, sparse_linear


def masked(rows: int, columns: int, seed: int, zeros: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random weight under an exact transposable mask, some of its kept values zero."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=draw)
    kept = transposable_mask(w, 2, 4, "exact") & (torch.rand(rows, columns, generator=draw) >= zeros)
    return torch.where(kept, w, 0.0).to(dtype)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 10**6), zeros=st.sampled_from((0, 0.3)))
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_element(rows: int, columns: int, seed: int, zeros: float) -> None:
    whole_rows, whole_columns = -rows % 4 + rows, -columns % 4 + columns
    w = masked(whole_rows, whole_columns, seed, zeros)[:rows, :columns]  # cut: the rest of a block is zero
    packed = TransposableWeight.pack(w)
    assert torch.equal(packed.dense(), w)
    assert packed.values.numel() * 2 == (-rows % 8 + rows) * (-columns % 4 + columns)


def test_columns_come_from_the_same_values() -> None:
    w = masked(16, 24, 3, dtype=torch.float16)
    packed = TransposableWeight.pack(w)
    blocks = w.reshape(2, 2, 4, 6, 4).permute(0, 3, 1, 4, 2)  # [down, across, half, column, row]
    want = blocks.reshape(-1, 4)[blocks.reshape(-1, 4) != 0].reshape(2, 6, 2, 4, 2)
    assert torch.equal(packed.by_columns(), want)
    assert packed.nbytes == w.nbytes // 2 + w.numel() // 16


def test_gradients_are_those_of_the_dense_layer() -> None:
    w, bias = masked(24, 20, 5).double().requires_grad_(), torch.randn(24, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 7, 20, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad((sparse_linear(x, w, bias) ** 2).sum(), (x, w, bias))
    want = torch.autograd.grad((torch.nn.functional.linear(x, w, bias) ** 2).sum(), (x, w, bias))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_the_unbiased_weight_gradient_has_the_right_mean() -> None:
    torch.manual_seed(0)
    w, x = masked(8, 12, 1).requires_grad_(), torch.randn(16, 12)
    loss = torch.randn(16, 8)
    want = loss.T @ x
    for method in ("optimal", "two-draw"):
        total = torch.zeros_like(want)
        for _ in range(2000):
            total += torch.autograd.grad((sparse_linear(x, w, mvue=method) * loss).sum(), w)[0]
        assert (total / 2000 - want).norm() < 0.1 * want.norm()


def test_what_does_not_fit_is_named() -> None:
    w = masked(16, 8, 2)
    w[8:12, 4:8] = 1.0
    with pytest.raises(InvalidInput, match="block at row 8, column 4 obeys no transposable 2:4 mask"):
        TransposableWeight.pack(w)
    w = masked(16, 8, 2)
    with pytest.raises(InvalidInput, match="the weight takes 8 inputs"):
        sparse_linear(torch.ones(2, 7), w)
    with pytest.raises(InvalidInput, match=r"x is torch\.float64"):
        sparse_linear(torch.ones(2, 8, dtype=torch.float64), w)
    with pytest.raises(InvalidInput, match="mvue is None"):
        sparse_linear(torch.ones(2, 8), w, mvue="other")  # type: ignore[arg-type]
