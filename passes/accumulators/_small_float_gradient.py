"""Gradients through small-float sums: straight through, or only for the terms that arrived (fine-grained estimators).

A step adds a rounded product p to a sum: it overflows when the exact result is beyond the largest value, underflows
when a result that is not zero becomes zero, and swamps p when the sum does not change though p is not zero. Products
over- and underflow likewise. ``immediate``: a term has a gradient where none of that happened in its own step, nor to
its chunk's sum where that is added. ``recursive``: a step that over- or underflows also cuts off all terms before it,
for the sum then no longer depends on them. After "Towards Cheaper Inference in Deep Networks with Lower Bit-Width
Accumulators" (Blumenfeld et al., ICLR 2024), whose list of estimators is longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

from bitwright.ir.semantics_small_float import Sums, Terms, dots, rounder, terms
from bitwright.ir.small_float import small_float_range

if TYPE_CHECKING:
    from torch import Tensor

Estimator = Literal["identity", "immediate", "recursive"]
Step = Callable[["Tensor", "Tensor"], "tuple[Tensor, Tensor, Tensor]"]


class SmallFloatDots(torch.autograd.Function):
    """``a[A, K], b[B, K], sums, estimator`` -> [A, B]: bits of the emulation forward, the estimator backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, sums: Sums, estimator: Estimator) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.how = sums, estimator
        return dots(a, b, sums).to(torch.float32).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        sums, estimator = ctx.how
        if estimator == "identity":
            return g @ b, g.t() @ a, None, None
        if a.shape[0] > b.shape[0]:
            db, da = masked_gradients(b, a, g.t(), sums, estimator == "recursive")
        else:
            da, db = masked_gradients(a, b, g, sums, estimator == "recursive")
        return da.to(a.dtype), db.to(b.dtype), None, None


def masked_gradients(a: Tensor, b: Tensor, g: Tensor, sums: Sums, recursive: bool) -> tuple[Tensor, Tensor]:
    """Gradients of a[A, K] and b[B, K] for g[A, B], of the terms that arrived."""
    if not a.numel() or not b.numel():
        return torch.zeros_like(a), torch.zeros_like(b)
    work = terms(a.nan_to_num(), b.nan_to_num(), sums)
    u, v = work.a.to(g.dtype), work.b.to(g.dtype)
    da, db = (torch.zeros_like(t) for t in (u, v))
    for rows, columns in work.tiles():
        inside, outside = _arrivals(work, rows, columns, recursive)
        part = g[rows, columns] * outside
        for i, kept in enumerate(inside):
            masked = part * kept
            da[i][:, rows] += masked @ v[i][..., columns].transpose(1, 2)
            db[i][..., columns] += u[i][:, rows].transpose(1, 2) @ masked
    return _by_row(da.squeeze(-1), a), _by_row(db.squeeze(-2), b)


def _by_row(t: Tensor, like: Tensor) -> Tensor:
    """[chunk, chunks, rows] as [rows, K]."""
    return t.permute(2, 1, 0).reshape(like.shape[0], -1)[:, : like.shape[1]]


def _arrivals(work: Terms, rows: slice, columns: slice, recursive: bool) -> tuple[list[Tensor], Tensor]:
    """Which terms of every chunk reach the chunk's sum, and which chunks [chunks, rows, columns] the result."""
    sums = work.sums
    step, largest = _step(sums), small_float_range(*sums.product)[1]
    kept: list[Tensor] = []
    cut: list[Tensor] = []
    inner: Tensor | None = None
    for i, p in enumerate(work.products(rows, columns)):
        inner = torch.zeros_like(p) if inner is None else inner
        exact = work.a[i][:, rows] * work.b[i][..., columns]
        lost = (exact.abs() > largest) | ((p == 0) & (exact != 0))
        inner, swamped, gone = step(inner, p)
        kept.append(~(lost | swamped | gone))
        cut.append(gone)
    assert inner is not None
    total, outer, outer_cut = torch.zeros_like(inner[0]), [], []
    for part in inner:
        total, swamped, gone = step(total, part)
        outer.append(~(swamped | gone))
        outer_cut.append(gone)
    if recursive:
        _cut_before(kept, cut)
        _cut_before(outer, outer_cut)
    return kept, torch.stack(outer)


def _step(sums: Sums) -> Step:
    q, largest = rounder(sums.acc, sums, sums.dtype), small_float_range(*sums.acc)[1]

    def step(before: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum after p, where p was swamped, and where the sum over- or underflowed."""
        exact = before + p
        after = q(exact.clone())
        gone = (exact.abs() > largest) | ((after == 0) & (exact != 0))
        return after, (after == before) & (p != 0), gone

    return step


def _cut_before(kept: list[Tensor], cut: list[Tensor]) -> None:
    """Terms before a cut do not arrive."""
    open_ = torch.ones_like(kept[-1])
    for i in reversed(range(len(kept))):
        kept[i] &= open_
        open_ = open_ & ~cut[i]
