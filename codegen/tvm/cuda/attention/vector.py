"""Attention of few queries against many keys: keys and values are read once, 16 bytes a lane, and nothing is stored.

A block has up to 8 queries that share keys: the heads of a group where there is one query, else consecutive queries.
Part of a warp holds a row of a key; every such part, warp and block has keys of its own, and its own running softmax,
which are joined at the end (Flash-Decoding, Dao et al. 2023): by shuffles, in shared memory, and, where one query
leaves the device empty, in memory by the last block to arrive. All arithmetic is f32: this is the kernel of f32, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.attention_views import Attend, Operand
from bitwright.codegen.tvm.cuda.attention.frame import Frame, halves, piece_of
from bitwright.codegen.tvm.generic_eval import conjunction, unflatten
from bitwright.codegen.tvm.tir import Index, Pointer, Register, Vec, const, minimum, width
from bitwright.codegen.tvm.vecmath import INF
from bitwright.ir.graph import Graph
from bitwright.ir.types import F32, S32, U32

WARPS, QUERIES, AHEAD = 4, 8, 4
FILL = 264
"""Blocks that occupy a device."""
SHORTEST = 128
"""Keys that a block has at least, where keys are split between blocks."""
HEADER = 4
"""Floats before a partial result: its largest exponent, its sum."""


@dataclass(frozen=True, slots=True)
class VectorPlan:
    """``queries`` of a block: ``by_head`` those of one group of heads, else rows. ``each`` elements of a lane's load,
    ``lanes`` a key, ``loads`` a lane; keys are cut into ``splits``; ``tasks`` blocks for each."""

    queries: int
    by_head: bool
    each: int
    lanes: int
    loads: int
    splits: int
    tasks: int
    width: int

    @property
    def partial(self) -> int:
        """Floats of a partial result of one query."""
        return HEADER + -(-self.width // 4) * 4

    @property
    def work_bytes(self) -> int:
        return 4 * self.tasks * self.splits * self.queries * self.partial if self.splits > 1 else 0


def plan_of(body: Graph, a: Attend) -> VectorPlan:
    """How an attention is cut."""
    by_head = a.rows == 1 and a.op.kv_groups > 1
    share = a.op.kv_groups if by_head else a.rows
    queries = max(n for n in range(1, QUERIES + 1) if not by_head or share % n == 0) if by_head else min(share, QUERIES)
    tasks = math.prod(a.batch) // queries if by_head else math.prod(a.batch) * -(-a.rows // queries)
    each = min(16 // width(body.types[o.name].dtype) for o in (a.q, a.k, a.v))
    vectors = -(-max(a.depth, a.width) // each)
    lanes = min(32, 1 << (vectors - 1).bit_length())
    splits = max(1, min(-(-FILL // tasks), -(-a.keys // SHORTEST))) if tasks < FILL // 2 else 1
    return VectorPlan(queries, by_head, each, lanes, -(-vectors // lanes), splits, tasks, a.width)


@dataclass(eq=False)
class Vector(Frame):
    """Emits the kernel. ``counters`` and ``work`` where keys are split between blocks."""

    plan: VectorPlan = None  # type: ignore[assignment]
    counters: Pointer | None = None
    work: Pointer | None = None
    _top: list[Register] = field(default_factory=list)
    _total: list[Register] = field(default_factory=list)

    def run(self) -> None:
        b, a, p = self.b, self.a, self.plan
        self.before()
        self.task, split = b.index(b.block("x")), b.index(b.block("y"))
        self._starts()
        per = -(-a.keys // p.splits)
        end: Index = minimum(split * per + per, a.keys)
        if a.op.causal:
            end = minimum(end, self.row + (1 if p.by_head else p.queries))
        self.end = b.index(end)
        self.member = b.index(b.lane % p.lanes)
        self.groups = WARPS * (32 // p.lanes)
        self.group = b.index(b.warp * (32 // p.lanes) + b.lane // p.lanes)
        self._queries()
        first = b.index(split * per)
        turn = self.groups * AHEAD
        with b.loop(b.index(tirx.max(self.end - first + (turn - 1), 0) // turn), name="turn") as t:
            self._turn(b.index(first + t * turn + self.group))
        self._join_lanes()
        self._join_warps(split)

    def _starts(self) -> None:
        """The first query of this block and where the operands begin."""
        b, a, p = self.b, self.a, self.plan
        if p.by_head:
            head, self.row = b.index(self.task * p.queries), 0
        else:
            blocks = -(-a.rows // p.queries)
            head, self.row = b.index(self.task // blocks), b.index(self.task % blocks * p.queries)
        idx = tuple(b.index(i) for i in unflatten(head, a.batch)) if a.batch else ()
        self.from_q, self.from_out = self.start(a.q, idx), self.start(a.out, idx)
        self.from_k, self.from_v = (self.start(o, idx, a.op.kv_groups) for o in (a.k, a.v))
        self.from_mask = self.start(a.mask, idx) if a.mask is not None else 0

    def _step(self, operand: Operand) -> int:
        """Elements between the rows of two queries of the block."""
        return operand.batch[-1] if self.plan.by_head else operand.row

    def _exists(self, n: Index) -> Any:
        """Whether there is a query ``n`` of the block."""
        p = self.plan
        return True if p.by_head or self.a.rows % p.queries == 0 else self.row + n < self.a.rows

    # ---- loads
    def _load(self, operand: Operand, at: Index, cols: int, there: Any) -> Callable[[], list[Vec]]:
        """Ask for a lane's elements of the row at ``at``; the result brings them as f32, zeros where there are none."""
        b, p = self.b, self.plan
        dtype, size = self.dtype(operand), width(self.dtype(operand))
        nbytes = p.each * size
        fast = piece_of(operand, size) % nbytes == 0 and cols % p.each == 0
        raw = b.local(U32, p.loads * nbytes // 4, "raw") if fast else b.local(F32, p.loads * p.each, "raw")
        for n in range(p.loads):
            col = b.index((n * p.lanes + self.member) * p.each)
            if fast:
                exists = conjunction([there, True if p.loads * p.lanes * p.each == cols else col < cols])
                to, place = b.address(raw, n * nbytes // 4), b.address(self.pointers[operand.name], at + col)
                b.call(f"bw_pull{nbytes}", to, place, exists)
                continue
            for k in range(p.each):
                b.store(raw, n * p.each + k, const(0.0, F32))
                with b.when(conjunction([there, col + k < cols])):
                    found = b.load(self.pointers[operand.name], at + (col + k) * operand.col)
                    b.store(raw, n * p.each + k, self.wide(found, dtype))

        def values() -> list[Vec]:
            if not fast:
                return [b.load(raw, i) for i in range(p.loads * p.each)]
            words = [b.load(raw, i) for i in range(p.loads * nbytes // 4)]
            if dtype == F32:
                return [self.keep(w.bits(F32)) for w in words]
            return [x for w in words for x in halves(self, w, dtype)]

        return values

    def _queries(self) -> None:
        b, a, p = self.b, self.a, self.plan
        each = p.loads * p.each
        self.q, self.sums = b.local(F32, p.queries * each, "q"), b.local(F32, p.queries * each, "sums")
        for n in range(p.queries):
            values = self._load(a.q, b.index(self.from_q + self._query(a.q, n)), a.depth, self._exists(n))()
            for i, v in enumerate(values):
                b.store(self.q, n * each + i, v)
                b.store(self.sums, n * each + i, const(0.0, F32))
            self._top.append(b.register(F32, 1, const(-INF, F32)))
            self._total.append(b.register(F32, 1, const(0.0, F32)))

    def _query(self, operand: Operand, n: Index) -> Index:
        """Where query ``n`` of the block lies behind the beginning of the operand's matrix."""
        return self.row * operand.row + n * self._step(operand)

    # ---- keys
    def _turn(self, key: Index) -> None:
        """Every part of a warp takes some keys, ``groups`` apart; all are asked for before any is used."""
        b, a, p = self.b, self.a, self.plan
        places = [b.index(key + u * self.groups) for u in range(AHEAD)]
        keys = [self._load(a.k, b.index(self.from_k + k * a.k.row), a.depth, k < self.end) for k in places]
        rows = [self._load(a.v, b.index(self.from_v + k * a.v.row), a.width, k < self.end) for k in places]
        scores = [self._scores(load(), place) for load, place in zip(keys, places, strict=True)]
        values = [load() for load in rows]
        for n in range(p.queries):
            top = b.register(F32, 1, self._top[n].get())
            for line in scores:
                top.set(top.get().max(line[n]))
            base = self.base(top.get())
            change = self.power(self.keep(self._top[n].get() - base))
            self._top[n].set(top.get())
            powers = [self.power(self.keep(line[n] - base)) for line in scores]
            total = self._total[n].get() * change
            for e in powers:
                total = self.keep(total + e)
            self._total[n].set(total)
            for i in range(p.loads * p.each):
                at = n * p.loads * p.each + i
                acc = self.keep(b.load(self.sums, at) * change)
                for e, v in zip(powers, values, strict=True):
                    acc = b.value("bw_fma", F32, e, v[i], acc)
                b.store(self.sums, at, acc)

    def _scores(self, k: list[Vec], place: Index) -> list[Vec]:
        """Exponents of one key for all queries, in all lanes of the part."""
        b, a, p = self.b, self.a, self.plan
        found = []
        for n in range(p.queries):
            acc = self.keep(b.load(self.q, n * len(k)) * k[0])
            for i, x in enumerate(k[1:], 1):
                acc = b.value("bw_fma", F32, b.load(self.q, n * len(k) + i), x, acc)
            score = b.register(F32, 1, acc)
            self._across(score, lambda x, y: x + y, 1, p.lanes)
            mask = self.from_mask
            if a.mask is not None:
                mask = b.index(mask + self._query(a.mask, n))
            value = self.scaled(score.get(), mask, 0, place, conjunction([place < self.end, self._exists(n)]))
            seen = place < self.end
            if a.op.causal:
                seen = tirx.all(seen, place <= self.row + (0 if p.by_head else n))
            found.append(self.keep(Vec(tirx.Select(seen, value.expr, const(-INF, F32).expr), F32)))
        return found

    def _across(self, value: Register, step: Callable[[Vec, Vec], Vec], first: int, end: int) -> None:
        while first < end:
            value.set(step(value.get(), self.b.value("bw_shfl_xor_f32", F32, value.get(), first)))
            first *= 2

    # ---- joining
    def _join_lanes(self) -> None:
        """The parts of a warp: all get the largest exponent, sums relative to it are added."""
        b, p = self.b, self.plan
        each = p.loads * p.each
        for n in range(p.queries) if p.lanes < 32 else ():
            mine = self.keep(self._top[n].get())
            self._across(self._top[n], lambda x, y: x.max(y), p.lanes, 32)
            change = self.power(self.keep(mine - self.base(self._top[n].get())))
            self._total[n].set(self._total[n].get() * change)
            self._across(self._total[n], lambda x, y: x + y, p.lanes, 32)
            for i in range(each):
                r = b.register(F32, 1, b.load(self.sums, n * each + i) * change)
                self._across(r, lambda x, y: x + y, p.lanes, 32)
                b.store(self.sums, n * each + i, r.get())

    def _join_warps(self, split: Index) -> None:
        b, p = self.b, self.plan
        held = b.shared(F32, WARPS * p.queries * p.partial, name="held")
        each = p.loads * p.each
        for n in range(p.queries):
            at = b.index((b.warp * p.queries + n) * p.partial)
            with b.when(b.lane < 1):
                b.store(held, at, self._top[n].get())
                b.store(held, at + 1, self._total[n].get())
            for i in range(each):
                col = b.index((i // p.each * p.lanes + self.member) * p.each + i % p.each)
                with b.when(tirx.all(b.lane < p.lanes, col < p.width)):
                    b.store(held, at + HEADER + col, b.load(self.sums, n * each + i))
        b.sync()

        def read(part: Index, n: Index, start: Index) -> list[Vec]:
            place = (part * p.queries + n) * p.partial + start
            return [self.keep(b.load(held, place + k)) for k in range(4)]

        if p.splits == 1:
            self._joined(WARPS, read, self._write)
            return
        assert self.work is not None
        mine = b.index((self.task * p.splits + split) * p.queries)
        work = self.work

        def save(n: Index, col: Index, top: Vec, total: Vec, values: list[Vec]) -> None:
            at = b.index((mine + n) * p.partial)
            with b.when(col < 1):
                b.store(work, at, top)
                b.store(work, at + 1, total)
            for k, v in enumerate(values):
                b.store(work, at + HEADER + col + k, v)

        self._joined(WARPS, read, save)
        self._join_blocks(held, work)

    def _join_blocks(self, held: Pointer, work: Pointer) -> None:
        """The last block of the query to arrive joins what all wrote."""
        b, p = self.b, self.plan
        assert self.counters is not None
        b.call("bw_fence")
        b.sync()
        flag = b.view(held, S32)
        with b.when(b.thread < 1):
            old = b.value("bw_count", S32, b.address(self.counters, self.task))
            b.store(flag, 0, old)
            with b.when(old.eq(p.splits - 1)):
                b.store(self.counters, self.task, const(0, S32))
        b.sync()

        def read(part: Index, n: Index, start: Index) -> list[Vec]:
            line = b.local(F32, 4, "line")
            place = ((self.task * p.splits + part) * p.queries + n) * p.partial + start
            b.call("bw_fresh16", b.address(line), b.address(work, place))
            return [b.load(line, k) for k in range(4)]

        with b.when(b.load(flag, 0).ge(p.splits - 1)):
            b.call("bw_fence")
            self._joined(p.splits, read, self._write)

    def _joined(
        self, parts: int, read: Callable[[Index, Index, Index], list[Vec]],
        write: Callable[[Index, Index, Vec, Vec, list[Vec]], None],
    ) -> None:  # fmt: skip
        """Partial results of all queries joined, four columns a thread."""
        b, p = self.b, self.plan
        pieces = (p.partial - HEADER) // 4
        with b.loop(-(-p.queries * pieces // b.threads), name="piece") as turn:
            e = b.index(turn * b.threads + b.thread)
            n, col = b.index(e // pieces), b.index(e % pieces * 4)
            with b.when(conjunction([e < p.queries * pieces, self._exists(n)])):
                top = b.register(F32, 1, const(-INF, F32))
                with b.loop(parts, name="part") as part:
                    top.set(top.get().max(read(part, n, 0)[0]))
                base = self.base(top.get())
                sums = [b.register(F32, 1, const(0.0, F32)) for _ in range(5)]
                with b.loop(parts, name="part") as part:
                    head = read(part, n, 0)
                    change = self.power(self.keep(head[0] - base))
                    for r, v in zip(sums, [head[1], *read(part, n, HEADER + col)], strict=True):
                        r.set(r.get() + v * change)
                write(n, col, top.get(), sums[0].get(), [r.get() for r in sums[1:]])

    def _write(self, n: Index, col: Index, top: Vec, total: Vec, values: list[Vec]) -> None:
        """The softmax's division, and the result."""
        inverse = self.keep(const(1.0, F32) / total)
        base = self.b.index(self.from_out + self._query(self.a.out, n))
        self.store(base, 0, col, [self.keep(v * inverse) for v in values])


__all__ = ["WARPS", "Vector", "VectorPlan", "plan_of"]
