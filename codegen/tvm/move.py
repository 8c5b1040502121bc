"""Data movement at memory speed: rows of vectors, transposes by tiles in registers, a pointwise chain on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class MoveConfig(Config):
    """``lanes`` per vector; ``tile`` rows of a transpose in registers; ``units[i]`` rows per task of box i."""

    lanes: int = 16
    tile: int = 16
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
            lanes=lanes, tile=tile, units=tuple(units),
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


def _units(box: Box, size: int) -> tuple[int, int]:
    """How many rows (or columns of tiles) a box has, and the elements of each."""
    if box.transposed is None:
        inner = box.axes[-1].size
        return box.size // inner, inner
    chunk, n = LINE // size, box.axes[box.transposed].size
    return box.size // n // box.axes[-1].size * -(-n // chunk), box.axes[-1].size * min(chunk, n)


Place = Callable[[Sequence[int], int], Index]


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
            outer = box.axes[:-1]
            at = unflatten(unit, [a.size for a in outer])
            self._row(box, [(a, i) for a, i in zip(outer, at, strict=True)])
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
        made = self.made
        if made.program is not None:
            value = keep(self.b, value)

            def read(leaf: Leaf) -> Vec:
                k = made.leaves[leaf]
                pointer = self.inputs[leaf.name]
                if axis.leaves[k] == 0 or lanes == 1:
                    return keep(self.b, self.b.load(pointer, leaves[k] + (i * axis.leaves[k]))).spread(lanes)
                return self.b.load(pointer, leaves[k] + i, lanes)

            given = {made.root.output: value}
            value = made.program.evaluate(self.b, self.config.isa, lanes, read, given)[made.out]
        self.b.store(self.out, out, value, valid)

    # ---- transposes
    def _columns(self, box: Box, at: list[tuple[Axis, Index]], first: Index, chunk: int) -> None:
        """Columns [first, first + chunk) of the source's contiguous axis become rows of the result."""
        assert box.transposed is not None
        b, tile = self.b, self.config.tile
        along, last = box.axes[box.transposed], box.axes[-1]
        where = self._offsets(box, at)
        whole, rest = last.size // tile, last.size % tile

        def strip(column: Index, rows: int) -> None:
            if whole:
                with b.loop(whole, name="tile") as i:
                    self._tile(box, where, column, b.index(i * tile), rows, tile)
            if rest:
                self._tile(box, where, column, whole * tile, rows, rest)

        if along.size >= tile:
            full = minimum(chunk // tile, (along.size - first) // tile)
            with b.loop(b.index(full), name="strip") as k:
                strip(b.index(first + k * tile), tile)
        if along.size % tile:
            ends = along.size // tile * tile
            with b.when(tirx.EQ(first, ends // chunk * chunk)):
                strip(ends, along.size % tile)

    def _tile(
        self, box: Box, where: tuple[Index, Index, list[Index]], column: Index, i: Index, rows: int, valid: int
    ) -> None:
        assert box.transposed is not None
        assert box.source is not None
        b, tile = self.b, self.config.tile
        along, last = box.axes[box.transposed], box.axes[-1]
        out, src, leaves = where
        start = b.index(src + column + i * last.src)
        read = [b.load(self.inputs[box.source], start + k * last.src, tile) for k in range(valid)]
        read = [keep(b, v) for v in read]
        turned = transpose(b, [*read, *[read[-1]] * (tile - valid)])
        start = b.index(out + column * along.out + i)
        lanes = min(1 << (valid - 1).bit_length(), tile)
        for r in range(rows):
            offsets = [x + (column + r) * n for x, n in zip(leaves, along.leaves, strict=False)]
            self._store(turned[r].part(0, lanes), start + r * along.out, offsets, last, i, lanes, valid)


def transpose(b: Builder, rows: Sequence[Vec]) -> list[Vec]:
    """The square of vectors turned: by rounds that interleave row i with row i + half."""
    n, half = len(rows), len(rows) // 2
    low = [k // 2 + (n if k % 2 else 0) for k in range(n)]
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
