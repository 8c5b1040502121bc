"""The kernel of a tensor-core product: stages of asynchronous copies, fragments one step ahead, sums in registers.

A stage holds w's fragments (each lane reads its 16 bytes), 2:4 metadata, and a tile of x for ``ldmatrix``. One barrier
a stage: behind it the next stage's first fragments are read and the stage before is free for new copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.mma_spec import Product, Tile
from bitwright.codegen.tvm.cuda.operands import CHUNK, Loader, swizzled
from bitwright.codegen.tvm.cuda.store import through_shared
from bitwright.codegen.tvm.generic_eval import div, mod
from bitwright.codegen.tvm.tir import Index, Pointer, Vec, const, minimum
from bitwright.ir.types import F32, S32, U8, U32

Put = Callable[[Index, Index, Index, list[Vec]], None]
"""Takes batch, row of the batch, first output, four sums."""


@dataclass(eq=False)
class Pointers:
    """A kernel's operands: x, w (packed bytes or as in memory), metadata of 2:4, counters and sums of parts,
    16 bytes that stand outside of a padded image."""

    x: Pointer
    w: Pointer
    meta: Pointer | None = None
    counters: Pointer | None = None
    work: Pointer | None = None
    filled: Pointer | None = None


@dataclass(eq=False)
class Kernel:
    """Emits one kernel into ``b``, whose grid and threads are the tile's."""

    b: CudaBuilder
    p: Product
    t: Tile
    at: Pointers
    _right: Loader = field(init=False)
    _left: Loader | None = None

    def emit(self, put: Put) -> None:
        """Everything: ``put`` writes four neighbouring outputs of a row."""
        b, p, t = self.b, self.p, self.t
        f = t.fragments
        self._open()
        self._steps = t.depth // t.step(p)
        if p.left != "packed":
            assert p.right is not None
            rows, depth = (t.outs, t.depth) if p.left == "rows" else (t.depth // p.size, t.outs * p.size)
            self._left = Loader(b, p.right, self._shared, rows, depth, x=self.at.w)
            self._left.start(self._out if p.left == "rows" else 0, self._z)
        self._acc = b.local(S32 if p.is_integer else F32, 4 * f.m * f.n, "acc")
        each = 4 if p.sparse else 2
        self._pair = 1 if p.sparse or f.n == 1 else 2
        self._late = f.n // self._pair >= 4
        self._a, self._b = b.local(U32, 2 * 4 * f.m, "a"), b.local(U32, (2 - self._late) * each * f.n, "b")
        self._meta = b.local(U32, 8, "meta") if p.sparse else None
        self._zero()
        self._lanes()
        self._prologue()
        self._load_a(0, 0)
        for j in range(f.n // self._pair):
            self._load_b(0, 0, j)
        with b.loop(self._turns(), name="turn") as turn:
            for s in range(self._steps):
                self._step(turn, s)
        b.call("bw_cp_async_wait0")
        self._close(put)

    def _open(self) -> None:
        """Shared memory, the block's place, x's loader."""
        b, p, t = self.b, self.p, self.t
        self._shared = b.shared(U8, t.shared_bytes(p))
        self._x_at = t.left_bytes(p) + t.meta_bytes(p)
        self._place()
        place = at_shared(self._shared, self._x_at)
        self._right = Loader(b, p.source, place, t.rows, t.depth, p.fill, x=self.at.x, filled=self.at.filled)
        self._right.start(self._row, self._z)

    def _zero(self) -> None:
        words = 4 * self.t.fragments.m * self.t.fragments.n
        for i in range(words):
            self.b.store(self._acc, i, const(0, self._acc.dtype))

    def _prologue(self) -> None:
        """Start the copies of all stages but one; the first has arrived."""
        b, t = self.b, self.t
        for s in range(t.stages - 1):
            with b.when(s < self._count):
                self._copy(s, s)
            b.call("bw_cp_async_commit")
        b.call(f"bw_cp_async_wait{t.stages - 2}")
        b.sync()

    def _turns(self) -> Index:
        """Stages of this block, not known to the compiler: unrolled, the loop would not fit the instruction cache."""
        return self.b.index(self.b.value("bw_opaque", S32, self._count).expr)

    def _close(self, put: Put) -> None:
        """Results, of the block that has all parts of the sum."""
        if self.t.split == 1:
            self._write(put)
            return
        with self.b.when(self._joined()):
            self._write(put)

    # ---- where
    def _place(self) -> None:
        """The block's first output and row, its part of the sum."""
        b, p, t = self.b, self.p, self.t
        down, across = math.ceil(p.rows / t.rows), math.ceil(p.outs / t.outs)
        tile = b.block("x")
        band = min(t.raster, down)
        inside = b.index(mod(tile, band * across))
        first = b.index(div(tile, band * across) * band)
        height = b.index(minimum(band, down - first)) if down % band else band
        self._row = b.index((first + _mod(inside, height)) * t.rows)
        self._out = b.index(_div(inside, height) * t.outs)
        self._z: Index = b.block("z") if p.batch > 1 else 0
        turns = t.turns(p)
        each = math.ceil(turns / t.split)
        self._first: Index = b.index(b.block("y") * each) if t.split > 1 else 0
        self._count: Index = b.index(minimum(each, turns - self._first)) if t.split > 1 and turns % each else each
        self._warp_out, self._warp_row = b.index(mod(b.warp, t.warps[0])), b.index(div(b.warp, t.warps[0]))

    def _lanes(self) -> None:
        """Byte offsets that every step adds to, a lane's own."""
        b, p, t, f = self.b, self.p, self.t, self.t.fragments
        lane = b.lane
        if p.sparse or f.n == 1:
            row, chunk = mod(lane, 8), div(lane, 8) if p.sparse else mod(div(lane, 8), 2)
        else:
            row, chunk = mod(lane, 8) + div(lane, 16) * 8, mod(div(lane, 8), 2)
        row = self._warp_row * (8 * f.n) + row
        self._b_lane = b.index(row * t.depth + swizzled(chunk, row, t.depth) * CHUNK)
        if p.left == "packed":
            self._a_lane = b.index(self._warp_out * (f.m * self._steps * 512) + lane * CHUNK)
        elif p.left == "rows":
            row = self._warp_out * (16 * f.m) + mod(lane, 16)
            self._a_lane = b.index(row * t.depth + swizzled(div(lane, 16), row, t.depth) * CHUNK)

    # ---- stages
    def _copy(self, turn: Index, slot: Index) -> None:
        """Start the copies of stage ``turn`` of this block's part into a slot."""
        b, p, t = self.b, self.p, self.t
        at = b.index(slot * t.stage_bytes(p))
        k = b.index((self._first + turn) * (t.depth // p.size))
        if p.left == "packed":
            self._copy_packed(at, turn)
        elif p.left == "rows":
            self._loader().copy(at, k)
        else:
            self._loader().copy(at, self._out, k)
        self._right.copy(at, k)

    def _copy_packed(self, at: Index, turn: Index) -> None:
        b, p, t = self.b, self.p, self.t
        ks, tiles = t.turns(p) * self._steps, math.ceil(p.outs / t.outs) * t.outs // 16
        first = (self._z * tiles + div(self._out, 16)) * (ks * 512) + (self._first + turn) * (self._steps * 512)
        self._stream(self.at.w, at, b.index(first), t.outs // 16, ks * 512, self._steps * 512)
        if p.sparse:
            assert self.at.meta is not None
            each = t.meta_bytes(p) // (t.outs // 64)
            blocks = math.ceil(p.outs / t.outs) * t.outs // 64
            whole = t.turns(p) * each
            first = (self._z * blocks + div(self._out, 64)) * whole + (self._first + turn) * each
            self._stream(self.at.meta, at + t.left_bytes(p), b.index(first), t.outs // 64, whole, each)

    def _stream(self, source: Pointer, to: Index, first: Index, pieces: int, stride: int, nbytes: int) -> None:
        """Copy ``pieces`` runs of ``nbytes``, ``stride`` apart, one behind the other."""
        b, threads = self.b, self.b.threads
        total = pieces * nbytes // CHUNK
        for i in range(math.ceil(total / threads)):
            unit = b.thread + i * threads
            with b.when(unit < total if (i + 1) * threads > total else True):
                place = first + div(unit, nbytes // CHUNK) * stride + mod(unit, nbytes // CHUNK) * CHUNK
                b.call("bw_cp_async16", b.address(self._shared, to + unit * CHUNK), b.address(source, place), CHUNK)

    def _loader(self) -> Loader:
        assert self._left is not None
        return self._left

    def _step(self, turn: Index, s: int) -> None:
        """The products of step ``s`` and the next step's fragments: x's behind the products that read their registers
        (``_late``: few registers), or before all, into registers of their own."""
        b, t, f = self.b, self.t, self.t.fragments
        last, then = s == self._steps - 1, (s + 1) % self._steps
        stage = b.index(mod(turn + last, t.stages) * t.stage_bytes(self.p))
        units = range(f.n // self._pair)
        if self._late:
            self._multiply(s, 0)
        if last:
            b.call(f"bw_cp_async_wait{t.stages - 2}")
            b.sync()
        self._load_a(stage, then)
        if s == 0:
            ahead = turn + (t.stages - 1)
            with b.when(ahead < self._count):
                self._copy(ahead, mod(ahead, t.stages))
            b.call("bw_cp_async_commit")
        if not self._late:
            for j in units:
                self._load_b(stage, then, j)
        for j in units:
            if j or not self._late:
                self._multiply(s, j)
            if self._late:
                self._load_b(stage, then, j)

    # ---- fragments
    def _load_a(self, stage: Index, s: int) -> None:
        """w's registers of step ``s`` of the stage at byte ``stage``."""
        f = self.t.fragments
        for i in range(f.m):
            self._load_left(stage, s, i, self.b.address(self._a, (s % 2 * f.m + i) * 4))
        if self._meta is not None:
            self._load_meta(stage, s)

    def _load_b(self, stage: Index, s: int, j: int) -> None:
        """x's registers of the j-th one or two fragments."""
        b, p, t, f = self.b, self.p, self.t, self.t.fragments
        each, step = (4, 64) if p.sparse else (2, 32)
        where = stage + self._x_at + _xor(self._b_lane, s * step) + j * self._pair * 8 * t.depth
        to = (self._half(s) * f.n + j * self._pair) * each
        b.call(f"bw_ldmatrix{each * self._pair}", b.address(self._b, to), b.address(self._shared, where))

    def _half(self, s: int) -> int:
        """Which of x's sets of registers step ``s`` uses."""
        return 0 if self._late else s % 2

    def _load_left(self, stage: Index, s: int, i: int, to: object) -> None:
        b, p, t, f = self.b, self.p, self.t, self.t.fragments
        if p.left == "packed":
            place = stage + self._a_lane + (i * self._steps + s) * 512
            b.call("bw_copy16", to, b.address(self._shared, place))
            return
        if p.left == "rows":
            place = stage + _xor(self._a_lane, s * 32) + i * 16 * t.depth
            b.call("bw_ldmatrix4", to, b.address(self._shared, place))
            return
        row = s * 16 + div(b.lane, 16) * 8 + mod(b.lane, 8)
        chunk = (self._warp_out * f.m + i) * 2 + mod(div(b.lane, 8), 2)
        depth = t.outs * p.size
        place = stage + row * depth + swizzled(chunk, row, depth) * CHUNK
        b.call("bw_ldmatrix4_trans", to, b.address(self._shared, place))

    def _load_meta(self, stage: Index, s: int) -> None:
        """Four words of a step (8-bit types), or two of the four that two steps share."""
        b, p, t = self.b, self.p, self.t
        assert self._meta is not None
        each = t.meta_bytes(p) // (t.outs // 64)
        place = stage + t.left_bytes(p) + self._warp_out * each + b.lane * CHUNK
        if p.size == 1:
            b.call("bw_copy16", b.address(self._meta, s % 2 * 4), b.address(self._shared, place + s * 512))
        else:
            b.call(
                "bw_copy8", b.address(self._meta, s % 2 * 4), b.address(self._shared, place + s // 2 * 512 + s % 2 * 8)
            )

    def _multiply(self, s: int, unit: int) -> None:
        """The products of x's ``unit``-th one or two fragments."""
        b, p, f = self.b, self.p, self.t.fragments
        half, each = s % 2, 4 if p.sparse else 2
        for j in range(unit * self._pair, (unit + 1) * self._pair):
            for i in range(f.m):
                d, a = b.address(self._acc, (i * f.n + j) * 4), b.address(self._a, (half * f.m + i) * 4)
                x = b.address(self._b, (self._half(s) * f.n + j) * each)
                if self._meta is None:
                    b.call(f"bw_mma_{p.element}", d, a, x)
                elif p.size == 1:
                    b.call(f"bw_mma_sp_{p.element}", d, a, x, b.element(self._meta, half * 4 + i))
                else:
                    b.call(f"bw_mma_sp_{p.element}_{i % 2}", d, a, x, b.element(self._meta, half * 4 + i // 2))

    # ---- parts of a sum
    def _joined(self) -> object:
        """Put this part's sums into memory; whether this block is the last of its tile, which then has all sums."""
        b, t, f = self.b, self.t, self.t.fragments
        assert self.at.work is not None
        assert self.at.counters is not None
        tiles = t.grid(self.p)[0]
        tile = b.index(self._z * tiles + b.block("x"))
        words, count = 4 * f.m * f.n, f.m * f.n
        base = b.index(tile * (t.split * words * b.threads) + b.thread * 4)
        for c in range(count):
            place = base + b.block("y") * (words * b.threads) + c * 4 * b.threads
            b.call("bw_copy16", b.address(self.at.work, place), b.address(self._acc, 4 * c))
        b.call("bw_fence")
        b.sync()
        flag = b.view(self._shared, S32)
        with b.when(b.thread < 1):
            old = b.value("bw_count", S32, b.address(self.at.counters, tile))
            b.store(flag, 0, old)
            with b.when(old.eq(t.split - 1)):
                b.store(self.at.counters, tile, const(0, S32))
        b.sync()
        last = b.index(b.load(flag, 0).expr)
        with b.when(last >= t.split - 1):
            b.call("bw_fence")
            for i in range(words):
                b.store(self._acc, i, const(0, self._acc.dtype))
            with b.loop(t.split) as part:
                more = b.local(self._acc.dtype, 4)
                for c in range(count):
                    place = base + part * (words * b.threads) + c * 4 * b.threads
                    b.call("bw_fresh16", b.address(more), b.address(self.at.work, place))
                    for q in range(4):
                        b.store(self._acc, 4 * c + q, b.load(self._acc, 4 * c + q) + b.load(more, q))
        return last >= t.split - 1

    def _write(self, put: Put) -> None:
        b, p, t = self.b, self.p, self.t
        f = t.fragments

        def one(row: Index, out: Index, values: list[Vec]) -> None:
            at, column = b.index(self._row + row), b.index(self._out + out)
            with b.when(self._inside(at, column)):
                put(self._z, at, column, values)

        through_shared(b, f, self._acc, self._shared, f.passes(t.stages * t.stage_bytes(p)), one)

    def _inside(self, row: Index, out: Index) -> object:
        """Whether the block's sum at a row and an output is one of the product's."""
        return tirx.all(row < self.p.rows, out < self.p.outs)


def at_shared(shared: Pointer, byte: int) -> Pointer:
    """Bytes of shared memory from ``byte`` on."""
    return Pointer(shared.root, shared.buffer, shared.dtype, shared.offset + byte, shared.name)


def _xor(a: Index, b: int) -> Index:
    return tirx.bitwise_xor(a, tirx.const(b, "int32")) if b else a


def _mod(i: Index, by: Index) -> Index:
    return mod(i, by) if isinstance(by, int) else tirx.truncmod(i, by)


def _div(i: Index, by: Index) -> Index:
    return div(i, by) if isinstance(by, int) else tirx.truncdiv(i, by)


__all__ = ["Kernel", "Pointers", "Put", "at_shared"]
