"""The kernel of a ``wgmma`` product: a producer warpgroup copies, one or two consumer warpgroups multiply.

A stage of shared memory holds one k-step: w's tile (packed: one bulk copy; computed: asynchronous copies) and x's rows,
both swizzled by 128 bytes (2:4 values by 64). ``full[s]`` counts the producer's threads and the bulk copy's bytes,
``empty[s]`` the consumers' warps. Blocks are persistent: while consumers write a tile, the producer fills the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.cuda.instructions.wgmma import LOW, high, name_of
from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.mma_emit import Pointers, Put, at_shared
from bitwright.codegen.tvm.cuda.mma_spec import Product
from bitwright.codegen.tvm.cuda.operands import Loader, Matrix, Window
from bitwright.codegen.tvm.cuda.wgmma_layout import ROWS, STEP, blob_bytes
from bitwright.codegen.tvm.cuda.wgmma_spec import PITCH, Cut
from bitwright.codegen.tvm.generic_eval import div, mod
from bitwright.codegen.tvm.tir import Index, Pointer, Register, Vec, choose, const, minimum
from bitwright.ir.types import F32, S32, U8, U32

GROUP = 128
_KINDS = {"f16": "f16", "bf16": "bf16", "s8": "s8s8", "s8u8": "s8u8", "u8s8": "u8s8", "u8": "u8u8", "e4m3": "e4m3"}


@dataclass(frozen=True, slots=True)
class Place:
    """A task: batch, tile along outputs, first row, first k-step and their number, tile's number, part of the sum."""

    batch: Index
    tile: Index
    row: Index
    first: Index
    count: Index
    number: Index
    part: Index


