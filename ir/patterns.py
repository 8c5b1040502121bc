"""Sparsity patterns on arrays: does a weight obey its encoding, how much of it is kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.types import NM, Block, Codebook, Encoding, Unstructured
from bitwright.ir.weights import Array


def grouped(weight: Array, group: int, axis: int, block: int = 1) -> Array:
    """``weight`` as [..., groups, group, block] along an axis, zero-padded at the end of the axis."""
    a = np.moveaxis(weight, axis, -1)
    tail = -a.shape[-1] % (group * block)
    if tail:
        a = np.concatenate([a, np.zeros((*a.shape[:-1], tail), a.dtype)], -1)
    return a.reshape(*a.shape[:-1], -1, group, block)


def share(keep: int, group: int, size: int) -> int:
    """What a shorter group of ``size`` may keep: its proportional share, rounded up."""
    return -(-keep * size // group)


def keep_in_tail(nm: NM, size: int) -> int:
    """How many blocks of the last, shorter group may be kept: proportional, rounded up."""
    tail = -(-size // nm.block) % nm.group
    return share(nm.keep, nm.group, tail) if tail else nm.keep


def violation(weight: Array, encoding: Encoding) -> str:
    """Why the values break the encoding, or the empty string."""
    if isinstance(encoding, NM):
        why = _too_many(weight, encoding.keep, encoding.group, encoding.axis, encoding.shared, encoding.block)
        if why or not encoding.transposable or weight.ndim < 2:
            return why
        # of a convolution, every tap is a matrix of outputs x inputs
        return _too_many(weight, encoding.keep, encoding.group, 1 if encoding.axis % weight.ndim == 0 else 0)
    if isinstance(encoding, Unstructured) and encoding.count:
        return _too_many(weight, encoding.count, encoding.per, encoding.axis, block=encoding.block)
    if isinstance(encoding, Unstructured) and encoding.kept < 1.0:
        share_of = kept_blocks(weight, encoding.axis, encoding.block)
        return "" if share_of <= encoding.kept else f"{share_of:.4%} of the blocks are kept, not {encoding.kept:.4%}"
    if isinstance(encoding, Codebook):
        count = len(np.unique(weight))
        return "" if count <= encoding.entries else f"{count} distinct values, at most {encoding.entries} allowed"
    return "" if not isinstance(encoding, Block) or weight.ndim >= 2 else "a block encoding needs two axes"


def tightest_keeps(weight: Array, groups: Iterable[int], axis: int, block: int = 1) -> dict[int, int]:
    """The smallest keep that holds for each group along ``axis``; groups that keep everything are left out.

    With ``block`` the groups count blocks of so many elements. Groups longer than the axis are left out, a shorter
    last group holds its share. Dense weights are given up after a few thousand elements. Groups up to 255.
    """
    rows = np.moveaxis(weight, axis, -1)
    size = rows.shape[-1]
    blocks, per_row = -(-size // block), max(1, rows[0].size) if len(rows) else 1
    held = {g: 0 for g in groups if 1 < g <= blocks}
    start, step = 0, max(1, _FIRST // per_row)
    while held and start < len(rows):
        kept: Array = np.ascontiguousarray(rows[start : start + step] != 0).reshape(-1, size)
        kept = np.any(grouped(kept, 1, -1, block), (-1, -2)) if block > 1 else kept
        ends = np.zeros((len(kept), blocks + 1), np.uint8)  # running counts; differences are right modulo 256
        np.cumsum(kept, axis=-1, dtype=np.uint8, out=ends[:, 1:])
        held = {g: k for g, least in held.items() if (k := max(least, _least_keep(ends, g))) < g}
        start, step = start + step, max(1, _PIECE // per_row)
    return {g: k for g, k in held.items() if k}


_FIRST, _PIECE = 1 << 13, 1 << 20
"""Elements looked at first and at a time."""


def _least_keep(ends: Array, group: int) -> int:
    """The smallest keep for rows with these running counts."""
    marks, tail = ends[:, ::group], (ends.shape[1] - 1) % group
    keep = int((marks[:, 1:] - marks[:, :-1]).max(initial=0))
    last = int((ends[:, -1] - marks[:, -1]).max(initial=0)) if tail else 0
    return max(keep, (last - 1) * group // tail + 1) if last else keep


def _too_many(weight: Array, keep: int, group: int, axis: int, shared: int = 1, block: int = 1) -> str:
    """Where a group along the axis has more non-zeros than it may, or the empty string."""
    if not -weight.ndim <= axis < weight.ndim:
        return f"axis {axis} is outside a weight of rank {weight.ndim}"
    blocks = grouped(weight != 0, group, axis, block)  # [..., groups, group, block]
    kept: Array = np.any(blocks, -1) if block > 1 else blocks[..., 0]
    if shared > 1:  # one pattern for `shared` consecutive outputs (axis 0): the union counts
        rows = kept.shape[0]
        pad = -rows % shared
        if pad:
            kept = np.concatenate([kept, np.zeros((pad, *kept.shape[1:]), bool)])
        kept = np.any(kept.reshape(-1, shared, *kept.shape[1:]), 1)
    count = kept.sum(-1, dtype=np.int32)
    if not count.size:
        return ""
    tail = -(-weight.shape[axis] // block) % group
    allowed = np.full(count.shape[-1], keep)
    allowed[-1] = share(keep, group, tail) if tail else keep
    if bool((count <= allowed).all()):
        return ""
    where = [int(i) for i in np.unravel_index(int((count - allowed).argmax()), count.shape)]
    most, size = int(allowed[where[-1]]), tail if tail and where[-1] == count.shape[-1] - 1 else group
    return f"{int(count[tuple(where)])} non-zeros in the group at {where}, at most {most} of {size} allowed"


def kept_blocks(weight: Array, axis: int, block: int = 1) -> float:
    """Share of the blocks of ``block`` consecutive elements along ``axis`` that hold a non-zero."""
    if block == 1 or not weight.size:
        return density(weight)
    return density(np.any(grouped(weight != 0, 1, axis, block), (-1, -2)))


def density(weight: Array) -> float:
    """Share of non-zero elements."""
    return float(np.count_nonzero(weight)) / weight.size if weight.size else 0.0


def kept_magnitude(before: Array, after: Array) -> float:
    """Sum of |after| over sum of |before|."""
    total = float(np.abs(before.astype(np.float64)).sum())
    return float(np.abs(after.astype(np.float64)).sum()) / total if total else 1.0


@cache
def transposable_patterns() -> NDArray[np.bool_]:
    """[90, 4, 4]: the 2:4 masks of a 4x4 block with two kept in every row and column, in the order of their numbers."""
    pairs = list(itertools.combinations(range(4), 2))
    grids = (np.array([[j in pair for j in range(4)] for pair in rows]) for rows in itertools.product(pairs, repeat=4))
    return np.stack([g for g in grids if (g.sum(0) == 2).all()])
