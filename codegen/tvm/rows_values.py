"""Values of a body around one row operator, a vector of columns at a time.

A body of the :class:`~bitwright.codegen.tvm.rows.Rows` template lives in a :class:`Space`: rows (the leading axes)
by columns (the trailing axes, collapsed). Every operand broadcasts into it. A value that is the same for all
columns is computed once per row, one that is the same everywhere once per call; the rest is pulled by vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from bitwright.codegen.tvm.generic_eval import carried, convert, div, memory, mod
from bitwright.codegen.tvm.pointwise import emit_pointwise, why_unsupported
from bitwright.codegen.tvm.tir import Builder, Condition, Index, Pointer, Vec, concat, const, constants, width
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import BF16, F32, U16, U32, DType

KERNEL, ROW, COLUMN = 0, 1, 2
"""How often a value changes: never, with the row, with the column."""

Shape = tuple[int, ...]


class Unfit(Exception):
    """Why a body is not for this template."""


@dataclass(frozen=True)
class Space:
    """Rows by columns: ``lead`` axes are rows, ``tail`` axes are columns."""

    lead: Shape
    tail: Shape

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    @property
    def columns(self) -> int:
        return math.prod(self.tail)


@dataclass(frozen=True)
class Layout:
    """Where an operand's elements are: a stride per lead axis, and 1 if it runs along the columns (else 0)."""

    strides: Shape
    along: int

    @property
    def level(self) -> int:
        if self.along:
            return COLUMN
        return ROW if any(self.strides) else KERNEL


def layout(shape: Shape, space: Space) -> Layout:
    """How an operand of ``shape`` broadcasts into the space; raises :class:`Unfit`."""
    full = space.lead + space.tail
    extra = len(shape) - len(full)
    if extra > 0 and any(n != 1 for n in shape[:extra]):
        raise Unfit(f"an operand of shape {list(shape)} does not broadcast to {list(full)}")
    shape = shape[max(extra, 0) :]
    shape = (1,) * (len(full) - len(shape)) + shape
    if any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise Unfit(f"an operand of shape {list(shape)} does not broadcast to {list(full)}")
    strides = [math.prod(shape[k + 1 :]) if n != 1 else 0 for k, n in enumerate(shape)]
    rank = len(space.lead)
    tail = shape[rank:]
    if tail != space.tail and any(n != 1 for n in tail):
        raise Unfit(f"an operand of shape {list(shape)} broadcasts inside a row")
    return Layout(tuple(strides[:rank]), int(any(n != 1 for n in tail)))


def row_offset(row: Index, lead: Shape, strides: Shape) -> Index:
    """Where the row starts in an operand with these strides."""
    runs: list[list[int]] = []  # [size, stride], axes merged where one index does
    for n, s in zip(lead, strides, strict=True):
        if n == 1:
            continue
        if runs and runs[-1][1] == s * n:
            runs[-1] = [runs[-1][0] * n, s]
        else:
            runs.append([n, s])
    total: Index = 0
    for k in reversed(range(len(runs))):
        n, s = runs[k]
        at = row if k == 0 else mod(row, n)
        row = row if k == 0 else div(row, n)
        if s:
            term = at * s if s != 1 else at
            total = term if isinstance(total, int) and total == 0 else total + term
    return total


def operand_shape(body: Graph, node: Node, k: int) -> Shape:
    """The shape with which operand ``k`` broadcasts against the others (scales and zeros lie along an axis)."""
    shape = body.types[node.inputs[k]].static_shape
    axis = getattr(node.op, "axis", None)
    if k == 0 or axis is None or math.prod(shape) == 1:
        return shape
    if not isinstance(node.op, (ops.Quantize, ops.Dequantize, ops.Requantize)):
        return shape
    if getattr(node.op, "group", 0):
        raise Unfit("a scale per group")
    first = body.types[node.inputs[0]].static_shape
    spread = [1] * len(first)
    spread[axis] = shape[0]
    return tuple(spread)


