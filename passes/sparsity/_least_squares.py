"""Least squares per layer under a fixed mask: each output row is a problem of its own in its kept weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-5
ITERATIONS = 300
ROUNDS = 4
DIRECT = 30
"""Rows are factorized while that costs about this many products with the Gram matrix."""
PIECE = 1 << 23
"""Elements of the small matrices factorized at a time."""


def damped(gram: torch.Tensor, amount: float) -> torch.Tensor:
    """A matrix with an amount added to the diagonal."""
    out = gram.clone()
    out.diagonal().add_(amount)
    return out


def errors(gram: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """Squared error of each output over all rows seen: the diagonal of D G Dᵀ."""
    return ((difference @ gram) * difference).sum(1).clamp_min(0.0)


def solve(gram: torch.Tensor, aim: torch.Tensor, start: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The W' that is zero outside ``kept`` and minimises tr(W' G W'ᵀ) - 2 tr(A W'ᵀ), so that W' G = A where it is free.

    ``gram`` G float64 [K, K], symmetric positive (semi)definite with any damping inside; ``aim`` A (W G to come near a
    W), ``start`` (zero outside ``kept``, where the search begins) and the result float64 [O, K]; ``kept`` bool [O, K].
    Cholesky factors of the kept rows and columns when these are small or many outputs have the same mask,
    else conjugate gradients with a diagonal preconditioner on all outputs at once, up to a relative residual of
    1e-5 or 4 rounds of 300 products.
    """
    import torch

    patterns, member = torch.unique(kept, dim=0, return_inverse=True)
    sizes = patterns.sum(1)
    right = (aim - start @ gram) * kept
    if float(sizes.double().pow(3).sum()) <= DIRECT * kept.shape[0] * float(kept.shape[1]) ** 2:
        change = _factorized(gram, right, patterns, member, sizes)
        if change is not None:
            return start + change
    return start + _conjugate_gradients(gram, right, kept)


def _factorized(
    gram: torch.Tensor, right: torch.Tensor, patterns: torch.Tensor, member: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor | None:
    """By Cholesky, patterns of one size in batches; None where a matrix is singular."""
    import torch

    out = torch.zeros_like(right)
    crowd = torch.bincount(member, minlength=len(patterns))
    order = torch.argsort(member, stable=True)
    first = crowd.cumsum(0) - crowd
    for size, many in torch.unique(torch.stack([sizes, crowd], 1), dim=0).tolist():
        alike = ((sizes == size) & (crowd == many)).nonzero()[:, 0]
        if not size:
            continue
        for part in torch.split(alike, max(1, PIECE // size**2)):
            columns = patterns[part].nonzero()[:, 1].reshape(len(part), size)
            outputs = order[first[part][:, None] + torch.arange(many)]
            factor, bad = torch.linalg.cholesky_ex(gram[columns[:, :, None], columns[:, None, :]])
            if bool(bad.any()):
                return None
            wanted = right[outputs[:, :, None], columns[:, None, :]]
            found = torch.cholesky_solve(wanted.transpose(1, 2), factor).transpose(1, 2)
            out[outputs[:, :, None], columns[:, None, :]] = found
    return out if bool(out.isfinite().all()) else None


def _conjugate_gradients(gram: torch.Tensor, right: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """In float32 on the system scaled to a unit diagonal; what is left is measured in float64 and solved again."""
    import torch

    diagonal = gram.diagonal()
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
    unit = (gram * scale * scale[:, None]).float()
    x, residual = torch.zeros_like(right), right
    goal = TOLERANCE * (right * scale).norm(dim=1)
    for _ in range(ROUNDS):
        scaled = residual * scale
        size = scaled.norm(dim=1)
        open_ = (size > goal).nonzero()[:, 0]
        if not len(open_):
            break
        norm = size[open_, None]
        start = (scaled[open_] / norm).float()
        step = _descend(unit, start, kept[open_].float(), (goal[open_] / size[open_]).float())
        x[open_] += step.double() * norm * scale
        residual = right - (x @ gram) * kept
    return x


def _descend(unit: torch.Tensor, residual: torch.Tensor, kept: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Conjugate gradients on all rows at once, each with its mask, until every residual is within its goal."""
    import torch

    x, direction, image = torch.zeros_like(residual), residual.clone(), torch.empty_like(residual)
    left = residual.square().sum(1, keepdim=True)
    for _ in range(ITERATIONS):
        torch.mm(direction, unit, out=image)
        image *= kept
        curve = torch.linalg.vecdot(direction, image)[:, None]
        step = torch.where(curve > 0, left / curve, 0.0)  # a finished or flat row stays
        x.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1.0)
        now = residual.square().sum(1, keepdim=True)
        if bool((now[:, 0] <= goal.square()).all()):
            break
        direction.mul_(torch.where(left > 0, now / left, 0.0)).add_(residual)
        left = now
    return x
