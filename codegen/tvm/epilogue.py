"""The pointwise program behind a contraction, run on the accumulators while they are in registers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from bitwright.codegen.tvm.contract.epilogue import EpilogueParam, one_by_one
from bitwright.codegen.tvm.dyadic import Form, byte_words, emit_form, packed_bytes
from bitwright.codegen.tvm.pointwise import emit_pointwise, needs_exact, why_unsupported
from bitwright.codegen.tvm.pointwise_convert import Convert
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec, const
from bitwright.codegen.tvm.vecmath import keep
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import BF16, F32, S8, S32, U8, U32, TensorType

_SCALED = (ops.Quantize, ops.Dequantize, ops.Requantize)
_HEAVY = frozenset("exp log erf tanh sigmoid silu gelu gelu_tanh softplus mish pow sin cos tan".split())
_WEIGHT = {ops.Requantize: 8, ops.Quantize: 3}
_Load = Callable[[int, TensorType], Vec]
"""The values of an input (its position, its type) that belong to a vector of accumulators."""
_FORM_WEIGHT = {"shift": 2, "low": 4, "high": 8}


@dataclass(frozen=True)
class PointwiseEpilogue:
    """Evaluates the pointwise nodes of ``body`` behind ``root`` on each vector of accumulators and stores the result.

    ``operands`` are the positions of the body's inputs it reads, in the order of its parameters. ``forms``: the
    requantizations that need no 64-bit lanes, by their result.
    """

    body: Graph
    root: Node
    isa: str = "portable"
    forms: tuple[tuple[str, Form], ...] = ()

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The pointwise nodes in order."""
        return tuple(n for n in self.body.nodes if n is not self.root and not isinstance(n.op, ops.Constant))

    @cached_property
    def operands(self) -> tuple[int, ...]:
        position = {v.name: i for i, v in enumerate(self.body.inputs)}
        return tuple(dict.fromkeys(position[x] for n in self.nodes for x in n.inputs if x in position))

    @property
    def params(self) -> Sequence[EpilogueParam]:
        inputs = self.body.inputs
        reads = [EpilogueParam(f"e{i}", inputs[i].type.dtype, inputs[i].type.size) for i in self.operands]
        out = self.body.types[self.body.outputs[0]]
        return (*reads, EpilogueParam("out", out.dtype, out.size))

    @property
    def heavy(self) -> bool:
        forms = {name: _FORM_WEIGHT[form.kind] for name, form in self.forms}
        costs = [
            10 if getattr(n.op, "fn", "") in _HEAVY else forms.get(n.output, _WEIGHT.get(type(n.op), 1))
            for n in self.nodes
        ]
        return sum(costs) > 10

    def refusal(self) -> str:
        """Why this program cannot run as an epilogue, or the empty string."""
        shape = self.root.type.shape
        if len(self.body.outputs) != 1:
            return "more than one result"
        for n in self.nodes:
            if n.type.shape != shape:
                return f"{n.op.spelling} changes the shape"
            if why := why_unsupported(n.op, [self.body.types[x].dtype for x in n.inputs]):
                return why
            axis = getattr(n.op, "axis", None)
            grouped = isinstance(n.op, ops.Quantize | ops.Dequantize) and n.op.group > 0
            if isinstance(n.op, _SCALED) and (grouped or axis not in (None, len(shape) - 1, -1)):
                return f"{n.op.spelling} along axis {axis}"
        return ""

    def store(self, b: Builder, pointers: Mapping[str, Pointer], acc: Vec, row: Index, col: Index, valid: int) -> None:
        cols = int(self.root.type.shape[-1])
        result = self._value(b, acc, self._at(b, pointers, row, col, acc.lanes))
        b.store(pointers["out"], row * cols + col, result, valid)

    def store_row(
        self, b: Builder, pointers: Mapping[str, Pointer], accs: Sequence[Vec], row: Index, col: Index, valid: int
    ) -> None:
        """Bytes of two or four vectors are narrowed and stored together."""
        lanes, cols = accs[0].lanes, int(self.root.type.shape[-1])
        together = next((n for n in (4, 2) if self._packs and n <= len(accs) and n * lanes <= valid), 0)
        if not together:
            one_by_one(self, b, pointers, accs, row, col, valid)
            return
        parts = [
            self._value(b, a, self._at(b, pointers, row, col + j * lanes, lanes), wide=True)
            for j, a in enumerate(accs[:together])
        ]
        b.store(pointers["out"], row * cols + col, packed_bytes(b, parts))
        if rest := accs[together:]:
            self.store_row(b, pointers, rest, row, col + together * lanes, valid - together * lanes)

    @cached_property
    def _packs(self) -> bool:
        """Whether the result is a requantize to bytes whose clamp the narrowing instructions can do."""
        last = self.body.producers[self.body.outputs[0]]
        return self.isa == "avx512-vnni" and last.type.dtype == U8 and last.output in dict(self.forms)

    @cached_property
    def words(self) -> tuple[int, ...] | None:
        """Whether bytes of four outputs can be made for rows in lanes (:meth:`word`): the positions of the operands
        that have bytes of their own for every row and output; None if the result or an operand does not allow it."""
        full, inputs = self.root.type.static_shape, self.body.inputs
        if self.body.types[self.body.outputs[0]].dtype != U8:
            return None
        found = []
        for i in self.operands:
            t = inputs[i].type
            if math.prod(t.static_shape[:-1]) == 1 and t.static_shape[-1:] in ((), (1,), full[-1:]):
                continue
            if t.static_shape != full or t.dtype not in (U8, S8) or full[-1] % 4:
                return None
            found.append(i)
        return tuple(found)

    def word(
        self,
        b: Builder,
        pointers: Mapping[str, Pointer],
        accs: Sequence[Sequence[Vec]],
        col: Index,
        held: Mapping[int, Sequence[Vec]],
    ) -> list[Vec]:
        """The bytes of outputs ``col`` .. ``col + 4`` as words: ``accs[o][r]`` are sums of output ``col + o`` and of
        the rows of vector r, ``held[i][r]`` the words of operand i. Element r of the result: s32, a row to a lane."""
        lanes = accs[0][0].lanes

        def load(o: int, r: int) -> _Load:
            def read(i: int, t: TensorType) -> Vec:
                if i in held:
                    byte = (held[i][r] << (24 - 8 * o)).bits(U32 if t.dtype == U8 else S32) >> 24
                    return byte.cast(t.dtype)
                return b.load(pointers[f"e{i}"], col + o if t.size > 1 else 0).spread(lanes)

            return read

        made = [[self._value(b, a, load(o, r), self._packs) for r, a in enumerate(row)] for o, row in enumerate(accs)]
        return [byte_words(b, four, self._packs) for four in zip(*made, strict=True)]

    def _at(self, b: Builder, pointers: Mapping[str, Pointer], row: Index, col: Index, lanes: int) -> _Load:
        return lambda i, t: self._load(b, pointers[f"e{i}"], t, row, col, lanes)

    def _value(self, b: Builder, acc: Vec, load: _Load, wide: bool = False) -> Vec:
        """The result for one vector; ``wide``: as s32, before the last clamp."""
        sums = acc.cast(BF16) if self.root.type.dtype == BF16 else acc
        values: dict[str, Vec] = {self.root.output: keep(b, sums)}
        position = {v.name: i for i, v in enumerate(self.body.inputs)}
        exact, forms = needs_exact(self.body), dict(self.forms)
        for n in self.body.nodes:
            if n is self.root:
                continue
            if isinstance(n.op, ops.Constant):
                values[n.output] = const(n.op.values[0], n.type.dtype, acc.lanes)
                continue
            for x in n.inputs:
                if x not in values:
                    t = self.body.inputs[position[x]].type
                    values[x] = keep(b, load(position[x], t))
            args = [values[x] for x in n.inputs]
            if isinstance(n.op, ops.Requantize) and n.output in forms:
                result = emit_form(
                    b, n.op, args[0], args[1], args[2], forms[n.output], wide and n.output == self.body.outputs[0]
                )
            elif isinstance(n.op, ops.Quantize) and self._is_near(n):
                result = Convert(b, self.isa, exact).quantize_near(n.op, *args)
            else:
                result = emit_pointwise(b, n.op, args, isa=self.isa, exact=exact)
            values[n.output] = keep(b, result)
        return values[self.body.outputs[0]]

    def _is_near(self, n: Node) -> bool:
        """Whether a quantize reads a function that is approximated, so that its ties mean nothing."""
        if len(n.inputs) != 3 or self.isa == "portable":
            return False
        maker = self.body.producers.get(n.inputs[0])
        heavy = maker is not None and isinstance(maker.op, ops.Unary) and maker.op.fn in _HEAVY
        floats = all(self.body.types[x].dtype == F32 for x in n.inputs[:2])
        return heavy and floats and n.type.dtype.kind == "uint" and n.type.dtype.bits <= 8

    def _load(self, b: Builder, pointer: Pointer, t: TensorType, row: Index, col: Index, lanes: int) -> Vec:
        """The operand's values at (row, col .. col + lanes), broadcast as NumPy does."""
        shape, full = t.static_shape, self.root.type.static_shape
        if math.prod(shape) == 1:
            return b.load(pointer, 0).spread(lanes)
        cols = full[-1]
        wide = shape[-1] == cols
        lead = (1,) * (len(full) - len(shape)) + shape[:-1]
        offset = _offset(row, lead, full[:-1])
        if wide and (cols > 1 or shape == full):
            return b.load(pointer, offset * cols + col, lanes)
        return b.load(pointer, offset).spread(lanes)


def _offset(row: Index, lead: tuple[int, ...], full: tuple[int, ...]) -> Index:
    """The operand's row number for output row ``row``: axes of size 1 are broadcast."""
    if math.prod(lead) == 1:
        return 0
    if lead == full:
        return row
    total: Index = 0
    below, stride = math.prod(full), 1
    strides = []
    for d in reversed(lead):
        strides.append(stride)
        stride *= d
    for size, mine, step in zip(full, lead, reversed(strides), strict=True):
        below //= size
        if mine > 1:
            total = total + row // below % size * step
    return total
