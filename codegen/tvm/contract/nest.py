"""The rows of a kernel as tiles, and tiles as blocks that tasks are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from bitwright.codegen.tvm.contract.spec import Knobs
from bitwright.codegen.tvm.tir import Builder, Index, minimum


@dataclass(frozen=True)
class Nest:
    """``rows`` rows in tiles of ``tile`` (a remainder in the last block), in ``blocks`` blocks."""

    rows: int
    tile: int
    blocks: int

    @property
    def tiles(self) -> int:
        return self.rows // self.tile

    @property
    def rest(self) -> int:
        return self.rows % self.tile

    @property
    def per_block(self) -> int:
        return ceil(self.tiles / self.blocks)

    def emit(self, b: Builder, block: Index, tile: Callable[[Index, int], None]) -> None:
        """Call ``tile(first row, rows)`` for the loop over the tiles of a block and for the remainder."""
        first = block * self.per_block
        with b.loop(minimum(first + self.per_block, self.tiles), first, name="tile") as number:
            tile(b.index(number * self.tile), self.tile)
        if self.rest:
            with b.when(block == self.blocks - 1):
                tile(self.tiles * self.tile, self.rest)


def nest_of(rows: int, knobs: Knobs) -> Nest:
    """Blocks as the knobs ask, but none without a tile."""
    tile = min(knobs.rows, rows)
    tiles = rows // tile
    per_block = ceil(tiles / max(1, min(knobs.row_blocks, tiles)))
    return Nest(rows, tile, ceil(tiles / per_block))
