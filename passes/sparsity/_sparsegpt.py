"""SparseGPT: columns pruned in turn, the rest of each row making up for it through the inverse Gram matrix.

Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, ICML 2023, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from bitwright.ir.patterns import share
from bitwright.ir.types import NM, Encoding, Unstructured
from bitwright.passes.sparsity._ranking import in_blocks
from bitwright.passes.sparsity.masks import fixed_count_mask, nm_mask, transposable_mask

if TYPE_CHECKING:
    import torch

WIDTH = 128
"""Columns updated one by one before the rest of the matrix follows in one product."""

Choose = Callable[["torch.Tensor", int], "torch.Tensor"]
"""From the saliency of some columns [O, columns] and the first column's number, what is kept of them."""


def rule(encoding: Encoding | None, kept: torch.Tensor, axis: int, rank: int) -> tuple[Choose, int] | str:
    """How a pattern is chosen again, column span by column span, and how long a span is; or why it is not.

    ``kept``: the mask now, bool [O, taps * inputs]; ``axis``: the axis of the weight, of that rank, that is summed
    over. Without a fixed pattern a span keeps as many entries as it has now.
    """
    free = isinstance(encoding, Unstructured) and not encoding.count and encoding.block == 1
    if isinstance(encoding, (NM, Unstructured)) and not free and encoding.axis % rank != axis:
        return f"{encoding} does not lie along the inputs"
    if isinstance(encoding, NM):
        e = encoding
        if not e.transposable:
            return (lambda s, _: nm_mask(s, e.keep, e.group, 1, e.shared, e.block)), e.group * e.block
        if e.block == e.shared == 1:
            return (lambda s, _: transposable_mask(s, e.keep, e.group)), e.group
    if isinstance(encoding, Unstructured) and encoding.count:
        u = encoding

        def fixed(s: torch.Tensor, _: int) -> torch.Tensor:
            run = -(-s.shape[1] // u.block)  # the last run may be shorter
            return fixed_count_mask(s, share(u.count, u.per, run), run, 1, u.block)

        return fixed, u.per * u.block
    if encoding is not None and not isinstance(encoding, Unstructured):
        return f"{encoding} is not chosen by saliency"

    block = encoding.block if isinstance(encoding, Unstructured) else 1

    def as_many(s: torch.Tensor, at: int) -> torch.Tensor:
        now = in_blocks(kept[:, at : at + s.shape[1]].float(), block) > 0
        score = in_blocks(s, block)
        chosen = _largest(score.reshape(1, -1), int(now.sum())).reshape(score.shape)
        return chosen.repeat_interleave(block, 1)[:, : s.shape[1]] if block > 1 else chosen

    return as_many, max(1, WIDTH // block) * block


def _largest(s: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` largest of each row, the first of equals."""
    import torch

    order = torch.sort(s, dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros(s.shape, dtype=torch.bool).scatter_(1, order, True)


def _blocks(size: int, taps: int, span: int) -> Iterator[list[tuple[int, int]]]:
    """Spans of columns that never cross a tap, gathered into blocks of about WIDTH columns."""
    block: list[tuple[int, int]] = []
    per = size // taps
    for tap in range(taps):
        for at in range(0, per, span):
            block.append((tap * per + at, tap * per + min(at + span, per)))
            if block[-1][1] - block[0][0] >= WIDTH:
                yield block
                block = []
    if block:
        yield block


def inverse_root(gram: torch.Tensor) -> torch.Tensor | None:
    """The upper U with UᵀU = G⁻¹; None when the matrix is singular. Inputs that are always zero count as one."""
    import torch

    g = gram.clone()
    dead = g.diagonal() <= 0
    g.diagonal()[dead] = 1.0
    factor, bad = torch.linalg.cholesky_ex(g)
    if bool(bad):
        return None
    upper, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    return None if bool(bad) or not bool(upper.isfinite().all()) else upper


def prune(
    root: torch.Tensor, dense: torch.Tensor, kept: torch.Tensor, taps: int = 1, choose: tuple[Choose, int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pruned weight float64 [O, K] and its mask; ``root`` as from :func:`inverse_root`.

    ``choose``: a rule by which each span of columns gets its mask when its turn comes, by the saliency w² / [G⁻¹]ₖₖ
    of the columns left; None keeps the mask ``kept``.
    """
    import torch

    w, mask, size = dense.clone(), kept.clone(), dense.shape[1]
    for spans in _blocks(size, taps, choose[1] if choose else WIDTH):
        begin, end = spans[0][0], spans[-1][1]
        missed = torch.zeros(len(w), end - begin, dtype=w.dtype)
        for at, to in spans:
            if choose is not None:
                mask[:, at:to] = choose[0](w[:, at:to].square() / root.diagonal()[at:to].square(), at)
            for k in range(at, to):
                miss = torch.where(mask[:, k], 0.0, w[:, k]) / root[k, k]
                w[:, k:end].addr_(miss, root[k, k:end], alpha=-1.0)
                missed[:, k - begin] = miss
        w[:, end:].addmm_(missed, root[begin:end, end:], alpha=-1.0)
    return torch.where(mask, w, 0.0), mask
