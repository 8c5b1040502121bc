"""Unbiased stochastic N:M masks of minimum variance, for gradients and activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import NM
from bitwright.passes.sparsity._magnitude import check_axis, floats, share

if TYPE_CHECKING:
    import torch


ROUNDING = 1e-12
"""A probability this near to one is one."""


def mvue_mask(
    values: torch.Tensor,
    keep: int,
    group: int,
    axis: int = -1,
    generator: torch.Generator | None = None,
    method: Literal["optimal", "two-draw"] = "optimal",
    name: str = "values",
) -> torch.Tensor:
    """Values with at most ``keep`` non-zeros in every ``group`` along ``axis``, whose expectation is ``values``.

    Element i is kept with probability p_i and then becomes a_i/p_i. ``optimal``: p_i = min(1, c|a_i|), the least
    variance there is. ``two-draw`` (keep 2): two draws without replacement in proportion to |a_i|, at most twice
    that variance. A shorter last group keeps its share rounded up. Raises :class:`InvalidInput` for integers, NaN
    and infinities. Equal generator states give equal results; without one, torch's own is used.
    """
    import torch

    NM(keep, group, axis)
    if method not in ("optimal", "two-draw"):
        raise InvalidInput(f"method is optimal or two-draw, not {method!r}")
    if method == "two-draw" and keep != 2:
        raise InvalidInput(f"two-draw keeps 2 of a group, not {keep}")
    check_axis(values, axis, name)
    a = floats(values, name).movedim(axis, -1)
    size = a.shape[-1]
    full = size - size % group
    parts = []
    for part, n in ((a[..., :full], group), (a[..., full:], size % group)):
        if part.numel():
            groups = part.reshape(-1, n).double()
            top = groups.abs().amax(-1, keepdim=True)
            unit = groups.abs() / torch.where(top > 0, top, 1.0)
            kept = share(keep, group, n)
            two = method == "two-draw" and kept == 2
            p, chosen = _two_draw(unit, generator) if two else _optimal(unit, kept, generator)
            scaled = torch.where(p < 1.0, groups / torch.where(p > 0, p, 1.0), groups)
            parts.append(torch.where(chosen & (groups != 0), scaled, 0.0).reshape(part.shape))
    out = torch.cat(parts, -1) if parts else a
    return _cast(out, values.dtype).movedim(-1, axis)


def _cast(out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To the type of the input; what would overflow to infinity saturates."""
    import torch

    limit = torch.finfo(dtype).max
    return out.clamp(-limit, limit).to(dtype)


def inclusion(a: torch.Tensor, keep: int) -> torch.Tensor:
    """p_i = min(1, c a_i) with sum ``keep`` for magnitudes [groups, n]: water-filling, at most ``keep`` clamps."""
    import torch

    sure = torch.zeros_like(a, dtype=torch.bool)
    for _ in range(keep):
        rest = torch.where(sure, 0.0, a)
        c = (keep - sure.sum(-1, keepdim=True)) / rest.sum(-1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
        reached = sure | (rest * c >= 1.0 - ROUNDING)
        if torch.equal(reached, sure):
            break
        sure = reached
    rest = torch.where(sure, 0.0, a)
    c = (keep - sure.sum(-1, keepdim=True)) / rest.sum(-1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
    return torch.where(sure, 1.0, (rest * c).clamp(max=1.0))


Sample = tuple["torch.Tensor", "torch.Tensor"]
"""Probabilities and what was chosen."""


def _optimal(a: torch.Tensor, keep: int, generator: torch.Generator | None) -> Sample:
    """Systematic sampling: one uniform number a group; chosen where an integer falls in the running sum."""
    import torch

    p = inclusion(a, keep)
    sure = p >= 1.0
    ends = torch.where(sure, 0.0, p).cumsum(-1)
    ends[:, -1] = ends[:, -1].round()  # the sum is an integer but for rounding: never one element more
    u = torch.rand((len(a), 1), generator=generator, dtype=torch.float64)
    passed = torch.floor(ends + u)
    hit = torch.diff(passed, dim=-1, prepend=torch.zeros_like(u)) > 0
    return p, hit | sure


def two_draw_inclusion(a: torch.Tensor) -> torch.Tensor:
    """p_i that one of two draws without replacement, in proportion to magnitudes [groups, n], takes i."""
    import torch

    n = a.shape[-1]
    others = a @ (1.0 - torch.eye(n, dtype=a.dtype))  # sums without the element: nothing cancels
    total = a.sum(-1, keepdim=True)
    t = a / torch.where(total > 0, total, 1.0)
    second = t / torch.where(others > 0, others, 1.0) * (others > 0)
    return (t + a * (second @ (1.0 - torch.eye(n, dtype=a.dtype)))).clamp(max=1.0)


def _two_draw(a: torch.Tensor, generator: torch.Generator | None) -> Sample:
    import torch

    p, left = two_draw_inclusion(a), a
    kept = torch.zeros_like(a, dtype=torch.bool)
    for _ in range(2):
        ends = left.cumsum(-1)
        u = torch.rand((len(a), 1), generator=generator, dtype=torch.float64)
        drawn = (ends <= u * ends[:, -1:]).sum(-1, keepdim=True).clamp(max=a.shape[-1] - 1)
        kept.scatter_(-1, drawn, True)
        left = torch.where(kept, 0.0, left)
    return p, kept
