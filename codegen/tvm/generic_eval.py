"""The pull evaluator behind the generic kernel: the value of any tensor of a body at an index.

A body's output element is asked for; pointwise nodes ask for their operands at the broadcast index, shape
operators at a computed index, reductions and contractions in a loop. Rules per operator live in
:data:`RULES`, filled by the ``generic_*`` modules. Values are remembered per loop scope, so that an operand
read twice at one index is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.pointwise import emit_pointwise
from bitwright.codegen.tvm.tir import Builder, Condition, Index, Pointer, Register, Vec, const, is_static, scalar
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import BF16, BOOL, F16, F32, F64, S32, S64, U16, U32, U64, DType

Idx = tuple[Index, ...]
Rule = Callable[["Evaluator", Node, int, Idx], Vec]
RULES: dict[type[ops.Op], Rule] = {}
"""``RULES[type(op)](evaluator, node, result number, index)``: the value of one element of a result."""

EXACT = (
    ops.Reshape, ops.Transpose, ops.Expand, ops.Concat, ops.Slice, ops.Tile, ops.Flip, ops.Pad, ops.Gather,
    ops.GatherElements, ops.GatherNd, ops.ScatterElements, ops.ScatterNd, ops.Constant,
)  # fmt: skip
"""Operators whose results are elements of their operands: nothing to round."""


@dataclass(eq=False)
class Evaluator:
    """Emits the computation of single elements into ``b``'s current block."""

    b: Builder
    body: Graph
    pointers: dict[str, Pointer]
    tables: list[Pointer] = field(default_factory=list)
    scratch: Pointer | None = None
    isa: str = "portable"
    exact: bool = False
    layers: list[dict[Any, Any]] = field(default_factory=lambda: [{}])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.body.types[name].static_shape

    def dtype(self, name: str) -> DType:
        return self.body.types[name].dtype

    def empty(self, name: str) -> bool:
        return 0 in self.shape(name)

    # ---- scopes
    @contextmanager
    def loop(self, end: Index, start: Index = 0, step: int = 1) -> Iterator[Index]:
        """A serial loop with its own memory of values; a single turn needs no loop."""
        if is_static(end) and is_static(start) and end - start == 1:
            yield start
            return
        with self.b.loop(end, start, step) as i, self.layer():
            yield self.b.index(i) if not is_static(start) or start or step != 1 else i

    @contextmanager
    def loops(self, extents: Sequence[int | tuple[Index, Index]]) -> Iterator[list[Index]]:
        """Nested loops, outermost first; an extent is a size or (start, end)."""
        with ExitStack() as stack:
            yield [
                stack.enter_context(self.loop(e[1], e[0]) if isinstance(e, tuple) else self.loop(e)) for e in extents
            ]

    @contextmanager
    def when(self, condition: Any) -> Iterator[None]:
        """Statements under a scalar condition or index comparison."""
        with self.b.when(condition), self.layer():
            yield

    @contextmanager
    def layer(self) -> Iterator[None]:
        self.layers.append({})
        yield
        self.layers.pop()

    def recall(self, key: Any) -> Any:
        """What an enclosing scope remembered under ``key``, or None."""
        return next((layer[key] for layer in reversed(self.layers) if key in layer), None)

    def remember(self, key: Any, value: Any) -> None:
        self.layers[-1][key] = value

    def fix(self, name: str, value: Vec) -> None:
        """Within this scope, ``name`` has this value at whatever index it is read."""
        self.remember((name, "any"), value)

    # ---- values
    def at(self, name: str, idx: Idx) -> Vec:
        """The element ``idx`` of the value ``name``, in its own number format (bf16 as f32)."""
        fixed = self.recall((name, "any"))
        if fixed is not None:
            return fixed  # type: ignore[no-any-return]
        key = (name, tuple(i if is_static(i) else ("e", id(i)) for i in idx))
        known = self.recall(key)
        if known is not None:
            return known[0]  # type: ignore[no-any-return]
        node = self.body.producers.get(name)
        if node is None or name in self.pointers:
            value = self.load(self.pointers[name], self.flat(name, idx), self.dtype(name))
        elif isinstance(node.op, ops.Constant):
            value = self._literal(node, idx)
        elif isinstance(node.op, ops.POINTWISE):
            value = self._pointwise(node, idx)
        else:
            value = RULES[type(node.op)](self, node, node.outputs.index(name), idx)
        exact = node is None or isinstance(node.op, EXACT)
        value = self.b.let(value) if exact else self.keep(value, self.dtype(name))
        self.remember(key, (value, idx))  # idx kept alive: its identity is the key
        return value

    def keep(self, value: Vec, dtype: DType) -> Vec:
        """The value rounded to ``dtype`` and evaluated once."""
        if dtype == BF16:
            return self.b.let(self._bf16(convert(value, F32)))
        return self.b.let(convert(value, dtype))

    def _bf16(self, value: Vec) -> Vec:
        """An f32 rounded to bf16, ties to even; NaN stays. In registers: TVM would rearrange the sums of bits."""
        bits = self.b.register(U32, 1, value.bits(U32))
        odd = self.b.register(U32, 1, (bits.get() >> 16) & 1)
        near = self.b.register(U32, 1, bits.get() + odd.get() + 0x7FFF)
        number = (bits.get() & 0x7FFFFFFF).le(0x7F800000)
        return (number.select(near.get(), bits.get()) & 0xFFFF0000).bits(F32)

    def number(self, name: str, idx: Idx) -> Vec:
        """The element in the format that arithmetic on it uses (f16 and bf16 as f32)."""
        return convert(self.at(name, idx), work(self.dtype(name)))

    def integer(self, name: str, idx: Idx, size: int) -> Index:
        """The element as an index into ``size`` elements: negative counts from the end, clamped to be inside."""
        v = self.at(name, idx)
        if v.dtype != U64:
            v = v.cast(S64)
            v = v.lt(0).select(v + size, v)
        return self.b.index(v.clip(0, max(size - 1, 0)).cast(S32).expr)

    def flat(self, name: str, idx: Idx) -> Index:
        """Row-major position of an element."""
        return flatten(idx, self.shape(name))

    def _pointwise(self, node: Node, idx: Idx) -> Vec:
        args = []
        for k, x in enumerate(node.inputs):
            args.append(self.at(x, operand_index(node.op, k, idx, self.shape(x), self.shape(node.inputs[0]))))
        return self.apply(node.op, *args)

    def apply(self, op: ops.Op, *args: Vec) -> Vec:
        """A pointwise operator on scalars."""
        if isinstance(op, ops.Cast) and BF16 in (op.dtype, args[0].dtype):
            return convert(args[0], op.dtype)
        return emit_pointwise(self.b, op, list(args), isa=self.isa, exact=self.exact)

    def load(self, pointer: Pointer, at: Index, dtype: DType) -> Vec:
        """An element of memory that holds ``dtype``, carried."""
        v = self.b.load(pointer, at)
        return (v.cast(U32) << 16).bits(F32) if dtype == BF16 else v

    def store(self, pointer: Pointer, at: Index, value: Vec, dtype: DType) -> None:
        """Store a value of ``dtype``, carried."""
        self.b.store(pointer, at, (value.bits(U32) >> 16).cast(U16) if dtype == BF16 else value)

    def _literal(self, node: Node, idx: Idx) -> Vec:
        kind = node.type.dtype
        values = [const(kind.numpy.type(v).item(), carried(kind)) for v in node.op.values]  # type: ignore[attr-defined]
        at, result = scalar(self.flat(node.output, idx)), values[0]
        for k, v in enumerate(values[1:], 1):
            result = at.eq(k).select(v, result)
        return result

    # ---- accumulation
    def register(self, dtype: DType, value: float) -> Register:
        return self.b.register(dtype, 1, const(value, dtype))

    def total(
        self, extents: Sequence[int | tuple[Index, Index]], acc: DType, term: Callable[[list[Index]], Vec]
    ) -> Vec:
        """The sum of ``term`` over nested loops, in ``acc``."""
        r = self.register(acc, 0)
        with self.loops(extents) as at:
            r.set(r.get() + convert(term(at), acc))
        return self.b.let(r.get())


