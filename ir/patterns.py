"""Sparsity patterns on arrays: does a weight obey its encoding, how much of it is kept."""

from __future__ import annotations

import numpy as np

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
    if isinstance(encoding, Codebook):
        count = len(np.unique(weight))
        return "" if count <= encoding.entries else f"{count} distinct values, at most {encoding.entries} allowed"
    return "" if not isinstance(encoding, Block) or weight.ndim >= 2 else "a block encoding needs two axes"


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


def density(weight: Array) -> float:
    """Share of non-zero elements."""
    return float(np.count_nonzero(weight)) / weight.size if weight.size else 0.0


def kept_magnitude(before: Array, after: Array) -> float:
    """Sum of |after| over sum of |before|."""
    total = float(np.abs(before.astype(np.float64)).sum())
    return float(np.abs(after.astype(np.float64)).sum()) / total if total else 1.0
