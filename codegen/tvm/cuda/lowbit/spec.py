"""How a low-bit linear layer is cut: tiles of 16 outputs, chunks of 64 inputs, spans that one lane's loads cover.

Weights are the left operand of ``mma.sync`` (16 outputs by 32 inputs, or 64 of which 2 of 4 are kept), so that 2:4
patterns need no other kernel. The order of inputs within a chunk is free as long as both operands agree: it is chosen
so that a lane's activations are 16 consecutive bytes (8 or 4 where groups are that short). Codes stay in the upper bits
of their byte, where they are two's complement without further work; a group's sum is shifted down once.

Sparser patterns are stored as values and places and become dense registers by shifts: a lane holds up to 16 consecutive
inputs of an output, so a group of a pattern lies in one lane.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import ceil

TILE, CHUNK = 16, 64
SHARED = 72 << 10
"""Bytes of shared memory for weights on their way: two blocks or three fit a multiprocessor."""
LONGEST = 1024
"""Inputs after which the code of a group repeats at most; longer groups are loops."""


@dataclass(frozen=True)
class LowbitSpec:
    """``rows`` of activations by ``outputs``, ``depth`` inputs, a scale every ``group`` of them (0: one an output).

    ``bits`` of a stored code: 2, 3, 4, 8. ``sparse``: 2 of 4 are stored, with 2 bits of place each. ``kept``: so many
    of so many are stored (0 of 0: all) and spread out again, with 2 bits of place in groups of 4, else 4. ``zeros``:
    zero points by group. ``exact``: s32 sums without scales, of ``unsigned`` activations or signed ones, with
    ``offsets`` by output. ``warps_k`` warps share the inputs of a tile, ``warps_o`` tiles are in a block.
    """

    rows: int
    outputs: int
    depth: int
    group: int
    bits: int
    wide_scales: bool
    zeros: bool
    sparse: bool
    kept: tuple[int, int] = (0, 0)
    exact: bool = False
    unsigned: bool = False
    offsets: bool = False
    warps_k: int = 1
    warps_o: int = 1

    # ---- the layer
    @property
    def groups(self) -> int:
        return ceil(self.depth / self.group) if self.group else 1

    @property
    def tiles(self) -> int:
        return ceil(self.outputs / TILE)

    @property
    def shift(self) -> int:
        """Bits that a code stands above the lowest of its byte."""
        return 8 - self.bits

    @property
    def piece(self) -> int:
        """Inputs whose products may be added before a scale must be applied, at most a chunk."""
        return next(p for p in (64, 32, 16) if self.group % p == 0)

    # ---- what is loaded together
    @property
    def chunks(self) -> int:
        """Chunks of a span: as many as make loads of 16 bytes."""
        if self.kept[0]:
            return 4
        if self.sparse:
            return {8: 2, 4: 2, 3: 4}[self.bits]
        return {8: 1, 4: 1, 3: 2, 2: 2}[self.bits]

    @property
    def span(self) -> int:
        return self.chunks * CHUNK

    @property
    def registers(self) -> int:
        """Words of unpacked codes of a lane and span."""
        return self.chunks * (4 if self.sparse else 8)

    @property
    def values(self) -> int:
        """Stored codes of a lane and span, where a pattern is spread out."""
        n, m = self.kept
        return self.chunks * 32 * n // m

    @property
    def place_bits(self) -> int:
        return 2 if self.kept[1] == 4 else 4

    @property
    def streams(self) -> tuple[int, ...]:
        """Words of a lane and span: codes (the upper two bits of 3), the lowest bits of 3, places."""
        if self.kept[0]:
            return self.values * self.bits // 32, self.values * self.place_bits // 32
        codes = self.registers * min(self.bits, 2 if self.bits == 3 else 8) // 8
        low = (self.registers // 8,) if self.bits == 3 else ()
        return (codes, *low, *((self.chunks,) if self.sparse else ()))

    @property
    def span_words(self) -> int:
        """Words of all lanes of a tile and span."""
        return 32 * sum(self.streams)

    @property
    def spans(self) -> int:
        """Spans of a tile, whole units."""
        return ceil(self.depth / self.unit) * (self.unit // self.span)

    @property
    def long(self) -> bool:
        """Whether a group is a loop over spans."""
        return not self.group or self.group > LONGEST // 2

    @property
    def unit(self) -> int:
        """Inputs after which spans and groups begin together."""
        return self.span if not self.group else math.lcm(self.group, self.span)

    @property
    def together(self) -> int:
        """Spans whose loads are under way at once."""
        loads = sum(ceil(w / 4) for w in self.streams)
        many = max(1, 4 // loads)
        return many if self.long else max(1, many * self.span // self.unit) * (self.unit // self.span)

    @property
    def turns(self) -> int:
        """Times that all warps together load, within a group where groups are loops."""
        inner = self.spans // self.groups if self.long else self.spans
        return ceil(inner / self.together)

    # ---- what is under way
    @property
    def loads(self) -> tuple[tuple[int, int], ...]:
        """Where each load of a span begins, in words, and how many words of it a lane has."""
        found, at = [], 0
        for count in self.streams:
            each = min(count, 4)
            for _ in range(count // each):
                found.append((at, each))
                at += 32 * each
        return tuple(found)

    @property
    def stage_words(self) -> int:
        """Words that a warp asks for in a turn."""
        return self.together * self.span_words

    @property
    def stages(self) -> int:
        """Turns whose words are in shared memory or on their way there."""
        return max(1, min(4, SHARED // (4 * self.stage_words * self.warps_k * self.warps_o)))

    # ---- rows
    @property
    def columns(self) -> int:
        """Tiles of 8 rows that a warp computes at once."""
        return next((n for n in (1, 2, 4) if self.rows <= 8 * n), 8)

    @property
    def blocks(self) -> tuple[int, int, int]:
        return ceil(self.tiles / self.warps_o), ceil(self.rows / (8 * self.columns)), 1

    @property
    def weight_words(self) -> int:
        return self.tiles * self.spans * self.span_words

    @property
    def output_bytes(self) -> int:
        """Bytes of an output's scales and zero points, or of its offset."""
        if self.exact:
            return 4 * self.offsets
        return self.groups * ((4 if self.wide_scales else 2) + self.zeros)

    @property
    def floor_bytes(self) -> int:
        """Bytes of codes, places, scales and zero points as such, without any padding."""
        share, place = (0.5, 2) if self.sparse else (1.0, 0)
        if self.kept[0]:
            share, place = self.kept[0] / self.kept[1], math.ceil(math.log2(self.kept[1]))
        codes = int(self.outputs * self.depth * share * (self.bits + place) / 8)
        return codes + self.outputs * self.output_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes that the kernel reads instead."""
        return 4 * self.weight_words + self.tiles * TILE * self.output_bytes


def place_of(piece: int, register: int, quarter: int) -> int:
    """The first of four inputs of a chunk that lane ``quarter`` (of four) holds in its activations' ``register``.

    >>> [place_of(64, i, 1) for i in range(4)], [place_of(32, i, 1) for i in range(4)]
    ([16, 20, 24, 28], [8, 12, 40, 44])
    """
    each = piece // 16
    return register // each * piece + quarter * 4 * each + register % each * 4


def refusal(spec: LowbitSpec) -> str:
    """Why no kernel computes this; the empty string if one does."""
    if min(spec.rows, spec.outputs, spec.depth) < 1:
        return "nothing to compute"
    if spec.group % 16:
        return f"groups of {spec.group}: kernels take multiples of 16"
    if spec.unit > LONGEST and spec.group % spec.span:
        return f"groups of {spec.group} and spans of {spec.span} inputs begin together only every {spec.unit}"
    if (spec.group or spec.depth) << (15 if spec.unsigned else 14) >= 1 << 31:
        return f"sums of {spec.group or spec.depth} products do not fit 32 bits"
    if max(4 * spec.weight_words, spec.rows * spec.outputs, spec.rows * spec.depth) >= 1 << 31:
        return "more than 2^31 bytes"
    return ""


__all__ = ["CHUNK", "TILE", "LowbitSpec", "place_of", "refusal"]