Key = tuple[str, Space, Shape]


@dataclass(eq=False)
class Cells:
    """Pulls values of a body into a kernel. ``root`` is the row operator's result: it is put in, not computed."""

    body: Graph
    root: str
    inner: Space
    """The space of the root's operand."""
    outer: Space
    """The space of the root's result (differs for reductions that drop their axes)."""
    b: Builder
    pointers: dict[str, Pointer]
    isa: str
    exact: bool
    row: Index = 0
    _known: tuple[dict[Key, Vec], dict[Key, Vec], dict[Key, Vec]] = field(default_factory=lambda: ({}, {}, {}))
    _bases: dict[Key, Index] = field(default_factory=dict)
    _levels: dict[Key, int] = field(default_factory=dict)

    # ---- analysis
    def level(self, name: str, space: Space, shape: Shape | None = None) -> int:
        """How often the value changes in this space; raises :class:`Unfit`."""
        key = self._key(name, space, shape)
        if key not in self._levels:
            self._levels[key] = self._find_level(key)
        return self._levels[key]

    def _key(self, name: str, space: Space, shape: Shape | None) -> Key:
        return name, space, self.body.types[name].static_shape if shape is None else shape

    def _find_level(self, key: Key) -> int:
        name, space, shape = key
        found = layout(shape, space).level
        node = self.body.producers.get(name)
        if node is None or name == self.root:
            return found
        if isinstance(node.op, ops.Constant):
            if node.type.size != 1:
                raise Unfit("a literal that is not a scalar")
            return KERNEL
        if shape != node.type.static_shape and node.type.size != 1:
            raise Unfit("computed scales along an axis")
        if why := why_unsupported(node.op, [self.body.types[x].dtype for x in node.inputs]):
            raise Unfit(why)
        return max(self.level(x, space, operand_shape(self.body, node, k)) for k, x in enumerate(node.inputs))

    # ---- evaluation
    def start_row(self, row: Index) -> None:
        """Forget what belongs to the row before."""
        self.row = row
        self._known[ROW].clear()
        self._bases.clear()

    def put(self, name: str, space: Space, value: Vec) -> None:
        """Within this row, ``name`` is this value for every column."""
        self._known[ROW][self._key(name, space, None)] = value

    def prepare(self, name: str, space: Space, upto: int, shape: Shape | None = None) -> None:
        """Compute now what ``name`` needs and what changes ``upto`` that often (all but what hangs on the root)."""
        key = self._key(name, space, shape)
        level, node = self.level(*key), self.body.producers.get(name)
        if name == self.root or any(key in known for known in self._known):
            return
        if level <= upto and not self._needs_root(name):
            self._known[level][key] = self._compute(key, 0, 1, None)
            return
        if node is None:
            self._base(key)
        for k, x in enumerate(node.inputs if node else ()):
            self.prepare(x, space, upto, operand_shape(self.body, node, k))  # type: ignore[arg-type]

    def _needs_root(self, name: str) -> bool:
        if self._known[ROW].get(self._key(self.root, self.outer, None)) is not None:
            return False
        node = self.body.producers.get(name)
        return name == self.root or (node is not None and any(self._needs_root(x) for x in node.inputs))

    def at(self, name: str, space: Space, col: Index, lanes: int, valid: int | None, given: dict[str, Vec]) -> Vec:
        """``lanes`` columns from ``col`` on, of which ``valid`` exist; ``given`` are values known already."""
        self._known[COLUMN].clear()
        for k, v in given.items():
            self._known[COLUMN][self._key(k, space, None)] = v
        return self._pull(self._key(name, space, None), col, lanes, valid)

    def scalar(self, name: str, space: Space) -> Vec:
        """A value that does not change along the row."""
        self._known[COLUMN].clear()
        return self._pull(self._key(name, space, None), 0, 1, None)

    def _pull(self, key: Key, col: Index, lanes: int, valid: int | None) -> Vec:
        for known in self._known:
            if key in known:
                value = known[key]
                return value.spread(lanes) if value.lanes == 1 and lanes > 1 else value
        value = self._compute(key, col, lanes, valid)
        self._known[COLUMN][key] = value
        return value

    def _compute(self, key: Key, col: Index, lanes: int, valid: int | None) -> Vec:
        name, space, _shape = key
        node = self.body.producers.get(name)
        if node is None:
            return self._load(key, col, lanes, valid)
        if isinstance(node.op, ops.Constant):
            value = const(node.op.values[0], carried(node.type.dtype), lanes)
            return rounded(self.b, value, node.type.dtype)
        args = [
            self._pull((x, space, operand_shape(self.body, node, k)), col, lanes, valid)
            for k, x in enumerate(node.inputs)
        ]
        return self.b.let(apply(self.b, node.op, args, node.type.dtype, self.isa, self.exact))

    def _load(self, key: Key, col: Index, lanes: int, valid: int | None) -> Vec:
        name, space, shape = key
        where, pointer = layout(shape, space), self.pointers[name]
        at = self._base(key)
        dtype = self.body.types[name].dtype
        if not where.along or lanes == 1:
            place = at + col if where.along else at
            return self.b.let(loaded(self.b.load(pointer, place), dtype)).spread(lanes)
        return self.b.let(loaded(load_columns(self.b, pointer, at + col, lanes, valid), dtype))

    def _base(self, key: Key) -> Index:
        _name, space, shape = key
        if key not in self._bases:
            where = layout(shape, space)
            if where.level == KERNEL or not any(where.strides):
                return 0
            self._bases[key] = self.b.index(row_offset(self.row, space.lead, where.strides))
        return self._bases[key]


