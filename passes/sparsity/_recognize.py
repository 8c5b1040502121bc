"""Which pattern weights obey: the tightest N:M of elements or blocks, who shares it, whether it holds both ways."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from bitwright.ir.patterns import keep_in_tail, kept_blocks, tightest_keeps, violation
from bitwright.ir.target import Target
from bitwright.ir.types import F32, NM, DType, Unstructured
from bitwright.ir.weights import Array
from bitwright.passes.sparsity._masking import PAYS

GROUPS = (*range(2, 17), 32, 64)
BLOCK, BLOCK_GROUPS = 4, range(2, 17)
SHARED = (64, 32, 16, 4)
"""Numbers of outputs that may carry one pattern, most first."""
CHANCE = 1e-3
"""A pattern that zeros in no order would obey with a higher probability says nothing."""
HALF = 0.5
CLEARLY = 1.05
"""A wider group must be so much faster than a smaller one, which says more."""
TOGETHER = 1.02
"""So many more elements than are not zero may lie in blocks that are called kept."""
FEW = 256
"""Outputs that are looked at first."""


def recognize(weight: Array, axis: int, nonzero: float, target: Target | None, formats: Iterable[DType]) -> NM | None:
    """The tightest pattern that the weight obeys along the axis, with everything else that holds of it, or None.

    ``nonzero`` is the share of non-zeros, ``formats`` are those that activations may have in the kernels. Zeros in
    no order may obey patterns by chance; those count if they pay on the target (without one: up to a half).
    """
    held = candidates(weight, axis)
    if not held:
        return None
    formats = (F32, *formats) if weight.dtype.kind not in "iub" else tuple(formats)
    size = weight.shape[axis]
    best = min(held, key=lambda nm: (_allowed(nm, size), -nm.block, nm.group))
    if target is None:
        pays = best.density <= HALF
    else:
        best = _fastest([nm for nm in held if _allowed(nm, size) == _allowed(best, size)], best, target, formats)
        pays = any(target.sparse_gain(x, nm) >= PAYS for nm in held for x in formats)
    return _details(weight, best) if pays or _by_chance(weight.size, best, nonzero) < CHANCE else None


def unordered(
    weight: Array, axis: int, found: NM | None, target: Target | None, formats: Iterable[DType]
) -> Unstructured | None:
    """The encoding of zeros in no order, of elements or of blocks along the axis, where it is faster on the target than
    the pattern ``found`` (without a target: where half or more are zeros and no pattern holds), or None.

    ``formats`` are those that activations may have in the kernels; one of them must gain, and none may lose to the
    pattern.
    """
    single, blocks = (kept_blocks(weight, axis, n) for n in (1, BLOCK))
    whole = weight.shape[axis] % BLOCK == 0 and blocks <= single * TOGETHER
    kept = math.ceil((blocks if whole else single) * 1e4) / 1e4
    if not 0.0 < kept < 1.0:
        return None
    free = Unstructured(0, 0, axis, BLOCK if whole else 1, kept)
    if target is None:
        return free if found is None and kept <= HALF else None
    formats = (F32, *formats) if weight.dtype.kind not in "iub" else tuple(formats)
    pays = any(target.gain(x, free) >= PAYS for x in formats)
    faster = all(target.gain(x, free) > CLEARLY * target.gain(x, found) for x in formats)
    return free if pays and (found is None or faster) else None


def _allowed(nm: NM, size: int) -> int:
    """How many elements of one row may be non-zero; the last group may be shorter."""
    full = -(-size // nm.block) // nm.group
    return nm.block * (full * nm.keep + (keep_in_tail(nm, size) if size % (nm.group * nm.block) else 0))


def _by_chance(size: int, nm: NM, nonzero: float) -> float:
    """The probability that as many non-zeros placed at random obey the pattern (binomial, groups independent)."""
    p = 1.0 - (1.0 - nonzero) ** nm.block
    ways = (math.comb(nm.group, n) * p**n * (1.0 - p) ** (nm.group - n) for n in range(nm.keep + 1))
    return float(min(1.0, sum(ways)) ** (size / (nm.group * nm.block)))


def candidates(weight: Array, axis: int) -> list[NM]:
    """Every keep:group of elements and of blocks along the axis that holds."""
    found = [NM(keep, group, axis) for group, keep in tightest_keeps(weight, GROUPS, axis).items()]
    if found and weight.shape[axis] % BLOCK == 0:
        blocks = tightest_keeps(weight, BLOCK_GROUPS, axis, BLOCK)
        found += [NM(keep, group, axis, block=BLOCK) for group, keep in blocks.items()]
    return found


def _fastest(held: list[NM], best: NM, target: Target, formats: Iterable[DType]) -> NM:
    """Of patterns as tight as ``best`` one that is clearly faster in every format, smaller groups first."""

    def speed(nm: NM) -> float:
        return min((target.gain(x, nm) for x in formats), default=0.0)

    for nm in sorted(held, key=lambda nm: (nm.group * nm.block, -nm.block)):
        if speed(nm) > CLEARLY * speed(best):
            best = nm
    return best


def _details(weight: Array, nm: NM) -> NM:
    """The pattern with the outputs that share it and the other axis, where they hold."""
    outputs = weight.shape[0 if nm.axis else 1]
    for shared in SHARED:
        if outputs % shared == 0 and _holds(weight, replace(nm, shared=shared)):
            return replace(nm, shared=shared)
    both = replace(nm, transposable=True)
    return both if nm.block == 1 and outputs >= nm.group and _holds(weight, both) else nm


def _holds(weight: Array, nm: NM) -> bool:
    """A few outputs are looked at first: most weights fail there."""
    few = weight[:FEW] if nm.axis else weight[:, :FEW]
    return not violation(few, nm) and (few.size == weight.size or not violation(weight, nm))
