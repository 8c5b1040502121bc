"""Operators with figures of a whole row: norms, softmax, attention. The figures are computed once a row, by
:func:`prepare`, where the loops of the region allow it (``nests``)."""

from __future__ import annotations

import math
from contextlib import ExitStack

from bitwright.codegen.c.reduce import loops
from bitwright.codegen.c.text import Idx, Index, carried, literal, over, plus, times
from bitwright.codegen.c.values import Evaluator, broadcast, rule
from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.types import BOOL, F64

ROWS = (ops.LayerNorm, ops.RmsNorm, ops.GroupNorm, ops.Softmax, ops.Attention)


def row_axes(node: Node) -> tuple[int, ...]:
    """The axes of the result along which the figures of a row stay the same."""
    rank, op = node.type.rank, node.op
    if isinstance(op, ops.Softmax):
        return (op.axis % rank,)
    if isinstance(op, ops.Attention):
        return (rank - 1,)
    if isinstance(op, ops.GroupNorm):
        return tuple(range(1, rank))
    assert isinstance(op, ops.LayerNorm | ops.RmsNorm)
    return tuple(range(rank - op.axes, rank))


def _key(node: Node, idx: Idx) -> tuple[object, ...]:
    axes = row_axes(node)
    return ("row", node.output, *(i for a, i in enumerate(idx) if a not in axes))


