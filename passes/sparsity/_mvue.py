"""Unbiased stochastic N:M masks of minimum variance, for gradients and activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitwright.ir.errors import InvalidInput
from bitwright.ir.mvue import Method, inclusion, sparse_groups, two_draw_inclusion
from bitwright.ir.types import NM
from bitwright.passes.sparsity._magnitude import check_axis, floats, share

if TYPE_CHECKING:
    import torch


PIECE = 1 << 16
"""Elements worked on at a time: they stay in the caches."""


def mvue_mask(
    values: torch.Tensor,
    keep: int,
    group: int,
    axis: int = -1,
    generator: torch.Generator | None = None,
    method: Method = "optimal",
    name: str = "values",
) -> torch.Tensor:
    """Values with at most ``keep`` non-zeros in every ``group`` along ``axis``, whose expectation is ``values``.

    Element i is kept with probability p_i and then becomes a_i/p_i. ``optimal``: p_i = min(1, c|a_i|), the least
    variance there is. ``two-draw`` (keep 2): two draws without replacement in proportion to |a_i|, at most twice
    that variance. A shorter last group keeps its share rounded up. Raises :class:`InvalidInput` for integers, NaN
    and infinities. Equal generator states give equal results; without one, torch's own is used. The arithmetic is
    that of the ``unbiased_mask`` operator (``ir/mvue.py``), whose random numbers are counted instead.
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
            kept = share(keep, group, n)
            pieces = [_sparse(g, kept, method, generator) for g in torch.split(part.reshape(-1, n), PIECE // n)]
            parts.append(torch.cat(pieces).reshape(part.shape))
    out = torch.cat(parts, -1) if parts else a
    return _cast(torch.where(out == 0, 0.0, out), values.dtype).movedim(-1, axis)


def _sparse(groups: torch.Tensor, kept: int, method: Method, generator: torch.Generator | None) -> torch.Tensor:
    """Float64 groups [groups, n] with ``kept`` of each left."""
    import torch

    groups = groups.double()
    _, top = torch.frexp(groups.abs().amax(-1, keepdim=True))
    top = top.clamp(-1000, 1000)  # scaling by a power of two rounds nothing
    u = torch.rand((len(groups), 2 if method == "two-draw" else 1), generator=generator, dtype=torch.float64)
    unit = sparse_groups(torch.ldexp(groups.abs(), -top), kept, method, u)
    return torch.copysign(torch.ldexp(unit, top), groups)


def _cast(out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To the type of the input; what would overflow to infinity saturates."""
    import torch

    limit = torch.finfo(dtype).max
    return out.clamp(-limit, limit).to(dtype)


__all__ = ["inclusion", "mvue_mask", "two_draw_inclusion"]
