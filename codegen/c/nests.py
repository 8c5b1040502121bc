"""One region as one C function: loops over its outputs around the evaluation of an element."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.c import bitplanes, contract, interpolate, moves
from bitwright.codegen.c.rows import ROWS, group_size, prepare, row_axes
from bitwright.codegen.c.text import Index, Writer, flatten, memory_type, plus, table_type, times
from bitwright.codegen.c.values import RULES, Evaluator, Table
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node

RULE_MODULES = (contract, interpolate, moves)
"""Imported for the rules they enter."""
_MOVES = (
    ops.Reshape, ops.Transpose, ops.Expand, ops.Slice, ops.Flip, ops.Tile, ops.Concat, ops.Pad, ops.Gather,
)  # fmt: skip
_NUMPY = {
    "uint8_t": np.uint8, "int8_t": np.int8, "uint16_t": np.uint16, "int16_t": np.int16, "uint32_t": np.uint32,
    "int32_t": np.int32,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Function:
    """A C function: ``parameters`` and ``body`` without its name; ``tables`` are its constants in parameter order.

    ``inputs`` are the body's computed inputs in parameter order, then tables, then all outputs. ``libm``: functions it
    calls; ``forms``: how its weights are stored.
    """

    parameters: tuple[str, ...]
    body: tuple[str, ...]
    inputs: tuple[str, ...]
    tables: tuple[Table, ...]
    libm: frozenset[str]
    forms: tuple[str, ...]


def heavy(body: Graph) -> list[Node]:
    """Nodes that compute an element from many others."""
    cheap: tuple[type[ops.Op], ...] = (ops.Constant, *ops.POINTWISE, *_MOVES)
    return [n for n in body.nodes if not isinstance(n.op, cheap)]


def why_not(body: Graph) -> str:
    """Why a body cannot be one function; the empty string if it can. Unknown operators are found when it is written."""
    big = heavy(body)
    if len(big) > 1:
        return f"{len(big)} operators that sum"
    if big and isinstance(big[0].op, ROWS):
        shape = big[0].type.static_shape
        if any(body.types[o].static_shape != shape for o in body.outputs):
            return "a row operator whose rows are not the result's"
    return ""


def unsupported(body: Graph) -> list[str]:
    """Operators and formats of a body that the C back end lacks."""
    known: tuple[type[ops.Op], ...] = (ops.Constant, *ops.POINTWISE, *RULES)
    out = [n.op.spelling for n in body.nodes if not isinstance(n.op, known)]
    for t in body.types.values():
        try:
            memory_type(t.dtype)
        except InvalidInput as e:
            out.append(str(e))
    return list(dict.fromkeys(out))


def function(body: Graph, constants: Mapping[str, NDArray[np.generic]]) -> Function:
    """The C function of a body; raises :class:`InvalidInput` for what has no rule."""
    w = Writer()
    computed = [v for v in body.inputs if v.name not in constants]
    pointers = {v.name: f"x{i}" for i, v in enumerate(computed)}
    tables: dict[str, Table] = {}

    def table(key: str, values: NDArray[np.generic]) -> Table:
        if key not in tables:
            ctype = table_type(values)
            kept = values if values.dtype.kind == "f" else values.astype(_NUMPY.get(ctype, values.dtype))
            tables[key] = Table(f"c{len(tables)}", kept, ctype)
        return tables[key]

    e = Evaluator(w, body, pointers, constants, table)
    for shape in dict.fromkeys(body.types[o].static_shape for o in body.outputs):
        _nest(e, [(k, o) for k, o in enumerate(body.outputs) if body.types[o].static_shape == shape], shape)
    parameters = [f"const {memory_type(v.type.dtype)} *x{i}" for i, v in enumerate(computed)]
    parameters += [f"const {t.ctype} *{t.name}" for t in tables.values()]
    parameters += [f"{memory_type(body.types[o].dtype)} *y{k}" for k, o in enumerate(body.outputs)]
    return Function(
        tuple(parameters), tuple(w.lines), tuple(v.name for v in computed), tuple(tables.values()),
        frozenset(e.used), tuple(e.forms),
    )  # fmt: skip


def _row(e: Evaluator, shape: tuple[int, ...]) -> tuple[Node | None, tuple[int, ...]]:
    """The operator that computes something once a row of the result, and the axes along such a row."""
    for n in heavy(e.body):
        if n.type.static_shape != shape:
            continue
        if isinstance(n.op, ROWS):
            return n, row_axes(n)
        if bitplanes.signs(n, e.body, dict(e.constants)):
            return n, (bitplanes.row_axis(n),)
    return None, ()


def _nest(e: Evaluator, outputs: list[tuple[int, str]], shape: tuple[int, ...]) -> None:
    """Loops over ``shape``, the axes along a row innermost, and the stores."""
    row, inner = _row(e, shape)
    w = e.w
    with ExitStack() as stack:
        at: dict[int, Index] = {}
        for axis in (a for a in range(len(shape)) if a not in inner):
            at[axis] = stack.enter_context(w.loop(shape[axis]))
        group: Index = 0
        if inner and row is not None:
            if isinstance(row.op, ops.GroupNorm):
                group = stack.enter_context(w.loop(row.op.groups, "g"))
            start = tuple(at.get(a, 0) for a in range(len(shape)))
            if isinstance(row.op, ROWS):
                prepare(e, row, start, group)
            else:
                bitplanes.prepare(e, row, start)
        for axis in inner:
            if axis == 1 and row is not None and isinstance(row.op, ops.GroupNorm):
                at[1] = plus(times(group, group_size(row)), stack.enter_context(w.loop(group_size(row))))
            else:
                at[axis] = stack.enter_context(w.loop(shape[axis]))
        idx = tuple(at[a] for a in range(len(shape)))
        for k, name in outputs:
            value = e.at(name, idx)
            target = memory_type(e.dtype(name))
            w.put(f"y{k}[{flatten(idx, shape)}] = ({target}){value};")
