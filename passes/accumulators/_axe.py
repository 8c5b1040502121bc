"""Error-compensating rounding within a register's budgets: AXE around GPTQ and GPFQ.

Colbert et al., Accumulator-Aware Post-Training Quantization (AXE), 2024; Frantar et al., GPTQ, ICLR 2023; Lybrand and
Saab, A Greedy Algorithm for Quantizing Neural Networks (GPFQ), JMLR 2021. Every row has, for each tile, one budget for
its positive and one for its negative weights. Weights are chosen one input after the other; each is first shrunk by
the threshold that would spread the budget best, and may not take more than what is left of it. Clipping comes after
rounding, on integers, so that no margin for rounding is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from bitwright.passes.accumulators._a2q import Limit, Shrink

if TYPE_CHECKING:
    import torch

WIDTH = 128
"""Columns chosen one by one before the rest of the matrix follows in one product."""
DAMPING = 0.01
"""Of the mean diagonal, added to Gram matrices before they are inverted."""


class Budget:
    """What the tiles of all rows may still take of each sign."""

    def __init__(self, rows: torch.Tensor, limit: Limit) -> None:
        """``rows``: float64 [groups, outputs, K], in units of the new scale."""
        import numpy as np
        import torch

        flat = Shrink(rows.reshape(-1, rows.shape[-1]).numpy(), limit)
        cuts = flat.spread(flat.thresholds(np.full(len(flat.rows), limit.radius)))
        self.up, self.down = (torch.from_numpy(c.copy()).reshape(rows.shape) for c in cuts)
        self.tile, self.radius = limit.tile or rows.shape[-1], float(int(limit.radius))
        self.left, self.ends = torch.empty(0), (limit.lo, limit.hi)

    def take(self, k: int, v: torch.Tensor) -> torch.Tensor:
        """The integers nearest to v [groups, outputs], shrunk, that the budgets of column k's tile still allow."""
        import torch

        if k % self.tile == 0:
            self.left = torch.full((2, *v.shape), self.radius, dtype=v.dtype)
        up, down = self.up[..., k], self.down[..., k]
        shrunk = torch.where(v > 0, (v - up).clamp(min=0), (v + down).clamp(max=0))
        q = torch.round(shrunk).clamp(*self.ends)
        q = torch.minimum(torch.maximum(q, -self.left[1]), self.left[0])
        self.left[0] -= q.clamp(min=0)
        self.left[1] -= (-q).clamp(min=0)
        return q


def greedy(
    rows: torch.Tensor,
    kept: torch.Tensor,
    gram: torch.Tensor,
    limit: Limit,
    order: Literal["gptq", "gpfq"],
    root: torch.Tensor | None = None,
) -> torch.Tensor:
    """Integer weights within the limit, zero where not ``kept``, whose products with the inputs come close.

    ``rows`` float64 and ``kept`` [groups, outputs, K]; ``gram`` float64 [groups, K, K], sums of x xᵀ. ``root``: its
    :func:`inverse_root` for GPTQ, where it is known already.
    """
    budget = Budget(rows, limit)
    if order == "gptq":
        return _gptq(rows.clone(), kept, inverse_root(gram) if root is None else root, budget)
    return _gpfq(rows, kept, gram, budget)


def _gptq(w: torch.Tensor, kept: torch.Tensor, root: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Columns in turn, the rest of each row making up for the rounding through the inverse Gram matrix."""
    import torch

    size, q = w.shape[-1], torch.zeros_like(w)
    for begin in range(0, size, WIDTH):
        end = min(begin + WIDTH, size)
        part = w[..., begin:end].clone()
        missed = torch.zeros_like(part)
        for k in range(begin, end):
            i = k - begin
            q[..., k] = budget.take(k, torch.where(kept[..., k], part[..., i], 0.0))
            miss = (part[..., i] - q[..., k]) / root[:, k, k, None]
            part[..., i:] -= miss[..., None] * root[:, None, k, k:end]
            missed[..., i] = miss
        w[..., end:] -= missed @ root[:, begin:end, end:]
    return q


def _gpfq(w: torch.Tensor, kept: torch.Tensor, gram: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Columns in turn, each the best answer to the error of the result so far."""
    import torch

    size, q, missed = w.shape[-1], torch.zeros_like(w), torch.zeros_like(w)
    norms = gram.diagonal(dim1=1, dim2=2)
    for begin in range(0, size, WIDTH):
        end = min(begin + WIDTH, size)
        pull = missed[..., :begin] @ gram[:, :begin, begin:end]
        for k in range(begin, end):
            here = pull[..., k - begin] + (missed[..., begin:k] @ gram[:, begin:k, k, None])[..., 0]
            norm = norms[:, k, None]
            want = w[..., k] + torch.where(norm > 0, here / norm.clamp(min=1e-30), 0.0)
            q[..., k] = budget.take(k, torch.where(kept[..., k], want, 0.0))
            missed[..., k] = w[..., k] - q[..., k]
    return q


def inverse_root(gram: torch.Tensor) -> torch.Tensor:
    """The upper U with UᵀU = (G + damping)⁻¹, with more damping while the matrix is singular."""
    import torch

    g = gram.clone()
    diagonal = g.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    diagonal += torch.where(mean > 0, DAMPING * mean, 1.0)
    while True:
        factor, bad = torch.linalg.cholesky_ex(g)
        if not bool(bad.any()):
            upper, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not bool(bad.any()):
                return upper  # type: ignore[no-any-return]
        diagonal += torch.where(mean > 0, mean, 1.0)
