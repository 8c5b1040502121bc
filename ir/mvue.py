"""The arithmetic of unbiased sparse groups: which entries stay, and what they become.

Float64, in an order that is part of the definition, so that a kernel gets the same bits: sums run from the first entry
of a group to the last, and no product is ever added to anything, so that no multiply-add can round differently.
Source: arXiv 2203.10991, with the case split of the paper replaced by water-filling (the same optimum, any pattern).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Method = Literal["optimal", "two-draw"]
NEAR = 1.0 - 1e-12
"""A probability this near to one is one."""


def sparse_groups(
    a: torch.Tensor, keep: int, method: Method, u: torch.Tensor, limit: float = float("inf")
) -> torch.Tensor:
    """Magnitudes [groups, n] with at most ``keep`` of each group left, unbiased over uniform ``u`` [groups, 1 or 2].

    ``two-draw`` (for keep 2; else, as in a short last group, optimal) uses both numbers of a group, ``optimal`` the
    first. Entries that are certain to stay are unchanged; others become a_i/p_i, ``limit`` at most.
    """
    rows = a.T.contiguous()  # a group is a column: every step below acts on all groups at once
    if method == "two-draw" and keep == 2:
        return _two_draw(rows, u[:, 0], u[:, 1], limit).T
    return _systematic(rows, keep, u[:, 0], limit).T


def _fill(a: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which entries are certain, the sum of the others, and how many of those may stay: p_i = min(1, left a_i/sum)."""
    import torch

    sure = torch.zeros_like(a, dtype=torch.bool)
    for _ in range(keep):
        rest = torch.where(sure, 0.0, a)
        total, left = rest.cumsum(0)[-1], (keep - sure.sum(0)).to(a.dtype)
        reached = sure | ((rest * left >= total * NEAR) & (rest > 0))
        if a.device.type != "meta" and torch.equal(reached, sure):
            break
        sure = reached
    return sure, torch.where(sure, 0.0, a).cumsum(0)[-1], (keep - sure.sum(0)).to(a.dtype)


def _systematic(a: torch.Tensor, keep: int, u: torch.Tensor, limit: float) -> torch.Tensor:
    """One number a group: an entry stays when the running sum of probabilities passes u, 1 + u, 2 + u, ..."""
    import torch

    sure, total, left = _fill(a, keep)
    level = (total / left).clamp(max=limit)
    passed = torch.where(sure, 0.0, a).cumsum(0) * (left / total)
    taken, out = torch.zeros_like(total), torch.empty_like(a)
    for j in range(len(a)):
        hit = (passed[j] > taken + u) & (taken < left) & (a[j] > 0) & ~sure[j]
        taken = taken + hit
        out[j] = torch.where(sure[j], a[j], torch.where(hit, level, 0.0))
    return out


def _two_draw_value(a: torch.Tensor) -> torch.Tensor:
    """a_i/p_i with p_i = a_i (1/S + sum over j != i of (a_j/S)/(S - a_j)), the probability that two draws take i."""
    import torch

    total = a.cumsum(0)[-1]
    others, second = torch.zeros_like(a), torch.zeros_like(a)
    for j in range(len(a)):
        others = others + _but(j, a)
    ratio = torch.where(others > 0, (a / total) / others, 0.0)
    for j in range(len(a)):
        second = second + _but(j, ratio)
    return torch.maximum(1.0 / (1.0 / total + second), a)


def _but(j: int, a: torch.Tensor) -> torch.Tensor:
    """Row j for every row, and 0 for row j itself: sums of these cancel nothing."""
    import torch

    out = a[j].expand_as(a).clone()
    out[j] = torch.zeros_like(a[j])
    return out


def _two_draw(a: torch.Tensor, u: torch.Tensor, v: torch.Tensor, limit: float) -> torch.Tensor:
    """Two draws without replacement, each in proportion to what is left."""
    import torch

    value, left = _two_draw_value(a).clamp(max=limit), a
    place = torch.arange(len(a), device=a.device)[:, None]
    kept = torch.zeros_like(a, dtype=torch.bool)
    for number in (u, v):
        ends = left.cumsum(0)
        drawn = (ends <= number * ends[-1]).sum(0).clamp(max=len(a) - 1)
        kept = kept | (place == drawn)
        left = torch.where(kept, 0.0, left)
    return torch.where(kept & (a > 0), value, 0.0)


def inclusion(a: torch.Tensor, keep: int) -> torch.Tensor:
    """p_i = min(1, c a_i) with sum ``keep`` for magnitudes [groups, n] of float64: the least variance there is."""
    import torch

    rows = a.T.contiguous()
    sure, total, left = _fill(rows, keep)
    p = torch.where(total > 0, rows * (left / total), 0.0)
    return torch.where(sure, 1.0, p.clamp(max=1.0)).T


def two_draw_inclusion(a: torch.Tensor) -> torch.Tensor:
    """p_i that one of two draws without replacement, in proportion to magnitudes [groups, n], takes i."""
    import torch

    return torch.where(a > 0, a / _two_draw_value(a.T.contiguous()).T, 0.0)
