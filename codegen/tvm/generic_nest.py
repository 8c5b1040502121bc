"""Loop nests of the generic kernel: which loops run outside, what is computed once per row, scans and sorts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.generic_eval import (
    Evaluator,
    Idx,
    better,
    both,
    broadcast,
    convert,
    either,
    flatten,
    is_nan,
    memory,
    negate,
    sums,
    take_max,
    unflatten,
    work,
)
from bitwright.codegen.tvm.generic_rows import ROWS, Row
from bitwright.codegen.tvm.tir import Condition, Index, Pointer, Vec, const, is_static, scalar
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import BOOL, S32, S64

MIN_TASKS = 16
"""Outer loops become tasks until there are so many."""
SELECT_UP_TO = 16
"""TopK with this many results scans once per result; above, it sorts."""


@dataclass(frozen=True)
class Nest:
    """Loops over one shape: the first ``flat`` of ``outer`` are the tasks; ``inner`` run after the preparation."""

    shape: tuple[int, ...]
    outer: tuple[tuple[int, int, int], ...]
    """(axis, extent, factor): the axis index grows by ``factor`` per turn."""
    inner: tuple[tuple[int, int], ...]
    flat: int

    @property
    def tasks(self) -> int:
        return math.prod(e for _, e, _ in self.outer[: self.flat])


def nest_of(
    shape: Sequence[int], inner: Sequence[int], split: dict[int, int] | None = None, spread: int = MIN_TASKS
) -> Nest:
    """Loops over ``shape`` with the axes ``inner`` inside; a split axis has its last positions inside.

    ``spread``: outer loops are tasks until there are so many (more than :data:`MIN_TASKS`: all that it takes).
    """
    outer, inside = [], []
    for axis, n in enumerate(shape):
        if split and axis in split and n:
            outer.append((axis, n // split[axis], split[axis]))
            inside.append((axis, split[axis]))
        elif axis in inner:
            inside.append((axis, n))
        else:
            outer.append((axis, n, 1))
    flat, tasks = 0, 1
    for k, (_, n, _) in enumerate(outer):
        innermost = k == len(outer) - 1 and not inside and spread == MIN_TASKS
        if tasks >= (2 if innermost else spread):
            break
        flat, tasks = k + 1, tasks * n
    return Nest(tuple(shape), tuple(outer), tuple(inside), flat)


def plan(body: Graph, root: Node | None, shape: tuple[int, ...], spread: int = MIN_TASKS) -> Nest:
    """The nest for the outputs of ``shape`` when ``root`` is the body's one costly operator."""
    if root is None or not after_is_pointwise(body, root):
        return nest_of(shape, (), None, spread)
    mine = body.types[root.output].static_shape
    row = ROWS[type(root.op)][0](root.op, _row_shape(body, root)) if type(root.op) in ROWS else Row(())
    if isinstance(root.op, (ops.CumSum, ops.TopK)):
        row = Row((root.op.axis % len(mine),) if mine else ())
    shift = len(shape) - len(mine)
    if shift < 0:
        return nest_of(shape, (), None, spread)
    fixed = {a + shift for a, n in enumerate(mine) if n == shape[a + shift] and n != 1 and a not in row.inner}
    inner = [a for a in range(len(shape)) if a not in fixed and shape[a] != 1]
    return nest_of(shape, inner, {a + shift: n for a, n in row.split.items() if a + shift in fixed}, spread)


def _row_shape(body: Graph, root: Node) -> tuple[int, ...]:
    name = root.output if isinstance(root.op, ops.Attention) else root.inputs[0]
    return body.types[name].static_shape


def after_is_pointwise(body: Graph, root: Node) -> bool:
    """Everything computed from the root is pointwise."""
    reached = set(root.outputs)
    for n in body.nodes:
        if reached.intersection(n.inputs):
            if not isinstance(n.op, ops.POINTWISE):
                return False
            reached.update(n.outputs)
    return True


@contextmanager
def outer_loops(ev: Evaluator, nest: Nest, first_task: int | None = None) -> Iterator[list[Index]]:
    """The task loop and the remaining outer loops; yields the index with 0 on the inner axes.

    ``first_task``: the number of the nest's first task where the kernel has several nests.
    """
    idx: list[Index] = [0] * len(nest.shape)
    begin, end = ev.b.begin, ev.b.end
    if first_task is not None:
        begin = ev.b.index(tirx.max(begin - first_task, 0))
        end = ev.b.index(tirx.max(tirx.min(end - first_task, nest.tasks), begin))
    with ev.loop(end, begin) as task:
        flat = unflatten(task, [e for _, e, _ in nest.outer[: nest.flat]])
        with ev.loops([e for _, e, _ in nest.outer[nest.flat :]]) as rest:
            for (axis, _, factor), i in zip(nest.outer, (*flat, *rest), strict=True):
                idx[axis] = ev.b.index(i * factor) if factor != 1 else i
            yield idx