def work(dtype: DType) -> DType:
    """The format that single operations run in: f32 for narrower floats."""
    if dtype.is_float:
        return F64 if dtype == F64 else F32
    return dtype


def sums(dtype: DType) -> DType:
    """The format that sums run in: f64 for f32 and f64, f32 for narrower floats, 64 bits for integers."""
    if dtype.is_float:
        return F64 if dtype.numpy.itemsize >= 4 else F32
    return U64 if dtype == U64 else S64


def carried(dtype: DType) -> DType:
    """The format that a value of ``dtype`` travels in: TVM cannot bind a bf16 variable, so those are f32."""
    return F32 if dtype == BF16 else dtype


def memory(dtype: DType) -> DType:
    """The format that buffers of ``dtype`` are declared with."""
    return U16 if dtype == BF16 else dtype


def convert(v: Vec, dtype: DType) -> Vec:
    """The value rounded to another format, carried; bool is "not zero"."""
    if dtype == BF16:
        return _round_bf16(v.cast(F32))
    if dtype == BOOL and v.dtype != BOOL:
        return v.ne(0).select(const(1, BOOL, v.lanes), const(0, BOOL, v.lanes))
    if F16 in (v.dtype, dtype) and v.dtype != dtype:
        return v.cast(F32).cast(dtype)
    return v.cast(dtype)


def _round_bf16(v: Vec) -> Vec:
    """An f32 rounded to the nearest bf16, ties to even; NaN stays NaN. ``v`` is repeated: let it be a variable."""
    bits = v.bits(U32)
    near = (bits + (((bits >> 16) & 1) + 0x7FFF)) & 0xFFFF0000
    return is_nan(v).select(v, near.bits(F32))


