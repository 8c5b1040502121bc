"""The pull evaluator: the C expression of any element of a region's body.

A region's output element is asked for; pointwise nodes ask for their operands at the broadcast index, shape operators
at a computed one, reductions and contractions in a loop. Rules per operator lie in :data:`RULES`, filled by the modules
beside this one. Values are remembered per C scope.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.c.scalar import Scalar
from bitwright.codegen.c.text import Idx, Index, Writer, carried, flatten, literal, over
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import DType

Rule = Callable[["Evaluator", Node, int, Idx], str]
RULES: dict[type[ops.Op], Rule] = {}
"""``RULES[type(op)](evaluator, node, result number, index)``: the C expression of one element."""


@dataclass(frozen=True, slots=True)
class Table:
    """A constant in flash: its C name, its values as they lie there, and the C type of an element."""

    name: str
    values: NDArray[np.generic]
    ctype: str


@dataclass(eq=False)
class Evaluator:
    """Writes the computation of single elements of ``body`` with ``w``.

    ``pointers``: C pointers of the computed inputs; ``constants``: arrays of the others; ``table`` enters a constant
    into flash and gives its name; ``used`` collects libm functions.
    """

    w: Writer
    body: Graph
    pointers: Mapping[str, str]
    constants: Mapping[str, NDArray[np.generic]]
    table: Callable[[str, NDArray[np.generic]], Table]
    used: set[str] = field(default_factory=set)
    forms: list[str] = field(default_factory=list)
    """How contractions were stored, for the report."""

    def shape(self, name: str) -> tuple[int, ...]:
        return self.body.types[name].static_shape

    def dtype(self, name: str) -> DType:
        return self.body.types[name].dtype

    def ctype(self, name: str) -> str:
        return carried(self.dtype(name))

    def at(self, name: str, idx: Idx) -> str:
        """The element ``idx`` of the value ``name``, carried."""
        key = (name, idx)
        known = self.w.recall(key)
        if known is not None:
            return known
        node = self.body.producers.get(name)
        if node is None:
            text = self._read(name, idx)
        elif isinstance(node.op, ops.Constant):
            text = self._constant(name, np.array(node.op.values).reshape(self.shape(name)), idx)
        elif isinstance(node.op, ops.POINTWISE):
            args = [self.at(x, self.operand(node, k, idx)) for k, x in enumerate(node.inputs)]
            scalar = Scalar(lambda c, e: self.w.let(c, e), self.used)
            text = scalar.apply(node.op, args, [self.dtype(x) for x in node.inputs], node.type.dtype)
        elif type(node.op) in RULES:
            text = RULES[type(node.op)](self, node, node.outputs.index(name), idx)
        else:
            raise InvalidInput(f"the C back end has no rule for {node.op.spelling}")
        value = self.w.let(self.ctype(name), text)
        self.w.remember(key, value)
        return value

    def pointer(self, name: str, idx: Idx) -> str:
        """A C pointer to element ``idx`` of an input of the body, in its memory type."""
        at = flatten(idx, self.shape(name))
        return self.pointers[name] if at == 0 else f"{self.pointers[name]} + {at}"

    def _read(self, name: str, idx: Idx) -> str:
        if name in self.constants:
            return self._constant(name, self.constants[name], idx)
        return f"({self.ctype(name)}){self.pointers[name]}[{flatten(idx, self.shape(name))}]"

    def _constant(self, name: str, values: NDArray[np.generic], idx: Idx) -> str:
        """A literal where the index or the content says which; otherwise an entry of a table in flash."""
        kind = self.dtype(name)
        flat = np.ascontiguousarray(values).reshape(-1)
        if flat.size and (flat == flat[0]).all():
            return literal(flat[0], kind)
        at = flatten(idx, self.shape(name))
        if isinstance(at, int):
            return literal(flat[at], kind)
        entry = f"{self.table(name, flat).name}[{at}]"
        return f"({carried(kind)}){entry}"

    def operand(self, node: Node, k: int, idx: Idx) -> Idx:
        """Where operand ``k`` of a pointwise node is read for the result's element ``idx``."""
        shape = self.shape(node.inputs[k])
        axis = getattr(node.op, "axis", None)
        scaled = isinstance(node.op, (ops.Quantize, ops.Dequantize, ops.Requantize))
        if k == 0 or axis is None or not shape or not scaled:
            return broadcast(idx, shape)
        axis %= len(self.shape(node.inputs[0]))
        if group := getattr(node.op, "group", 0):
            return broadcast(tuple(over(i, group) if a == axis else i for a, i in enumerate(idx)), shape)
        return (0 if shape[0] == 1 else idx[axis],)


def broadcast(idx: Idx, shape: tuple[int, ...]) -> Idx:
    """The index into an operand of ``shape`` that is broadcast to a result read at ``idx``."""
    tail: tuple[Index, ...] = idx[len(idx) - len(shape) :]
    return tuple(0 if n == 1 else i for i, n in zip(tail, shape, strict=True))


def rule(*kinds: type[ops.Op]) -> Callable[[Rule], Rule]:
    """Enter a rule for operators."""

    def enter(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, fn))
        return fn

    return enter