def run_nest(ev: Evaluator, nest: Nest, root: Node | None, outputs: dict[str, Pointer], first_task: int | None) -> None:
    """Compute ``outputs`` (all of the nest's shape) element by element."""
    if 0 in nest.shape:
        return
    with outer_loops(ev, nest, first_task) as idx:
        if root is not None and nest.inner and after_is_pointwise(ev.body, root):
            _prepare(ev, root, tuple(idx))
        with ev.loops([e for _, e in nest.inner]) as inside:
            for (axis, _), i in zip(nest.inner, inside, strict=True):
                idx[axis] = ev.b.index(idx[axis] + i) if not is_static(idx[axis]) else i
            store(ev, outputs, tuple(idx))


def _prepare(ev: Evaluator, root: Node, idx: Idx) -> None:
    at = broadcast(idx, ev.shape(root.output))
    if type(root.op) in ROWS:
        ev.remember(("row", root.output), ROWS[type(root.op)][1](ev, root, at))
    else:
        ev.fix(root.output, ev.at(root.output, at))


def store(ev: Evaluator, outputs: dict[str, Pointer], idx: Idx) -> None:
    """Evaluate and store every output at ``idx``."""
    values = [(name, ev.at(name, idx)) for name in outputs]
    for name, v in values:
        ev.store(outputs[name], ev.flat(name, idx), v, ev.dtype(name))


# --- running sums -------------------------------------------------------------------------------------------


def run_scan(ev: Evaluator, nest: Nest, root: Node, outputs: dict[str, Pointer]) -> None:
    """CumSum: the axis is the innermost loop and the sum a register."""
    op, x = root.op, root.inputs[0]
    assert isinstance(op, ops.CumSum)
    dtype = ev.dtype(x)
    axis, acc = op.axis % max(len(nest.shape), 1), sums(ev.dtype(x))
    with outer_loops(ev, nest) as idx:
        total = ev.register(acc, 0)
        with ev.loop(nest.shape[axis] if nest.shape else 1) as i:
            if nest.shape:
                idx[axis] = ev.b.index(nest.shape[axis] - 1 - i) if op.reverse else i
            v = convert(ev.at(x, tuple(idx)), acc)
            total.set(total.get() + v)
            now = ev.b.let(total.get())
            ev.fix(root.output, ev.keep(now - v if op.exclusive else now, dtype))
            store(ev, outputs, tuple(idx))


# --- top k --------------------------------------------------------------------------------------------------


def beats(v: Vec, old: Vec, largest: bool) -> Condition:
    """v comes before old in the sorted order, ties aside: NaN counts as the largest value."""
    if largest or not v.dtype.is_float:
        return better(v, old, 1 if largest else -1)
    return either(v.lt(old), both(is_nan(old), negate(is_nan(v))))


def sort_bytes(op: ops.TopK, size: int) -> int:
    """Scratch of a TopK over ``size`` elements."""
    return 8 * size if op.k > SELECT_UP_TO else 0


def run_topk(ev: Evaluator, nest: Nest, root: Node, outputs: dict[str, Pointer]) -> None:
    """TopK: a selection scan per result for few results, a stable merge sort for many."""
    op, x = root.op, root.inputs[0]
    assert isinstance(op, ops.TopK)
    axis = op.axis % len(nest.shape)
    size = ev.shape(x)[axis]
    if 0 in nest.shape:
        return
    with outer_loops(ev, nest) as idx:

        def key(i: Index) -> Vec:
            return ev.number(x, (*idx[:axis], i, *idx[axis + 1 :]))

        def emit(p: Index, found: Index) -> None:
            ev.fix(root.outputs[0], ev.at(x, (*idx[:axis], found, *idx[axis + 1 :])))
            ev.fix(root.outputs[1], ev.b.let(scalar(found).cast(S64)))
            store(ev, outputs, (*idx[:axis], p, *idx[axis + 1 :]))

        if not sort_bytes(op, size):
            _selection(ev, op, size, key, emit)
        else:
            order = _merge_sort(ev, op, size, key)
            with ev.loop(op.k) as p:
                emit(p, ev.b.index(ev.b.load(order, p).expr))


