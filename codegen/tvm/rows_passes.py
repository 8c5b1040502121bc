"""The passes over one row: what each row operator does with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitwright.codegen.tvm.rows_values import COLUMN, KERNEL, ROW, Cells, first_lanes, rounded, stored
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Register, Vec, const
from bitwright.codegen.tvm.vecmath import INF, VecMath
from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.types import F32, DType

Step = Callable[[Vec, Vec], Vec]
"""accumulator, next -> accumulator"""


@dataclass(frozen=True)
class Span:
    """A vector of columns: where, how many exist (None: all), and which accumulator is its."""

    col: Index
    valid: int | None
    slot: int


@dataclass(eq=False)
class RowKernel:
    """Emits the computation of one row."""

    b: Builder
    cells: Cells
    root: Node
    out: Pointer
    scratch: Pointer | None
    lanes: int
    unroll: int
    staged: bool

    def __post_init__(self) -> None:
        self.m = VecMath(self.b, self.cells.isa)
        self.source = self.root.inputs[0]
        self.count = self.cells.inner.columns
        self.result = self.cells.body.outputs[0]
        self.dtype: DType = self.root.type.dtype
        self.row: Index = 0

    # ---- frame
    def before(self) -> None:
        """What is the same in all rows."""
        self._prepare(KERNEL)

    def _prepare(self, upto: int) -> None:
        for x in self.root.inputs:
            self.cells.prepare(x, self.cells.inner, upto)
        self.cells.prepare(self.result, self.cells.outer, upto)

    def run(self, row: Index) -> None:
        """All passes over the row."""
        self.row = row
        self.cells.start_row(row)
        self._prepare(ROW)
        op = self.root.op
        if isinstance(op, ops.Softmax):
            self._softmax(op.log)
        elif isinstance(op, ops.LayerNorm):
            self._layer_norm(op.eps)
        elif isinstance(op, ops.RmsNorm):
            self._rms_norm(op.eps)
        else:
            assert isinstance(op, ops.Reduce)
            self._finish_scalar(rounded(self.b, self._reduce(op.fn), self.dtype))

    # ---- columns
    def columns(self, emit: Callable[[Span], None]) -> None:
        """``emit`` for every vector of the row: unrolled groups, single vectors, the partial one."""
        lanes, unroll = self.lanes, self.unroll
        whole, tail = divmod(self.count, lanes)
        groups = whole // unroll
        if groups > 1:
            with self.b.loop(groups, name="group") as g:
                start = self.b.index(g * (unroll * lanes))
                for u in range(unroll):
                    emit(Span(start + u * lanes, None, u))
        else:
            groups = 0
        for k in range(groups * unroll, whole):
            emit(Span(k * lanes, None, k % unroll))
        if tail:
            emit(Span(whole * lanes, tail, whole % unroll))

    def total(self, start: float, step: Step, term: Callable[[Span], Vec], neutral: float | None = None) -> Vec:
        """The scalar that ``step`` makes of all terms; ``neutral`` stands for columns that do not exist."""
        slots = min(self.unroll, -(-self.count // self.lanes))
        sums = [self.b.register(F32, self.lanes, const(start, F32, self.lanes)) for _ in range(slots)]
        fill = const(start if neutral is None else neutral, F32, self.lanes)

        def one(span: Span) -> None:
            value = term(span)
            if span.valid is not None:
                value = first_lanes(self.lanes, span.valid).select(value, fill)
            sums[span.slot].set(step(sums[span.slot].get(), value))

        self.columns(one)
        return self._across([s.get() for s in self._halve(sums, step)], step)

    def _halve(self, sums: list[Register], step: Step) -> list[Register]:
        while len(sums) > 1:
            half = (len(sums) + 1) // 2
            for k in range(len(sums) - half):
                sums[k].set(step(sums[k].get(), sums[half + k].get()))
            sums = sums[:half]
        return sums

    def _across(self, values: list[Vec], step: Step) -> Vec:
        value = values[0]
        while value.lanes > 2:
            half = value.lanes // 2
            value = self.b.let(step(value.part(0, half), value.part(half, half)))
        return self.b.let(step(value.shuffle([0]), value.shuffle([1])))

    def read(self, span: Span) -> Vec:
        """The row operator's operand, in f32; computed ones are kept in scratch."""
        x = self.cells.at(self.source, self.cells.inner, span.col, self.lanes, span.valid, {})
        x = self.b.let(x.cast(F32))
        if self.staged:
            self.keep(span, x)
        return x

    def again(self, span: Span) -> Vec:
        """The operand once more, after :meth:`read` has run over the row."""
        if self.staged:
            return self.kept(span)
        return self.b.let(self.b.load(self.cells.pointers[self.source], self.row * self.count + span.col, self.lanes))

    def keep(self, span: Span, value: Vec) -> None:
        assert self.scratch is not None
        self.b.store(self.scratch, span.col, value)

    def kept(self, span: Span) -> Vec:
        assert self.scratch is not None
        return self.b.let(self.b.load(self.scratch, span.col, self.lanes))

    def operand(self, k: int, span: Span) -> Vec:
        """Scale or bias of a norm as f32, for these columns."""
        x = self.root.inputs[k]
        return self.cells.at(x, self.cells.inner, span.col, self.lanes, span.valid, {}).cast(F32)

    def finish(self, value: Callable[[Span], Vec], operand: bool) -> None:
        """Epilogue and store; ``operand`` says that the row operator's operand can still be read again."""
        dtype = self.cells.body.types[self.result].dtype

        def one(span: Span) -> None:
            root = rounded(self.b, self.b.let(value(span)), self.dtype)
            given = {self.root.output: self.b.let(root)}
            if operand and self.source in self.cells.body.producers and self.dtype == F32:
                given[self.source] = self.again(span)
            y = self.cells.at(self.result, self.cells.outer, span.col, self.lanes, span.valid, given)
            self.b.store(self.out, self.row * self.count + span.col, stored(y, dtype), span.valid)

        self.columns(one)

    def _finish_scalar(self, value: Vec) -> None:
        cells = self.cells
        cells.put(self.root.output, cells.outer, self.b.let(value))
        cells.prepare(self.result, cells.outer, ROW)
        dtype = cells.body.types[self.result].dtype
        if cells.level(self.result, cells.outer) < COLUMN:
            self.b.store(self.out, self.row, stored(cells.scalar(self.result, cells.outer), dtype))
            return

        def one(span: Span) -> None:
            y = cells.at(self.result, cells.outer, span.col, self.lanes, span.valid, {})
            self.b.store(self.out, self.row * self.count + span.col, stored(y, dtype), span.valid)

        self.columns(one)

    # ---- operators
    def _top(self) -> Vec:
        """The largest element, NaN unlikely to win: what follows turns into NaN anyway."""
        return self.total(-INF, lambda a, v: v.max(a), self.read)

    def _softmax(self, log: bool) -> None:
        top = self._top().spread(self.lanes)

        def power(span: Span) -> Vec:
            e = self.b.let(self.m.exp(self.b.let(self.again(span) - top)))
            if not log:
                self.keep(span, e)
            return e

        total = self.total(0.0, lambda a, v: a + v, power)
        if log:
            shift = self.b.let(self.m.log(total)).spread(self.lanes)
            self.finish(lambda span: self.again(span) - top - shift, operand=True)
        else:
            inverse = self.b.let(const(1.0, F32) / total).spread(self.lanes)
            self.finish(lambda span: self.kept(span) * inverse, operand=False)

    def _layer_norm(self, eps: float) -> None:
        mean = self.b.let(self._sum(self.read) * (1.0 / self.count)).spread(self.lanes)

        def square(span: Span) -> Vec:
            centred = self.b.let(self.again(span) - mean)
            return centred * centred

        variance = self._sum(square) * (1.0 / self.count)
        inverse = self.b.let(const(1.0, F32) / self.m.sqrt(variance + eps)).spread(self.lanes)
        self.finish(lambda span: self._affine(span, self.b.let((self.again(span) - mean) * inverse)), operand=True)

    def _rms_norm(self, eps: float) -> None:
        def square(span: Span) -> Vec:
            x = self.read(span)
            return x * x

        mean = self._sum(square) * (1.0 / self.count)
        inverse = self.b.let(const(1.0, F32) / self.m.sqrt(mean + eps)).spread(self.lanes)
        self.finish(lambda span: self._affine(span, self.b.let(self.again(span) * inverse)), operand=True)

    def _affine(self, span: Span, y: Vec) -> Vec:
        """y * scale + bias, rounded to the operand's format after every step."""
        if len(self.root.inputs) == 1:
            return y
        y = self._narrow(y) * self.operand(1, span)
        if len(self.root.inputs) == 2:
            return y
        return self._narrow(y) + self.operand(2, span)

    def _narrow(self, y: Vec) -> Vec:
        """Rounded to the operand's format, in f32."""
        return y if self.dtype == F32 else self.b.let(rounded(self.b, self.b.let(y), self.dtype).cast(F32))

    def _sum(self, term: Callable[[Span], Vec]) -> Vec:
        return self.total(0.0, lambda a, v: a + v, term)

    def _reduce(self, fn: str) -> Vec:
        def square(span: Span) -> Vec:
            x = self.read(span)
            return self._narrow(x * x)

        simple: dict[str, Callable[[], Vec]] = {
            "sum": lambda: self._sum(self.read),
            "mean": lambda: self._sum(self.read) * (1.0 / self.count),
            "max": lambda: self.total(-INF, self._larger, self.read),
            "min": lambda: self.m.negate(self.total(-INF, self._larger, lambda s: self.m.negate(self.read(s)))),
            "prod": lambda: self.total(1.0, lambda a, v: a * v, self.read),
            "l1": lambda: self._sum(lambda s: self.m.abs(self.read(s))),
            "sumsq": lambda: self._sum(square),
            "l2": lambda: self.m.sqrt(self._narrow(self._sum(square))),
            "logsum": lambda: self.m.log(self._narrow(self._sum(self.read))),
            "logsumexp": self._log_sum_exp,
        }
        return self.b.let(simple[fn]())

    def _larger(self, a: Vec, v: Vec) -> Vec:
        """The larger; NaN wins."""
        return self.m.call("llvm.maximum", a, v)

    def _log_sum_exp(self) -> Vec:
        top = self.b.let(self._top())
        top = self.b.let(self.m.abs(top).eq(INF).select(const(0.0, F32), top))
        wide = top.spread(self.lanes)
        total = self._sum(lambda s: self.m.exp(self.b.let(self.again(s) - wide)))
        return self.m.log(self.b.let(total)) + top


__all__ = ["RowKernel", "Span"]
