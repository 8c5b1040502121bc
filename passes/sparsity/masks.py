"""N:M masks on tensors: the largest magnitudes of every group, ties to the lower index."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.patterns import keep_in_tail
from bitwright.ir.types import NM
from bitwright.ir.weights import Array
from bitwright.passes.sparsity._diversity import mask_diversity, pattern_from_density
from bitwright.passes.sparsity._magnitude import check_axis, floats
from bitwright.passes.sparsity._mvue import mvue_mask
from bitwright.passes.sparsity._transposable import transposable_mask

if TYPE_CHECKING:
    import torch


PIECE = 1 << 18
"""Elements ranked at a time: what is compared stays in the caches."""


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
    if shared < 1 or block < 1:
        raise InvalidInput(f"{name}: shared and block are at least 1, not {shared} and {block}")
    check_axis(weight, axis, name)
    score = floats(weight, name).abs().movedim(axis, -1)
    size = score.shape[-1]
    blocks = -(-size // block)
    if block > 1:
        score = (
            torch.nn.functional.pad(score, (0, blocks * block - size)).reshape(*score.shape[:-1], blocks, block).sum(-1)
        )
    kept = _share(score, shared, lambda s: _largest(s, nm, size))
    kept = kept.repeat_interleave(block, -1)[..., :size] if block > 1 else kept
    return kept.movedim(-1, axis)


def _share(score: torch.Tensor, shared: int, choose: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Choose on the scores summed over every ``shared`` rows of axis 0, and give each row the result."""
    import torch

    if shared == 1 or score.dim() == 1:
        return choose(score)
    rows = score.shape[0]
    padded = torch.cat([score, score.new_zeros((-rows % shared, *score.shape[1:]))])
    chosen = choose(padded.reshape(-1, shared, *padded.shape[1:]).sum(1))
    return chosen.repeat_interleave(shared, 0)[:rows]


def _largest(score: torch.Tensor, nm: NM, size: int) -> torch.Tensor:
    """The kept entries of the last axis, group by group."""
    import torch

    blocks = score.shape[-1]
    s = torch.nn.functional.pad(score, (0, -blocks % nm.group), value=-1.0) if blocks % nm.group else score
    kept = torch.empty(s.shape, dtype=torch.bool)
    flat, out = s.reshape(-1, nm.group), kept.view(-1, nm.group)
    step = PIECE // nm.group
    for part, into in zip(torch.split(flat, step), torch.split(out, step), strict=True):
        torch.lt(_rank(part), nm.keep, out=into)
    if blocks % nm.group:
        last = slice(blocks - blocks % nm.group, None)
        kept[..., last] = _rank(s[..., last]) < keep_in_tail(nm, size)
    return kept[..., :blocks]


def _rank(s: torch.Tensor) -> torch.Tensor:
    """Place of each element in its group, largest first, equals in index order."""
    import torch

    group = s.shape[-1]
    if group > 8:
        order = torch.sort(s, dim=-1, descending=True, stable=True).indices
        return torch.empty_like(order).scatter_(-1, order, torch.arange(group).expand_as(order))
    columns = s.movedim(-1, 0).contiguous()
    ranks = torch.zeros_like(columns, dtype=torch.int8)
    for j in range(1, group):
        ahead = (columns[j] > columns[:j]).to(torch.int8)  # an equal one stays behind the earlier index
        ranks[:j] += ahead
        ranks[j] += j - ahead.sum(0, dtype=torch.int8)
    return ranks.movedim(0, -1)


def nm_mask_array(
    weight: Array, keep: int, group: int, axis: int = -1, shared: int = 1, block: int = 1, name: str = "weight"
) -> Array:
    """:func:`nm_mask` on a NumPy array."""
    from bitwright.ir.interpret import to_torch

    kept: Array = nm_mask(to_torch(weight), keep, group, axis, shared, block, name).numpy()
    return kept if kept.flags.c_contiguous else np.ascontiguousarray(kept)


__all__ = [
    "Pattern",
    "mask_diversity",
    "mvue_mask",
    "nm_mask",
    "nm_mask_array",
    "pattern_from_density",
    "transposable_mask",
]
