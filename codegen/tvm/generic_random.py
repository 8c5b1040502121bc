"""Generic rule of the unbiased mask: bit for bit the arithmetic of ``ir/mvue.py`` and the numbers of Philox-4x32-10.

Every operation is a scalar one in the order of the definition. No product meets an addition, except for one with a
power of two, so that LLVM's multiply-adds change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitwright.codegen.tvm.generic_eval import RULES, Evaluator, Idx, both, convert, div, flatten, is_nan
from bitwright.codegen.tvm.generic_rows import ROWS, Row, prepared
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec, const, scalar
from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.mvue import NEAR
from bitwright.ir.semantics_random import MULTIPLIERS, ROUNDS, WEYL, WORD
from bitwright.ir.types import F64, S32, U64, DType

BUFFERS = 4
"""Of one group each: what is left, magnitudes, ratios, values."""


def _whole(op: ops.UnbiasedMask, size: int) -> bool:
    """A row is a group, else (where the last group is shorter) it is the axis."""
    return size % op.group == 0


def mask_bytes(op: ops.UnbiasedMask, shape: Sequence[int]) -> int:
    """Scratch: the results of a row, and the buffers of one group."""
    size = shape[op.axis]
    return 8 * ((op.group if _whole(op, size) else size) + BUFFERS * op.group)


def _row(op: ops.UnbiasedMask, shape: Sequence[int]) -> Row:
    axis = op.axis % len(shape)
    return Row((), {axis: op.group}) if _whole(op, shape[axis]) else Row((axis,))


@dataclass(eq=False)
class _Group:
    """One group of ``n`` entries at work."""

    ev: Evaluator
    n: int
    kept: int
    limit: float
    out: Pointer
    rest: Pointer
    magnitude: Pointer
    ratio: Pointer
    value: Pointer

    @property
    def b(self) -> Builder:
        return self.ev.b

    def read(self, element: Callable[[Index], Vec]) -> None:
        with self.ev.loop(self.n) as j:
            v = self.b.let(convert(element(j), F64))
            a = self.b.let(v.lt(0.0).select(const(0.0, F64) - v, v))
            self.b.store(self.magnitude, j, a)
            self.b.store(self.rest, j, a)
            self.b.store(self.out, j, const(0.0, F64))

    def total(self, of: Pointer, but: Index | None = None) -> Vec:
        """The sum in order; of all entries but one, which counts as 0."""

        def term(at: list[Index]) -> Vec:
            v = self.b.load(of, at[0])
            return v if but is None else scalar(at[0]).eq(scalar(but)).select(const(0.0, F64), v)

        return self.ev.total([self.n], F64, term)

    def optimal(self, u: Vec) -> None:
        left = self.ev.register(F64, float(self.kept))
        with self.ev.loop(self.kept):
            bound, room = self.b.let(self.total(self.rest) * NEAR), self.b.let(left.get())
            with self.ev.loop(self.n) as j:
                r = self.b.let(self.b.load(self.rest, j))
                with self.ev.when(both((r * room).ge(bound), r.gt(0.0)).expr):
                    self.b.store(self.out, j, r)
                    self.b.store(self.rest, j, const(0.0, F64))
                    left.set(left.get() - 1.0)
        total, room = self.total(self.rest), self.b.let(left.get())
        level, pace = self.b.let((total / room).min(self.limit)), self.b.let(room / total)
        taken, run = self.ev.register(F64, 0.0), self.ev.register(F64, 0.0)
        with self.ev.loop(self.n) as j:
            r = self.b.let(self.b.load(self.rest, j))
            run.set(run.get() + r)
            next_one = self.b.let(taken.get() + u)
            hit = both(both((run.get() * pace).gt(next_one), taken.get().lt(room)), r.gt(0.0))
            with self.ev.when(hit.expr):
                self.b.store(self.out, j, level)
                taken.set(taken.get() + 1.0)

    def two_draw(self, numbers: Sequence[Vec]) -> None:
        total, one = self.total(self.magnitude), const(1.0, F64)
        with self.ev.loop(self.n) as j:
            a, others = self.b.let(self.b.load(self.magnitude, j)), self.total(self.magnitude, j)
            ratio = self.b.let((a / total) / others)
            self.b.store(self.ratio, j, others.gt(0.0).select(ratio, const(0.0, F64)))
        with self.ev.loop(self.n) as j:
            second = self.b.let(one / self.b.let(one / total + self.total(self.ratio, j)))
            self.b.store(self.value, j, second.max(self.b.load(self.magnitude, j)).min(self.limit))
        for u in numbers:
            bound = self.b.let(u * self.total(self.rest))
            run, place = self.ev.register(F64, 0.0), self.ev.register(S32, 0)
            with self.ev.loop(self.n) as j:
                run.set(run.get() + self.b.load(self.rest, j))
                with self.ev.when(run.get().le(bound).expr):
                    place.set(place.get() + 1)
            j = self.b.index(place.get().min(self.n - 1).expr)
            with self.ev.when(self.b.load(self.magnitude, j).gt(0.0).expr):
                self.b.store(self.out, j, self.b.load(self.value, j))
            self.b.store(self.rest, j, const(0.0, F64))

    def spoil(self) -> None:
        """A group with a NaN is NaN."""
        total = self.b.let(self.total(self.magnitude))
        with self.ev.when(is_nan(total).expr), self.ev.loop(self.n) as j:
            self.b.store(self.out, j, total)


def _stats(ev: Evaluator, node: Node, idx: Idx) -> tuple[Pointer, Index]:
    """Masks the groups of the row of ``idx``; the results, and which index along the axis is the first of them."""
    op, (x, draw) = node.op, node.inputs
    assert isinstance(op, ops.UnbiasedMask)
    assert ev.scratch is not None
    shape = ev.shape(x)
    axis = op.axis % len(shape)
    size, memory = shape[axis], ev.b.view(ev.scratch, F64)
    blocks = -(-size // op.group)
    lead = [*idx[:axis], *idx[axis + 1 :]]
    row = flatten(lead, [*shape[:axis], *shape[axis + 1 :]])
    number = ev.b.let(ev.at(draw, ()).bits(U64))
    results = memory
    buffers = op.group if _whole(op, size) else size

    def group(first: Index, block: Index, into: Index, n: int) -> None:
        places = [ev.b.at(memory, buffers + k * op.group) for k in range(BUFFERS)]
        g = _Group(ev, n, -(-op.keep * n // op.group), _limit(ev.dtype(x)), ev.b.at(results, into), *places)
        g.read(lambda j: ev.at(x, (*idx[:axis], ev.b.index(first + j), *idx[axis + 1 :])))
        u, v = uniform(ev.b, scalar(ev.b.index(row * blocks + block)).cast(U64), number, op.seed)
        if op.method == "two-draw" and g.kept == 2:
            g.two_draw((u, v))
        else:
            g.optimal(u)
        g.spoil()

    if _whole(op, size):
        block = ev.b.index(div(idx[axis], op.group))
        first = ev.b.index(block * op.group)
        group(first, block, 0, op.group)
        return results, first
    with ev.loop(size // op.group) as block:
        first = ev.b.index(block * op.group)
        group(first, block, first, op.group)
    full = size - size % op.group
    group(full, size // op.group, full, size % op.group)
    return results, 0


def _limit(dtype: DType) -> float:
    import torch

    from bitwright.ir.semantics import torch_dtype

    return torch.finfo(torch_dtype(dtype)).max


def _mask(ev: Evaluator, node: Node, _: int, idx: Idx) -> Vec:
    op, x = node.op, node.inputs[0]
    assert isinstance(op, ops.UnbiasedMask)
    results, first = prepared(ev, node, idx)
    at = idx[op.axis % len(idx)]
    v = ev.b.let(ev.b.load(results, at - first))
    return convert(ev.number(x, idx), F64).lt(0.0).select(const(0.0, F64) - v, v)


def uniform(b: Builder, block: Vec, draw: Vec, seed: int) -> tuple[Vec, Vec]:
    """Two numbers of [0, 1) for a block under a draw and a seed (u64 scalars): see ``ir/semantics_random.py``."""
    c0, c1 = block, const(0, U64)
    c2, c3 = b.let(draw & WORD), b.let(draw >> 32)
    k, m = seed & WORD, seed >> 32 & WORD
    for _ in range(ROUNDS):
        p = b.register(U64, 1, c0 * MULTIPLIERS[0])
        q = b.register(U64, 1, c2 * MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            b.let((q.get() >> 32) ^ c1 ^ k), b.let(q.get() & WORD), b.let((p.get() >> 32) ^ c3 ^ m),
            b.let(p.get() & WORD),
        )  # fmt: skip
        k, m = (k + WEYL[0]) & WORD, (m + WEYL[1]) & WORD
    return b.let(c0.cast(F64) * 2.0**-32), b.let(c1.cast(F64) * 2.0**-32)


ROWS[ops.UnbiasedMask] = (_row, _stats)
RULES[ops.UnbiasedMask] = _mask

__all__ = ["mask_bytes", "uniform"]