def load_columns(b: Builder, pointer: Pointer, at: Index, lanes: int, valid: int | None) -> Vec:
    """A vector of columns; never further than 64 bytes past the last valid one."""
    if valid is None or (lanes - valid) * width(pointer.dtype) <= 64:
        return b.load(pointer, at, lanes)
    zero = const(0, pointer.dtype)
    return concat([b.let(b.load(pointer, at + k)) if k < valid else zero for k in range(lanes)])


def loaded(value: Vec, dtype: DType) -> Vec:
    """A value from memory as it travels (bf16 as f32)."""
    return (value.cast(U32) << 16).bits(F32) if dtype == BF16 else Vec(value.expr, dtype, value.lanes)


def stored(value: Vec, dtype: DType) -> Vec:
    """A travelling value of ``dtype`` as it is stored."""
    return (value.bits(U32) >> 16).cast(U16) if dtype == BF16 else Vec(value.expr, memory(dtype), value.lanes)


def rounded(b: Builder, value: Vec, dtype: DType) -> Vec:
    """The value in ``dtype``, as it travels: bf16 is an f32 of that precision, ties to even, NaN stays."""
    if dtype != BF16:
        return convert(value, dtype)
    value = b.let(value.cast(F32))
    bits = b.let(value.bits(U32))
    near = (bits + (((bits >> 16) & 1) + 0x7FFF)) & 0xFFFF0000
    return b.let((bits & 0x7FFFFFFF).gt(0x7F800000).select(value, near.bits(F32)))


def apply(b: Builder, op: ops.Op, args: list[Vec], dtype: DType, isa: str, exact: bool) -> Vec:
    """A pointwise operator on vectors; the result as it travels."""
    if isinstance(op, ops.Cast) and BF16 in (op.dtype, *(a.dtype for a in args)):
        return rounded(b, args[0], op.dtype)
    return rounded(b, emit_pointwise(b, op, args, isa=isa, exact=exact), dtype)


def first_lanes(lanes: int, valid: int) -> Condition:
    """True in the first ``valid`` lanes."""
    return constants(list(range(lanes)), F32).lt(float(valid))
