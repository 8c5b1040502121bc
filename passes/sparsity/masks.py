"""Masks on tensors: the largest magnitudes of every group or run, ties to the lower index."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import NM, Unstructured
from bitwright.ir.weights import Array
from bitwright.passes.sparsity._diversity import mask_diversity, pattern_from_density
from bitwright.passes.sparsity._magnitude import check_axis, floats, share
from bitwright.passes.sparsity._mvue import mvue_mask
from bitwright.passes.sparsity._ranking import best, in_blocks, largest, share_rows
from bitwright.passes.sparsity._transposable import transposable_mask

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Pattern:
    """``keep`` of every ``group``, written ``2:4``.

    >>> Pattern.parse("2:4"), str(Pattern(1, 8))
    (Pattern(keep=2, group=4), '1:8')
    """

    keep: int
    group: int

    def __post_init__(self) -> None:
        self.along(0)

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read ``keep:group``; raises :class:`InvalidInput`."""
        m = re.fullmatch(r"(\d+):(\d+)", text)
        if not m:
            raise InvalidInput(f"{text!r} is not a pattern such as 2:4 (kept : group)")
        return Pattern(int(m[1]), int(m[2]))

    def along(self, axis: int, shared: int = 1, block: int = 1) -> NM:
        """The encoding of this pattern along an axis."""
        return NM(self.keep, self.group, axis, shared, block)


def nm_mask(
    weight: torch.Tensor, keep: int, group: int, axis: int = -1, shared: int = 1, block: int = 1, name: str = "weight"
) -> torch.Tensor:
    """True where an element is kept: the ``keep`` largest magnitudes of every ``group`` along ``axis``.

    ``block`` consecutive elements are scored and kept together; ``shared`` consecutive rows of axis 0 carry one
    mask. A shorter last group keeps its proportional share, rounded up. Raises :class:`InvalidInput` for
    integers, NaN and infinities, quoting ``name``.
    """
    import torch

    nm = NM(keep, group, axis, shared, block)
    check_axis(weight, axis, name)
    score = floats(weight, name).abs().movedim(axis, -1)
    size = score.shape[-1]
    if not score.numel():
        return torch.zeros(weight.shape, dtype=torch.bool)
    kept = share_rows(in_blocks(score, block), shared, lambda s: largest(s, nm, size))
    kept = kept.repeat_interleave(block, -1)[..., :size] if block > 1 else kept
    return kept.movedim(-1, axis)


def fixed_count_mask(
    weight: torch.Tensor, count: int, per: int, axis: int = -1, block: int = 1, name: str = "weight"
) -> torch.Tensor:
    """True where an element is kept: the ``count`` largest magnitudes of every ``per`` elements along ``axis``.

    Like :func:`nm_mask` without its limit: ``per`` is anything up to the whole axis. The lower index wins ties, a
    shorter last run keeps its proportional share, rounded up. With ``block`` consecutive elements are scored and
    kept together; count and per then count blocks. Besides the result, memory for one score in float32 and for
    what is ranked at a time. Raises :class:`InvalidInput` for integers, NaN and infinities, quoting ``name``.
    """
    import torch

    Unstructured(count, per, axis, block)
    if count < 1:
        raise InvalidInput(f"{name}: a fixed count needs 1 <= count <= per, got {count} per {per}")
    check_axis(weight, axis, name)
    score = floats(weight, name).abs().movedim(axis, -1)
    size = score.shape[-1]
    if not score.numel():
        return torch.zeros(weight.shape, dtype=torch.bool)
    score = in_blocks(score, block)
    if per > score.shape[-1]:
        what = f"blocks of {block}" if block > 1 else "elements"
        raise InvalidInput(f"{name} has {score.shape[-1]} {what} along axis {axis}, fewer than per={per}")
    kept = torch.empty(score.shape, dtype=torch.bool)
    full = score.shape[-1] - score.shape[-1] % per
    for part, into in ((score[..., :full], kept[..., :full]), (score[..., full:], kept[..., full:])):
        if part.numel():
            run = min(per, part.shape[-1])
            into.copy_(best(part.reshape(-1, run), share(count, per, run)).reshape(part.shape))
    kept = kept.repeat_interleave(block, -1)[..., :size] if block > 1 else kept
    return kept.movedim(-1, axis)


def fixed_count_mask_array(weight: Array, encoding: Unstructured, name: str = "weight") -> Array:
    """:func:`fixed_count_mask` on a NumPy array, by its encoding."""
    from bitwright.ir.interpret import to_torch

    e = encoding
    kept: Array = fixed_count_mask(to_torch(weight), e.count, e.per, e.axis, e.block, name).numpy()
    return kept if kept.flags.c_contiguous else np.ascontiguousarray(kept)


def nm_mask_array(
    weight: Array, keep: int, group: int, axis: int = -1, shared: int = 1, block: int = 1, name: str = "weight"
) -> Array:
    """:func:`nm_mask` on a NumPy array."""
    from bitwright.ir.interpret import to_torch

    kept: Array = nm_mask(to_torch(weight), keep, group, axis, shared, block, name).numpy()
    return kept if kept.flags.c_contiguous else np.ascontiguousarray(kept)


__all__ = [
    "Pattern",
    "fixed_count_mask",
    "fixed_count_mask_array",
    "mask_diversity",
    "mvue_mask",
    "nm_mask",
    "nm_mask_array",
    "pattern_from_density",
    "transposable_mask",
]
