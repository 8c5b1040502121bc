"""Reductions and pooling. Sums of floats run in double."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack

from bitwright.codegen.c.text import Idx, Index, carried, literal, plus, times
from bitwright.codegen.c.values import Evaluator, rule
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Node
from bitwright.ir.types import F32, F64, S64, DType


def total_type(dtype: DType) -> DType:
    """The format sums run in."""
    return F64 if dtype.is_float else S64


def loops(e: Evaluator, stack: ExitStack, sizes: Sequence[int]) -> list[Index]:
    return [stack.enter_context(e.w.loop(n, "r")) for n in sizes]


@rule(ops.Reduce)
def _reduce(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    op, source = node.op, e.shape(node.inputs[0])
    assert isinstance(op, ops.Reduce)
    axes = sorted({a % len(source) for a in op.axes})
    kind, count = e.dtype(node.inputs[0]), math.prod(source[a] for a in axes)
    start, step, end = _reduction(op.fn, kind, count, e)
    acc = e.w.variable(carried(start[1]), start[0])
    with ExitStack() as stack:
        inner = loops(e, stack, [source[a] for a in axes])
        outer = iter(i for k, i in enumerate(idx) if not op.keepdim or k not in axes)
        where = dict(zip(axes, inner, strict=True))
        x = e.at(node.inputs[0], tuple(where[a] if a in where else next(outer) for a in range(len(source))))
        e.w.put(step.format(acc=acc, x=x))
    return end.format(acc=acc)


def _reduction(fn: str, kind: DType, count: int, e: Evaluator) -> tuple[tuple[str, DType], str, str]:
    """(start and its format), the statement per element, the result."""
    wide, c = total_type(kind), carried(kind)
    zero = literal(0, wide)
    if fn in ("sum", "mean"):
        result = f"({c}){{acc}}" if fn == "sum" else f"({c})({{acc}} / {literal(count, wide)})"
        return (zero, wide), f"{{acc}} += ({carried(wide)}){{x}};", result
    if fn == "sumsq":
        return (zero, wide), f"{{acc}} += ({carried(wide)}){{x}} * ({carried(wide)}){{x}};", f"({c}){{acc}}"
    if fn in ("max", "min"):
        sign = "<" if fn == "max" else ">"
        worst = float("-inf") if fn == "max" else float("inf")
        first = literal(worst, kind) if kind.is_float else literal(kind.lo if fn == "max" else kind.hi, kind)
        return (first, kind), f"if ({{acc}} {sign} {{x}}) {{{{ {{acc}} = {{x}}; }}}}", "{acc}"
    if fn == "l2" and kind in (F32, F64):
        e.used.add("sqrt")
        return (zero, wide), "{acc} += (double){x} * (double){x};", f"({c})sqrt({{acc}})"
    raise InvalidInput(f"the C back end has no reduction {fn}")


def _window(e: Evaluator, node: Node, idx: Idx) -> tuple[list[int], list[Index], Index, Index, bool]:
    op = node.op
    assert isinstance(op, ops.MaxPool | ops.AvgPool)
    source, n = e.shape(node.inputs[0]), len(op.kernel)
    last = op.channels_last
    space = list(source[1:-1] if last else source[2:])
    at = list(idx[1:-1] if last else idx[2:])
    return space[:n], at, idx[0], idx[-1] if last else idx[1], last


@rule(ops.MaxPool, ops.AvgPool)
def _pool(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    op, kind = node.op, node.type.dtype
    assert isinstance(op, ops.MaxPool | ops.AvgPool)
    space, at, batch, channel, last = _window(e, node, idx)
    n = len(space)
    largest = isinstance(op, ops.MaxPool)
    if largest:
        start = literal(float("-inf") if kind.is_float else kind.lo, kind)
        acc, count = e.w.variable(carried(kind), start), ""
    else:
        acc = e.w.variable(carried(total_type(kind)), literal(0, total_type(kind)))
        count = e.w.variable("int32_t", "0", "n")
    dilation = (op.dilation if isinstance(op, ops.MaxPool) else ()) or (1,) * n
    with ExitStack() as stack:
        here: list[Index] = []
        taps = loops(e, stack, op.kernel)
        checks, counted = [], []
        for a in range(n):
            begin = op.padding[a] if op.padding else 0
            end = op.padding[n + a] if op.padding else 0
            i = plus(plus(times(at[a], op.stride[a] if op.stride else 1), times(taps[a], dilation[a])), -begin)
            i = i if isinstance(i, int) else e.w.let("int32_t", i, "p")
            here.append(i)
            checks.append(f"{i} >= 0 && {i} < {space[a]}")
            counted.append(f"{i} >= {-begin} && {i} < {space[a] + end}")
        if count and getattr(op, "count_padding", False):
            e.w.put(f"{count} += {' && '.join(counted)};")
        with e.w.block(f"if ({' && '.join(checks)})"):
            x = e.at(node.inputs[0], (batch, *here, channel) if last else (batch, channel, *here))
            if largest:
                e.w.put(f"if ({acc} < {x}) {{ {acc} = {x}; }}")
            else:
                e.w.put(f"{acc} += ({carried(total_type(kind))}){x};")
                if not getattr(op, "count_padding", False):
                    e.w.put(f"++{count};")
    if largest:
        return acc
    return f"({carried(kind)})({acc} / ({carried(total_type(kind))}){count})"
