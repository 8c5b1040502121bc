"""Resize and transposed convolution."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from bitwright.codegen.c.contract import table_of
from bitwright.codegen.c.reduce import loops
from bitwright.codegen.c.text import Idx, Index, carried, flatten, literal, over, plus, rest, times
from bitwright.codegen.c.values import Evaluator, rule
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Node


@rule(ops.Resize)
def _resize(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    """A weighted sum over the taps of every space axis, whose places and weights are tables."""
    from bitwright.ir.semantics_index import resize_taps

    op, kind, source = node.op, node.type.dtype, e.shape(node.inputs[0])
    assert isinstance(op, ops.Resize)
    if not kind.is_float:
        raise InvalidInput(f"the C back end resizes floats, not {kind}")
    acc = e.w.variable(carried(kind), literal(0, kind), "acc")
    real = carried(kind)
    with ExitStack() as stack:
        here, factor = [], ""
        for a in range(len(op.size)):
            index, weight = (t.numpy() for t in resize_taps(op, a, source[2 + a]))
            (tap,) = loops(e, stack, [index.shape[1]])
            at = flatten((idx[2 + a], tap), index.shape)
            where = e.table(f"{node.output}.place{a}", index.astype(np.int32).reshape(-1)).name
            here.append(e.w.let("int32_t", f"(int32_t){where}[{at}]", "p"))
            if not (weight == 1).all():
                values = e.table(f"{node.output}.weight{a}", weight.astype(kind.numpy).reshape(-1)).name
                factor += f" * {values}[{at}]"
        e.w.put(f"{acc} += {e.at(node.inputs[0], (*idx[:2], *here))}{factor};")
    return f"({real}){acc}"


@rule(ops.ConvTranspose)
def _conv_transpose(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    """Gathered per output: the taps whose step lands here."""
    op, (x, w) = node.op, node.inputs[:2]
    assert isinstance(op, ops.ConvTranspose)
    source, kernel, kind = e.shape(x), e.shape(w)[2:], node.type.dtype
    n, outputs = len(kernel), e.shape(w)[1]
    inputs = source[1] // op.groups
    first: Index = times(over(idx[1], outputs), inputs) if op.groups > 1 else 0
    start = e.at(node.inputs[2], (idx[1],)) if len(node.inputs) > 2 else literal(0, kind)
    acc = e.w.variable(carried(kind), start, "acc")
    table = table_of(e, w)
    with ExitStack() as stack:
        taps = loops(e, stack, kernel)
        here: list[Index] = []
        for a in range(n):
            step, spread = (op.stride or (1,) * n)[a], (op.dilation or (1,) * n)[a]
            pad = op.padding[a] if op.padding else 0
            far = plus(plus(idx[2 + a], pad), f"-{times(taps[a], spread)}" if taps[a] != 0 else 0)
            far = e.w.let("int32_t", str(far), "f")
            stack.enter_context(
                e.w.block(f"if ({far} >= 0 && {far} % {step} == 0 && {far} / {step} < {source[2 + a]})")
            )
            here.append(over(far, step))
        c = stack.enter_context(e.w.loop(inputs, "c"))
        channel = plus(first, c)
        at = flatten((channel, rest(idx[1], outputs), *taps), e.shape(w))
        e.w.put(f"{acc} += {e.at(x, (idx[0], channel, *here))} * {table}[{at}];")
    return acc