def take_max(v: Vec, best: Vec, sign: int = 1) -> Vec:
    """The larger (smaller for sign -1) of two numbers; a NaN wins, as in torch."""
    return better(v, best, sign).select(v, best)


def better(v: Vec, best: Vec, sign: int = 1) -> Condition:
    """v beats best strictly: larger (smaller), or the first NaN."""
    beats = v.gt(best) if sign > 0 else v.lt(best)
    if not v.dtype.is_float:
        return beats
    return either(beats, both(is_nan(v), negate(is_nan(best))))


def is_nan(v: Vec) -> Condition:
    """By the bits: TVM takes ``x == x`` for true."""
    bits, top, inf = (S32, 0x7FFFFFFF, 0x7F800000) if v.dtype != F64 else (S64, (1 << 63) - 1, 0x7FF << 52)
    return (v.bits(bits) & top).gt(inf)


def both(a: Condition, b: Condition) -> Condition:
    return Condition(tirx.And(a.expr, b.expr))


def either(a: Condition, b: Condition) -> Condition:
    return Condition(tirx.Or(a.expr, b.expr))


def negate(a: Condition) -> Condition:
    return Condition(tirx.Not(a.expr))


def conjunction(parts: Sequence[Any]) -> Any:
    """All of some index comparisons, each a Python bool or an expression."""
    if any(p is False for p in parts):
        return False
    rest = [p for p in parts if p is not True]
    result = rest[0] if rest else True
    for p in rest[1:]:
        result = tirx.And(result, p)
    return result


def lowest(dtype: DType, sign: int = 1) -> float:
    """The value that every other beats in a maximum (minimum for sign -1)."""
    if dtype.is_float:
        return -sign * float("inf")
    carrier = 8 * dtype.numpy.itemsize
    if dtype == BOOL or dtype.kind == "uint":
        return 0 if sign > 0 else (1 if dtype == BOOL else (1 << carrier) - 1)
    return -(1 << (carrier - 1)) if sign > 0 else (1 << (carrier - 1)) - 1


def div(i: Index, by: int) -> Index:
    """i // by for i >= 0."""
    return i // by if is_static(i) else i if by == 1 else tirx.truncdiv(i, by)


def mod(i: Index, by: int) -> Index:
    """i % by for i >= 0."""
    return i % by if is_static(i) else 0 if by == 1 else tirx.truncmod(i, by)


def clip(i: Index, lo: int, hi: int) -> Index:
    """The index moved into [lo, hi]."""
    return min(max(i, lo), hi) if is_static(i) else tirx.max(tirx.min(i, hi), lo)


def flatten(idx: Sequence[Index], shape: Sequence[int]) -> Index:
    """Row-major position of ``idx`` in ``shape``."""
    stride, base = 1, 0
    terms: list[Any] = []
    for i, n in zip(reversed(idx), reversed(shape), strict=True):
        if n != 1:
            if is_static(i):
                base += i * stride
            else:
                terms.append(i if stride == 1 else i * stride)
        stride *= n
    total: Index = base
    for t in reversed(terms):
        total = t if is_static(total) and total == 0 else total + t
    return total


def unflatten(at: Index, shape: Sequence[int]) -> Idx:
    """The index of row-major position ``at``; axes of size 1 cost nothing."""
    out: list[Index] = []
    real = [k for k, n in enumerate(shape) if n != 1]
    for k in reversed(range(len(shape))):
        if shape[k] == 1:
            out.append(0)
        elif k == real[0]:
            out.append(at)
        else:
            out.append(mod(at, shape[k]))
            at = div(at, shape[k])
    return tuple(reversed(out))


def broadcast(idx: Idx, shape: Sequence[int]) -> Idx:
    """The index into an operand of ``shape`` that is broadcast to a result read at ``idx``."""
    tail = idx[len(idx) - len(shape) :]
    return tuple(0 if n == 1 else i for i, n in zip(tail, shape, strict=True))


def operand_index(op: ops.Op, k: int, idx: Idx, shape: Sequence[int], first: Sequence[int]) -> Idx:
    """Where operand ``k`` (of ``shape``) of a pointwise operator is read for the result element ``idx``.

    Scales and zeros of the quantization operators lie along an axis of the first operand (of shape ``first``).
    """
    axis = getattr(op, "axis", None)
    if k == 0 or axis is None or not shape or not isinstance(op, (ops.Quantize, ops.Dequantize, ops.Requantize)):
        return broadcast(idx, shape)
    axis %= len(first)
    group = getattr(op, "group", 0)
    if group:
        grouped = tuple(div(i, group) if a == axis else i for a, i in enumerate(idx))
        return broadcast(grouped, shape)
    return (0 if shape[0] == 1 else idx[axis],)
