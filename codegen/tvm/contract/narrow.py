"""Which sums fit 16 bits: proved from the weights in the order in which the kernel adds them up.

pmaddubsw adds the products of two activations and saturates; its results are summed in 16-bit lanes, two to an
accumulator, each of which takes one half of every step. Activations are 0 to ``x_hi`` independently of each other, so
a lane's extremes are its positive and its negative weights alone, times ``x_hi``. Because zero is among the
activations, no partial sum is beyond them either.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.tvm.contract.packing import in_steps, to_runs
from bitwright.codegen.tvm.contract.plan import Plan
from bitwright.codegen.tvm.contract.spec import ContractSpec
from bitwright.ir.types import S16

_CHUNK = 1 << 22
"""Weights widened at once."""


def _limits(spec: ContractSpec) -> tuple[int, int]:
    """The largest sum of positive weights, and of negative ones, that ``x_hi`` times leaves in 16 bits."""
    most = max(spec.x_hi, 1)
    return S16.hi // most, -S16.lo // most


def any_pair_fits(spec: ContractSpec, weight: NDArray[Any]) -> bool:
    """Whether the products of any two weights fit 16 bits."""
    runs, (up, down) = to_runs(spec, weight), _limits(spec)
    return 2 * int(runs.max(initial=0)) <= up and -2 * int(runs.min(initial=0)) <= down


def safe_steps(spec: ContractSpec, plan: Plan, weight: NDArray[Any], most: int) -> int:
    """The largest number of consecutive steps of a run, wherever they begin, whose sums fit 16 bits in every lane.

    0: a pair of products does not fit, so pmaddubsw would saturate. At most ``most`` and the steps of a run.
    """
    steps = in_steps(spec, plan, weight)
    lanes = steps.reshape(-1, plan.steps, plan.quad // 2, 2)
    most, (up, down) = min(most, plan.steps), _limits(spec)
    for first in range(0, len(lanes), size := max(1, _CHUNK // max(1, steps.shape[-2] * steps.shape[-1]))):
        part = lanes[first : first + size].astype(np.int32)
        for sign, limit in ((1, up), (-1, down)):
            pairs = np.maximum(sign * part, 0).sum(-1)
            sums = np.zeros((len(part), plan.steps + 1, plan.quad // 2), np.int32)
            np.cumsum(pairs, 1, out=sums[:, 1:])
            most = _longest(sums, limit, most)
    return most


def _longest(sums: NDArray[np.int32], limit: int, most: int) -> int:
    """The largest window, up to ``most``, none of whose sums is above the limit; ``sums`` are cumulative."""

    def fit(window: int) -> bool:
        return int((sums[:, window:] - sums[:, : sums.shape[1] - window]).max(initial=0)) <= limit

    fits, fails = 0, most + 1
    while fails - fits > 1:
        window = 1 if fits == 0 and fails > most else (fits + fails) // 2
        fits, fails = (window, fails) if fit(window) else (fits, window)
    return fits


def spill_of(plan: Plan, steps: int) -> int:
    """Blocks between two spills when ``steps`` steps are safe, dealt evenly; 0 when 16-bit sums do not pay.

    A spill costs about as much as a step, so sums of a single step gain nothing.
    """
    blocks = steps // len(plan.block.steps)
    if steps < 2 or not blocks or plan.steps < 2:
        return 0
    return ceil(plan.full / ceil(plan.full / blocks)) if plan.full else 1


def terms_of(plan: Plan, spill: int) -> int:
    """Products that one 16-bit sum takes between spills."""
    return min(spill * len(plan.block.steps), plan.steps) * plan.quad // 2
