"""Weights as pairs of conductances, some of which are stuck: a code is G+ less G-, a fault holds one at 0 or the top.

Stuck-at faults of resistive crossbars as in arXiv:2404.15498. A fault map follows from seed, layer and rate; the faults
of a lower rate are among those of a higher one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from zlib import crc32

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from bitwright.ir.errors import InvalidInput


class Cells(BaseModel):
    """``[options.cells]``: ``levels`` of a conductance above 0; ``high``, the share of faults at the largest."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    levels: Annotated[int, Field(ge=1, le=127)]
    high: Annotated[float, Field(ge=0, le=1)] = 0.5


@dataclass(frozen=True, slots=True)
class Faults:
    """The share of cells that are stuck, and the chip: another seed is another chip. Raises :class:`InvalidInput`."""

    rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise InvalidInput(f"a rate of faults is 0 to 1 (0.1 is 10 %), not {self.rate}")
        if self.seed < 0:
            raise InvalidInput(f"a seed is at least 0, not {self.seed}")


def stuck(codes: torch.Tensor, cells: Cells, faults: Faults, layer: str) -> torch.Tensor:
    """What the pairs of a layer's codes [O, ...] read as, same shape and dtype; without faults the codes themselves."""
    pair = torch.stack([codes.clamp(min=0), (-codes.to(torch.int16)).clamp(min=0).to(codes.dtype)])
    rng = np.random.default_rng([faults.seed, crc32(layer.encode())])
    faulty = torch.from_numpy(rng.random(tuple(pair.shape)) < faults.rate)
    high = torch.from_numpy(rng.random(tuple(pair.shape)) < cells.high)
    held = torch.where(high, cells.levels, 0).to(codes.dtype)
    read = torch.where(faulty, held, pair)
    return read[0] - read[1]
