"""One tile of queries of one head: scores, softmax, product with the values, epilogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bitwright.codegen.tvm.attention_views import Attend, Operand
from bitwright.codegen.tvm.contract.runtime_right import transpose
from bitwright.codegen.tvm.rows_values import apply, load_columns, loaded, rounded, stored
from bitwright.codegen.tvm.tir import (
    Builder,
    Index,
    Pointer,
    Register,
    Vec,
    const,
    constants,
    fma,
    is_static,
    minimum,
    scalar,
)
from bitwright.codegen.tvm.vecmath import INF, VecMath
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.types import BOOL, F32, S32, DType

KEYS = {32: {1: 8, 2: 8, 3: 6, 4: 4}, 16: {1: 6, 2: 4}}
"""Keys of a register tile by the number of registers and the vectors of queries."""


@dataclass(frozen=True)
class Tile:
    """Queries from ``row`` on, in ``vectors`` vectors; where each operand's matrix starts."""

    row: Index
    vectors: int
    bases: dict[str, Index]


@dataclass(eq=False)
class TileWriter:
    """Emits tiles into a builder. ``parts`` are the areas of the scratch."""

    b: Builder
    body: Graph
    a: Attend
    isa: str
    lanes: int
    columns: int
    registers: int
    pointers: dict[str, Pointer]
    parts: dict[str, Pointer]
    scalars: dict[str, Vec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.m = VecMath(self.b, self.isa)

    # ---- pieces
    def before(self) -> None:
        """Read the scalars of the epilogue."""
        for node in self.a.after:
            for x in node.inputs:
                maker = self.body.producers.get(x)
                dtype = self.body.types[x].dtype
                if maker is None and x in self.pointers:
                    self.scalars[x] = self.b.let(loaded(self.b.load(self.pointers[x], 0), dtype))
                elif maker is not None and isinstance(maker.op, ops.Constant):
                    self.scalars[x] = rounded(self.b, const(maker.op.values[0], F32), dtype)

    def mac(self, acc: Register, x: Vec, y: Vec) -> None:
        acc.set(acc.get() + x * y if self.isa == "portable" else fma(x, y, acc.get()))

    def load(self, operand: Operand, at: Index, lanes: int, valid: int | None) -> Vec:
        """Consecutive elements of an operand, as f32."""
        dtype = self._dtype(operand)
        return self.b.let(loaded(load_columns(self.b, self.pointers[operand.name], at, lanes, valid), dtype).cast(F32))

    def strided(self, operand: Operand, start: Index, step: int, lanes: int, limit: Index) -> Vec:
        """Elements ``step`` apart as f32; those past ``limit`` (the last) repeat it."""
        place = self.b.let(constants(list(range(lanes)), S32).min(scalar(limit).spread(lanes)) * step)
        return self.b.let(
            loaded(self.b.gather(self.pointers[operand.name], start, place), self._dtype(operand)).cast(F32)
        )

    def _dtype(self, operand: Operand) -> DType:
        return self.body.types[operand.name].dtype

    # ---- the tile
    def tile(self, t: Tile) -> None:
        """All of it."""
        self._copy_keys(t)
        self._pack_queries(t)
        end = self._end(t, t.row + t.vectors * self.lanes)
        top = [self.b.register(F32, self.lanes, const(-INF, F32, self.lanes)) for _ in range(t.vectors)]
        self._scores(t, end, top)
        self._softmax(t, end, top)
        self._product(t, end)

    def _end(self, t: Tile, row: Index) -> Index:
        """How many keys the queries before ``row`` look at."""
        return self.b.index(minimum(row, self.a.keys)) if self.a.op.causal else self.a.keys

    def _width(self, t: Tile) -> int:
        return t.vectors * self.lanes

    # ---- packing
    def _copy_keys(self, t: Tile) -> None:
        a = self.a
        if "k" in self.parts:
            self._copy(a.k, t.bases["k"], self.parts["k"], a.depth, self.lanes)
        if "v" in self.parts:
            self._copy(a.v, t.bases["v"], self.parts["v"], a.width, self.columns)

    def _copy(self, operand: Operand, base: Index, to: Pointer, width: int, lanes: int) -> None:
        """All rows of an operand as f32, padded to whole vectors."""
        b, padded = self.b, -(-width // lanes) * lanes
        with b.loop(self.a.keys, name="s") as s:
            at = b.index(base + s * operand.row)
            for c in range(0, padded, lanes):
                valid = min(lanes, width - c)
                if operand.col == 1:
                    x = self.load(operand, at + c, lanes, valid)
                else:
                    x = self.strided(operand, at + c * operand.col, operand.col, lanes, valid - 1)
                b.store(to, s * padded + c, x)

    def _pack_queries(self, t: Tile) -> None:
        """Queries times scale, [depth][query]; queries past the last one repeat it."""
        a, b, lanes, q = self.a, self.b, self.lanes, self.a.q
        with b.loop(t.vectors, name="v") as v:
            first = b.index(t.row + v * lanes)
            if q.col == 1:
                rows = [b.index(t.bases["q"] + minimum(first + n, a.rows - 1) * q.row) for n in range(lanes)]
                whole = a.depth // lanes
                with b.loop(whole, name="d") as d:
                    self._pack_block(t, rows, d * lanes, v, lanes)
                if a.depth % lanes:
                    self._pack_block(t, rows, whole * lanes, v, a.depth % lanes)
            else:
                left = b.index(a.rows - 1 - first)
                start = b.index(t.bases["q"] + first * q.row)
                with b.loop(a.depth, name="d") as d:
                    x = self.strided(q, b.index(start + d * q.col), q.row, lanes, left)
                    b.store(self.parts["q"], d * self._width(t) + v * lanes, x * a.op.scale)

    def _pack_block(self, t: Tile, rows: list[Index], d: Index, v: Index, valid: int) -> None:
        b, lanes = self.b, self.lanes
        block = [b.let(self.load(self.a.q, r + d, lanes, valid) * self.a.op.scale) for r in rows]
        for k, line in enumerate(transpose(block, b.let)[:valid]):
            b.store(self.parts["q"], (d + k) * self._width(t) + v * lanes, line)

    # ---- scores
    def _scores(self, t: Tile, end: Index, top: list[Register]) -> None:
        """Scores [key][query] of the keys before ``end`` (rounded up to whole blocks), and their maxima."""
        b, keys = self.b, self.a.keys
        size = min(KEYS[self.registers][t.vectors], keys)
        whole = keys // size
        blocks = b.index(minimum((end + (size - 1)) // size, whole)) if not is_static(end) else whole
        with b.loop(blocks, name="keys") as k:
            self._score_block(t, b.index(k * size), size, top)
        if keys % size:
            with b.when(end > whole * size):
                self._score_block(t, whole * size, keys % size, top)
        if self._mask_by_row():
            self._add_mask(t, end, top)

    def _score_block(self, t: Tile, key: Index, size: int, top: list[Register]) -> None:
        a, b, lanes = self.a, self.b, self.lanes
        copied = "k" in self.parts
        pointer = self.parts["k"] if copied else self.pointers[a.k.name]
        step = (-(-a.depth // lanes) * lanes, 1) if copied else (a.k.row, a.k.col)
        base = 0 if copied else t.bases["k"]
        rows = [b.index(base + (key + j) * step[0]) for j in range(size)]
        zero = const(0.0, F32, lanes)
        acc = [[b.register(F32, lanes, zero) for _ in range(t.vectors)] for _ in range(size)]
        with b.loop(a.depth, name="d") as d:
            q = [b.let(b.load(self.parts["q"], d * self._width(t) + v * lanes, lanes)) for v in range(t.vectors)]
            for j in range(size):
                k = b.let(b.load(pointer, rows[j] + d * step[1])).spread(lanes)
                for v in range(t.vectors):
                    self.mac(acc[j][v], q[v], k)
        for j in range(size):
            self._put_scores(t, b.index(key + j), [r.get() for r in acc[j]], top)

    def _put_scores(self, t: Tile, key: Index, values: list[Vec], top: list[Register]) -> None:
        a, b, lanes = self.a, self.b, self.lanes
        mask = self._key_mask(t, key)
        for v, value in enumerate(values):
            if a.op.causal:
                rows = constants(list(range(lanes)), S32) + scalar(t.row + v * lanes).spread(lanes)
                value = rows.ge(scalar(key).spread(lanes)).select(value, const(-INF, F32, lanes))
            value = b.let(mask(value))
            b.store(self.parts["scores"], key * self._width(t) + v * lanes, value)
            if not self._mask_by_row():
                top[v].set(value.max(top[v].get()))

    def _mask_by_row(self) -> bool:
        """Whether the mask differs between queries."""
        return self.a.mask is not None and self.a.mask.row != 0

    def _key_mask(self, t: Tile, key: Index) -> Callable[[Vec], Vec]:
        """What a mask that is the same for all queries does with the scores of a key."""
        mask = self.a.mask
        if mask is None or mask.row:
            return lambda x: x
        dtype = self._dtype(mask)
        m = self.b.let(loaded(self.b.load(self.pointers[mask.name], t.bases["mask"] + key * mask.col), dtype))
        if dtype == BOOL:
            m = self.b.let(m.cast(S32)).spread(self.lanes)
            return lambda x: m.ne(0).select(x, const(-INF, F32, self.lanes))
        wide = m.cast(F32).spread(self.lanes)
        return lambda x: x + wide

    def _add_mask(self, t: Tile, end: Index, top: list[Register]) -> None:
        """Apply a mask of queries by keys to the scores; find the maxima."""
        b, lanes, mask, best = self.b, self.lanes, self.a.mask, self.parts["inverse"]
        assert mask is not None
        with b.loop(t.vectors, name="v") as v:
            highest = b.register(F32, lanes, const(-INF, F32, lanes))
            if mask.col == 1 and self.a.keys >= lanes:
                self._add_mask_blocks(t, end, v, highest)
            else:
                first = b.index(t.row + v * lanes)
                start, left = b.index(t.bases["mask"] + first * mask.row), b.index(self.a.rows - 1 - first)
                with b.loop(end, name="s") as s:
                    m = self.strided(mask, b.index(start + s * mask.col), mask.row, lanes, left)
                    self._mask_score(t, s, v, m, highest)
            b.store(best, v * lanes, highest.get())
        for k, r in enumerate(top):
            r.set(b.load(best, k * lanes, lanes))

    def _add_mask_blocks(self, t: Tile, end: Index, v: Index, highest: Register) -> None:
        """The mask by transposed blocks; the last one begins where it ends with the row."""
        a, b, lanes, mask = self.a, self.b, self.lanes, self.a.mask
        assert mask is not None
        first = b.index(t.row + v * lanes)
        rows = [b.index(t.bases["mask"] + minimum(first + n, a.rows - 1) * mask.row) for n in range(lanes)]
        with b.loop((end + (lanes - 1)) // lanes, name="block") as k:
            key = b.index(minimum(k * lanes, a.keys - lanes))
            block = [self.load(mask, r + key, lanes, None) for r in rows]
            fresh = b.index(k * lanes - key)  # keys before it were in the block before
            for j, line in enumerate(transpose(block, b.let)):
                inside = True if is_static(end) else key + j < end
                with b.when(True if a.keys % lanes == 0 else fresh <= j), b.when(inside):
                    self._mask_score(t, b.index(key + j), v, line, highest)

    def _mask_score(self, t: Tile, key: Index, v: Index, mask: Vec, top: Register) -> None:
        assert self.a.mask is not None
        at = self.b.index(key * self._width(t) + v * self.lanes)
        score = self.b.let(self.b.load(self.parts["scores"], at, self.lanes))
        if self._dtype(self.a.mask) == BOOL:
            score = mask.gt(0.0).select(score, const(-INF, F32, self.lanes))
        else:
            score = score + mask
        score = self.b.let(score)
        self.b.store(self.parts["scores"], at, score)
        top.set(score.max(top.get()))

    # ---- softmax
    def _softmax(self, t: Tile, end: Index, top: list[Register]) -> None:
        """Scores to exp(score - maximum), and the reciprocals of their sums."""
        b, lanes, scores = self.b, self.lanes, self.parts["scores"]
        best = [b.let(r.get()) for r in top]
        sums = [b.register(F32, lanes, const(0.0, F32, lanes)) for _ in best]
        with b.loop(end, name="s") as s:
            for v in range(t.vectors):
                at = s * self._width(t) + v * lanes
                e = b.let(self.m.exp(b.let(b.load(scores, at, lanes) - best[v])))
                b.store(scores, at, e)
                sums[v].set(sums[v].get() + e)
        for v, total in enumerate(sums):
            b.store(self.parts["inverse"], v * lanes, const(1.0, F32, lanes) / total.get())

    # ---- product with the values
    def _product(self, t: Tile, end: Index) -> None:
        b, a = self.b, self.a
        vectors = -(-a.width // self.columns)
        most = 4 if self.registers >= 32 else 2
        groups = -(-vectors // most)
        sizes = [vectors // groups + (g < vectors % groups) for g in range(groups)]
        rows = min(self.lanes, 8 if max(sizes) * 8 <= 4 * most else 4)
        count = b.index(minimum(a.rows - t.row, self._width(t)))
        with b.loop((count + (rows - 1)) // rows, name="rows") as r:
            row = b.index(r * rows)
            reach = self._end(t, t.row + row + rows) if a.op.causal else end
            done = 0
            for n in sizes:
                self._product_block(t, row, rows, done, n, reach)
                done += n

    def _product_block(self, t: Tile, row: Index, rows: int, first: int, vectors: int, end: Index) -> None:
        a, b, lanes = self.a, self.b, self.columns
        copied = "v" in self.parts
        pointer = self.parts["v"] if copied else self.pointers[a.v.name]
        step = -(-a.width // lanes) * lanes if copied else a.v.row
        base = 0 if copied else t.bases["v"]
        zero = const(0.0, F32, lanes)
        acc = [[b.register(F32, lanes, zero) for _ in range(vectors)] for _ in range(rows)]
        with b.loop(end, name="s") as s:
            at, p = b.index(base + s * step), b.index(s * self._width(t) + row)
            v = [b.let(b.load(pointer, at + (first + j) * lanes, lanes)) for j in range(vectors)]
            for i in range(rows):
                x = b.let(b.load(self.parts["scores"], p + i)).spread(lanes)
                for j in range(vectors):
                    self.mac(acc[i][j], v[j], x)
        self._put_rows(t, row, first, acc)

    def _put_rows(self, t: Tile, row: Index, first: int, acc: list[list[Register]]) -> None:
        """Store the sums of some rows of the tile, divided by what their probabilities sum to."""
        a, b, lanes, rows = self.a, self.b, self.columns, len(acc)
        for i in range(rows):
            with b.when(True if a.rows % rows == 0 else t.row + row + i < a.rows):
                inverse = b.let(b.load(self.parts["inverse"], row + i)).spread(lanes)
                out = b.index(t.bases["out"] + (t.row + row + i) * a.out.row)
                for j, sums in enumerate(acc[i]):
                    self._store(out, (first + j) * lanes, b.let(sums.get() * inverse))

    def _store(self, base: Index, col: int, value: Vec) -> None:
        """Pointwise operators and the store of columns from ``col`` on."""
        b, a, lanes = self.b, self.a, self.columns
        valid = min(lanes, a.width - col)
        value = b.let(rounded(b, value, a.node.type.dtype))
        for node in a.after:
            args = [self.scalars[x].spread(lanes) if x in self.scalars else value for x in node.inputs]
            value = b.let(apply(b, node.op, args, node.type.dtype, self.isa, False))
        out = self.pointers[""]
        value = stored(value, self.body.types[self.body.outputs[0]].dtype)
        if a.out.col == 1 or valid == 1:
            b.store(out, base + col * a.out.col, value, valid)
            return
        value = b.let(value)
        for k in range(valid):
            b.store(out, base + (col + k) * a.out.col, value.shuffle([k]))


__all__ = ["Tile", "TileWriter"]
