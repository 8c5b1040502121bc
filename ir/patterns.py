"""Sparsity patterns on arrays: does a weight obey its encoding, how much of it is kept."""

from __future__ import annotations

import numpy as np

from bitwright.ir.types import NM, Block, Codebook, Encoding, Unstructured
from bitwright.ir.weights import Array


def grouped(weight: Array, nm: NM) -> Array:
    """``weight`` as [..., groups, group, block] along the pattern's axis, zero-padded at the end of the axis."""
    a = np.moveaxis(weight, nm.axis, -1)
    span = nm.group * nm.block
    tail = -a.shape[-1] % span
    if tail:
        a = np.concatenate([a, np.zeros((*a.shape[:-1], tail), a.dtype)], -1)
    return a.reshape(*a.shape[:-1], -1, nm.group, nm.block)


def keep_in_tail(nm: NM, size: int) -> int:
    """How many blocks of the last, shorter group may be kept: proportional, rounded up."""
    tail = -(-size // nm.block) % nm.group
    return -(-nm.keep * tail // nm.group) if tail else nm.keep


def violation(weight: Array, encoding: Encoding) -> str:
    """Why the values break the encoding, or the empty string."""
    if isinstance(encoding, NM):
        return _nm_violation(weight, encoding)
    if isinstance(encoding, Unstructured) and encoding.count:
        kept, per = weight != 0, encoding.per
        most = max((int(kept[..., i : i + per].sum(-1).max()) for i in range(0, kept.shape[-1], per)), default=0)
        return "" if most <= encoding.count else f"{most} non-zeros in {per}, at most {encoding.count} allowed"
    if isinstance(encoding, Codebook):
        count = len(np.unique(weight))
        return "" if count <= encoding.entries else f"{count} distinct values, at most {encoding.entries} allowed"
    return "" if not isinstance(encoding, Block) or weight.ndim >= 2 else "a block encoding needs two axes"


def _nm_violation(weight: Array, nm: NM) -> str:
    if not -weight.ndim <= nm.axis < weight.ndim:
        return f"axis {nm.axis} is outside a weight of rank {weight.ndim}"
    kept = (grouped(weight, nm) != 0).any(-1)  # [..., groups, group]
    if nm.shared > 1:  # one pattern for `shared` consecutive outputs (axis 0): the union counts
        rows = kept.shape[0]
        pad = -rows % nm.shared
        if pad:
            kept = np.concatenate([kept, np.zeros((pad, *kept.shape[1:]), bool)])
        kept = kept.reshape(-1, nm.shared, *kept.shape[1:]).any(1)
    count = kept.sum(-1)
    if count.size and int(count.max()) > nm.keep:
        where = [int(i) for i in np.unravel_index(int(count.argmax()), count.shape)]
        return f"{int(count.max())} non-zeros in the group at {where}, at most {nm.keep} of {nm.group} allowed"
    if nm.transposable and weight.ndim >= 2:  # of a convolution, every tap is a matrix of outputs x inputs
        return _nm_violation(weight, NM(nm.keep, nm.group, 1 if nm.axis % weight.ndim == 0 else 0))
    return ""


def density(weight: Array) -> float:
    """Share of non-zero elements."""
    return float(np.count_nonzero(weight)) / weight.size if weight.size else 0.0


def kept_magnitude(before: Array, after: Array) -> float:
    """Sum of |after| over sum of |before|."""
    total = float(np.abs(before.astype(np.float64)).sum())
    return float(np.abs(after.astype(np.float64)).sum()) / total if total else 1.0
