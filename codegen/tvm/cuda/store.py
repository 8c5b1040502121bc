"""Results of a tile: from fragments of sums through shared memory to rows of neighbouring outputs, then the epilogue.

A lane's sums lie eight outputs apart; in shared memory they become rows, so that a warp writes whole lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.epilogue import Epilogue
from bitwright.codegen.tvm.generic_eval import Evaluator, convert, div, memory, mod
from bitwright.codegen.tvm.pointwise import needs_exact
from bitwright.codegen.tvm.tir import Index, Pointer, Vec, width

FOUR = 4


@dataclass(eq=False)
class RowEpilogue(Epilogue):
    """An epilogue that writes four neighbouring outputs at once where the rows allow it."""

    def store_row(
        self, lead: Sequence[Index], column: Index, values: Sequence[Vec], end: Index, whole: bool = False
    ) -> None:
        """The outputs at ``(*lead, column ...)`` of the root's values there, those before column ``end``.

        ``whole``: all of them are, and columns are multiples of their number; then they are written at once.
        """
        b, n = self.b, len(values)
        assert isinstance(b, CudaBuilder)
        if not whole:
            for k, value in enumerate(values):
                with b.when(column + k < end):
                    self.store((*lead, column + k), value)
            return
        rows = [b.local(memory(self.body.types[name].dtype), n) for name in self.body.outputs]
        for k, value in enumerate(values):
            self._evaluate((*lead, column + k), value, rows, k)
        for name, pointer, row in zip(self.body.outputs, self.outputs, rows, strict=True):
            at = _flat(self.body.types[name].static_shape, (*lead, column))
            if (nbytes := n * width(row.dtype)) in (4, 8, 16):
                b.call(f"bw_copy{nbytes}", b.address(pointer, at), b.address(row))
                continue
            for k in range(n):
                b.store(pointer, at + k, b.load(row, k))

    def _evaluate(self, at: tuple[Index, ...], value: Vec, rows: Sequence[Pointer], k: int) -> None:
        ev = Evaluator(self.b, self.body, dict(self.inputs), isa="cuda", exact=needs_exact(self.body))
        with ev.layer():
            ev.fix(self.root.output, self.b.let(convert(value, ev.dtype(self.root.output))))
            for name, row in zip(self.body.outputs, rows, strict=True):
                ev.store(row, k, ev.at(name, at), ev.dtype(name))


def _flat(shape: Sequence[int], at: Sequence[Index]) -> Index:
    total: Index = 0
    for n, i in zip(shape, at, strict=True):
        total = total * n + i
    return total


@dataclass(frozen=True, slots=True)
class Fragments:
    """How sums lie in registers: a warp has ``m`` x ``n`` fragments of 16 outputs by 8 rows, four words a lane each;
    ``warps`` along outputs and rows."""

    m: int
    n: int
    warps: tuple[int, int]

    @property
    def outs(self) -> int:
        """Outputs of a block."""
        return 16 * self.m * self.warps[0]

    @property
    def pitch(self) -> int:
        """Words of a row in shared memory: four more than outputs, so that lanes write different banks."""
        return self.outs + 4

    def passes(self, nbytes: int) -> int:
        """In how many parts the sums go through ``nbytes`` of shared memory."""
        rows = max(nbytes // (4 * self.pitch) // (8 * self.warps[1]), 1)
        return next(p for p in range(1, self.n + 1) if self.n % p == 0 and self.n // p <= rows)

    def nbytes(self, passes: int) -> int:
        """Shared memory of a part."""
        return self.warps[1] * self.n // passes * 8 * self.pitch * 4


def through_shared(
    b: CudaBuilder,
    f: Fragments,
    acc: Pointer,
    shared: Pointer,
    passes: int,
    put: Callable[[Index, Index, list[Vec]], None],
) -> None:
    """Call ``put(row, output, four values)`` for the sums ``acc`` of a block; row and output count in the block."""
    words = b.view(shared, acc.dtype)
    part = f.n // passes
    height = f.warps[1] * 8 * part
    across = f.outs // FOUR
    warp_out, warp_row = mod(b.warp, f.warps[0]), div(b.warp, f.warps[0])
    for p in range(passes):
        b.sync()
        line = b.index((warp_row * (8 * part) + mod(b.lane, 4) * 2) * f.pitch + warp_out * (16 * f.m) + div(b.lane, 4))
        for i in range(f.m):
            for j in range(part):
                for q in range(4):
                    value = b.load(acc, ((i * f.n) + p * part + j) * 4 + q)
                    b.store(words, line + (8 * j + q % 2) * f.pitch + 16 * i + 8 * (q // 2), value)
        b.sync()
        with b.loop(-(-height * across // b.threads)) as turn:
            unit = b.index(turn * b.threads + b.thread)
            with b.when(unit < height * across if height * across % b.threads else True):
                row, column = b.index(div(unit, across)), b.index(mod(unit, across) * FOUR)
                four = b.let(b.load(words, row * f.pitch + column, FOUR))
                block_row = div(row, 8 * part) * (8 * f.n) + p * 8 * part + mod(row, 8 * part)
                put(b.index(block_row), column, [b.let(four.part(k, 1)) for k in range(FOUR)])
