"""Softmax, norms and reductions over trailing axes on a GPU, with the pointwise work around them.

A row belongs to 1 to 32 lanes of a warp or to a whole block. Its values are read once, with up to 16 bytes a load, wait
in registers as f32 and are written once, so that the bytes moved are those of the operands and the result. Sums are
exchanged by shuffles, and between warps through shared memory. Rows that do not fit the registers of a block are read
again in every pass. Sums are in f32, in another order than on a CPU: the error is that of ``codegen/tvm/rows.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.config import CudaConfig
from bitwright.codegen.tvm.generic_eval import better, memory
from bitwright.codegen.tvm.pointwise import needs_exact
from bitwright.codegen.tvm.rows import Plan, levels, plan_of
from bitwright.codegen.tvm.rows_passes import RowKernel, Span, Step
from bitwright.codegen.tvm.rows_values import COLUMN, Cells, Unfit, stored
from bitwright.codegen.tvm.template import Config, Refused, Template, plain_args
from bitwright.codegen.tvm.tir import Expr, Index, Register, Vec, concat, const, minimum, width
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.types import F32
from bitwright.ir.weights import Array

RESIDENT = 32
"""Values of a row that a thread keeps in registers."""
WIDEST = 512
"""Threads that share a row at most."""
BLOCK = 128


@dataclass(frozen=True)
class CudaRowsConfig(CudaConfig):
    """``lanes`` columns a load, ``per_row`` threads a row (a power of two), ``turns`` loads a thread."""

    lanes: int = 1
    per_row: int = 32
    turns: int = 1

    @property
    def resident(self) -> bool:
        """Whether rows wait in registers between the passes."""
        return self.turns * self.lanes <= RESIDENT


class CudaRows(Template):
    """Pointwise work, one operator over rows, pointwise work."""

    name: ClassVar[str] = "cuda_rows"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes f32, f16 and bf16 rows along trailing axes; one output."""
        try:
            plan = plan_of(body)
            levels(body, plan)
        except Unfit as why:
            return Refused(str(why))
        return cut_rows(body, plan, target)

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        """One launch over all rows."""
        assert isinstance(config, CudaRowsConfig)
        plan = plan_of(body)
        b = CudaBuilder(symbol, grid=config.grid, threads=config.threads)
        pointers = {v.name: b.param(f"x{i}", memory(v.type.dtype), v.type.size) for i, v in enumerate(body.inputs)}
        result = body.types[body.outputs[0]]
        out = b.param("y", memory(result.dtype), result.size)
        cells = Cells(body, plan.root.output, plan.inner, plan.outer, b, pointers, "cuda", needs_exact(body))
        kernel = CudaRowKernel(
            b, cells, plan.root, out, None, config.lanes, config.turns if config.resident else 1, config.resident,
            device=b, config=config,
        )  # fmt: skip
        first = b.index(b.block() * (config.threads // config.per_row) + b.thread // config.per_row)
        rows = plan.inner.rows
        kernel.exists = None if rows * config.per_row % config.threads == 0 else first < rows
        kernel.run(b.index(minimum(first, rows - 1)))
        return b.finish()


def cut_rows(body: Graph, plan: Plan, target: Target) -> CudaRowsConfig:
    """How rows are shared between threads."""
    columns, rows = plan.inner.columns, plan.inner.rows
    lanes = _lanes(body, columns)
    vectors = columns // lanes
    per_row = shared_by(vectors, RESIDENT // lanes)
    threads = max(BLOCK, per_row)
    turns = -(-vectors // per_row)
    return CudaRowsConfig(
        args=plain_args(body), mcpu=target.mcpu, threads=threads, grid=(-(-rows * per_row // threads), 1, 1),
        lanes=lanes, per_row=per_row, turns=turns,
        reason=f"rows of {columns}, {per_row} threads each, {lanes} columns a load"
        + ("" if turns * lanes <= RESIDENT else ", read again in every pass"),
    )  # fmt: skip


def shared_by(vectors: int, turns: int) -> int:
    """How many threads share a row of so many vectors: a power of two; beyond a warp only if it takes more turns."""
    threads = 1
    while threads < vectors and (threads < 32 or (threads * turns < vectors and threads < WIDEST)):
        threads *= 2
    return threads


def _lanes(body: Graph, columns: int) -> int:
    """Columns of a load: at most 16 bytes of every operand, and rows begin at a multiple of it."""
    widest = max(width(memory(body.types[x].dtype)) for x in (*(v.name for v in body.inputs), *body.outputs))
    return next(n for n in (4, 2, 1) if columns % n == 0 and n * widest <= 16)


@dataclass(eq=False)
class CudaRowKernel(RowKernel):
    """The passes over one row by the threads that share it. ``exists``: whether there is such a row (None: always)."""

    device: CudaBuilder = field(kw_only=True)
    config: CudaRowsConfig = field(kw_only=True)
    exists: Expr = None
    _slots: list[Register] = field(default_factory=list)

    @property
    def share(self) -> Index:
        """This thread's number among those of its row."""
        return self.device.thread % self.config.per_row

    def run(self, row: Index) -> None:
        """All passes over the row."""
        neutral = const(0.0, F32, self.lanes)
        if self.staged:
            self._slots = [self.b.register(F32, self.lanes, neutral) for _ in range(self.unroll)]
        super().run(row)

    # ---- columns
    def columns(self, emit: Callable[[Span], None]) -> None:
        """``emit`` for this thread's vectors of the row."""
        if self.staged:
            for k in range(self.config.turns):
                self._turn(k, k, emit)
        else:
            with self.b.loop(self.config.turns, name="turn") as k:
                self._turn(k, 0, emit)

    def _turn(self, turn: Index, slot: int, emit: Callable[[Span], None]) -> None:
        vectors, share = self.count // self.lanes, self.config.per_row
        at = self.b.index(turn * share + self.share)
        whole = vectors % share == 0 or (isinstance(turn, int) and (turn + 1) * share <= vectors)
        with self.b.when(True if whole else at < vectors):
            emit(Span(self.b.index(at * self.lanes), None, slot))

    def total(self, start: float, step: Step, term: Callable[[Span], Vec], neutral: float | None = None) -> Vec:
        """The scalar that ``step`` makes of all terms of the row, in all of its threads."""
        mine = self.b.register(F32, self.lanes, const(start, F32, self.lanes))
        self.columns(lambda span: mine.set(step(mine.get(), self.b.let(term(span)))))
        value = mine.get() if self.lanes == 1 else self._across([mine.get()], step)
        value = self._warp(value, min(self.config.per_row, 32), step)
        return value if self.config.per_row <= 32 else self._block(value, step)

    def _warp(self, value: Vec, threads: int, step: Step) -> Vec:
        value = self.m.keep(value)
        while threads > 1:
            threads //= 2
            value = self.m.keep(step(value, self.device.value("bw_shfl_xor_f32", F32, value, threads)))
        return value

    def _block(self, value: Vec, step: Step) -> Vec:
        """Over the warps of a row, each total in shared memory of its own."""
        warps, warp = self.config.per_row // 32, self.device.warp
        parts = self.device.shared(F32, self.config.threads // 32, align=4)
        with self.b.when(self.device.lane < 1):
            self.b.store(parts, warp, value)
        self.device.sync()
        return self._warp(self.b.load(parts, warp // warps * warps + self.device.lane % warps), warps, step)

    # ---- what waits between the passes
    def again(self, span: Span) -> Vec:
        """The operand once more: from registers, or read and computed again."""
        return self.kept(span) if self.staged else self.read(span)

    def keep(self, span: Span, value: Vec) -> None:
        if self.staged:
            self._slots[span.slot].set(value)

    def kept(self, span: Span) -> Vec:
        return self._slots[span.slot].get()

    def _softmax(self, log: bool) -> None:
        if self.staged or log:
            super()._softmax(log)
            return
        top = self._top().spread(self.lanes)

        def power(span: Span) -> Vec:
            return self.b.let(self.m.exp(self.b.let(self.read(span) - top)))

        inverse = self.b.let(const(1.0, F32) / self._sum(power)).spread(self.lanes)
        self.finish(lambda span: power(span) * inverse, operand=False)

    def finish(self, value: Callable[[Span], Vec], operand: bool) -> None:
        """Epilogue and store, of rows that exist."""
        with self._existing():
            super().finish(value, operand)

    def _finish_scalar(self, value: Vec) -> None:
        cells, result = self.cells, self.result
        cells.put(self.root.output, cells.outer, self.b.let(value))
        cells.prepare(result, cells.outer, 1)
        dtype = cells.body.types[result].dtype
        if cells.level(result, cells.outer) < COLUMN:
            with self._existing(), self.b.when(self.share < 1):
                self.b.store(self.out, self.row, stored(cells.scalar(result, cells.outer), dtype))
            return

        def one(span: Span) -> None:
            y = cells.at(result, cells.outer, span.col, self.lanes, None, {})
            self.b.store(self.out, self.row * self.count + span.col, stored(y, dtype))

        with self._existing():
            self.columns(one)

    def _existing(self) -> Any:
        return self.b.when(True if self.exists is None else self.exists)

    def _larger(self, a: Vec, v: Vec) -> Vec:
        """The larger; NaN wins."""
        a, v = self.m.keep(a), self.m.keep(v)  # registers: TVM would write bindings out wherever they are used
        if a.lanes == 1:
            return better(v, a).select(v, a)
        parts = [self._larger(a.shuffle([i]), v.shuffle([i])) for i in range(a.lanes)]
        return self.b.let(concat(parts))
