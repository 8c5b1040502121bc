"""How many masks a pattern admits, and which pattern a given density admits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from bitwright.ir.errors import InvalidInput
from bitwright.passes.sparsity._magnitude import share

CONFIDENCE = 0.95
State = tuple[int, ...]
STATES = 1_000_000
"""Beyond this bound on the number of states an exact count is refused."""


def mask_diversity(
    shape: Sequence[int],
    keep: int,
    group: int,
    transposable: bool = False,
    formula: Literal["exact", "paper"] = "exact",
) -> int:
    """Number of masks with ``keep`` of every ``group`` on a tensor of a shape.

    Rows: groups lie along the last axis, a shorter last one keeps its share rounded up. Transposable: the tensor
    is tiled by group x group blocks with ``keep`` in each line; ``formula="paper"`` is the published product
    of factorials, which is too large whenever 1 < keep < group.

    >>> mask_diversity((4, 4), 2, 4, transposable=True), mask_diversity((4, 4), 2, 4, True, "paper")
    (90, 144)
    """
    if formula not in ("exact", "paper"):
        raise InvalidInput(f"formula is exact or paper, not {formula!r}")
    if not 1 <= keep <= group:
        raise InvalidInput(f"1 <= keep <= group, got {keep}:{group}")
    if not shape or any(s < 1 for s in shape):
        raise InvalidInput(f"a shape has positive sizes, not {tuple(shape)}")
    total = math.prod(shape)
    if not transposable:
        full, tail = divmod(shape[-1], group)
        return int((math.comb(group, keep) ** full * math.comb(tail, share(keep, group, tail))) ** (total // shape[-1]))
    if len(shape) < 2 or shape[-1] % group or shape[-2] % group:
        raise InvalidInput(f"{tuple(shape)} is not tiled by {group}x{group} blocks")
    one = _paper(keep, group) if formula == "paper" else _exact(keep, group)
    return int(one ** (total // group**2))


def _paper(keep: int, group: int) -> int:
    return math.prod(math.factorial(group - i) for i in range(keep))


def _exact(keep: int, group: int) -> int:
    """0/1 matrices with every line sum ``keep``: the upper half row by row, joined with the lower half.

    A state says how many columns still need 0, 1, 2, ... entries; the lower half, read from below, starts alike.
    """
    few = min(keep, group - keep)  # zeros and ones swapped give the same count
    if math.comb(group + few, few) > STATES:
        raise InvalidInput(f"the exact count for {keep}:{group} takes too long: formula='paper', or a smaller group")
    upper = {(0,) * few + (group,): 1}
    for _ in range(group // 2):
        upper = _row(upper, few)
    lower = _row(upper, few) if group % 2 else upper
    total = 0
    for state, ways in upper.items():
        columns = math.factorial(group) // math.prod(math.factorial(c) for c in state)
        total += ways * lower.get(state[::-1], 0) // columns  # of all ways below, those for these very columns
    return total


def _row(states: dict[State, int], ones: int) -> dict[State, int]:
    """The states after one more row, each with the number of ways to get there; needs are visited in turn."""
    now = {(state, ones): ways for state, ways in states.items()}
    for need in range(1, ones + 1):
        after: Counter[tuple[State, int]] = Counter()
        for (state, left), ways in now.items():
            n = state[need]
            for k in range(max(0, left - sum(state[need + 1 :])), min(left, n) + 1):
                moved = (*state[: need - 1], state[need - 1] + k, n - k, *state[need + 1 :])
                after[moved, left - k] += ways * math.comb(n, k)
        now = after
    return {state: ways for (state, _), ways in now.items()}


def pattern_from_density(zero_fraction: float, group: int, confidence: float = CONFIDENCE) -> int:
    """How many of a group to keep when this fraction of a weight is zero already, placed at random.

    The largest number of zeros that more than ``confidence`` of the groups have is pruned; at least one entry stays.

    >>> [pattern_from_density(p, 8) for p in (0.5, 0.75, 0.9)]
    [6, 4, 2]
    """
    if not 0.0 <= zero_fraction <= 1.0:
        raise InvalidInput(f"a zero fraction lies between 0 and 1, not {zero_fraction}")
    if group < 1:
        raise InvalidInput(f"a group has at least one element, not {group}")
    if not 0.0 <= confidence < 1.0:
        raise InvalidInput(f"a confidence lies between 0 and 1, not {confidence}")
    tail = 0.0
    for zeros in range(group, 0, -1):
        tail += math.comb(group, zeros) * zero_fraction**zeros * (1.0 - zero_fraction) ** (group - zeros)
        if tail > confidence:
            return max(1, group - zeros)
    return group
