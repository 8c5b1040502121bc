"""The kernel: packed weights into registers, exact sums of a group on tensor cores, one scale each, then the epilogue.

Every warp has a tile of 16 outputs and up to 64 rows; several warps may share a tile, each with a part of its inputs,
and add up in shared memory in a fixed order. Weights come by asynchronous copies of up to 16 bytes a lane, some turns
ahead, because loads into registers would be moved to their use by the assembler; activations come from the caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.lowbit.spec import CHUNK, TILE, LowbitSpec
from bitwright.codegen.tvm.cuda.store import RowEpilogue
from bitwright.codegen.tvm.generic_eval import conjunction, div, mod, unflatten
from bitwright.codegen.tvm.tir import Index, Pointer, Vec, choose, const, maximum, minimum
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import F32, S32, U32

STRIDE = 20
"""Floats between rows of sums in shared memory: no two lanes that store at once share a bank."""
_UPPER = {8: 0xFFFFFFFF, 4: 0xF0F0F0F0, 2: 0xC0C0C0C0}


@dataclass(frozen=True)
class Operands:
    """Pointers of the kernel."""

    x: Pointer
    weights: Pointer
    x_scale: Pointer | None = None
    scales: Pointer | None = None
    zeros: Pointer | None = None
    offsets: Pointer | None = None


@dataclass(eq=False)
class Kernel:
    """Emits one kernel of a spec."""

    b: CudaBuilder
    s: LowbitSpec
    on: Operands
    _held: dict[str, Pointer] = field(default_factory=dict)

    def run(self, epilogue: RowEpilogue, body: Graph, root: Node) -> None:
        b, s = self.b, self.s
        self.quarter, self.eighth = b.index(b.lane % 4), b.index(b.lane // 4)
        self.warp, self.part = b.index(b.warp), b.index(b.warp % s.warps_k)
        self.tile = b.index(minimum(b.block("x") * s.warps_o + b.warp // s.warps_k, s.tiles - 1))
        self.first_row = b.index(b.block("y") * (8 * s.columns))
        words = 4 * s.columns
        self.raw = b.local(U32, s.together * sum(s.streams), "raw")
        self.ring = b.shared(U32, s.warps_k * s.warps_o * s.stages * s.stage_words, name="ring")
        self.codes = b.local(U32, 4 if s.sparse else 8, "codes")
        self.x = b.local(U32, words, "x")
        self.masked = b.local(U32, 4, "masked")
        self.kind = S32 if s.exact else F32
        self.sums, self.total = b.local(S32, words, "sums"), b.local(self.kind, words, "total")
        self.ones, self.sums_x = b.local(U32, 4, "ones"), b.local(S32, words, "sums_x")
        for i in range(words):
            b.store(self.total, i, const(0, self.kind))
        for i in range(4):
            b.store(self.ones, i, const(0x01010101, U32))
        self._clear()
        if s.long:
            self._long()
        else:
            self._short()
        self._finish(epilogue, body, root)

    # ---- loops over the inputs
    def _long(self) -> None:
        """Groups of many spans, each split between the warps of the tile."""
        b, s = self.b, self.s
        inner = s.spans // s.groups
        with b.loop(s.groups, name="group") as g:
            for first, there in self._loads(inner, b.index(g * inner)):
                self._words(there)
                for n in range(s.together):
                    for _ in self._chunks(n, b.index((g * inner + first + n) * s.span)):
                        pass
            self._flush(b.index(g))

    def _short(self) -> None:
        """Whole units of spans and groups, the warps of a tile in turns."""
        b, s = self.b, self.s
        length = s.together * s.span
        for first, there in self._loads(s.spans, 0):
            at = b.index(div(first, s.together))
            self._words(there)
            for n in range(s.together):
                for end in self._chunks(n, b.index((first + n) * s.span)):
                    group, rest = divmod(n * s.span + end, s.group)
                    if not rest:
                        last = s.groups - 1
                        self._flush(b.index(minimum(at * (length // s.group) + (group - 1), last)))

    def _there(self, first: Index, count: int) -> list[Any]:
        """Which of the spans from ``first`` on exist."""
        whole = count % (self.s.together * self.s.warps_k) == 0 and self.s.stages == 1
        return [True if whole else first + n < count for n in range(self.s.together)]

    def _loads(self, count: int, base: Index) -> Iterator[tuple[Index, list[Any]]]:
        """The loop over ``count`` spans from ``base`` on: this warp's first span of each turn, and which there are.

        Loads of the turns ahead are under way; a lane reads back what it asked for itself, so nothing waits for others.
        """
        b, s = self.b, self.s

        def first(turn: Index) -> Index:
            return b.index((turn * s.warps_k + self.part) * s.together)

        for ahead in range(s.stages - 1):
            self._ask(base, at := first(ahead), self._there(at, count), ahead)
        with b.loop(ceil(ceil(count / s.together) / s.warps_k), name="turn") as turn:
            later = b.index(turn + (s.stages - 1))
            self._ask(base, at := first(later), self._there(at, count), b.index(mod(later, s.stages)))
            b.call(f"bw_cp_async_wait{s.stages - 1}")
            self.slot = b.index((self.warp * s.stages + mod(turn, s.stages)) * s.stage_words)
            at = first(turn)
            yield at, self._there(at, count)

    def _ask(self, base: Index, first: Index, there: Sequence[Any], stage: Index) -> None:
        """Begin to copy the words of the spans ``first`` and following into a stage of this warp."""
        b, s = self.b, self.s
        slot = b.index((self.warp * s.stages + stage) * s.stage_words)
        source = b.index((self.tile * s.spans + base + first) * s.span_words)
        for n, exists in enumerate(there):
            for at, each in s.loads:
                place = n * s.span_words + at + b.lane * each
                valid = tirx.Select(exists, tirx.const(4 * each, "int32"), tirx.const(0, "int32"))
                to, start = b.address(self.ring, slot + place), b.address(self.on.weights, source + place)
                b.call(f"bw_cp_async{4 * each}", to, start, 4 * each if exists is True else valid)
        b.call("bw_cp_async_commit")

    def _words(self, there: Sequence[Any]) -> None:
        """This lane's words out of the stage that has arrived."""
        b, s = self.b, self.s
        to = 0
        for n, exists in enumerate(there):
            for at, each in s.loads:
                place = self.slot + (n * s.span_words + at) + b.lane * each
                b.call(f"bw_pull{4 * each}", b.address(self.raw, to), b.address(self.ring, place), True)
                to += each
            for i in range(to - s.chunks, to) if s.sparse and exists is not True else ():  # two places always differ
                found = b.load(self.raw, i).expr
                b.store(self.raw, i, Vec(_places_or_first(exists, found), U32))

    # ---- one span
    def _chunks(self, n: int, k: Index) -> Iterator[int]:
        """Multiply the chunks of loaded span ``n``, whose first input is ``k``; yields each piece's end after it."""
        s = self.s
        for c in range(s.chunks):
            self._unpack(n, c)
            for j in range(s.columns):
                self._activations(j, self.b.index(k + c * CHUNK))
            for end in range(s.piece, CHUNK + 1, s.piece):
                self._products(n, c, end)
                yield c * CHUNK + end

    def _unpack(self, n: int, c: int) -> None:
        """Codes of a chunk into the upper bits of bytes."""
        b, s = self.b, self.s
        if s.kept[0]:
            self._spread_out(n, c)
            return
        bits, count = 2 if s.bits == 3 else s.bits, 4 if s.sparse else 8
        each, base = 8 // bits, n * sum(s.streams)
        for i in range(count):
            r = c * count + i
            word = b.load(self.raw, base + r // each)
            value = _shifted(word, 8 - bits * (r % each + 1))
            if s.bits != 8:
                value = value & _UPPER[bits]
            if s.bits == 3:
                low = b.load(self.raw, base + s.streams[0] + r // 8)
                value = value | (_shifted(low, 5 - r % 8) & 0x20202020)
            b.store(self.codes, i, value)

    def _spread_out(self, n: int, c: int) -> None:
        """Stored codes of a chunk to their places: each is a byte shifted there, and nothing if shifted too far."""
        b, s = self.b, self.s
        keep, m = s.kept
        base, mask = n * sum(s.streams), 256 - (1 << s.shift)
        words = [[const(0, U32)] * 2 for _ in range(4)]  # by register and half of the rows
        for e in range(s.values // s.chunks):
            half, group = e // (16 // m * keep), e // keep % (16 // m)
            at = c * (s.values // s.chunks) + e
            stored = b.load(self.raw, base + at // (32 // s.bits))
            value = b.register(U32, 1, _shifted(stored, s.shift - at % (32 // s.bits) * s.bits) & mask).get()
            place = b.load(self.raw, base + s.streams[0] + at // (32 // s.place_bits))
            to = _shifted(place, 3 - at % (32 // s.place_bits) * s.place_bits) & (8 * (m - 1))
            bit = b.register(S32, 1, to.cast(S32)).get()
            for i in range(m // 4):
                moved = b.value("bw_shift", U32, value, bit - 32 * i if i else bit)
                words[group * (m // 4) + i][half] = moved | words[group * (m // 4) + i][half]
        for i, pair in enumerate(words):
            for half in range(2):
                b.store(self.codes, 2 * i + half, pair[half])

    def _activations(self, j: int, k: Index) -> None:
        """The lane's bytes of a row, from input ``k`` of the chunk on."""
        b, s = self.b, self.s
        size = s.piece // 4
        row = b.index(self.first_row + 8 * j + self.eighth)
        for p in range(CHUNK // s.piece):
            at = b.index(k + p * s.piece + self.quarter * size)
            to, place = b.address(self.x, 4 * j + p * size // 4), b.address(self.on.x, row * s.depth + at)
            if s.depth % size == 0:
                b.call(f"bw_pull{size}", to, place, conjunction([row < s.rows, at < s.depth]))
            else:
                left = maximum(minimum(s.depth - at, size), 0)
                b.call(f"bw_gather{size}", to, place, choose(row < s.rows, left, 0))

    def _products(self, n: int, c: int, end: int) -> None:
        """The products of the piece of a chunk that ends at ``end``, for all rows."""
        b, s = self.b, self.s
        name = "s8u8" if s.unsigned else "s8"
        for j in range(s.columns):
            if s.sparse:
                right = self._only(4 * j, 4, range((end - s.piece) // 16, end // 16))
                meta = b.load(self.raw, n * sum(s.streams) + sum(s.streams[:-1]) + c)
                b.call(f"bw_mma_sp_{name}", b.address(self.sums, 4 * j), b.address(self.codes), right, meta)
                continue
            for step in range(2):
                kept = [i for i in range((end - s.piece) // 16, end // 16) if i // 2 == step]
                if kept:
                    right = self._only(4 * j + 2 * step, 2, [i % 2 for i in kept])
                    b.call(f"bw_mma_{name}", b.address(self.sums, 4 * j), b.address(self.codes, 4 * step), right)
                    if s.zeros:
                        b.call("bw_mma_s8", b.address(self.sums_x, 4 * j), b.address(self.ones), right)

    def _only(self, first: int, count: int, kept: Sequence[int]) -> Any:
        """The address of ``count`` registers of activations from ``first`` on, zeros in those not ``kept``."""
        b = self.b
        if len(kept) == count:
            return b.address(self.x, first)
        for i in range(count):
            b.store(self.masked, i, b.load(self.x, first + i) if i in kept else const(0, U32))
        return b.address(self.masked)

    # ---- groups
    def _clear(self) -> None:
        for i in range(4 * self.s.columns):
            self.b.store(self.sums, i, const(0, S32))
            self.b.store(self.sums_x, i, const(0, S32))

    def _flush(self, group: Index) -> None:
        """Add the exact sums of a group, times its scale, to the totals."""
        b, s = self.b, self.s
        if s.exact:
            for i in range(4 * s.columns):
                b.store(self.total, i, b.load(self.total, i) + (b.load(self.sums, i) >> s.shift))
            self._clear()
            return
        at = b.index((self.tile * s.groups + group) * TILE + self.eighth * 2)
        scales = self._scales(at)
        zeros = None
        if self.on.zeros is not None:
            zeros = [b.let(b.load(self.on.zeros, at + h).cast(S32)) for h in range(2)]
        for i in range(4 * s.columns):
            value = b.load(self.sums, i) >> s.shift
            if zeros is not None:
                value = value - zeros[i % 4 // 2] * b.load(self.sums_x, i - i % 4 + i % 2)
            b.store(self.total, i, b.load(self.total, i) + value.cast(F32) * scales[i % 4 // 2])
        self._clear()

    def _scales(self, at: Index) -> list[Vec]:
        b = self.b
        assert self.on.scales is not None
        if self.s.wide_scales:
            return [b.register(F32, 1, b.load(self.on.scales, at + h)).get() for h in range(2)]
        both = b.register(U32, 1, b.load(b.view(self.on.scales, U32), at // 2)).get()
        return [b.register(F32, 1, v.bits(F32)).get() for v in (both << 16, both & 0xFFFF0000)]

    # ---- the end
    def _finish(self, epilogue: RowEpilogue, body: Graph, root: Node) -> None:
        """Totals of all warps through shared memory to rows of four outputs a thread."""
        b, s = self.b, self.s
        rows = 8 * s.columns
        held = b.shared(self.kind, s.warps_k * s.warps_o * rows * STRIDE)
        mine = b.index((self.part * s.warps_o + b.warp // s.warps_k) * rows)
        for i in range(4 * s.columns):
            row = mine + 8 * (i // 4) + self.quarter * 2 + i % 2
            b.store(held, row * STRIDE + self.eighth + 8 * (i % 4 // 2), b.load(self.total, i))
        b.sync()
        pieces = s.warps_o * rows * (TILE // 4)
        lead = root.type.static_shape[:-1]
        with b.loop(-(-pieces // b.threads), name="piece") as n:
            e = b.index(n * b.threads + b.thread)
            line = b.index(e // 4)
            row = b.index(self.first_row + line % rows)
            first = b.index((b.block("x") * s.warps_o + line // rows) * TILE + e % 4 * 4)
            with b.when(conjunction([e < pieces, row < s.rows, first < s.outputs])):
                factor = b.register(F32, 1, b.load(self.on.x_scale, row)).get() if self.on.x_scale is not None else None
                values = []
                for k in range(4):
                    value = b.load(held, line * STRIDE + e % 4 * 4 + k)
                    for p in range(1, s.warps_k):
                        value = value + b.load(held, (p * s.warps_o * rows + line) * STRIDE + e % 4 * 4 + k)
                    if self.on.offsets is not None:
                        value = value + b.load(self.on.offsets, first + k)
                    values.append(b.register(self.kind, 1, value if factor is None else value * factor).get())
                whole = s.outputs % 4 == 0
                epilogue.store_row(unflatten(row, lead), first, values, s.outputs, whole)


def _places_or_first(exists: Any, found: Any) -> Any:
    """Places as loaded, or the first two of every four where nothing was."""
    return tirx.Select(exists, found, tirx.const(0x44444444, "uint32"))


def _shifted(word: Vec, left: int) -> Vec:
    """Shifted to the left, or to the right where ``left`` is negative."""
    return word if not left else word << left if left > 0 else word >> -left
