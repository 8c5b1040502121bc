"""The rows of a kernel as tiles, and tiles as blocks that tasks are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from bitwright.codegen.tvm.contract.spec import ContractSpec, Knobs
from bitwright.codegen.tvm.tir import Builder, Index, minimum

L2_BYTES, NEAR_BYTES = 1 << 20, 384 * 1024
"""A second-level cache, and what a block of rows may take of it beside the weights."""


def near_blocks(spec: ContractSpec) -> int:
    """Blocks of rows that stay in the second-level cache while all outputs are made of them, one block after the other;
    0 where panels of weights come first: the rows, their results and as many bytes of an operand fit that cache, or the
    weights take so much of it that they should pass once.

    A panel makes a part of a cache line of each row: with many rows, panel by panel every line of the results would
    come and go several times.
    """
    size = spec.input_dtype.numpy.itemsize
    near = spec.input_elements * size + 2 * spec.rows * spec.cols * size
    weights = spec.cols * spec.depth * size
    if spec.right != "constant" or near <= L2_BYTES or weights > NEAR_BYTES:
        return 0
    return ceil(near / NEAR_BYTES)


@dataclass(frozen=True)
class Nest:
    """``rows`` rows in tiles of ``tile`` (a remainder in the last block), in ``blocks`` blocks.

    Task t is block ``t % blocks`` of a panel or, with ``panels``, panel ``t % panels`` of a block.
    """

    rows: int
    tile: int
    blocks: int
    panels: int = 0

    @property
    def tiles(self) -> int:
        return self.rows // self.tile

    @property
    def rest(self) -> int:
        return self.rows % self.tile

    @property
    def per_block(self) -> int:
        return ceil(self.tiles / self.blocks)

    def place(self, b: Builder, task: Index) -> tuple[Index, Index]:
        """Panel and block of a task."""
        if self.panels:
            return b.index(task % self.panels), b.index(task // self.panels)
        if self.blocks == 1:
            return task, 0
        return b.index(task // self.blocks), b.index(task % self.blocks)

    def emit(self, b: Builder, block: Index, tile: Callable[[Index, int], None]) -> None:
        """Call ``tile(first row, rows)`` for the loop over the tiles of a block and for the remainder."""
        first = block * self.per_block
        with b.loop(minimum(first + self.per_block, self.tiles), first, name="tile") as number:
            tile(b.index(number * self.tile), self.tile)
        if self.rest:
            with b.when(block == self.blocks - 1):
                tile(self.tiles * self.tile, self.rest)


def nest_of(rows: int, knobs: Knobs, panels: int = 0) -> Nest:
    """Blocks as the knobs ask, but none without a tile; ``panels``: of all groups, where blocks come first."""
    tile = min(knobs.rows, rows)
    tiles = rows // tile
    per_block = ceil(tiles / max(1, min(knobs.row_blocks, tiles)))
    return Nest(rows, tile, ceil(tiles / per_block), panels)
