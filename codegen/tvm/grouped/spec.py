"""What a grouped kernel computes and how it is laid out: sizes, fields of a stored byte, blocks, tiles."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd

from bitwright.ir.target import Isa

LANES = {"avx512-vnni": 16, "avx-vnni": 8, "avx2": 8, "portable": 4, "neon-i8mm": 4, "neon-dot": 4, "vector": 4}
"""s32 lanes of a vector."""
QUAD = 4
"""Products that one lane of one step adds."""
BLOCK = 64
"""Inputs of a row that lie together: a cache line."""


@dataclass(frozen=True)
class GroupSpec:
    """``rows`` x ``depth`` codes times ``outputs`` x ``depth`` weights; ``low``: the smallest weight, stored as 0.

    ``group``: inputs of a scale (0: all); ``bits`` of a stored weight; ``wide_scales``: f32 ones rather than bf16;
    ``zeros``: every scale has a zero point of its own."""

    rows: int
    outputs: int
    depth: int
    group: int
    bits: int
    low: int
    wide_scales: bool
    zeros: bool
    isa: Isa

    @property
    def lanes(self) -> int:
        return LANES[self.isa]

    @property
    def fields(self) -> int:
        """Steps that share a stored vector."""
        return 8 // self.bits

    @property
    def chunk(self) -> int:
        """Inputs that a stored vector of weights covers."""
        return QUAD * self.fields

    @property
    def size(self) -> int:
        """Inputs of a group as it is stored: all of them are padded to whole blocks."""
        return self.group or ceil(self.depth / BLOCK) * BLOCK

    @property
    def groups(self) -> int:
        return ceil(self.depth / self.size)

    @property
    def padded(self) -> int:
        return self.groups * self.size

    @property
    def block(self) -> int:
        """Inputs between two loads of a row's address."""
        return gcd(self.size, BLOCK)

    @property
    def words(self) -> bool:
        """Whether products are made of 16-bit operands: codes of 8 bits overflow byte pairs, SSE2 has none."""
        return self.isa in ("portable", "vector") or (self.isa == "avx2" and self.bits == 8)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and vectors of outputs of a tile."""
        if self.isa != "avx512-vnni":  # 16 registers
            return (1, 4) if self.rows == 1 else (min(self.rows, 4), 2) if self.isa == "avx-vnni" else (2, 2)
        return (self.rows, 4) if self.rows <= 4 else (min(self.rows, 8), 2)

    @property
    def in_registers(self) -> bool:
        """Whether the sums of the groups stay in registers beside those of the group at hand."""
        rows, vectors = self.tile
        return rows * vectors <= (8 if self.isa == "avx512-vnni" else 4)

    @property
    def in_place(self) -> bool:
        """Whether fields are not shifted to the bottom of their byte: each then has sums of its own, that many times
        too large, which are shifted once a group. A single row has registers for that, and too few vector ports."""
        return self.rows == 1 and self.isa == "avx512-vnni" and self.bits < 8

    @property
    def panel(self) -> int:
        """Outputs of a task."""
        return self.tile[1] * self.lanes

    @property
    def panels(self) -> int:
        return ceil(self.outputs / self.panel)

    @property
    def panel_bytes(self) -> int:
        return self.panel * self.padded * self.bits // 8

    @property
    def weight_bytes(self) -> int:
        return self.panels * self.panel_bytes

    @property
    def copied(self) -> bool:
        """Whether rows are copied: into tiles, widened, or because their end is padded."""
        return self.rows > 1 or self.words or self.padded != self.depth

    @property
    def copy_bytes(self) -> int:
        return ceil(self.rows * self.padded * (2 if self.words else 1) / 64) * 64 if self.copied else 0

    @property
    def sums_bytes(self) -> int:
        return ceil(self.rows * self.groups * 4 / 64) * 64

    @property
    def scratch_bytes(self) -> int:
        """Rows in tiles, sums of each row and group, the running results of a tile."""
        rows, vectors = self.tile
        held = 0 if self.in_registers else rows * vectors * self.lanes * 4
        return self.copy_bytes + self.sums_bytes + held + 64


def refusal(spec: GroupSpec) -> str:
    """Why no grouped kernel computes this; the empty string if one does."""
    if spec.bits not in (2, 4, 8):
        return f"weights are stored in 2, 4 or 8 bits, not {spec.bits}"
    if spec.group % 16 or spec.group < 0:
        return f"groups of {spec.group}: kernels take multiples of 16"
    if min(spec.rows, spec.outputs, spec.depth) < 1:
        return "nothing to compute"
    if max(spec.weight_bytes, spec.rows * spec.padded * 2, spec.rows * spec.outputs) >= 1 << 31:
        return "more than 2^31 elements"
    if spec.size * 127 * 255 >= 1 << 31:
        return f"sums of {spec.size} products do not fit 32 bits"
    return ""


__all__ = ["BLOCK", "LANES", "QUAD", "GroupSpec", "refusal"]
