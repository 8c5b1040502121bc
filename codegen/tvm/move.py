"""Data movement at memory speed: rows of vectors, transposes by tiles in registers, a pointwise chain on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.generic_eval import memory, unflatten
from bitwright.codegen.tvm.move_boxes import Axis, Box, boxes_of
from bitwright.codegen.tvm.pointwise_program import Leaf, NotPointwise, Program
from bitwright.codegen.tvm.template import Config, Refused, Template, plain_args
from bitwright.codegen.tvm.tir import Builder, Index, Vec, const, maximum, minimum, shuffle, width
from bitwright.codegen.tvm.vecmath import keep
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.types import BF16, BOOL, F16, S32, S64, DType
from bitwright.ir.weights import Array

MOVES = (
    ops.Transpose, ops.Expand, ops.Slice, ops.Flip, ops.Tile, ops.Concat, ops.Pad, ops.Gather,
)  # fmt: skip
TASK_BYTES = 32 << 10
LIMIT = 1 << 31
LINE = 64
SHORT = 256
"""Elements of a row below which the loop around it matters."""
CACHE_SETS = 64
"""Sets of a first-level cache, of 8 lines or more."""


@dataclass(frozen=True)
class MoveConfig(Config):
    """``lanes`` per vector; ``tile`` rows of a transpose in registers; ``units[i]`` rows per task of box i.

    Small elements are turned in ``groups`` squares of ``narrow`` side by side, one per 128 bits.
    """

    lanes: int = 16
    tile: int = 16
    narrow: int = 16
    groups: int = 1
    units: tuple[int, ...] = ()


class Move(Template):
    """One shape operator, a pointwise chain behind it."""

    name: ClassVar[str] = "move"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes bodies whose source is contiguous along some axis of the result."""
        try:
            made = _Body(body)
        except NotPointwise as why:
            return Refused(str(why))
        if target.kind != "cpu":
            return Refused("move kernels are for CPUs")
        size = width(body.types[made.root.output].dtype)
        types = [body.types[x].dtype for x in body.types]
        widest = max(_computed(t) if made.program else width(t) for t in types)
        lanes = target.vector_bits // 8 // widest if made.program else LINE // size
        tile = min(16, target.vector_bits // 8 // size)
        units, tasks = [], 0
        for box in made.boxes:
            count, each = _units(box, size)
            units.append(min(max(TASK_BYTES // (each * size), 1), count))
            tasks += -(-count // units[-1])
        turned = any(b.transposed is not None for b in made.boxes)
        return MoveConfig(
            tasks=tasks, args=plain_args(body), isa=target.isa, mcpu=target.mcpu,
            reason=f"{made.root.op.spelling} in {f'{tile}x{tile} tiles' if turned else f'rows of {lanes} lanes'}",
            lanes=lanes, tile=tile,
            narrow=16 // min(size, 16), groups=_groups(made.boxes, size, target), units=tuple(units),
        )  # fmt: skip

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        """One loop over rows or tiles per box."""
        assert isinstance(config, MoveConfig)
        return _Kernel(_Body(body), config, symbol).emit()


def _computed(dtype: DType) -> int:
    """Bytes of a lane while it is computed with."""
    return 4 if dtype == F16 else width(dtype)


class _Body:
    """The shape operator, the program behind it, the boxes; raises NotPointwise where there are none."""

    def __init__(self, body: Graph) -> None:
        roots = [n for n in body.nodes if not isinstance(n.op, (*ops.POINTWISE, ops.Constant))]
        if len(roots) != 1 or not isinstance(roots[0].op, MOVES):
            raise NotPointwise("not one shape operator")
        self.body, self.root = body, roots[0]
        self.kind = self.root.type.dtype
        if len(body.outputs) != 1 or any(x in body.producers for x in self.root.inputs):
            raise NotPointwise("work before the shape operator, or several results")
        self.out = body.outputs[0]
        shape = self.root.type.static_shape
        if body.types[self.out].static_shape != shape or any(t.size >= LIMIT for t in body.types.values()):
            raise NotPointwise("another shape behind the shape operator")
        self.program: Program | None = None
        self.leaves: dict[Leaf, int] = {}
        strides: list[tuple[int, ...]] = []
        if self.out != self.root.output:
            strides = self._program(shape)
        made = boxes_of(body, self.root, strides)
        if isinstance(made, str):
            raise NotPointwise(made)
        if any(b.axes[-1].src not in (0, 1) and b.transposed is None for b in made):
            raise NotPointwise("a source that is contiguous nowhere")
        if any(b.indirect and b.transposed is not None for b in made):
            raise NotPointwise("a gather that transposes")
        self.boxes = made

    def _program(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Strides of the epilogue's operands along the result's axes."""
        program = Program(self.body, shape, (self.out,), given=(self.root.output,))
        if BF16 in {t.dtype for t in self.body.types.values()}:
            raise NotPointwise("arithmetic on bf16")
        if any(leaf.name in self.body.producers for leaf in program.leaves.values()):
            raise NotPointwise("a literal tensor")
        strides: list[tuple[int, ...]] = []
        for (name, places), leaf in program.leaves.items():
            row = program.strides(self.body.types[name].static_shape, places)
            if len(row) != len(shape):
                raise NotPointwise("groups along an axis")
            if leaf not in self.leaves:
                self.leaves[leaf] = len(strides)
                strides.append(row)
        if any(row and row[-1] not in (0, 1) for row in strides):
            raise NotPointwise("an operand that is not contiguous")
        self.program = program
        return strides


def _outer(box: Box) -> int:
    """How many axes number the rows; short rows take one axis more with them, which saves divisions."""
    short = len(box.axes) > 2 and box.axes[-1].size <= SHORT
    return len(box.axes) - (2 if short else 1)


def _units(box: Box, size: int) -> tuple[int, int]:
    """How many rows (or columns of tiles) a box has, and the elements of each."""
    if box.transposed is None:
        inner = math.prod(a.size for a in box.axes[_outer(box) :])
        return box.size // inner, inner
    chunk, n = LINE // size, box.axes[box.transposed].size
    return box.size // n // box.axes[-1].size * -(-n // chunk), box.axes[-1].size * min(chunk, n)


def _groups(boxes: Sequence[Box], size: int, target: Target) -> int:
    """Squares side by side: few enough that the result's rows they write stay in the first-level cache.

    Rows that are a multiple of a large power of two apart share few of its sets.
    """
    groups = target.vector_bits // 128 if size <= 2 else 1
    for box in boxes:
        if box.transposed is None:
            continue
        lines = max(box.axes[box.transposed].out * size // LINE, 1)
        while groups > 1 and groups * 16 // size > CACHE_SETS // math.gcd(CACHE_SETS, lines) * 8:
            groups //= 2
    return groups


Where = tuple[Index, Index, list[Index]]
"""Where the result, the source and the further operands start."""


class _Kernel:
    def __init__(self, made: _Body, config: MoveConfig, symbol: str) -> None:
        self.made, self.config, self.b = made, config, Builder(symbol)
        types = made.body.types
        inputs = made.body.inputs
        self.inputs = {v.name: self.b.param(f"x{i}", memory(v.type.dtype), v.type.size) for i, v in enumerate(inputs)}
        self.out = self.b.param("y", memory(types[made.out].dtype), types[made.out].size)

    def emit(self) -> Any:
        b, first = self.b, 0
        for box, per in zip(self.made.boxes, self.config.units, strict=True):
            count, _ = _units(box, width(self.made.kind))
            tasks = -(-count // per)
            start = maximum(b.begin - first, 0) if first else b.begin
            stop = minimum(b.end - first, tasks)
            with b.loop(b.index(minimum(stop * per, count)), b.index(start * per), name="unit") as unit:
                self._unit(box, b.index(unit))
            first += tasks
        return b.finish()

    def _unit(self, box: Box, unit: Index) -> None:
        b, turned = self.b, box.transposed
        if turned is None:
            outer = box.axes[: _outer(box)]
            at = unflatten(unit, [a.size for a in outer])
            place = list(zip(outer, at, strict=True))
            if len(outer) == len(box.axes) - 1:
                self._row(box, place)
                return
            with b.loop(box.axes[-2].size, name="row") as i:
                self._row(box, [*place, (box.axes[-2], b.index(i))])
            return
        lead = [a for k, a in enumerate(box.axes[:-1]) if k != turned]
        chunk = LINE // width(self.made.kind)
        chunks = -(-box.axes[turned].size // chunk)
        at = unflatten(unit, [*(a.size for a in lead), chunks])
        self._columns(box, [(a, i) for a, i in zip(lead, at[:-1], strict=True)], b.index(at[-1] * chunk), chunk)

    def _offsets(self, box: Box, at: list[tuple[Axis, Index]]) -> tuple[Index, Index, list[Index]]:
        """Where the result, the source and the further operands are for these outer indices."""
        b = self.b
        out, src = (
            b.index(_sum(start, [(getattr(a, f), i) for a, i in at]))
            for start, f in ((box.out, "out"), (box.src, "src"))
        )
        leaves = [b.index(_sum(start, [(a.leaves[k], i) for a, i in at])) for k, start in enumerate(box.leaves)]
        if box.indirect:
            index = b.load(self.inputs[box.indirect.name], leaves.pop()).cast(S64)
            index = index.lt(0).select(index + box.indirect.size, index).clip(0, box.indirect.size - 1)
            src = b.index(src + b.index(index.cast(S32).expr) * box.indirect.step)
        return out, src, leaves

    # ---- rows
    def _row(self, box: Box, at: list[tuple[Axis, Index]]) -> None:
        b, axis, lanes = self.b, box.axes[-1], self.config.lanes
        out, src, leaves = self._offsets(box, at)
        whole = axis.size // lanes

        def piece(i: Index, n: int, valid: int) -> None:
            value = self._source(box, src, i, n)
            self._store(value, out + i, leaves, axis, i, n, valid)

        if whole > 4:
            with b.loop(whole, name="vector") as i:
                piece(b.index(i * lanes), lanes, lanes)
        else:
            for i in range(whole):
                piece(i * lanes, lanes, lanes)
        rest = axis.size - whole * lanes
        if rest:
            piece(whole * lanes, min(1 << (rest - 1).bit_length(), lanes), rest)

    def _source(self, box: Box, src: Index, i: Index, lanes: int) -> Vec:
        kind = memory(self.made.kind)
        if box.source is None:
            value = box.fill if self.made.kind.is_float else int(bool(box.fill)) if kind == BOOL else int(box.fill)
            if self.made.kind == BF16:
                value = int(BF16.numpy.type(value).view("uint16"))
            return const(value, kind, lanes)
        pointer = self.inputs[box.source]
        if box.axes[-1].src == 0:
            return self.b.load(pointer, src).spread(lanes)
        return self.b.load(pointer, src + i, lanes)

    def _store(
        self, value: Vec, out: Index, leaves: Sequence[Index], axis: Axis, i: Index, lanes: int, valid: int
    ) -> None:
        """The epilogue and the store of ``valid`` elements at ``out``; ``i`` counts along the last axis."""
        self.b.store(self.out, out, self._value(value, leaves, axis, i, lanes), valid)

    def _value(self, value: Vec, leaves: Sequence[Index], axis: Axis, i: Index, lanes: int) -> Vec:
        made = self.made
        if made.program is None:
            return value

        def read(leaf: Leaf) -> Vec:
            k = made.leaves[leaf]
            pointer = self.inputs[leaf.name]
            if axis.leaves[k] == 0 or lanes == 1:
                return keep(self.b, self.b.load(pointer, leaves[k] + (i * axis.leaves[k]))).spread(lanes)
            return self.b.load(pointer, leaves[k] + i, lanes)

        given = {made.root.output: keep(self.b, value)}
        return made.program.evaluate(self.b, self.config.isa, lanes, read, given)[made.out]

    # ---- transposes
    def _columns(self, box: Box, at: list[tuple[Axis, Index]], first: Index, chunk: int) -> None:
        """Columns [first, first + chunk) of the source's contiguous axis become rows of the result."""
        assert box.transposed is not None
        b, tile = self.b, self.config.tile
        along = box.axes[box.transposed]
        where = self._offsets(box, at)
        if self._few(box):
            self._interleave(box, where, first, chunk)
            return
        wide = self.config.narrow * self.config.groups
        if self.config.groups > 1 and along.size >= wide:
            full = minimum(chunk // wide, (along.size - first) // wide)
            with b.loop(b.index(full), name="strip") as k:
                self._strip(box, where, b.index(first + k * wide), wide, self.config.narrow)
            ends = along.size // wide * wide
            with b.when(tirx.EQ(first, ends // chunk * chunk)):
                for column in range(ends, along.size, tile):
                    self._strip(box, where, column, min(tile, along.size - column), tile)
            return
        if along.size >= tile:
            full = minimum(chunk // tile, (along.size - first) // tile)
            with b.loop(b.index(full), name="strip") as k:
                self._strip(box, where, b.index(first + k * tile), tile, tile)
        if along.size % tile:
            ends = along.size // tile * tile
            with b.when(tirx.EQ(first, ends // chunk * chunk)):
                self._strip(box, where, ends, along.size % tile, tile)

    def _strip(self, box: Box, where: Where, column: Index, columns: int, tile: int) -> None:
        """``columns`` columns from ``column`` on, ``tile`` positions of the last axis at a time."""
        b, last = self.b, box.axes[-1]
        whole, rest = last.size // tile, last.size % tile
        if whole:
            with b.loop(whole, name="tile") as i:
                self._tile(box, where, column, b.index(i * tile), columns, tile, tile)
        if rest:
            self._tile(box, where, column, whole * tile, columns, rest, tile)

    def _few(self, box: Box) -> bool:
        """Whether the result's rows are so short (colours of an image) that whole vectors are interleaved instead."""
        assert box.transposed is not None
        along, last = box.axes[box.transposed], box.axes[-1]
        near = along.out == last.size <= 4 and not any(along.leaves[: len(self.made.leaves)])
        return near and self.config.isa != "portable"

    def _interleave(self, box: Box, where: Where, first: Index, lanes: int) -> None:
        """``lanes`` columns: one vector per position of the last axis, woven into contiguous vectors."""
        assert box.transposed is not None
        assert box.source is not None
        b, along, last = self.b, box.axes[box.transposed], box.axes[-1]
        out, src, leaves = where
        many, still = last.size, Axis(1, 1, 1, (0,) * len(last.leaves))
        parts = []
        for k in range(many):
            plane = b.load(self.inputs[box.source], b.index(src + first + k * last.src), lanes)
            at = [x + k * n for x, n in zip(leaves, last.leaves, strict=False)]
            parts.append(keep(b, self._value(plane, at, still, 0, lanes)))
        woven = [
            keep(b, shuffle(parts, [e % many * lanes + e // many for e in range(v * lanes, (v + 1) * lanes)]))
            for v in range(many)
        ]
        start = b.index(out + first * many)
        rest, ends = along.size % lanes * many, along.size // lanes * lanes
        if ends:
            with b.when(first < ends):
                for v in range(many):
                    b.store(self.out, start + v * lanes, woven[v])
        if rest:
            with b.when(tirx.EQ(first, ends)):
                for v in range(-(-rest // lanes)):
                    b.store(self.out, start + v * lanes, woven[v], min(rest - v * lanes, lanes))

    def _tile(self, box: Box, where: Where, column: Index, i: Index, columns: int, valid: int, tile: int) -> None:
        """``valid`` rows of the source (at most ``tile``) turned: one square, or several side by side."""
        assert box.transposed is not None
        assert box.source is not None
        b = self.b
        groups = max(columns // tile, 1)
        along, last = box.axes[box.transposed], box.axes[-1]
        out, src, leaves = where
        start = b.index(src + column + i * last.src)
        read = [b.load(self.inputs[box.source], start + k * last.src, tile * groups) for k in range(valid)]
        read = [keep(b, v) for v in read]
        turned = transpose(b, [*read, *[read[-1]] * (tile - valid)], groups)
        start = b.index(out + column * along.out + i)
        lanes = min(1 << (valid - 1).bit_length(), tile)
        for r in range(columns):
            offsets = [x + (column + r) * n for x, n in zip(leaves, along.leaves, strict=False)]
            value = turned[r % tile].part(r // tile * tile, lanes)
            self._store(value, start + r * along.out, offsets, last, i, lanes, valid)


def transpose(b: Builder, rows: Sequence[Vec], groups: int = 1) -> list[Vec]:
    """Squares of vectors, ``groups`` of them side by side, turned: rounds that interleave row i with row i + half."""
    n, half = len(rows), len(rows) // 2
    total = n * groups
    low = [g * n + k // 2 + (total if k % 2 else 0) for g in range(groups) for k in range(n)]
    high = [k + half for k in low]
    done = list(rows)
    for _ in range(n.bit_length() - 1):
        pairs = [(done[k], done[k + half]) for k in range(half)]
        done = [keep(b, shuffle(pair, order)) for pair in pairs for order in (low, high)]
    return done


def _sum(start: int, terms: Sequence[tuple[int, Index]]) -> Index:
    total: Index = start
    for n, i in terms:
        if n:
            total = total + i * n
    return total
