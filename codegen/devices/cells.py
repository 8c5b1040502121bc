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
    """The share of cells that are stuck, and the chip: another seed is another chip. ``known``: the chip was tested,
    and the other cell of a pair is programmed to make up for a stuck one. Raises :class:`InvalidInput`."""

    rate: float = 0.0
    seed: int = 0
    known: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise InvalidInput(f"a rate of faults is 0 to 1 (0.1 is 10 %), not {self.rate}")
        if self.seed < 0:
            raise InvalidInput(f"a seed is at least 0, not {self.seed}")


def stuck(codes: torch.Tensor, cells: Cells, faults: Faults, layer: str) -> torch.Tensor:
    """What the pairs of a layer's codes [O, ...] read as, same shape and dtype; without faults the codes themselves."""
    wide = codes.to(torch.int16)
    pair = torch.stack([wide.clamp(min=0), (-wide).clamp(min=0)])
    rng = np.random.default_rng([faults.seed, crc32(layer.encode())])
    faulty = torch.from_numpy(rng.random(tuple(pair.shape)) < faults.rate)
    high = torch.from_numpy(rng.random(tuple(pair.shape)) < cells.high)
    held = torch.where(high, cells.levels, 0).to(wide.dtype)
    read = torch.where(faulty, held, around(wide, pair, faulty, held, cells.levels) if faults.known else pair)
    return (read[0] - read[1]).to(codes.dtype)


def around(
    codes: torch.Tensor, pair: torch.Tensor, faulty: torch.Tensor, held: torch.Tensor, most: int | torch.Tensor
) -> torch.Tensor:
    """The pairs [2, O, ...] to program where the stuck cells are known: the healthy one of a pair takes what its stuck
    neighbour, which is ``held`` at a value, lacks or has too much, as far as 0 to ``most`` reaches."""
    zero = torch.zeros_like(codes)
    plus = torch.minimum(torch.maximum(codes + held[1], zero), zero + most)
    minus = torch.minimum(torch.maximum(held[0] - codes, zero), zero + most)
    return torch.stack([torch.where(faulty[1], plus, pair[0]), torch.where(faulty[0], minus, pair[1])])
