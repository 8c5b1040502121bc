"""The tile of :mod:`attention_tile` with products of bf16: pairs of depth, then pairs of keys, by vdpbf16ps.

Sums are f32. Probabilities go into the second product cut to bf16 (towards zero) and are divided by the sum of what
was cut, so that the bias of the cut cancels: each is off by 2^-7 of itself at most, a result by less than 2^-9 of what
it sums on average. 2^x is good to 8e-5 before the cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitwright.codegen.instructions.x86 import VDPBF16PS_512
from bitwright.codegen.tvm.attention_tile import Tile, TileWriter
from bitwright.codegen.tvm.attention_views import Attend, Operand
from bitwright.codegen.tvm.contract.runtime_right import transpose
from bitwright.codegen.tvm.rows_values import load_columns
from bitwright.codegen.tvm.spelling import call
from bitwright.codegen.tvm.tir import Index, Pointer, Register, Vec, concat, const, fma, is_static, minimum
from bitwright.codegen.tvm.vecmath import polynomial
from bitwright.ir.graph import Graph
from bitwright.ir.types import BF16, F32, S32, U16

LANES = 16
_EXP2 = (0.9999280571937561, 0.6932610273361206, 0.24261116981506348, 0.05517134070396423)
_LOWEST = -150.0
"""2 to less than this is zero."""


def why_not_pairs(body: Graph, a: Attend, features: tuple[str, ...], lanes: int, columns: int) -> str:
    """Why this attention cannot multiply pairs of bf16; the empty string if it can."""
    if any(body.types[o.name].dtype != BF16 for o in (a.q, a.k, a.v)):
        return "operands are not bf16"
    if "avx512bf16" not in features:
        return "the target has no products of bf16"
    if (lanes, columns) != (LANES, LANES):
        return "fewer than 16 queries or columns"
    if a.depth % 2 or any(_odd(o) for o in (a.q, a.k)):
        return "depth is not in adjacent pairs"
    return "" if a.v.col == 1 else "columns of the value are not adjacent"


def _odd(o: Operand) -> bool:
    return o.col != 1 or any(n % 2 for n in (o.row, o.offset, *o.batch))


def pair_scratch(a: Attend, rows: int) -> dict[str, int]:
    """Words of 32 bits of each part of the scratch."""
    columns = -(-a.width // LANES) * LANES
    return {"q": a.depth // 2 * rows, "scores": a.keys * rows, "inverse": rows, "v": -(-a.keys // 2) * columns}


@dataclass(eq=False)
class PairWriter(TileWriter):
    """Emits tiles whose operands are pairs of bf16 in words of 32 bits."""

    def before(self) -> None:
        super().before()
        self.b.require(VDPBF16PS_512.wrapper)

    def dot(self, acc: Register, x: Vec, y: Vec) -> None:
        acc.set(call(VDPBF16PS_512, acc.get(), x, y))

    def _words(self, pointer: Pointer) -> Pointer:
        return self.b.view(pointer, S32)

    # ---- packing
    def _copy_keys(self, t: Tile) -> None:
        """Values by pairs of keys, [pair][column][2]; the last of an odd number stands beside zeros."""
        a, b = self.a, self.b
        columns = -(-a.width // LANES) * LANES
        source, to = b.view(self.pointers[a.v.name], U16), self._words(self.parts["v"])

        def pair(s: Index, both: bool) -> None:
            at = b.index(t.bases["v"] + s * (2 * a.v.row))
            for c in range(0, columns, LANES):
                valid = min(LANES, a.width - c)
                low = b.let(load_columns(b, source, at + c, LANES, valid))
                high = const(0, U16, LANES)
                if both:
                    high = b.let(load_columns(b, source, at + (a.v.row + c), LANES, valid))
                order = [lane + LANES * k for lane in range(LANES) for k in (0, 1)]
                b.store(to, s * columns + c, concat([low, high]).shuffle(order).bits(S32))

        with b.loop(a.keys // 2, name="s") as s:
            pair(s, True)
        if a.keys % 2:
            pair(a.keys // 2, False)

    def _pack_queries(self, t: Tile) -> None:
        """Queries as [pair of depth][query]; those past the last one repeat it."""
        a, b, q, pairs = self.a, self.b, self.a.q, self.a.depth // 2
        source, to = self._words(self.pointers[q.name]), self._words(self.parts["q"])
        with b.loop(t.vectors, name="v") as v:
            first = b.index(t.row + v * LANES)
            rows = [b.index((t.bases["q"] + minimum(first + n, a.rows - 1) * q.row) // 2) for n in range(LANES)]

            def block(d: Index, valid: int) -> None:
                lines = [b.let(load_columns(b, source, r + d, LANES, valid)) for r in rows]
                for k, line in enumerate(transpose(lines, b.let)[:valid]):
                    b.store(to, (d + k) * self._width(t) + v * LANES, line)

            with b.loop(pairs // LANES, name="d") as d:
                block(b.index(d * LANES), LANES)
            if pairs % LANES:
                block(pairs // LANES * LANES, pairs % LANES)

    # ---- scores
    def _score_block(self, t: Tile, key: Index, size: int, top: list[Register]) -> None:
        a, b = self.a, self.b
        queries, keys = self._words(self.parts["q"]), self._words(self.pointers[a.k.name])
        rows = [b.index((t.bases["k"] + (key + j) * a.k.row) // 2) for j in range(size)]
        zero = const(0.0, F32, LANES)
        acc = [[b.register(F32, LANES, zero) for _ in range(t.vectors)] for _ in range(size)]
        with b.loop(a.depth // 2, name="d") as d:
            q = [b.let(b.load(queries, d * self._width(t) + v * LANES, LANES)) for v in range(t.vectors)]
            for j in range(size):
                k = b.let(b.load(keys, rows[j] + d)).spread(LANES)
                for v in range(t.vectors):
                    self.dot(acc[j][v], q[v], k)
        for j in range(size):
            self._put_scores(t, b.index(key + j), [b.let(r.get() * a.op.scale) for r in acc[j]], top)

    # ---- softmax
    def _softmax(self, t: Tile, end: Index, top: list[Register]) -> None:
        """Scores to pairs of exp(score - maximum) in bf16, [pair of keys][query][2], where the scores were."""
        b, width = self.b, self._width(t)
        scores, pairs = self.parts["scores"], self._words(self.parts["scores"])
        log2e = const(math.log2(math.e), F32, LANES)
        best = [b.let(r.get() * math.log2(math.e)) for r in top]
        sums = [b.register(F32, LANES, const(0.0, F32, LANES)) for _ in best]
        ones = const(0x3F803F80, S32, LANES)

        def power(s: Index, v: int) -> Vec:
            score = b.load(scores, s * width + v * LANES, LANES)
            x = b.let(self.m.at_least(fma(score, log2e, self.m.negate(best[v])), _LOWEST))
            n = b.let(self.m.round(x))
            return b.let(self.m.scale(b.let(polynomial(b.let(x - n), _EXP2)), n).bits(S32))

        def pair(s: Index, both: bool) -> None:
            for v in range(len(best)):
                low = b.let((power(s * 2, v) >> 16) & 0xFFFF)
                x = b.let(low | (power(s * 2 + 1, v) & -0x10000)) if both else low
                b.store(pairs, s * width + v * LANES, x)
                self.dot(sums[v], x, ones)

        with b.loop(end // 2, name="s") as s:
            pair(s, True)
        if self.a.keys % 2:
            with b.when(True if is_static(end) else end == self.a.keys):
                pair(self.a.keys // 2, False)
        for v, total in enumerate(sums):
            b.store(self.parts["inverse"], v * LANES, const(1.0, F32, LANES) / total.get())

    # ---- product with the values
    def _product_block(self, t: Tile, row: Index, rows: int, first: int, vectors: int, end: Index) -> None:
        b, columns = self.b, -(-self.a.width // LANES) * LANES
        values, chances = self._words(self.parts["v"]), self._words(self.parts["scores"])
        zero = const(0.0, F32, LANES)
        acc = [[b.register(F32, LANES, zero) for _ in range(vectors)] for _ in range(rows)]
        with b.loop((end + 1) // 2, name="s") as s:
            at, p = b.index(s * columns), b.index(s * self._width(t) + row)
            v = [b.let(b.load(values, at + (first + j) * LANES, LANES)) for j in range(vectors)]
            for i in range(rows):
                x = b.let(b.load(chances, p + i)).spread(LANES)
                for j in range(vectors):
                    self.dot(acc[i][j], v[j], x)
        self._put_rows(t, row, first, acc)


__all__ = ["PairWriter", "pair_scratch", "why_not_pairs"]
