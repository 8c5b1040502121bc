"""Results of one byte: made while rows lie in lanes, four outputs to a word, and turned into rows as words.

Four times fewer vectors are transposed than if 32-bit sums were, and what belongs to an output (multiplier, shift) is
broadcast once for all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitwright.codegen.tvm.contract.epilogue import Epilogue
from bitwright.codegen.tvm.epilogue import PointwiseEpilogue
from bitwright.codegen.tvm.lanes.spec import WORD, Memory, Shape
from bitwright.codegen.tvm.lanes.transpose import lane_tile, transposed
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Register, choose, minimum
from bitwright.ir.types import S32, U8

QUAD = 4
"""Outputs of a word."""
TOGETHER = (4, 3, 2, 1)
"""Vectors of rows whose results are made at once: what belongs to an output is loaded once for them."""


@dataclass(frozen=True)
class Words:
    """Writes the bytes of a block of rows and a block of outputs, which begins at output ``first``."""

    b: Builder
    shape: Shape
    memory: Memory
    epilogue: PointwiseEpilogue
    operands: tuple[int, ...]
    pointers: Mapping[str, Pointer]
    scratch: Pointer

    @property
    def step(self) -> int:
        """Words from one quad of outputs to the next."""
        return self.shape.pitch // WORD

    @property
    def fused(self) -> bool:
        """Whether a group of outputs is a quad, and its results are made from sums in registers."""
        return self.shape.knobs.shared == QUAD and not self.epilogue.heavy

    def operand(self, i: int) -> int:
        """Where the words of the i-th operand begin."""
        return self.memory.words + (1 + i) * self.memory.words_size

    def fetch(self, row: Index, first: Index, part: Index, vectors: int) -> None:
        """Bring the operands of rows from ``row`` on and of a block of outputs into lanes."""
        b, lanes = self.b, self.shape.lanes
        cols = self.shape.spec.cols
        for n, i in enumerate(self.operands):
            x = b.view(self.pointers[f"e{i}"], S32)
            with b.loop(vectors, name="vector") as r:
                rows = [b.index(minimum(row + r * lanes + j, self.shape.spec.rows - 1)) for j in range(lanes)]
                bases = [b.index((at * cols + first) // WORD) for at in rows]
                place = b.index(self.operand(n) + r * lanes)
                with b.loop(self._chunks(part, up=True), name="chunk") as c:
                    lane_tile(b, x, bases, b.index(c * lanes), lanes, self.scratch, place, self.step)

    def quad(self, quad: Index, first: Index, sums: Sequence[Sequence[Register]]) -> None:
        """Results of four outputs whose sums are in registers, for all vectors of rows."""
        self._make(quad, first, sums, range(len(sums[0])))

    def all(self, part: Index, first: Index, vectors: int) -> None:
        """Results of all outputs from their sums in memory."""
        b, lanes, last = self.b, self.shape.lanes, self.shape.output_blocks - 1
        cols, outputs = self.shape.spec.cols, self.shape.knobs.outputs
        counts = [-(-n // QUAD) for n in (cols - last * outputs, min(outputs, cols))]
        sums = b.view(self.scratch, self.shape.acc)
        together = next(n for n in TOGETHER if vectors % n == 0)
        with (
            b.loop(b.index(choose(part == last, *counts)), name="quad") as q,
            b.loop(vectors // together, name="vectors") as v,
        ):
            near = [b.index(v * together + r) for r in range(together)]
            place = b.index(self.memory.sums + q * (QUAD * self.step))
            loads = [[b.load(sums, place + o * self.step + r * lanes, lanes) for r in near] for o in range(QUAD)]
            self._make(q, first, [[b.register(self.shape.acc, lanes, x) for x in row] for row in loads], near)

    def _make(self, quad: Index, first: Index, sums: Sequence[Sequence[Register]], vectors: Sequence[Index]) -> None:
        b, lanes = self.b, self.shape.lanes
        at = b.index(quad * self.step)
        held = {
            i: [b.let(b.load(self.scratch, self.operand(n) + at + r * lanes, lanes)) for r in vectors]
            for n, i in enumerate(self.operands)
        }
        values = [[register.get() for register in row] for row in sums]
        made = self.epilogue.word(b, self.pointers, values, b.index(first + quad * QUAD), held)
        for r, word in zip(vectors, made, strict=True):
            b.store(self.scratch, self.memory.words + at + r * lanes, word)

    def write(self, row: Index, part: Index, first: Index, vectors: int) -> None:
        """Turn the words into rows of bytes."""
        b, lanes = self.b, self.shape.lanes
        cols, outputs, run = self.shape.spec.cols, self.shape.knobs.outputs, self.shape.vector
        last = self.shape.output_blocks - 1
        tail, whole = (cols - last * outputs) % run, (cols - last * outputs) // run
        with b.loop(vectors, name="vector") as r:
            base = b.index(row + r * lanes)
            with b.loop(self._chunks(part, up=False), name="chunk") as c:
                self._tile(base, r, b.index(first + c * run), c, run)
            if tail:
                with b.when(part == last):
                    self._tile(base, r, b.index(first + whole * run), whole, tail)

    def _chunks(self, part: Index, up: bool) -> Index:
        """Vectors of bytes in the block of outputs, whole ones or ``up`` to its end."""
        cols, outputs, run = self.shape.spec.cols, self.shape.knobs.outputs, self.shape.vector
        last = self.shape.output_blocks - 1
        tail, full = ((n + up * (run - 1)) // run for n in (cols - last * outputs, min(outputs, cols)))
        return self.b.index(choose(part == last, tail, full))

    def _tile(self, base: Index, r: Index, col: Index, chunk: Index, valid: int) -> None:
        """One vector of words to a row: ``valid`` outputs of the rows from ``base`` on."""
        b, lanes, spec = self.b, self.shape.lanes, self.shape.spec
        place = b.index(self.memory.words + chunk * (lanes * self.step) + r * lanes)
        rows = transposed(b, [b.let(b.load(self.scratch, place + j * self.step, lanes)) for j in range(lanes)])
        out = self.pointers["out"]
        if spec.rows % lanes == 0:
            for j, v in enumerate(rows):
                b.store(out, (base + j) * spec.cols + col, v.bits(U8), valid)
            return
        for j, v in enumerate(rows):
            b.store(self.scratch, self.memory.tile + j * lanes, v)
        with b.loop(minimum(lanes, spec.rows - base), name="row") as j:
            v = b.load(self.scratch, self.memory.tile + j * lanes, lanes)
            b.store(out, (base + j) * spec.cols + col, v.bits(U8), valid)


def words_of(epilogue: Epilogue) -> tuple[int, ...] | None:
    """The operands of an epilogue that makes words, or None for one that does not."""
    return epilogue.words if isinstance(epilogue, PointwiseEpilogue) else None
