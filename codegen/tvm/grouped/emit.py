"""The grouped kernel: unpack in registers, exact sums of a group, one fused multiply-add with its scale.

Weights count from the smallest and are the unsigned operand; what that adds, ``zero * sum of the codes``, is taken off
in the accumulator's first value, which costs nothing. Sources: references of the project, CPU kernels, section 3;
weights unpacked beside the dot products as llama.cpp and T-MAC (arXiv 2407.00088) do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.codegen.instructions import arm, x86
from bitwright.codegen.tvm.epilogue import PointwiseEpilogue
from bitwright.codegen.tvm.grouped.spec import QUAD, GroupSpec
from bitwright.codegen.tvm.spelling import call
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Register, Vec, const, constants, fma, scalar
from bitwright.ir.types import F32, S8, S16, S32, U8, U16, U32

AHEAD = {2: 8192, 4: 4096, 8: 4096}
"""Bytes that a single row asks for ahead of its loads, by bits of a weight: the hardware stops at the end of a page."""


def emit(spec: GroupSpec, epilogue: PointwiseEpilogue, symbol: str) -> Any:
    """The PrimFunc; a task is a panel of outputs for all rows."""
    b = Builder(symbol)
    x = b.param("x", S8, spec.rows * spec.depth)
    x_scale = b.param("x_scale", F32, spec.rows)
    weights = b.param("weights", U8, spec.weight_bytes)
    scales = b.param("scales", F32 if spec.wide_scales else U16, spec.panels * spec.groups * spec.panel)
    zeros = b.param("zeros", S16, spec.panels * spec.groups * spec.panel) if spec.zeros else None
    pointers = {p.name: b.param(p.name, p.dtype, p.elements) for p in epilogue.params}
    scratch = b.scratch(spec.scratch_bytes)
    rows = _Rows(b, spec, x, scratch)
    with b.when(b.begin < b.end):
        rows.prepare()
    kernel = _Kernel(b, spec, rows, x_scale, weights, scales, zeros, scratch, epilogue, pointers)
    with b.loop(b.end, b.begin, name="task") as task:
        kernel.panel(b.index(task))
    return b.finish()


@dataclass(frozen=True)
class _Rows:
    """The codes as the tiles read them, and their sums by group."""

    b: Builder
    c: GroupSpec
    x: Pointer
    scratch: Pointer

    @property
    def codes(self) -> Pointer:
        if not self.c.copied:
            return self.x
        return self.b.view(self.scratch, S16 if self.c.words else S8)

    @property
    def sums(self) -> Pointer:
        return self.b.view(self.scratch, S32, self.c.copy_bytes)

    def prepare(self) -> None:
        """Copy the rows of each tile block by block, and sum their groups."""
        c = self.c
        tall = c.tile[0]
        whole, rest = divmod(c.rows, tall)
        with self.b.loop(whole, name="tile") as tile:
            self._tile(self.b.index(tile * tall), tall)
        if rest:
            self._tile(whole * tall, rest)

    def _tile(self, first: Index, tall: int) -> None:
        b, c = self.b, self.c
        base = b.index(first * c.padded)
        for i in range(tall):
            row = b.index(first + i)
            source = b.index(row * c.depth)
            with b.loop(c.groups, name="group") as g:
                total = b.register(S32, 4, const(0, S32, 4), "total")
                for n in range(c.size // c.block):
                    at = b.index(g * c.size + n * c.block)
                    for k in range(0, c.block, 16):
                        self._piece(source, b.index(at + k), base + at * tall + i * c.block + k, total)
                lanes = b.let(total.get())
                pairs = b.let(lanes.part(0, 2) + lanes.part(2, 2))
                b.store(self.sums, row * c.groups + g, pairs.part(0, 1) + pairs.part(1, 1))

    def _piece(self, source: Index, k: Index, to: Index, total: Register) -> None:
        """16 codes of a row from ``k`` on, zeros behind its end."""
        b, c = self.b, self.c
        value = b.let(b.load(self.x, source + k, 16))
        if c.padded != c.depth:
            inside = _less(b, k, c.depth)
            value = b.let(inside.select(value, const(0, S8, 16)))
        words = b.let(value.cast(S16))
        if c.words:  # the first and third of each four, then the others
            order = [4 * q + n for q in range(4) for n in (0, 2, 1, 3)]
            b.store(self.codes, to, words.shuffle(order))
        elif c.copied:
            b.store(self.codes, to, value)
        half = b.let(words.part(0, 8) + words.part(8, 8))
        wide = b.let(half.part(0, 4) + half.part(4, 4))
        total.set(total.get() + wide.cast(S32))


def _less(b: Builder, k: Index, depth: int) -> Any:
    """Lanes of sixteen whose place ``k + lane`` lies before ``depth``."""
    left = b.let(scalar(depth - k))
    return constants(range(16), S32).lt(left.spread(16))


@dataclass(frozen=True)
class _Kernel:
    b: Builder
    c: GroupSpec
    rows: _Rows
    x_scale: Pointer
    weights: Pointer
    scales: Pointer
    zeros: Pointer | None
    scratch: Pointer
    epilogue: PointwiseEpilogue
    pointers: Mapping[str, Pointer]

    def panel(self, task: Index) -> None:
        """All rows of one panel."""
        tall = self.c.tile[0]
        whole, rest = divmod(self.c.rows, tall)
        with self.b.loop(whole, name="tile") as n:
            self._tile(task, n, tall, whole + (rest > 0))
        if rest:
            self._tile(task, whole, rest, whole + 1)

    def _tile(self, task: Index, tile: Index, tall: int, tiles: int) -> None:
        b, c = self.b, self.c
        first = b.index(tile * c.tile[0])
        held = _Held(b, c, tall, b.view(self.scratch, F32, c.copy_bytes + c.sums_bytes))
        held.clear()
        start = b.index(task * c.panel_bytes)
        with b.loop(c.groups, name="group") as group:
            g = b.index(group)
            acc = self._starts(task, first, g, tall)
            at = b.index(start + g * (c.size * c.panel * c.bits // 8))
            codes = b.index(first * c.padded + g * (c.size * tall))
            with b.loop(c.size // c.block, name="block") as n:
                self._block(acc, b.index(at + n * (c.block * c.panel * c.bits // 8)),
                            b.index(codes + n * (c.block * tall)), tile, tiles)  # fmt: skip
            place = b.index((task * c.groups + g) * c.panel)
            for j in range(c.tile[1]):
                scale = self._scale(place + j * c.lanes)
                for i in range(tall):
                    held.add(i, j, self._total(acc[i][j]).cast(F32), scale)
        self._finish(task, first, tall, held)

    def _scale(self, at: Index) -> Vec:
        raw = self.b.load(self.scales, at, self.c.lanes)
        return self.b.let(raw if self.c.wide_scales else (raw.cast(U32) << 16).bits(F32))

    def _total(self, sums: list[Register]) -> Vec:
        """The group's sum out of those of its fields."""
        total = sums[0].get()
        for f, more in enumerate(sums[1:], 1):
            total = total + (more.get() >> (self.c.bits * f))
        return total

    def _starts(self, task: Index, first: Index, g: Index, tall: int) -> list[list[list[Register]]]:
        """Accumulators, by row and vector (and field), that begin with what the stored zero adds, taken off."""
        b, c = self.b, self.c
        acc = []
        place = b.index((task * c.groups + g) * c.panel)
        for i in range(tall):
            total = b.let(b.load(self.rows.sums, (first + i) * c.groups + g))
            line = []
            for j in range(c.tile[1]):
                if self.zeros is None:
                    start = (total * c.low).spread(c.lanes)
                else:
                    zero = b.load(self.zeros, place + j * c.lanes, c.lanes).cast(S32)
                    start = const(0, S32, c.lanes) - zero * total.spread(c.lanes)
                more = [const(0, S32, c.lanes)] * (c.fields - 1 if c.in_place else 0)
                line.append([b.register(S32, c.lanes, v, "acc") for v in (start, *more)])
            acc.append(line)
        return acc

    def _block(self, acc: list[list[list[Register]]], at: Index, codes: Index, tile: Index, tiles: int) -> None:
        """The stored vectors of a block one after the other; with 2 bits and many rows in a loop that is not unrolled:
        LLVM would begin all unpacking at once and keep it on the stack."""
        b, c = self.b, self.c
        count, size = c.block // c.chunk, c.tile[1] * c.lanes * QUAD
        self._prefetch(at, count * c.tile[1], tile, tiles)
        if c.bits == 2 and c.rows > 1:
            with b.loop(count + (b.begin >> 31), name="chunk") as n:  # begin is not negative
                self._chunk(acc, b.index(at + n * size), b.index(codes + n * c.chunk))
        else:
            for n in range(count):
                self._chunk(acc, at + n * size, codes + n * c.chunk)

    def _chunk(self, acc: list[list[list[Register]]], at: Index, codes: Index) -> None:
        b, c = self.b, self.c
        wide = c.lanes * QUAD
        raws = []
        for j in range(c.tile[1]):
            raws.append(b.let(b.load(self.weights, at + j * wide, wide)))
            if c.rows == 1:
                b.prefetch(self.weights, at + j * wide + AHEAD[c.bits])
        for fields in self._at_once():
            parts = {f: [self._field(raw, f) for raw in raws] for f in fields}
            for i in range(len(acc)):
                a = {f: self._codes(codes + i * c.block + f * QUAD) for f in fields}
                for j in range(c.tile[1]):
                    self._add(acc[i][j], [(f, parts[f][j], a[f]) for f in fields])

    def _at_once(self) -> list[list[int]]:
        """Fields that are unpacked together: where 16-bit sums of several save a widening; else registers are few."""
        every = list(range(self.c.fields))
        return [every] if self.c.isa == "avx2" and not self.c.words else [[f] for f in every]

    def _prefetch(self, at: Index, lines: int, tile: Index, tiles: int) -> None:
        """Every tile of several asks for its share of the next panel."""
        if tiles > 1:
            share = -(-lines // tiles)
            for line in range(share):
                place = at + self.c.panel_bytes + (tile * share + line) * (self.c.lanes * QUAD)
                self.b.prefetch(self.weights, place)

    def _field(self, raw: Vec, field: int) -> Vec:
        c = self.c
        if c.bits == 8:
            return raw
        if c.in_place:
            return self.b.let(raw & (((1 << c.bits) - 1) << (c.bits * field)))
        moved = (raw.bits(U16) >> (c.bits * field)).bits(U8) if field else raw
        return self.b.let(moved & ((1 << c.bits) - 1))

    def _codes(self, at: Index) -> tuple[Vec, ...]:
        """Four codes of a row in every lane; as words: the first and third, the second and fourth."""
        b, c = self.b, self.c
        if not c.words:
            return (b.let(b.load(self.rows.codes, at, QUAD).bits(S32).spread(c.lanes)),)
        return tuple(b.let(b.load(self.rows.codes, at + 2 * n, 2).bits(S32).spread(c.lanes)) for n in (0, 1))

    def _add(self, sums: list[Register], steps: list[tuple[int, Vec, tuple[Vec, ...]]]) -> None:
        """The sums + the products of the fields of a stored vector."""
        b, c, acc = self.b, self.c, sums[0]
        if c.isa in ("avx512-vnni", "avx-vnni"):
            dot = x86.VPDPBUSD_512 if c.isa == "avx512-vnni" else x86.VPDPBUSD_256
            for f, w, a in steps:
                own = sums[f] if c.in_place else acc
                own.set(call(dot, own.get(), w, a[0]))
        elif c.isa in ("neon-i8mm", "neon-dot") and not c.words:
            for _, w, a in steps:  # sdot: weights below 8 bits are not negative as signed ones either
                acc.set(call(arm.USDOT if c.isa == "neon-i8mm" else arm.SDOT, acc.get(), w, a[0]))
        elif not c.words:  # at most four pairs of 15 * 127 * 2: no saturation
            pairs = call(x86.VPMADDUBSW_256, steps[0][1], steps[0][2][0])
            for _, w, a in steps[1:]:
                pairs = b.let(pairs + call(x86.VPMADDUBSW_256, w, a[0]))
            acc.set(acc.get() + call(x86.VPMADDWD_256, pairs, const(1, S16, 16)))
        else:
            for _, w, a in steps:
                words = w.bits(U16)
                for half, codes in ((words & 255, a[0]), (words >> 8, a[1])):
                    acc.set(acc.get() + _pairs(c.isa, half, codes))

    def _finish(self, task: Index, first: Index, tall: int, held: _Held) -> None:
        b, c = self.b, self.c
        whole, rest = divmod(c.outputs, c.panel)
        cases = [(c.panel, task < whole if rest else True)] if whole else []
        cases += [(rest, task == whole if whole else True)] if rest else []
        for cols, condition in cases:
            with b.when(condition):
                for i in range(tall):
                    scale = b.let(b.load(self.x_scale, first + i)).spread(c.lanes)
                    for j in range(c.tile[1]):
                        valid = min(c.lanes, cols - j * c.lanes)
                        if valid > 0:
                            y = b.let(held.get(i, j) * scale)
                            col = b.index(task * c.panel + j * c.lanes)
                            self.epilogue.store(b, self.pointers, y, first + i, col, valid)


def _pairs(isa: str, half: Vec, codes: Vec) -> Vec:
    """The sum of the products of two 16-bit lanes each."""
    if isa in ("avx2", "portable"):
        return call(x86.VPMADDWD_256 if isa == "avx2" else x86.PMADDWD_128, half, codes)
    w, a = half.bits(S32), codes.bits(S32)
    return (w & 0xFFFF) * ((a << 16) >> 16) + (w >> 16) * (a >> 16)


class _Held:
    """The results of a tile while its groups pass: in registers, or in memory where there are too many."""

    def __init__(self, b: Builder, c: GroupSpec, tall: int, memory: Pointer) -> None:
        self.b, self.c, self.tall, self.memory = b, c, tall, memory
        self.kept: dict[tuple[int, int], Register] = {}

    def _all(self) -> list[tuple[int, int]]:
        return [(i, j) for i in range(self.tall) for j in range(self.c.tile[1])]

    def _at(self, i: int, j: int) -> int:
        return (i * self.c.tile[1] + j) * self.c.lanes

    def clear(self) -> None:
        zero = const(0.0, F32, self.c.lanes)
        for i, j in self._all():
            if self.c.in_registers:
                self.kept[i, j] = self.b.register(F32, self.c.lanes, zero, "sum")
            else:
                self.b.store(self.memory, self._at(i, j), zero)

    def get(self, i: int, j: int) -> Vec:
        if self.c.in_registers:
            return self.kept[i, j].get()
        return self.b.load(self.memory, self._at(i, j), self.c.lanes)

    def add(self, i: int, j: int, value: Vec, scale: Vec) -> None:
        """One group's sum times its scale."""
        before = self.get(i, j)
        after = before + value * scale if self.c.isa == "portable" else fma(value, scale, before)
        if self.c.in_registers:
            self.kept[i, j].set(after)
        else:
            self.b.store(self.memory, self._at(i, j), after)


__all__ = ["emit"]
