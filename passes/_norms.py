"""What a batch norm knew about the value it normalized: kept as a fact after the norm is folded away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from bitwright.ir.weights import Array
from bitwright.passes._pass import Context


@dataclass(frozen=True, eq=False)
class Norm:
    """Parameters of a batch norm by channel, f64, under the name of its result in ``facts["norms"]``.

    On the training data the result has mean ``beta`` and standard deviation ``std``: folding the norm into the
    contraction before it does not change that, so the fact describes the folded contraction's result as well.
    """

    gamma: Array
    beta: Array
    mean: Array
    variance: Array
    eps: float = 1e-5

    @property
    def std(self) -> Array:
        """Standard deviation of the result by channel; ``eps`` makes it a little smaller than |gamma|."""
        found: Array = np.abs(self.gamma) * np.sqrt(self.variance / (self.variance + self.eps))
        return found

    def moved(self, divide: Array | float = 1.0, shift: Array | float = 0.0) -> Norm:
        """The fact about ``result / divide + shift``."""
        return replace(self, gamma=self.gamma / divide, beta=self.beta / divide + shift)


def known_norms(context: Context) -> dict[str, Norm]:
    """What folded batch norms left, by value; a pass that changes a value's statistics keeps this true."""
    norms: dict[str, Norm] = context.facts.setdefault("norms", {})
    return norms


def channels_divided(context: Context, factors: Mapping[str, Array]) -> None:
    """Keep the facts true after channels of values were divided: norms follow, ranges are to be observed again."""
    norms = known_norms(context)
    norms.update({name: norms[name].moved(divide=s) for name, s in factors.items() if name in norms})
    context.facts.pop("ranges", None)


__all__ = ["Norm", "channels_divided", "known_norms"]
