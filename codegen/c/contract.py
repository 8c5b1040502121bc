"""Contractions: sums of products in loops, weights read from flash as they are packed there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from bitwright.codegen.c import bitplanes
from bitwright.codegen.c.packing import Form, form_of, pack
from bitwright.codegen.c.text import Idx, Index, carried, literal, over, plus, rest, times
from bitwright.codegen.c.values import Evaluator, rule
from bitwright.codegen.c.window import taps_of
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Node
from bitwright.ir.types import DType

Element = Callable[[Index], str]
"""An activation of a run, by its place in it (minus its zero point)."""


def _sum_type(node: Node) -> DType:
    return node.type.dtype


@rule(ops.IntLinear, ops.Linear)
def _linear(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    x, w = node.inputs[:2]
    if bitplanes.signs(node, e.body, dict(e.constants)):
        return bitplanes.value(e, node, idx)
    acc = _start(e, node, idx[-1])
    zero = getattr(node.op, "x_zero", 0)
    _run(e, node, w, acc, idx[-1], 0, lambda k: _shifted(e.at(x, (*idx[:-1], k)), zero))
    return acc


@rule(ops.IntConv, ops.Conv)
def _conv(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    op, (x, w) = node.op, node.inputs[:2]
    assert isinstance(op, ops.IntConv | ops.Conv)
    if bitplanes.signs(node, e.body, dict(e.constants)):
        return bitplanes.value(e, node, idx)
    last = op.channels_last
    out = idx[-1] if last else idx[1]
    channels = e.shape(w)[1]
    first = times(over(out, e.shape(w)[0] // op.groups), channels) if op.groups > 1 else 0
    zero = getattr(op, "x_zero", 0)
    acc = _start(e, node, out)
    with ExitStack() as stack:
        here, inside, tap = taps_of(e, node, idx, stack)
        if inside:
            stack.enter_context(e.w.block(f"if ({inside})"))

        def element(c: Index) -> str:
            channel = plus(first, c)
            where = (idx[0], *here, channel) if last else (idx[0], channel, *here)
            return _shifted(e.at(x, where), zero)

        if channels == 1:  # the run is the taps: one product here
            _single(e, node, w, acc, out, tap, element(0))
        else:
            _run(e, node, w, acc, out, tap, element)
    return acc


@rule(ops.IntMatMul, ops.MatMul)
def _matmul(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    op, (a, b) = node.op, node.inputs
    assert isinstance(op, ops.IntMatMul | ops.MatMul)
    if min(len(e.shape(a)), len(e.shape(b))) < 2:
        raise InvalidInput("the C back end multiplies matrices, not vectors")
    acc = _start(e, node, 0)
    lead = [_lead(idx[:-2], e.shape(v)[:-2]) for v in (a, b)]
    with e.w.loop(e.shape(a)[-1], "k") as k:
        left = _shifted(e.at(a, (*lead[0], idx[-2], k)), getattr(op, "a_zero", 0))
        where = (idx[-1], k) if op.transpose_b else (k, idx[-1])
        right = _shifted(e.at(b, (*lead[1], *where)), getattr(op, "b_zero", 0))
        e.w.put(f"{acc} += {left} * {right};")
    return acc


def _lead(idx: Idx, shape: tuple[int, ...]) -> Idx:
    return tuple(0 if n == 1 else i for i, n in zip(idx[len(idx) - len(shape) :], shape, strict=True))


def _start(e: Evaluator, node: Node, out: Index) -> str:
    """The accumulator: zero, or the bias."""
    kind = _sum_type(node)
    start = e.at(node.inputs[2], (out,)) if len(node.inputs) > 2 else literal(0, kind)
    return e.w.variable(carried(kind), start, "acc")


def _shifted(x: str, zero: int) -> str:
    return f"({x} - {zero})" if zero > 0 else f"({x} + {-zero})" if zero else x


def _form(e: Evaluator, name: str) -> tuple[Form, str, str]:
    """(layout, table of values, table of indices); run-time weights have none."""
    if name not in e.constants:
        raise InvalidInput("the C back end needs the weights of linear layers and convolutions to be constant")
    weight = np.asarray(e.constants[name])
    form = form_of(e.body.types[name], weight)
    values, indices = pack(weight, form)
    if str(form) not in e.forms:
        e.forms.append(str(form))
    return (
        form,
        e.table(f"{name}.weights", values).name,
        e.table(f"{name}.indices", indices).name if indices is not None else "",
    )


def table_of(e: Evaluator, name: str) -> str:
    """The table of a constant weight as it is."""
    if name not in e.constants:
        raise InvalidInput("the C back end needs the weights of linear layers and convolutions to be constant")
    return e.table(f"{name}.weights", np.ascontiguousarray(e.constants[name]).reshape(-1)).name


def _field(table: str, row: Index, number: Index, bits: int) -> str:
    """Field ``number`` of a row that starts at byte ``row``, as unsigned."""
    if bits == 8:
        return f"{table}[{plus(row, number)}]"
    per = 8 // bits
    byte, place = plus(row, over(number, per)), times(rest(number, per), bits)
    shifted = f"{table}[{byte}]" if place == 0 else f"({table}[{byte}] >> ({place}))"
    return f"({shifted} & {(1 << bits) - 1})"


def _value(form: Form, table: str, row: Index, number: Index) -> str:
    """Stored weight ``number`` of a row, as a signed number."""
    if form.bits >= 8:
        return f"{table}[{plus(row, number)}]"
    code = f"(int32_t){_field(table, row, number, form.bits)}"
    return f"({code} * 2 - 1)" if form.bits == 1 else f"({code} - {form.offset})"


def _single(e: Evaluator, node: Node, w: str, acc: str, out: Index, tap: Index, x: str) -> None:
    """One product with element ``tap`` of the only run of a row."""
    form, values, _ = _form(e, w)
    row = times(out, form.row_bytes if form.bits < 8 else form.per_run)
    real = carried(_sum_type(node))
    e.w.put(f"{acc} += {x} * ({real}){_value(form, values, row, tap)};")


def _run(e: Evaluator, node: Node, w: str, acc: str, out: Index, run: Index, element: Element) -> None:
    """Add the products of one run."""
    form, values, indices = _form(e, w)
    real = carried(_sum_type(node))
    start = times(out, form.row_bytes if form.bits < 8 else form.runs * form.per_run)
    if form.sparse:
        _sparse(e, form, values, indices, acc, real, (out, start, run), element)
        return
    base = plus(start, times(run if isinstance(run, int) else f"({run})", form.per_run * form.bits // 8 or 1))
    if form.bits >= 8:
        base = plus(start, times(run if isinstance(run, int) else f"({run})", form.per_run))
    base = base if isinstance(base, int) else e.w.let("int32_t", base, "row")
    per = 8 // form.bits if form.bits < 8 else 1
    full = form.length // per
    if full:
        with e.w.loop(full, "k") as k:
            _products(e, form, values, acc, real, plus(base, k), times(k, per), per, element)
    if tail := form.length - full * per:
        _products(e, form, values, acc, real, plus(base, full), full * per, tail, element)


def _products(
    e: Evaluator, form: Form, table: str, acc: str, real: str, at: Index, first: Index, count: int, element: Element
) -> None:
    """Products with the ``count`` weights that byte (or element) ``at`` of the table holds."""
    if form.bits >= 8:
        e.w.put(f"{acc} += {element(first)} * ({real}){table}[{at}];")
        return
    byte = e.w.let("int32_t", f"{table}[{at}]", "b")
    for n in range(count):
        code = f"({byte} >> {n * form.bits})" if n else byte
        code = f"({code} & {(1 << form.bits) - 1})"
        value = f"({code} * 2 - 1)" if form.bits == 1 else f"({code} - {form.offset})"
        e.w.put(f"{acc} += {element(plus(first, n))} * {value};")


def _sparse(
    e: Evaluator, form: Form, values: str, indices: str, acc: str, real: str, place: tuple[Index, Index, Index],
    element: Element,
) -> None:  # fmt: skip
    """Products with the kept weights of a run: one load of an activation, of an index and of a weight for each."""
    out, row, run = place
    index_row = times(out, form.index_row_bytes)
    before = times(run if isinstance(run, int) else f"({run})", form.per_run)
    rows = [r if isinstance(r, int) else e.w.let("int32_t", r, "row") for r in (row, index_row, before)]
    with e.w.loop(form.per_run // form.keep, "g") as g:
        for j in range(form.keep):
            number = plus(rows[2], plus(times(g, form.keep), j))
            number = number if isinstance(number, int) else e.w.let("int32_t", number, "n")
            at = e.w.let("int32_t", f"(int32_t){_field(indices, rows[1], number, form.index_bits)}", "c")
            x = element(plus(times(g, form.group), at))
            e.w.put(f"{acc} += {x} * ({real}){_value(form, values, rows[0], number)};")
