"""Attention by tiles on tensor cores: 64 queries a block, keys in tiles, the softmax kept up to date (FlashAttention-2,
Dao 2023, arXiv 2307.08691).

A warp has 16 queries. Keys and values come into shared memory by asynchronous copies, the next tile while this one is
multiplied; rows there are 16 bytes longer than needed, so that ``ldmatrix`` meets every bank once. Probabilities are
rounded to the operands' format before the second product, as on CPUs with products of bf16; sums are f32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.attention_views import Operand
from bitwright.codegen.tvm.cuda.attention.frame import Frame, piece_of
from bitwright.codegen.tvm.generic_eval import unflatten
from bitwright.codegen.tvm.tir import Index, Pointer, Vec, const, minimum
from bitwright.codegen.tvm.vecmath import INF
from bitwright.ir.types import F16, F32, U16, U32

QUERIES, WARPS, PAD = 64, 4, 8


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """Depth and width padded to 16; keys of a tile."""

    depth: int
    width: int
    keys: int

    @property
    def stage(self) -> int:
        """Elements of one tile of keys and values."""
        return self.keys * (self.depth + self.width + 2 * PAD)

    @property
    def shared_bytes(self) -> int:
        return 2 * (QUERIES * (self.depth + PAD) + 2 * self.stage)


def plan_of(depth: int, width: int) -> FlashPlan:
    """Tiles of 64 keys, of 32 where heads are wide: the sums must stay in registers."""
    deep, wide = -(-depth // 16) * 16, -(-width // 16) * 16
    return FlashPlan(deep, wide, 64 if max(deep, wide) <= 128 else 32)


@dataclass(eq=False)
class Flash(Frame):
    """Emits the kernel."""

    plan: FlashPlan = None  # type: ignore[assignment]

    def run(self) -> None:
        b, a, p = self.b, self.a, self.plan
        tiles = -(-a.rows // QUERIES)
        head, tile = b.index(b.block() // tiles), b.index(b.block() % tiles)
        idx = tuple(b.index(i) for i in unflatten(head, a.batch)) if a.batch else ()
        groups = a.op.kv_groups
        self.from_q, self.from_out = self.start(a.q, idx), self.start(a.out, idx)
        self.from_k, self.from_v = self.start(a.k, idx, groups), self.start(a.v, idx, groups)
        self.from_mask = self.start(a.mask, idx) if a.mask is not None else 0
        self.quarter, self.eighth = b.index(b.lane % 4), b.index(b.lane // 4)
        self.first = b.index(tile * QUERIES)
        self.row = b.index(self.first + b.warp * 16)
        self.q = b.shared(U16, QUERIES * (p.depth + PAD), name="q")
        self.tiles = b.shared(U16, 2 * p.stage, name="tiles")
        self.before()
        self._registers()
        end = a.keys
        if a.op.causal:
            end = b.index(minimum(a.keys, self.first + QUERIES))
        count = b.index((end + (p.keys - 1)) // p.keys)
        self._fetch(self.q, 0, a.q, self.from_q, self.first, QUERIES, a.rows, a.depth, p.depth)
        self._tile(0, 0)
        b.call("bw_cp_async_wait0")
        b.sync()
        self._queries()
        with b.loop(count, name="step") as step:
            b.call("bw_cp_async_wait0")
            b.sync()
            with b.when(step + 1 < count):
                self._tile(b.index(step + 1), (step + 1) % 2 * p.stage)
            self._step(b.index(step * p.keys), b.index(step % 2 * p.stage))
        self._finish()

    def _registers(self) -> None:
        b, p = self.b, self.plan
        self.left = b.local(U32, p.depth // 4, "left")
        self.right = b.local(U32, 4, "right")
        self.scores = b.local(F32, p.keys // 2, "scores")
        self.sums = b.local(F32, p.width // 2, "sums")
        for i in range(p.width // 2):
            b.store(self.sums, i, const(0.0, F32))
        self.top = [b.register(F32, 1, const(-INF, F32)) for _ in range(2)]
        self.total = [b.register(F32, 1, const(0.0, F32)) for _ in range(2)]

    # ---- into shared memory
    def _tile(self, step: Index, stage: Index) -> None:
        a, p, first = self.a, self.plan, step * self.plan.keys
        self._fetch(self.tiles, stage, a.k, self.from_k, first, p.keys, a.keys, a.depth, p.depth)
        values = stage + p.keys * (p.depth + PAD)
        self._fetch(self.tiles, values, a.v, self.from_v, first, p.keys, a.keys, a.width, p.width)
        self.b.call("bw_cp_async_commit")

    def _fetch(
        self, to: Pointer, at: Index, operand: Operand, base: Index, first: Index, rows: int, limit: int, cols: int,
        padded: int,
    ) -> None:  # fmt: skip
        """Rows ``first`` to ``first + rows`` of an operand; zeros where it ends."""
        b = self.b
        source = b.view(self.pointers[operand.name], U16)
        chunks = padded // 8
        for turn in range(-(-rows * chunks // b.threads)):
            c = b.index(turn * b.threads + b.thread)
            row, col = b.index(c // chunks), b.index(c % chunks * 8)
            place = b.index(at + row * (padded + PAD) + col)
            with b.when(True if (turn + 1) * b.threads <= rows * chunks else c < rows * chunks):
                if piece_of(operand, 2) == 16:
                    left = minimum(cols - col, 8) if cols % 8 else 8
                    valid = tirx.Select(tirx.all(first + row < limit, col < cols), _expr(left * 2), _expr(0))
                    start = base + (first + row) * operand.row + col
                    b.call("bw_cp_async16", b.address(to, place), b.address(source, start), valid)
                    continue
                for k in range(8):
                    element = b.register(U16, 1, const(0, U16))
                    with b.when(tirx.all(first + row < limit, col + k < cols)):
                        element.set(b.load(source, base + (first + row) * operand.row + (col + k) * operand.col))
                    b.store(to, place + k, element.get())

    def _queries(self) -> None:
        b, p = self.b, self.plan
        line = b.index((b.warp * 16 + b.lane % 16) * (p.depth + PAD) + b.lane // 16 * 8)
        for k in range(p.depth // 16):
            b.call("bw_ldmatrix4", b.address(self.left, 4 * k), b.address(self.q, line + 16 * k))

    # ---- one tile of keys
    def _step(self, key: Index, stage: Index) -> None:
        b, a, p = self.b, self.a, self.plan
        name = "f16" if self.dtype(a.q) == F16 else "bf16"
        for i in range(p.keys // 2):
            b.store(self.scores, i, const(0.0, F32))
        line = b.index(stage + (b.lane // 16 * 8 + b.lane % 8) * (p.depth + PAD) + b.lane // 8 % 2 * 8)
        for k in range(p.depth // 16):
            for n in range(p.keys // 16):
                at = line + n * 16 * (p.depth + PAD) + 16 * k
                b.call("bw_ldmatrix4", b.address(self.right), b.address(self.tiles, at))
                for h in range(2):
                    sums = b.address(self.scores, 4 * (2 * n + h))
                    b.call(f"bw_mma_{name}", sums, b.address(self.left, 4 * k), b.address(self.right, 2 * h))
        self._mask(key)
        self._softmax()
        self._values(name, stage)

    def _place(self, key: Index, i: int) -> tuple[Index, Index]:
        """Row and key of a lane's score ``i``."""
        return self.row + self.eighth + 8 * (i % 4 // 2), key + 8 * (i // 4) + self.quarter * 2 + i % 2

    def _mask(self, key: Index) -> None:
        """Scores to exponents; -infinity where there is no key, or none that a query may see."""
        b, a, p = self.b, self.a, self.plan
        for i in range(p.keys // 2):
            row, column = self._place(key, i)
            inside = tirx.all(row < a.rows, column < a.keys)
            b.store(self.scores, i, self.scaled(b.load(self.scores, i), self.from_mask, row, column, inside))
        edge = key + p.keys > a.keys
        if a.op.causal:
            edge = tirx.any(edge, key + (p.keys - 1) > self.row)
        elif a.keys % p.keys == 0:
            return
        with b.when(edge):
            for i in range(p.keys // 2):
                row, column = self._place(key, i)
                seen = column < a.keys if not a.op.causal else tirx.all(column < a.keys, column <= row)
                value = tirx.Select(seen, b.load(self.scores, i).expr, const(-INF, F32).expr)
                b.store(self.scores, i, Vec(value, F32))

    def _softmax(self) -> None:
        """Powers of the scores in their place; what was summed before is brought to the new largest score."""
        b, p = self.b, self.plan
        for h in range(2):
            mine = [i for i in range(p.keys // 2) if i % 4 // 2 == h]
            top = b.register(F32, 1, self.top[h].get())
            for i in mine:
                top.set(top.get().max(b.load(self.scores, i)))
            for step in (1, 2):
                top.set(top.get().max(b.value("bw_shfl_xor_f32", F32, top.get(), step)))
            base = self.base(top.get())
            change = self.power(self.keep(self.top[h].get() - base))
            self.top[h].set(top.get())
            self.total[h].set(self.total[h].get() * change)
            for i in mine:
                e = self.power(self.keep(b.load(self.scores, i) - base))
                b.store(self.scores, i, e)
                self.total[h].set(self.total[h].get() + e)
            for i in range(p.width // 2):
                if i % 4 // 2 == h:
                    b.store(self.sums, i, b.load(self.sums, i) * change)

    def _values(self, name: str, stage: Index) -> None:
        b, p = self.b, self.plan
        start = stage + p.keys * (p.depth + PAD)
        line = b.index(start + (b.lane // 8 % 2 * 8 + b.lane % 8) * (p.width + PAD) + b.lane // 16 * 8)
        powers = b.local(U32, 4, "powers")
        for k in range(p.keys // 16):
            for i in range(4):
                low = 8 * k + 4 * (i // 2) + 2 * (i % 2)
                pair = (b.load(self.scores, low), b.load(self.scores, low + 1))
                b.store(powers, i, b.value(f"bw_pack_{name}", U32, *pair))
            for n in range(p.width // 16):
                at = line + k * 16 * (p.width + PAD) + 16 * n
                b.call("bw_ldmatrix4_trans", b.address(self.right), b.address(self.tiles, at))
                for h in range(2):
                    sums = b.address(self.sums, 4 * (2 * n + h))
                    b.call(f"bw_mma_{name}", sums, b.address(powers), b.address(self.right, 2 * h))

    def _finish(self) -> None:
        b, p = self.b, self.plan
        for h in range(2):
            total = self.total[h]
            for step in (1, 2):
                total.set(total.get() + b.value("bw_shfl_xor_f32", F32, total.get(), step))
            inverse = self.keep(const(1.0, F32) / total.get())
            row = b.index(self.row + self.eighth + 8 * h)
            with b.when(row < self.a.rows):
                for n in range(p.width // 8):
                    values = [self.keep(b.load(self.sums, 4 * n + 2 * h + e) * inverse) for e in range(2)]
                    self.store(self.from_out, row, b.index(8 * n + self.quarter * 2), values)


def _expr(value: Any) -> Any:
    return tirx.const(value, "int32") if isinstance(value, int) else value


__all__ = ["Flash", "FlashPlan", "plan_of"]
