"""Products looked up, not multiplied: weights are places in a codebook, activations digits, their products a table.

An output's weights have few different values, its codebook; outputs with alike values share one, as neurons do in
"Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings". The engine fills a table with
every digit times every value of a codebook, once, and then adds up entries: an activation of 8 bits is two digits of 4,
whose entries are added with a shift. All sums are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bitwright.codegen.devices.units import quantity

Array = NDArray[Any]


class Tables(BaseModel):
    """``[options.tables]``: ``entries`` of a codebook, bits of a ``digit``, cycles and joules of filling one entry."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    entries: Annotated[int, Field(ge=2, le=256)]
    digit: Annotated[float, BeforeValidator(lambda v: quantity(v, "bits")), Field(ge=1, le=8)]
    fill_cycles: Annotated[float, Field(ge=0)] = 1.0
    fill_energy: Annotated[float, BeforeValidator(lambda v: quantity(v, "joule"))] = 0.0

    @property
    def filled(self) -> int:
        """Entries of a whole table: every digit by every value."""
        return self.entries << int(self.digit)

    def digits(self, bits: float) -> int:
        """Digits of an activation."""
        return ceil(bits / self.digit)


@dataclass(frozen=True, slots=True, eq=False)
class Codebooks:
    """The codebooks of a layer. ``outputs``: rows of each book; ``values``: its sorted different weights, s64."""

    outputs: tuple[tuple[int, ...], ...]
    values: tuple[Array, ...]

    def stored_bytes(self, terms: int, tables: Tables, value_bits: float) -> float:
        """Bytes of the places of all weights, and of the books."""
        places = sum(map(len, self.outputs)) * terms * (tables.entries - 1).bit_length()
        return ceil(places / 8) + ceil(len(self.values) * tables.entries * value_bits / 8)


def books(weight: Array, tables: Tables) -> Codebooks | str:
    """Codebooks that cover a layer's codes [O, ...], outputs with more values first; or why there are none."""
    rows = [np.unique(row) for row in weight.reshape(len(weight), -1).astype(np.int64)]
    many = max(map(len, rows), default=0)
    if many > tables.entries:
        return (
            f"an output with {many} different weights, a table has {tables.entries} (codebook-weights makes them few)"
        )
    outputs: list[list[int]] = []
    values: list[Array] = []
    for n in sorted(range(len(rows)), key=lambda n: -len(rows[n])):
        unions = [np.union1d(have, rows[n]) for have in values]
        fits = [k for k, both in enumerate(unions) if len(both) <= tables.entries]
        if fits:
            k = min(fits, key=lambda k: len(unions[k]) - len(values[k]))
            values[k] = unions[k]
            outputs[k].append(n)
        else:
            values.append(rows[n])
            outputs.append([n])
    return Codebooks(tuple(tuple(sorted(o)) for o in outputs), tuple(values))


def places(weight: Array, made: Codebooks) -> list[Array]:
    """What is stored: of every book the places u8 [outputs, terms] of the weights [O, terms]."""
    return [
        np.searchsorted(v, weight[list(rows)]).astype(np.uint8)
        for rows, v in zip(made.outputs, made.values, strict=True)
    ]


def look_up(x: Array, weight: Array, made: Codebooks, tables: Tables, bits: float) -> Array:
    """Sums s64 [n, O] of unsigned rows x [n, k] by weights [O, k]: entries of tables, no product of x and w."""
    out = np.zeros((len(x), len(weight)), np.int64)
    width = int(tables.digit)
    digits = [((x.astype(np.int64) >> (width * d)) & ((1 << width) - 1)) for d in range(tables.digits(bits))]
    for rows, values, stored in zip(made.outputs, made.values, places(weight, made), strict=True):
        table = np.arange(1 << width)[:, None] * values  # [digit, place]
        for row, place in zip(rows, stored, strict=True):
            for d, digit in enumerate(digits):
                out[:, row] += table[digit, place[None, :]].sum(1) << (width * d)
    return out


class TableSums:
    """Sums of rows by look-ups, in the place of an instruction's meaning; ``zero`` is taken off behind them."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    def __call__(self, i: Any, rows: torch.Tensor, w: torch.Tensor, zero: int) -> torch.Tensor:
        """[rows, outputs] from rows [rows, taps, channels] and weights [outputs, taps, channels]."""
        x, k = rows.flatten(1).numpy(), w.flatten(1).numpy().astype(np.int64)
        made = books(k, self.tables)
        assert isinstance(made, Codebooks), "the layer was scheduled"
        sums = look_up(x, k, made, self.tables, i.parsed.x.bits)
        return torch.from_numpy(sums - zero * k.sum(1))