def prepare(e: Evaluator, node: Node, idx: Idx, group: Index = 0) -> None:
    """Compute the figures of the row that ``idx`` lies in (its entries along the row do not matter); ``group``: that of
    a group norm."""
    key = _key(node, idx)
    if e.w.recall(key) is not None:
        return
    if isinstance(node.op, ops.Attention):
        _scores(e, node, idx, key)
        return
    if isinstance(node.op, ops.Softmax):
        first = _sum(e, node, idx, "max")
        e.w.remember(key, first)
        e.w.remember((*key, "sum"), _sum(e, node, idx, "exp", first))
        return
    size = math.prod(e.shape(node.inputs[0])[a] for a in row_axes(node))
    count = literal(size // getattr(node.op, "groups", 1), F64)
    mean = "0.0"
    if not isinstance(node.op, ops.RmsNorm):
        mean = e.w.let("double", f"{_sum(e, node, idx, 'sum', group=group)} / {count}", "mean")
    square = _sum(e, node, idx, "square", mean, group)
    e.used.add("sqrt")
    eps = literal(node.op.eps, F64)  # type: ignore[attr-defined]
    e.w.remember(key, mean)
    e.w.remember((*key, "sum"), e.w.let("double", f"1.0 / sqrt({square} / {count} + {eps})", "scale"))


def group_size(node: Node) -> int:
    """Channels of one group of a group norm."""
    assert isinstance(node.op, ops.GroupNorm)
    return int(node.type.static_shape[1]) // node.op.groups


def _sum(e: Evaluator, node: Node, idx: Idx, what: str, base: str = "", group: Index = 0) -> str:
    """One figure of a row, in double (a maximum in the operand's format)."""
    kind, axes, shape = e.dtype(node.inputs[0]), row_axes(node), e.shape(node.inputs[0])
    real = carried(kind)
    acc = e.w.variable(real if what == "max" else "double", literal(float("-inf"), kind) if what == "max" else "0.0")
    grouped = isinstance(node.op, ops.GroupNorm)
    sizes = [group_size(node) if grouped and a == 1 else shape[a] for a in axes]
    with ExitStack() as stack:
        inner = dict(zip(axes, loops(e, stack, sizes), strict=True))
        if grouped:
            inner[1] = plus(times(group, group_size(node)), inner[1])
        x = e.at(node.inputs[0], tuple(inner.get(a, i) for a, i in enumerate(idx)))
        if what == "max":
            e.w.put(f"if ({acc} < {x}) {{ {acc} = {x}; }}")
        elif what == "exp":
            e.used.add("exp")
            e.w.put(f"{acc} += exp((double)({x} - {base}));")
        elif what == "sum":
            e.w.put(f"{acc} += (double){x};")
        else:
            d = e.w.let("double", f"(double){x} - {base}")
            e.w.put(f"{acc} += {d} * {d};")
    return acc


@rule(ops.LayerNorm, ops.RmsNorm, ops.GroupNorm)
def _norm(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    group = over(idx[1], group_size(node)) if isinstance(node.op, ops.GroupNorm) else 0
    prepare(e, node, idx, group)
    mean, scale = e.w.recall(_key(node, idx)), e.w.recall((*_key(node, idx), "sum"))
    x, real = e.at(node.inputs[0], idx), carried(node.type.dtype)
    y = e.w.let(real, f"({real})(((double){x} - {mean}) * {scale})")
    for k, sign in ((1, "*"), (2, "+")):
        if len(node.inputs) > k:
            at = (idx[1],) if isinstance(node.op, ops.GroupNorm) else idx[len(idx) - len(e.shape(node.inputs[k])) :]
            y = e.w.let(real, f"{y} {sign} {e.at(node.inputs[k], at)}")
    return y


@rule(ops.Softmax)
def _softmax(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    assert isinstance(node.op, ops.Softmax)
    prepare(e, node, idx)
    first, total = e.w.recall(_key(node, idx)), e.w.recall((*_key(node, idx), "sum"))
    x, real = e.at(node.inputs[0], idx), carried(node.type.dtype)
    e.used.add("log" if node.op.log else "exp")
    if node.op.log:
        return f"({real})((double)({x} - {first}) - log({total}))"
    return f"({real})(exp((double)({x} - {first})) / {total})"


# --- attention -----------------------------------------------------------------------------------------------


def _batch(e: Evaluator, name: str, lead: Idx, groups: int) -> Idx:
    """The batch index of a key or value: heads are shared by ``groups`` query heads."""
    shape = e.shape(name)[:-2]
    at = list(lead[len(lead) - len(shape) :])
    if groups > 1:
        at[-1] = over(at[-1], groups)
    return tuple(0 if n == 1 else i for i, n in zip(at, shape, strict=True))


def _scores(e: Evaluator, node: Node, idx: Idx, key: tuple[object, ...]) -> None:
    """The exponentials of one query's scores in an array on the stack, and their sum."""
    op, w = node.op, e.w
    assert isinstance(op, ops.Attention)
    q, k = node.inputs[:2]
    lead, row = idx[:-2], idx[-2]
    length, depth, kind = e.shape(k)[-2], e.shape(k)[-1], e.dtype(q)
    real, scores, most = carried(kind), w.name("scores"), w.variable(carried(kind), literal(float("-inf"), kind))
    w.put(f"{real} {scores}[{length}];")
    with w.loop(length, "s") as s:
        acc = w.variable(real, literal(0, kind), "acc")
        with w.loop(depth, "d") as d:
            left = e.at(q, (*_batch(e, q, lead, 1), row, d))
            w.put(f"{acc} += {left} * {e.at(k, (*_batch(e, k, lead, op.kv_groups), s, d))};")
        w.put(f"{acc} *= {literal(op.scale, kind)};")
        _mask(e, node, acc, (*lead, row, s))
        w.put(f"{scores}[{s}] = {acc};")
        w.put(f"if ({most} < {acc}) {{ {most} = {acc}; }}")
    total = w.variable(real, literal(0, kind), "sum")
    exp = "exp" if kind == F64 else "expf"
    e.used.add(exp)
    with w.loop(length, "s") as s:
        w.put(f"{scores}[{s}] = {exp}({scores}[{s}] - {most});")
        w.put(f"{total} += {scores}[{s}];")
    w.remember(key, scores)
    w.remember((*key, "sum"), total)


def _mask(e: Evaluator, node: Node, acc: str, at: Idx) -> None:
    assert isinstance(node.op, ops.Attention)
    low = literal(float("-inf"), e.dtype(node.inputs[0]))
    if node.op.causal:
        e.w.put(f"if ({at[-1]} > {at[-2]}) {{ {acc} = {low}; }}")
    if len(node.inputs) > 3:
        mask = node.inputs[3]
        value = e.at(mask, broadcast(at, e.shape(mask)))
        e.w.put(f"if (!{value}) {{ {acc} = {low}; }}" if e.dtype(mask) == BOOL else f"{acc} += {value};")


@rule(ops.Attention)
def _attention(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    assert isinstance(node.op, ops.Attention)
    prepare(e, node, idx)
    scores, total = e.w.recall(_key(node, idx)), e.w.recall((*_key(node, idx), "sum"))
    v, kind = node.inputs[2], node.type.dtype
    acc = e.w.variable(carried(kind), literal(0, kind), "acc")
    with e.w.loop(e.shape(v)[-2], "s") as s:
        value = e.at(v, (*_batch(e, v, idx[:-2], node.op.kv_groups), s, idx[-1]))
        e.w.put(f"{acc} += {scores}[{s}] * {value};")
    return f"({acc} / {total})"
