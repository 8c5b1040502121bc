"""A chain of pointwise operators over a loop nest: which elements every operand brings, and its evaluation.

The loop nest runs over the result's axes. Every operand is an array seen through strides along those axes (0 where
it is broadcast); a scale per group of an axis splits the axis in two. Neighbouring axes that every operand walks
alike become one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.pointwise import emit_pointwise, needs_exact, why_unsupported
from bitwright.codegen.tvm.template import Arg
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec, const, constants, is_static, width
from bitwright.codegen.tvm.vecmath import keep
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import F16, S32, DType

Place = tuple[int, int] | None
"""Where a value's axis runs: (loop axis, elements per step), or None for an axis of size 1."""
Places = tuple[Place, ...]


class NotPointwise(Exception):
    """The nodes are no pointwise program over the loop nest; the message says why."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """An array that the program reads: the value's name and its strides along the loop axes, in elements."""

    name: str
    dtype: DType
    elements: int
    strides: tuple[int, ...]

    @property
    def inner(self) -> int:
        return self.strides[-1]


class Program:
    """Pointwise nodes of ``body`` evaluated for ``outputs`` over ``shape``.

    ``given``: values that the caller supplies at every point (an accumulator, a normalised element), with the
    shape they have. ``fixed`` loop axes at the end are never merged with those before.
    """

    def __init__(
        self, body: Graph, shape: Sequence[int], outputs: Sequence[str], given: Sequence[str] = (), fixed: int = 0
    ) -> None:
        self.body, self.shape, self.outputs = body, tuple(shape), tuple(outputs)
        self.given, self.fixed = frozenset(given), fixed
        self.exact = needs_exact(body)
        self.nodes: dict[str, Node] = {}
        self._places: dict[tuple[str, Places], None] = {}
        for name in self.outputs:
            self._visit(name, self.natural(name))
        self._group = self._groups()
        self.axes, self.leaves = self._collapse()

    # ---- analysis
    def natural(self, name: str) -> Places:
        """A value broadcast to the loop nest, NumPy's way."""
        return self._aligned(self.body.types[name].static_shape, tuple((a, 1) for a in range(len(self.shape))))

    def _aligned(self, shape: tuple[int, ...], full: Places) -> Places:
        if len(shape) > len(full):
            raise NotPointwise(f"an operand of shape {list(shape)} has more axes than the result")
        tail = full[len(full) - len(shape) :]
        return tuple(None if n == 1 else p for n, p in zip(shape, tail, strict=True))

    def _visit(self, name: str, places: Places) -> None:
        if (name, places) in self._places:
            return
        self._places[name, places] = None
        node = self.body.producers.get(name)
        if name in self.given or node is None or isinstance(node.op, ops.Constant):
            return
        why = why_unsupported(node.op, [self.body.types[x].dtype for x in node.inputs])
        if why:
            raise NotPointwise(why)
        self.nodes[name] = node
        for i in range(len(node.inputs)):
            self._visit(node.inputs[i], self._operand(node, i, places))

    def _operand(self, node: Node, i: int, places: Places) -> Places:
        """Where the axes of operand ``i`` run when those of the node's result run at ``places``."""
        shape = self.body.types[node.inputs[i]].static_shape
        axis = getattr(node.op, "axis", None) if i else None
        if axis is None or not shape:
            return self._aligned(shape, places)
        group = getattr(node.op, "group", 0)
        rank = len(places)
        if group:
            where = list(self._aligned(shape, places))
            place = places[axis % rank]
            where[axis % rank] = None if place is None or shape[axis % rank] == 1 else (place[0], place[1] * group)
            return tuple(where)
        return (None if shape[0] == 1 else places[axis % rank],)

    def _groups(self) -> dict[int, int]:
        groups: dict[int, int] = {}
        for _, places in self._places:
            for place in places:
                if place and place[1] > 1 and groups.setdefault(place[0], place[1]) != place[1]:
                    raise NotPointwise("two group sizes along one axis")
        for axis, group in groups.items():
            if self.shape[axis] % group:
                raise NotPointwise(f"groups of {group} do not divide an axis of {self.shape[axis]}")
        return groups

    def strides(self, shape: tuple[int, ...], places: Places) -> tuple[int, ...]:
        """Strides of a row-major array along the (split, not yet merged) loop axes."""
        along = {}
        for axis, place in enumerate(places):
            if place is not None:
                along[place[0]] = (prod(shape[axis + 1 :]), place[1])
        out: list[int] = []
        for axis in range(len(self.shape)):
            step, group = along.get(axis, (0, 1))
            if axis not in self._group:
                out.append(step)
            else:
                size = self._group[axis]
                out += [step, 0] if group > 1 else [step * size, step]
        return tuple(out)

    def _split_shape(self) -> list[int]:
        out: list[int] = []
        for axis, size in enumerate(self.shape):
            out += [size // self._group[axis], self._group[axis]] if axis in self._group else [size]
        return out

    def _is_leaf(self, name: str) -> bool:
        if name in self.given:
            return False
        node = self.body.producers.get(name)
        return node is None or (isinstance(node.op, ops.Constant) and self.body.types[name].size > 1)

    def _collapse(self) -> tuple[tuple[int, ...], dict[tuple[str, Places], Leaf]]:
        """Sizes of the merged loop axes, and every array the program reads."""
        sizes, keys = self._split_shape(), [k for k in self._places if self._is_leaf(k[0])]
        rows = [self.strides(self.body.types[name].static_shape, places) for name, places in keys]
        rows.append(tuple(prod(sizes[i + 1 :]) for i in range(len(sizes))))
        fixed = len(sizes) - self.fixed
        groups = [[i] for i, n in enumerate(sizes) if n != 1 or (self.fixed and i >= fixed)]
        merged: list[list[int]] = []
        for g in groups:
            i = g[0]
            if merged and not (self.fixed and i == fixed) and all(r[merged[-1][-1]] == r[i] * sizes[i] for r in rows):
                merged[-1].append(i)
            else:
                merged.append(g)
        axes = tuple(prod(sizes[i] for i in m) for m in merged) or (1,)
        leaves = {}
        for (name, places), row in zip(keys, rows, strict=False):
            t = self.body.types[name]
            strides = tuple(row[m[-1]] for m in merged) or (0,)
            leaves[name, places] = Leaf(name, t.dtype, t.size, strides)
        return axes, leaves

    # ---- description
    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the arrays read, in body order: inputs, then literals."""
        names = {leaf.name for leaf in self.leaves.values()}
        ordered = [v.name for v in self.body.inputs] + [n.output for n in self.body.nodes]
        return tuple(x for x in ordered if x in names)

    @property
    def weight(self) -> int:
        """Rough count of vector operations per point."""
        return sum(_cost(self.body, n) for n in self.nodes.values())

    def lanes(self, vector_bits: int, extra: Sequence[DType] = ()) -> int:
        """Elements per vector: as many of the widest format as one register holds."""
        types = [self.body.types[n].dtype for n, _ in self._places] + list(extra)
        return lanes_for(types, vector_bits)

    # ---- evaluation
    def evaluate(
        self, b: Builder, isa: str, lanes: int, read: Callable[[Leaf], Vec], given: Mapping[str, Vec]
    ) -> dict[str, Vec]:
        """All outputs at one point (``lanes`` consecutive elements of the innermost axis)."""
        memo: dict[tuple[str, Places], Vec] = {}

        def value(name: str, places: Places) -> Vec:
            key = (name, places)
            if key not in memo:
                memo[key] = keep(b, compute(name, places))
            return memo[key]

        def compute(name: str, places: Places) -> Vec:
            if name in given:
                return given[name]
            if (name, places) in self.leaves:
                return read(self.leaves[name, places])
            node = self.body.producers[name]
            if isinstance(node.op, ops.Constant):
                return const(_number(node.op.values[0]), node.type.dtype, lanes)
            args = [value(x, self._operand(node, i, places)) for i, x in enumerate(node.inputs)]
            return emit_pointwise(b, node.op, args, isa=isa, exact=self.exact)

        return {name: value(name, self.natural(name)) for name in self.outputs}


def _number(value: float | int | bool) -> float | int:
    return int(value) if isinstance(value, bool) else value


def _cost(body: Graph, node: Node) -> int:
    heavy = {"exp", "log", "erf", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "softplus", "mish", "sin", "cos"}
    if isinstance(node.op, ops.Requantize):
        return 8
    if isinstance(node.op, ops.Unary) and node.op.fn in heavy:
        return 16
    return 4 if isinstance(node.op, (ops.Quantize, ops.Elu)) else 1


def lanes_for(types: Sequence[DType], vector_bits: int) -> int:
    """Lanes that fit every format into one register; half floats are computed in f32."""
    widest = max((4 if t.is_float and t.bits <= F16.bits else width(t) for t in types), default=4)
    return max(1, vector_bits // (8 * widest))


def reader(
    b: Builder, pointers: Mapping[str, Pointer], offsets: Mapping[Leaf, Index], position: Index, lanes: int
) -> Callable[[Leaf], Vec]:
    """Loads leaves at ``offset + position`` of the innermost axis."""

    def read(leaf: Leaf) -> Vec:
        pointer, start = pointers[leaf.name], offsets[leaf]
        if leaf.inner == 0:
            return keep(b, b.load(pointer, start)).spread(lanes)
        if leaf.inner == 1:
            return b.load(pointer, start + position, lanes)
        steps = constants([leaf.inner * i for i in range(lanes)], S32)
        return b.gather(pointer, start + position * leaf.inner, steps)

    return read


def outer_offset(strides: Sequence[int], sizes: Sequence[int], row: Index) -> Index:
    """Offset of flattened index ``row`` over axes ``sizes``: sum of stride times the axis' index."""
    total: Index = 0
    below = prod(sizes)
    for axis, (stride, size) in enumerate(zip(strides, sizes, strict=True)):
        below //= size
        if stride == 0:
            continue
        at = row if below == 1 else divide(row, below)
        at = at if axis == 0 else modulo(at, size)
        total = total + at * stride
    return total


def divide(a: Index, n: int) -> Index:
    """a // n of a non-negative index."""
    if n == 1:
        return a
    return a // n if is_static(a) else tirx.truncdiv(a, n)


def modulo(a: Index, n: int) -> Index:
    """a % n of a non-negative index."""
    return a % n if is_static(a) else tirx.truncmod(a, n)


def literals(body: Graph, names: Sequence[str]) -> list[str]:
    """Those of the names that are literals: the kernels take them as packed constants."""
    return [x for x in names if x in body.producers]


def program_args(body: Graph, names: Sequence[str]) -> tuple[Arg, ...]:
    """The kernel arguments behind the names a program reads."""
    inputs = {v.name: i for i, v in enumerate(body.inputs)}
    packed = {x: i for i, x in enumerate(literals(body, names))}
    return tuple(Arg("input", inputs[x]) if x in inputs else Arg("packed", packed[x]) for x in names)
