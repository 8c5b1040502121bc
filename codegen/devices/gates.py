"""Gated XNOR: products of {-1, 0, 1} by two bit planes and counted bits; gates rest where a factor is zero.

A value is the planes "not zero" and "negative". A gate is active where both factors are not zero; the sum of products
is the active gates less twice those whose signs differ (GXNOR, arXiv:1912.12636).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict

from bitwright.codegen.devices.schema import Instruction
from bitwright.codegen.devices.units import quantity
from bitwright.ir.errors import InvalidInput

Array = NDArray[Any]
_Joule = Annotated[float, BeforeValidator(lambda v: quantity(v, "joule"))]


class Gates(BaseModel):
    """``[options.gates]``: joules of a product of two factors that are not zero, and of one whose gate rests."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    active: _Joule
    resting: _Joule


@dataclass
class Activity:
    """Gates counted while a model ran."""

    active: int = 0
    resting: int = 0
    layers: list[tuple[str, int, int]] = field(default_factory=list)
    """(layer, active, resting)."""

    def energy(self, gates: Gates) -> float:
        """Joules of the products."""
        return self.active * gates.active + self.resting * gates.resting

    def count(self, name: str, active: int, products: int) -> None:
        """Add a layer."""
        self.active, self.resting = self.active + active, self.resting + products - active
        self.layers.append((name, active, products - active))


def planes(values: Array) -> tuple[Array, Array]:
    """Rows [n, k] of -1, 0, 1 as packed bits u8 [n, ceil(k / 8)]: not zero, negative; raises :class:`InvalidInput`."""
    if values.size and int(np.abs(values).max()) > 1:
        raise InvalidInput(f"gates take -1, 0 and 1, not {values.min()} to {values.max()}")
    return np.packbits(values != 0, axis=1), np.packbits(values < 0, axis=1)


def gxnor(x: Array, w: Array) -> tuple[Array, Array]:
    """Sums of products s64 [n, o] of ternary rows x [n, k] and w [o, k], and the active gates of each."""
    (x_on, x_sign), (w_on, w_sign) = planes(x), planes(w)
    sums, active = [], []
    for on, sign in zip(w_on, w_sign, strict=True):
        both = x_on & on
        count = np.bitwise_count(both).sum(1, dtype=np.int64)
        differ = np.bitwise_count(both & (x_sign ^ sign)).sum(1, dtype=np.int64)
        active.append(count)
        sums.append(count - 2 * differ)
    return np.stack(sums, 1), np.stack(active, 1)


class GatedSums:
    """Sums of rows by gates, in the place of an instruction's meaning; ``active`` counts them."""

    def __init__(self) -> None:
        self.active = 0

    def __call__(self, i: Instruction, rows: torch.Tensor, w: torch.Tensor, zero: int) -> torch.Tensor:
        """[rows, outputs] from rows [rows, taps, channels] and weights [outputs, taps, channels]."""
        if zero:
            raise InvalidInput(f"gates take -1, 0 and 1: a zero point of {zero} has no code")
        sums, active = gxnor(rows.flatten(1).numpy(), w.flatten(1).numpy())
        self.active += int(active.sum())
        return torch.from_numpy(sums)