@dataclass(eq=False)
class Kernel:
    """Emits one kernel into ``b``, whose grid and threads are the cut's."""

    b: CudaBuilder
    p: Product
    c: Cut
    at: Pointers
    _shared: Pointer = field(init=False)

    def emit(self, put: Put) -> None:
        """Everything: ``put`` writes four neighbouring outputs of a row."""
        b, p, c = self.b, self.p, self.c
        self._shared = b.shared(U8, c.shared_bytes(p), align=1024)
        with b.when(b.thread < 1):
            for s in range(c.stages):
                b.call("bw_mbarrier_init", self._full(s), GROUP + (p.left == "packed"))
                b.call("bw_mbarrier_init", self._empty(s), 4 * c.consumers * c.cluster)
            b.call("bw_mbarrier_ready")
        self._together()
        b.either(b.thread < GROUP, self._produce, lambda: self._consume(put))
        if c.cluster > 1:  # none ends while another writes to it
            self._together()

    # ---- where
    def _barrier(self, index: Index) -> object:
        return self.b.address(self._shared, self.c.barriers_at(self.p) + index * 8)

    def _full(self, slot: Index) -> object:
        return self._barrier(slot)

    def _empty(self, slot: Index) -> object:
        return self._barrier(slot + self.c.stages)

    def _tasks(self, run: Callable[[Place], None]) -> None:
        """All tasks of this block, in an order in which blocks that run together share operands."""
        b, p, c = self.b, self.p, self.c
        total, grid = c.tasks(p) // c.cluster, c.grid(p) // c.cluster
        across, down = c.tiles(p)[0], c.tiles(p)[1] // c.cluster
        rank, block = mod(b.block(), c.cluster), b.index(div(b.block(), c.cluster))
        turns = div(block * -1 + (total - 1), grid) + 1 if total % grid else total // grid
        with b.loop(turns, name="task") as turn:
            task = b.index(block + turn * grid)
            part, number = b.index(mod(task, c.split)), b.index(div(task, c.split))
            batch, inside = b.index(div(number, across * down)), b.index(mod(number, across * down))
            band = min(c.raster, across)
            start = b.index(div(inside, band * down) * band)
            rest = b.index(mod(inside, band * down))
            width = b.index(minimum(band, across - start)) if across % band else band
            tile = b.index(start + (mod(rest, width) if isinstance(width, int) else tirx.truncmod(rest, width)))
            row = div(rest, width) if isinstance(width, int) else tirx.truncdiv(rest, width)
            steps = c.steps(p)
            each = math.ceil(steps / c.split)
            first = b.index(part * each)
            count = b.index(minimum(each, steps - first)) if steps % each else each
            at = b.index((row * c.cluster + rank) * c.rows)
            run(Place(batch, tile, at, first, count, b.index(number * c.cluster + rank), part))

    # ---- the producer
    def _produce(self) -> None:
        b, p, c = self.b, self.p, self.c
        self._registers("dec")
        right = self._loader(p.source, c.left_bytes(p), c.rows, p.fill, self.at.x)
        left = None if p.right is None else self._loader(p.right, 0, c.outs, 0, self.at.w)
        behind = c.ahead
        done = b.register(S32, 1, const(0, S32))

        def fill(at: Place) -> None:
            right.start(at.row, at.batch)
            if left is not None:
                left.start(b.index(at.tile * c.outs), at.batch)
            with b.loop(at.count, name="step") as step:
                turn = self._turn(done)
                slot = b.index(mod(turn, c.stages))
                b.call("bw_mbarrier_wait", self._empty(slot), 1 - mod(div(turn, c.stages), 2))
                to, k = b.index(slot * c.stage_bytes(p)), b.index(at.first + step)
                if left is None:
                    self._fetch(at, k, slot, to)
                else:
                    left.copy(to, b.index(k * (STEP // p.size)))
                right.copy(to, b.index(k * (STEP // p.size)))
                b.call("bw_cp_async_commit")
                with b.when(turn >= behind if behind else True):
                    b.call(f"bw_cp_async_wait{behind}")
                    b.call("bw_fence_proxy")
                    b.call("bw_mbarrier_arrive", self._full(mod(turn - behind, c.stages)))
                done.set(Vec(turn + 1, S32, 1))

        self._tasks(fill)
        if behind:
            b.call("bw_cp_async_wait0")
            b.call("bw_fence_proxy")
            turn = self._turn(done)
            for late in range(behind, 0, -1):
                with b.when(turn >= late):
                    b.call("bw_mbarrier_arrive", self._full(mod(turn - late, c.stages)))

    def _loader(self, source: Matrix | Window, at: int, rows: int, fill: int, x: Pointer) -> Loader:
        shared = at_shared(self._shared, at)
        return Loader(self.b, source, shared, rows, STEP, fill, x=x, threads=GROUP, filled=self.at.filled)

    def _fetch(self, at: Place, k: Index, slot: Index, to: Index) -> None:
        """One thread asks for w's tile of this k-step."""
        b, p, c = self.b, self.p, self.c
        nbytes = blob_bytes(c.outs, p.size, p.sparse)
        with b.when(b.thread < 1):
            b.call("bw_mbarrier_expect", self._full(slot), nbytes)
            tiles = c.tiles(p)[0]
            place = ((at.batch * tiles + at.tile) * c.steps(p) + k) * nbytes
            full = self._full(slot)
            if c.cluster == 1:
                b.call("bw_bulk_load", b.address(self._shared, to), b.address(self.at.w, place), nbytes, full)
                return
            share = nbytes // c.cluster
            skip = b.index(mod(b.block(), c.cluster) * share)
            ends = b.address(self._shared, to + skip), b.address(self.at.w, place + skip)
            b.call("bw_bulk_multicast", *ends, share, full, (1 << c.cluster) - 1)

    # ---- the consumers
    def _consume(self, put: Put) -> None:
        b, p, c = self.b, self.p, self.c
        self._registers("inc")
        kind = S32 if p.is_integer else F32
        acc = b.local(kind, c.words, "acc")
        for i in range(c.words):
            b.store(acc, i, const(0, kind))
        group = b.index(b.value("bw_shfl_idx_s32", S32, div(b.thread, GROUP) - 1, 0).expr)
        base = b.index(b.value(LOW, S32, b.address(self._shared)).expr)
        done = b.register(S32, 1, const(0, S32))
        meta = b.local(U32, c.each * (1 if p.size == 2 else 2), "meta") if p.sparse else None

        def make(at: Place) -> None:
            with b.loop(at.count, name="step") as step:
                turn = self._turn(done)
                slot = b.index(mod(turn, c.stages))
                b.call("bw_mbarrier_wait", self._full(slot), mod(div(turn, c.stages), 2))
                if meta is not None:
                    self._metadata(meta, slot, group)
                b.call("bw_wgmma_fence")
                self._multiply(acc, meta, b.index(base + slot * (c.stage_bytes(p) // 16)), group, step)
                b.call("bw_wgmma_commit")
                b.call("bw_wgmma_wait1")
                with b.when(tirx.all(step > 0, b.lane < 1)):
                    self._release(turn)
                done.set(Vec(turn + 1, S32, 1))
            b.call("bw_wgmma_wait0")
            for i in range(c.each):
                self._keep(acc, i)
            with b.when(b.lane < 1):
                self._release(self._turn(done))
            if c.split == 1:
                self._write(at, acc, group, put)
                return
            with b.when(self._joined(at, acc, group)):
                self._write(at, acc, group, put)

        self._tasks(make)

    def _metadata(self, meta: Pointer, slot: Index, group: Index) -> None:
        """This thread's words of a stage."""
        b, p, c = self.b, self.p, self.c
        words, each = b.view(self._shared, U32), 256 // p.size
        start = b.index(
            div(slot * c.stage_bytes(p) + c.outs * STEP // 2, 4) + group * (c.each * each) + mod(b.thread, GROUP)
        )
        for i in range(c.each):
            for half in range(each // 128):
                b.store(meta, i * (each // 128) + half, b.load(words, start + i * each + half * 128))

    def _multiply(self, acc: Pointer, meta: Pointer | None, low: Index, group: Index, step: Index) -> None:
        """One stage's instructions."""
        b, p, c = self.b, self.p, self.c
        pitch = STEP // 2 if p.sparse else STEP
        for k in range(pitch // 32):
            for i in range(c.each):
                a = low + group * (c.each * ROWS * pitch // 16) + (i * ROWS * pitch // 16 + 2 * k)
                x = low + (c.left_bytes(p) // 16 + k * (4 if p.sparse else 2))
                selector = None if not p.sparse else k if p.size == 2 else 0
                e = [] if meta is None else [b.element(meta, i if p.size == 2 else 2 * i + k)]
                name = name_of(_KINDS[p.element], c.rows, selector)
                add: Index = choose(step > 0, 1, 0) if k == 0 else 1
                sums = b.address(acc, i * c.rows // 2)
                b.call(name, sums, a, _word(high(8 * pitch, pitch)), x, _word(high(8 * STEP, STEP)), *e, add)

    def _keep(self, acc: Pointer, i: int) -> None:
        kind = "s32" if self.p.is_integer else "f32"
        self.b.call(f"bw_wgmma_keep_{kind}_{self.c.rows // 2}", self.b.address(acc, i * self.c.rows // 2))

    def _joined(self, at: Place, acc: Pointer, group: Index) -> object:
        """Put this part's sums into memory; whether this warpgroup is the tile's last, which then has all sums."""
        b, c = self.b, self.c
        assert self.at.work is not None
        assert self.at.counters is not None
        mine = b.index(mod(b.thread, GROUP))
        size = c.words * GROUP
        whose = b.index(at.number * c.consumers + group)
        base = b.index(whose * (c.split * size) + mine * 4)
        for w in range(0, c.words, 4):
            place = base + at.part * size + w * GROUP
            b.call("bw_copy16", b.address(self.at.work, place), b.address(acc, w))
        b.call("bw_fence")
        b.call("bw_barrier", group + 1, GROUP)
        flag = at_shared(self._shared, c.barriers_at(self.p) + 16 * c.stages)
        flags = b.view(flag, S32)
        with b.when(mine < 1):
            was = b.value("bw_count", S32, b.address(self.at.counters, whose))
            b.store(flags, group, was)
            with b.when(was.eq(c.split - 1)):
                b.store(self.at.counters, whose, const(0, S32))
        b.call("bw_barrier", group + 1, GROUP)
        last = b.index(b.load(flags, group).expr)
        with b.when(last >= c.split - 1):
            b.call("bw_fence")
            more = b.local(acc.dtype, 4, "more")
            for w in range(c.words):
                b.store(acc, w, const(0, acc.dtype))
            with b.loop(c.split, name="part") as part:
                for w in range(0, c.words, 4):
                    b.call("bw_fresh16", b.address(more), b.address(self.at.work, base + part * size + w * GROUP))
                    for q in range(4):
                        b.store(acc, w + q, b.load(acc, w + q) + b.load(more, q))
        return last >= c.split - 1

    def _write(self, at: Place, acc: Pointer, group: Index, put: Put) -> None:
        """Sums through shared memory, so that neighbouring threads write neighbouring outputs."""
        b, p, c = self.b, self.p, self.c
        words = b.view(at_shared(self._shared, c.sums_at(p)), acc.dtype)
        mine = b.index(mod(b.thread, GROUP))
        own = b.index(group * (c.part * PITCH))
        line = b.index(own + mod(b.lane, 4) * (2 * PITCH) + div(mine, 32) * 16 + div(b.lane, 4))
        parts = c.rows // c.part
        with b.loop(c.each * parts, name="slice") as turn:
            b.call("bw_barrier", group + 1, GROUP)
            for i in range(c.each * parts):  # registers have no index: one copy of what follows, a branch to each slice
                with b.when(turn < i + 1), b.when(turn >= i):
                    for q in range(c.part // 2):
                        value = b.load(acc, i * (c.part // 2) + q)
                        b.store(words, line + (q // 4 * 8 + q % 2) * PITCH + q // 2 % 2 * 8, value)
            b.call("bw_barrier", group + 1, GROUP)
            out = b.index(at.tile * c.outs + (group * c.each + div(turn, parts)) * ROWS)
            first = b.index(at.row + mod(turn, parts) * c.part)
            with b.loop(c.part // 8, name="eight") as eight:
                row = b.index(eight * 8 + div(mine, 16))
                column = b.index(mod(mine, 16) * 4)
                y, x = b.index(first + row), b.index(out + column)
                with b.when(tirx.all(y < p.rows, x < p.outs)):
                    four = b.let(b.load(words, own + row * PITCH + column, 4))
                    put(at.batch, y, x, [b.let(four.part(k, 1)) for k in range(4)])

    # ---- small
    def _together(self) -> None:
        """All threads of the cluster wait for each other."""
        if self.c.cluster > 1:
            self.b.call("bw_cluster_sync")
        else:
            self.b.sync()

    def _release(self, turn: Index) -> None:
        """The stage before this turn's may be filled again, by every block that fills it."""
        b, c = self.b, self.c
        slot = b.index(mod(turn + (c.stages - 1), c.stages))
        if c.cluster == 1:
            b.call("bw_mbarrier_arrive", self._empty(slot))
            return
        for rank in range(c.cluster):
            b.call("bw_mbarrier_arrive_at", self._empty(slot), rank)

    def _turn(self, done: Register) -> Index:
        """k-steps before this one, of all tiles."""
        return self.b.index(self.b.let(done.get()).expr)

    def _registers(self, way: str) -> None:
        """Move registers from the producer to two consumers; one consumer has enough at once."""
        if self.c.consumers == 2:
            self.b.call(f"bw_setmaxnreg_{way}_{88 if way == 'dec' else 208}")


def _word(value: int) -> object:
    return tirx.const(value, "uint32")


def builder(symbol: str, p: Product, c: Cut) -> CudaBuilder:
    """The builder of a kernel: one block a multiprocessor, so that registers can be moved."""
    return CudaBuilder(symbol, grid=(c.grid(p), 1, 1), threads=c.threads, min_blocks=1, cluster=c.cluster)
