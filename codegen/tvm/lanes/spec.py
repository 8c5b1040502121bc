"""What a kernel with activations in lanes is made for: how outputs share entries, how the reduction is cut.

A *unit* is 32 bits of activations of one row: four consecutive 8-bit values or one float. An *entry* is a unit with
the weights that ``shared`` consecutive outputs have for it; it is stored if any of them is not zero. Rows lie in the
lanes of a vector, so selecting a unit is an address, and any pattern of entries runs (references of the project, CPU
kernels, sections 1d and 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from bitwright.codegen.tvm.contract.spec import LANES, ContractSpec, Isa
from bitwright.ir.types import DType

WORD = 4
"""Bytes of a unit, and of an accumulator."""


@dataclass(frozen=True, slots=True)
class LanesKnobs:
    """The register tile (``shared`` outputs by ``vectors`` vectors of rows) and how the reduction is cut.

    ``block``: units of a K block, whose activations stay in the first-level cache; ``outputs`` of a task;
    ``counts``: entries that every group of outputs has in a full K block and in the last, shorter one (padded with
    zeros), or () for row pointers, in whose K blocks the outputs are sorted by their number of entries so that
    branches are predicted. ``safe_pairs``: the weights are proven not to saturate pmaddubsw.
    """

    isa: Isa
    vectors: int
    shared: int
    block: int
    outputs: int
    counts: tuple[int, int] | tuple[()] = ()
    safe_pairs: bool = False


@dataclass(frozen=True)
class Shape:
    """Everything that packing and emitting derive from a spec and its knobs."""

    spec: ContractSpec
    knobs: LanesKnobs

    @property
    def quad(self) -> int:
        """Activations of a unit."""
        return quad_of(self.spec)

    @property
    def acc(self) -> DType:
        return self.spec.acc_dtype

    @property
    def lanes(self) -> int:
        return LANES[self.knobs.isa]

    @property
    def vector(self) -> int:
        """Bytes of a vector."""
        return self.lanes * WORD

    @property
    def rows(self) -> int:
        """Rows of a task."""
        return self.knobs.vectors * self.lanes

    @property
    def pitch(self) -> int:
        """Bytes from one unit's activations to the next, and from one output's accumulators to the next."""
        return self.knobs.vectors * self.vector

    @property
    def row_blocks(self) -> int:
        return ceil(self.spec.rows / self.rows)

    @property
    def output_blocks(self) -> int:
        return ceil(self.spec.cols / self.knobs.outputs)

    @property
    def units(self) -> int:
        return self.spec.depth // self.quad

    @property
    def blocks(self) -> int:
        """K blocks, the last of which may be shorter."""
        return ceil(self.units / self.knobs.block)

    @property
    def full_blocks(self) -> int:
        return self.units // self.knobs.block

    @property
    def per_block(self) -> int:
        """Groups of outputs in a block of outputs; the last block may have fewer."""
        return self.knobs.outputs // self.knobs.shared

    @property
    def groups(self) -> int:
        """Groups of outputs in all."""
        return ceil(self.spec.cols / self.knobs.shared)

    @property
    def last_groups(self) -> int:
        return self.groups - (self.output_blocks - 1) * self.per_block

    @property
    def pointers(self) -> bool:
        return not self.knobs.counts

    @property
    def entries_per_group(self) -> int:
        """Entries of a group in all K blocks (without row pointers)."""
        assert self.knobs.counts
        full, last = self.knobs.counts
        return self.full_blocks * full + (last if self.blocks > self.full_blocks else 0)

    @property
    def span_row(self) -> int:
        """Elements of the row pointers of one K block: (first entry, group) pairs and the end."""
        return 2 * (self.per_block + 1)


@dataclass(frozen=True)
class Memory:
    """Where the parts of the scratch memory begin, in words: first words of the rows, activations in lanes, sums, a
    tile of finished rows, words of results and of their operands (``words_size`` each), padded images; and where it
    ends, in bytes."""

    table: int
    lanes: int
    sums: int
    tile: int
    words: int
    words_size: int
    image: int
    size: int


def quad_of(spec: ContractSpec) -> int:
    """Activations of a unit: four of 8 bits, one float."""
    return 4 if spec.element == "u8s8" else 1
