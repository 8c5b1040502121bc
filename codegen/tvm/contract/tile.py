"""The microkernel: one register tile of accumulators over the whole reduction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from bitwright.codegen.tvm.contract.engine import Engine, Generic, Operand, PairBytes
from bitwright.codegen.tvm.contract.epilogue import Epilogue
from bitwright.codegen.tvm.contract.flipped import FlippedBytes
from bitwright.codegen.tvm.contract.plan import Block, Plan, Step
from bitwright.codegen.tvm.contract.spec import Runs
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Register, Vec, const, width
from bitwright.ir.types import S16

LINE = 64
"""Bytes of a cache line."""
UNROLLED = 4
"""From so many steps on, a loop between two spills of 16-bit sums is kept as a loop."""


@dataclass(frozen=True)
class Streams:
    """The operands of a kernel: activations, packed weights, packed indices and initial accumulators.

    ``step``: distance in elements from one step's weights to the next (None: as packed).
    """

    x: Pointer
    weights: Pointer
    indices: Pointer | None = None
    init: Pointer | None = None
    step: int | None = None


@dataclass(frozen=True)
class Fetch:
    """Cache lines to ask for while a tile runs: with every block of its steps the next ``elements`` from ``start``."""

    pointer: Pointer
    start: Index
    elements: int


@dataclass(frozen=True)
class Place:
    """Where a tile is: output row and column, activation index per row, weight and index base, valid columns.

    ``fetch``: memory that the tile asks for, for later ones.
    """

    row: Index
    col: Index
    x: list[Index]
    weights: Index
    indices: Index
    vectors: int
    cols: int
    fetch: tuple[Fetch, ...] = ()


@dataclass(frozen=True)
class Cursor:
    """Where the reduction stands: activation index per row, weight and index position, which of the steps that share a
    vector of weights it is, and the number of the block of steps."""

    x: list[Index]
    weights: Index
    indices: Index
    part: int = 0
    block: Index = 0


@dataclass(frozen=True)
class TileWriter:
    """Emits tiles of one contraction into a builder."""

    b: Builder
    engine: Engine
    plan: Plan
    runs: Runs
    streams: Streams
    epilogue: Epilogue
    pointers: Mapping[str, Pointer]
    spill: int = 0
    scaled: bool = False
    """Whether accumulators hold a multiple of the sums, which then begin at zero."""

    def tile(self, place: Place) -> None:
        """Initialise, reduce, hand the accumulators to the epilogue."""
        lanes = self.engine.lanes
        acc: list[list[Register]] = [[] for _ in place.x]
        for j in range(place.vectors):
            start = const(0, self.engine.acc, lanes)
            if self.streams.init is not None and not self.scaled:
                start = self.b.let(self.b.load(self.streams.init, place.col + j * lanes, lanes))
            for row in acc:
                row.append(self.b.register(self.engine.acc, lanes, start, "acc"))
        zero, missing = const(0, self.engine.acc, lanes), range(place.vectors if self.engine.shifted else 0)
        lacking = [self.b.register(self.engine.acc, lanes, zero, "lacking") for _ in missing]
        tile = _Tile(self, place, acc, lacking=lacking)
        tile.reduce(0, Cursor(place.x, place.weights, place.indices))
        tile.finish()


@dataclass(frozen=True)
class _Tile:
    writer: TileWriter
    place: Place
    acc: list[list[Register]]
    sums: list[list[Register]] = field(default_factory=list)
    """16-bit partial sums of the chunk at hand, if the kernel has them."""
    lacking: list[Register] = field(default_factory=list)
    """Half of what every row of the tile still lacks, if products are shifted."""

    @property
    def weight_step(self) -> int:
        engine = self.writer.engine
        return self.writer.streams.step or self.place.vectors * engine.lanes * engine.quad

    @property
    def index_step(self) -> int:
        return self.place.vectors * self.writer.engine.lanes * self.writer.engine.index_quad

    def reduce(self, depth: int, at: Cursor) -> None:
        """The loops over taps, then one run."""
        loops, plan, b = self.writer.runs.loops, self.writer.plan, self.writer.b
        if depth == len(loops):
            self._run(at)
            return
        count, distance = loops[depth]
        inner = prod(n for n, _ in loops[depth + 1 :])
        with b.loop(count, name="tap") as t:
            x = [b.index(i + t * distance) for i in at.x]
            weights = b.index(at.weights + t * (inner * plan.all_weight_vectors * self.weight_step))
            indices = b.index(at.indices + t * (inner * plan.vectors * self.index_step))
            blocks = at.block + t * (inner * (plan.full + (plan.tail is not None)))
            self.reduce(depth + 1, Cursor(x, weights, indices, block=blocks))

    def _run(self, at: Cursor) -> None:
        plan, block = self.writer.plan, self.writer.plan.block
        weights, indices = plan.weight_vectors(block) * self.weight_step, block.vectors * self.index_step

        def moved(k: Index) -> Cursor:
            x = [i + k * block.advance for i in at.x]
            return Cursor(x, at.weights + k * weights, at.indices + k * indices, block=at.block + k)

        def blocks(first: Index, count: int) -> None:
            long = self.writer.spill and count * len(block.steps) >= UNROLLED
            with self.writer.b.loop(_kept(self.writer.b, count) if long else count, name="k") as k:
                self._block(block, moved(first + k))

        b, chunk = self.writer.b, self.writer.spill or plan.full or 1
        whole, rest = divmod(plan.full, chunk)
        if whole == 1:
            self._spilled(lambda: blocks(0, chunk))
        elif whole:
            with b.loop(_kept(b, whole), name="chunk") as c:
                start = b.index(c * chunk)
                self._spilled(lambda: blocks(start, chunk))
        if rest:
            self._spilled(lambda: blocks(whole * chunk, rest))
        if tail := plan.tail:
            self._spilled(lambda: self._block(tail, moved(plan.full)))

    def _spilled(self, emit: Callable[[], None]) -> None:
        """Emit part of the reduction; if sums are partial ones, start them at zero before it and add them up after."""
        if not self.writer.spill:
            emit()
            return
        b, engine = self.writer.b, self.writer.engine
        assert isinstance(engine, PairBytes)
        zero = const(0, S16, 2 * engine.lanes)
        self.sums[:] = [[b.register(S16, 2 * engine.lanes, zero, "sums") for _ in row] for row in self.acc]
        emit()
        for row, sums in zip(self.acc, self.sums, strict=True):
            for acc, part in zip(row, sums, strict=True):
                acc.set(engine.widen(acc.get(), part.get()))

    def _block(self, block: Block, at: Cursor) -> None:
        writer, engine = self.writer, self.writer.engine
        start, windows = -1, list[Vec]()
        for fetch in self.place.fetch:
            for offset in range(0, fetch.elements, LINE // width(fetch.pointer.dtype)):
                writer.b.prefetch(fetch.pointer, fetch.start + at.block * fetch.elements + offset)
        for n, step in enumerate(block.steps):
            vector, part = divmod(n, writer.plan.fields)
            here = Cursor(at.x, at.weights + vector * self.weight_step, at.indices, part)
            if not writer.plan.sparse:
                self._dense_step(here if not step.start else replace(here, x=[i + step.start for i in at.x]))
            elif isinstance(engine, Generic):
                self._gather_step(engine, step, here)
            else:
                if step.start != start:
                    start, reach = step.start, self._reach(block, step.start)
                    windows = [engine.window(writer.b, writer.streams.x, i + start, reach) for i in at.x]
                self._select_step(step, windows, here)

    def _dense_step(self, at: Cursor) -> None:
        engine, b, x = self.writer.engine, self.writer.b, self.writer.streams.x
        if self.place.vectors < len(at.x):  # hold the fewer operands in registers
            held = [self._weights(at, j) for j in range(self.place.vectors)]
            for i, where in enumerate(at.x):
                activation = engine.broadcast(b, x, where)
                for j, w in enumerate(held):
                    self._mac(i, j, activation, w)
            return
        a = [engine.broadcast(b, x, i) for i in at.x]
        for j in range(self.place.vectors):
            w = self._weights(at, j)
            for i, operand in enumerate(a):
                self._mac(i, j, operand, w)

    def _select_step(self, step: Step, windows: list[Vec], at: Cursor) -> None:
        for j in range(self.place.vectors):
            index, w = self._indices(step, at, j), self._weights(at, j)
            if isinstance(self.writer.engine, FlippedBytes):
                w = self.writer.engine.signless(w, self.writer.plan)
            for i, window in enumerate(windows):
                self._mac(i, j, self.writer.engine.select(self.writer.b, window, index), w)

    def _gather_step(self, engine: Generic, step: Step, at: Cursor) -> None:
        for j in range(self.place.vectors):
            index, w = self._indices(step, at, j), self._weights(at, j)
            for i, base in enumerate(at.x):
                a = engine.gather(self.writer.b, self.writer.streams.x, base + step.start, index)
                self._mac(i, j, a, w)

    def _mac(self, i: int, j: int, a: Operand, w: Operand) -> None:
        engine = self.writer.engine
        if self.writer.spill and isinstance(engine, PairBytes):
            sums = self.sums[i][j]
            sums.set(engine.partial(sums.get(), a, w))
        else:
            acc = self.acc[i][j]
            acc.set(engine.mac(acc.get(), a, w))

    def _weights(self, at: Cursor, j: int) -> Operand:
        engine = self.writer.engine
        where = at.weights + j * engine.lanes * engine.quad
        found = engine.weights(self.writer.b, self.writer.streams.weights, where, at.part)
        if not self.lacking:
            return found
        sums = self.lacking[j]
        sums.set(engine.lacking(sums.get(), found))
        return found[:1]

    def _indices(self, step: Step, at: Cursor, j: int) -> Vec:
        writer, stream = self.writer, self.writer.streams.indices
        assert stream is not None
        where = at.indices + step.vector * self.index_step + j * writer.engine.lanes * writer.engine.index_quad
        return writer.engine.indices(writer.b, stream, where, step, writer.plan)

    def _reach(self, block: Block, start: int) -> int:
        """How many activations the steps that share this load need."""
        slots = [s for step in block.steps if step.start == start for s in step.slots if s]
        return (1 + max(s.group for s in slots)) * self.writer.plan.group - start

    def finish(self) -> None:
        """Hand every accumulator to the epilogue."""
        b, lanes, rows = self.writer.b, self.writer.engine.lanes, len(self.acc)
        if not self.writer.epilogue.heavy or rows == 1:
            for i, row in enumerate(self.acc):
                self._store([register.get() for register in row], self.place.row + i)
            return
        spilled = [self._spill([row[j] for row in self.acc]) for j in range(self.place.vectors)]
        with b.loop(rows, name="row") as i:
            self._store([b.load(memory, i * lanes, lanes) for memory in spilled], self.place.row + i)

    def _spill(self, column: list[Register]) -> Pointer:
        b, lanes = self.writer.b, self.writer.engine.lanes
        memory = b.stack(self.writer.engine.acc, len(column) * lanes, "tile")
        for i, register in enumerate(column):
            b.store(memory, i * lanes, register.get())
        return memory

    def _store(self, accs: list[Vec], row: Index) -> None:
        """One row of the tile."""
        writer, lanes, sums = self.writer, self.writer.engine.lanes, list[Vec]()
        for j, acc in enumerate(accs):
            if self.lacking:
                acc = acc + (self.lacking[j].get() << 1)
            if writer.scaled:
                acc = writer.engine.total(acc)
                col = self.place.col + j * lanes
                acc = acc if writer.streams.init is None else acc + writer.b.load(writer.streams.init, col, lanes)
            sums.append(writer.b.let(acc))
        writer.epilogue.store_row(writer.b, writer.pointers, sums, row, self.place.col, self.place.cols)


def _kept(b: Builder, count: int) -> Index:
    """The count of a loop that LLVM shall not unroll: it would put off the widening of every chunk to the last one and
    run out of registers. ``begin`` is never negative, which LLVM cannot know."""
    return count + (b.begin >> 31)
