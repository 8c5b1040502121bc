"""Ranking of scores: which entries of every group are the largest, ties to the lower index; torch, in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bitwright.ir.patterns import keep_in_tail
from bitwright.ir.types import NM

if TYPE_CHECKING:
    import torch


PIECE = 1 << 18
"""Elements ranked at a time: what is compared stays in the caches."""
COUNTED = 32
"""Groups up to this size are ranked by counting who is larger."""


def best(rows: torch.Tensor, count: int) -> torch.Tensor:
    """True at the ``count`` largest of each row [rows, n], equals in index order."""
    import torch

    kept = torch.empty(rows.shape, dtype=torch.bool)
    step = max(1, PIECE // rows.shape[1])
    for s, into in zip(torch.split(rows, step), torch.split(kept, step), strict=True):
        if s.shape[1] <= COUNTED:
            torch.lt(_rank(s), count, out=into)
        else:
            into.copy_(_select(s, count))
    return kept


def _select(s: torch.Tensor, count: int) -> torch.Tensor:
    """What exceeds the count-th largest of a row, then as many of its equals as there is room for."""
    import torch

    limit = s.kthvalue(s.shape[1] - count + 1, dim=-1, keepdim=True).values
    over, equal = s > limit, s == limit
    room = count - over.sum(-1, keepdim=True, dtype=torch.int32)
    return over | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def in_blocks(score: torch.Tensor, block: int) -> torch.Tensor:
    """Scores of ``block`` consecutive entries of the last axis added up; the last block may be shorter."""
    import torch

    if block == 1:
        return score
    padded = torch.nn.functional.pad(score, (0, -score.shape[-1] % block))
    return padded.reshape(*score.shape[:-1], -1, block).sum(-1)


def share_rows(score: torch.Tensor, shared: int, choose: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Choose on the scores summed over every ``shared`` rows of axis 0, and give each row the result."""
    import torch

    if shared == 1 or score.dim() == 1:
        return choose(score)
    rows = score.shape[0]
    padded = torch.cat([score, score.new_zeros((-rows % shared, *score.shape[1:]))])
    chosen = choose(padded.reshape(-1, shared, *padded.shape[1:]).sum(1))
    return chosen.repeat_interleave(shared, 0)[:rows]


def largest(score: torch.Tensor, nm: NM, size: int) -> torch.Tensor:
    """The kept entries of the last axis, group by group."""
    import torch

    blocks = score.shape[-1]
    s = torch.nn.functional.pad(score, (0, -blocks % nm.group), value=-1.0) if blocks % nm.group else score
    kept = best(s.reshape(-1, nm.group), nm.keep).view(s.shape)
    if blocks % nm.group:
        last = slice(blocks - blocks % nm.group, None)
        kept[..., last] = best(s[..., last].reshape(-1, nm.group), keep_in_tail(nm, size)).view(kept[..., last].shape)
    return kept[..., :blocks]


def _rank(s: torch.Tensor) -> torch.Tensor:
    """Place of each element in its group, largest first, equals in index order."""
    import torch

    columns = s.movedim(-1, 0).contiguous()
    ranks = torch.zeros_like(columns, dtype=torch.int8)
    for j in range(1, len(columns)):
        ahead = (columns[j] > columns[:j]).to(torch.int8)  # an equal one stays behind the earlier index
        ranks[:j] += ahead
        ranks[j] += j - ahead.sum(0, dtype=torch.int8)
    return ranks.movedim(0, -1)