def _selection(ev: Evaluator, op: ops.TopK, size: int, key: object, emit: object) -> None:
    kind = key(0).dtype  # type: ignore[operator]
    last, last_at = ev.register(kind, 0), ev.register(S32, -1)
    with ev.loop(op.k) as p:
        best, best_at = ev.register(kind, 0), ev.register(S32, -1)
        previous, previous_at = ev.b.let(last.get()), ev.b.let(last_at.get())
        with ev.loop(size) as i:
            v, old, old_at = key(i), ev.b.let(best.get()), ev.b.let(best_at.get())  # type: ignore[operator]
            i_later = scalar(i).gt(previous_at)
            later = either(beats(previous, v, op.largest), both(i_later, negate(beats(v, previous, op.largest))))
            left = either(previous_at.lt(0), later)
            with ev.when(both(left, either(old_at.lt(0), beats(v, old, op.largest)))):
                best.set(v)
                best_at.set(scalar(i))
        last.set(best.get())
        last_at.set(best_at.get())
        emit(p, ev.b.index(best_at.get().expr))  # type: ignore[operator]


def _merge_sort(ev: Evaluator, op: ops.TopK, size: int, key: object) -> Pointer:
    """Stable bottom-up merge sort of the positions 0..size-1 in the scratch; returns where they ended up."""
    assert ev.scratch is not None
    a = ev.b.view(ev.scratch, S32)
    b = ev.b.at(a, size)
    with ev.loop(size) as i:
        ev.b.store(a, i, scalar(i))
    run = 1
    while run < size:
        with ev.loop(-(-size // (2 * run))) as block:
            start = ev.b.index(block * (2 * run))
            middle, stop = (ev.b.index(tirx.min(start + n * run, size)) for n in (1, 2))
            left, right = ev.b.register(S32, 1, scalar(start)), ev.b.register(S32, 1, scalar(middle))
            with ev.loop(stop, start) as t:
                at_l, at_r = ev.b.let(left.get()), ev.b.let(right.get())
                from_l = ev.b.load(a, tirx.min(at_l.expr, size - 1))
                from_r = ev.b.load(a, tirx.min(at_r.expr, size - 1))
                from_l, from_r = ev.b.let(from_l), ev.b.let(from_r)
                ahead = beats(key(from_r.expr), key(from_l.expr), op.largest)  # type: ignore[operator]
                turn = ev.register(S32, 0)
                with ev.when(both(at_r.lt(Vec(stop, S32)), either(ahead, at_l.ge(Vec(middle, S32))))):
                    turn.set(const(1, S32))
                go_r = ev.b.let(turn.get())
                ev.b.store(b, t, go_r.ne(0).select(from_r, from_l))
                right.set(at_r + go_r)
                left.set(at_l + (const(1, S32) - go_r))
        a, b = b, a
        run *= 2
    return a


# --- scatter ------------------------------------------------------------------------------------------------


def run_scatter(ev: Evaluator, root: Node, outputs: dict[str, Pointer]) -> None:
    """ScatterElements and ScatterNd: copy, update in index order, then the pointwise rest. One task."""
    x, index, updates = root.inputs
    shape, dtype = ev.shape(x), ev.dtype(x)
    direct = list(outputs) == [root.output]
    target = outputs[root.output] if direct else ev.b.view(ev.scratch, memory(dtype))  # type: ignore[arg-type]
    with ev.loop(ev.b.end, ev.b.begin):
        with ev.loops(shape) as at:
            ev.store(target, flatten(at, shape), ev.at(x, tuple(at)), dtype)
        if not ev.empty(x):
            _scatter(ev, root, target, index, updates)
        if direct:
            return
        with ev.layer():
            ev.pointers[root.output] = target
            with ev.loops(shape) as at:
                store(ev, outputs, tuple(at))


def _scatter(ev: Evaluator, root: Node, target: Pointer, index: str, updates: str) -> None:
    shape, many = ev.shape(root.inputs[0]), ev.shape(index)
    if isinstance(root.op, ops.ScatterNd):
        with ev.loops(many[:-1]) as at:
            lead = [ev.integer(index, (*at, k), shape[k]) for k in range(many[-1])]
            with ev.loops(shape[many[-1] :]) as tail:
                update(ev, root, target, flatten((*lead, *tail), shape), ev.at(updates, (*at, *tail)))
        return
    axis = root.op.axis % len(shape)  # type: ignore[attr-defined]
    with ev.loops(many) as at:
        place = list(at)
        place[axis] = ev.integer(index, tuple(at), shape[axis])
        update(ev, root, target, flatten(place, shape), ev.at(updates, tuple(at)))


def update(ev: Evaluator, root: Node, target: Pointer, at: Index, new: Vec) -> None:
    """One update of a scatter at a position of the target."""
    how, dtype = root.op.reduction, ev.dtype(root.output)  # type: ignore[attr-defined]
    if how != "none":
        kind = S32 if dtype == BOOL else work(dtype)
        old, new = ev.b.let(convert(ev.load(target, at, dtype), kind)), ev.b.let(convert(new, kind))
        if how in ("min", "max"):
            new = take_max(new, old, 1 if how == "max" else -1)
        else:
            new = old + new if how == "add" else old * new
    ev.store(target, at, new if how == "none" else ev.keep(new, dtype), dtype)
