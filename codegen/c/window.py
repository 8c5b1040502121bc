"""The places that one output of a convolution reads."""

from __future__ import annotations

from contextlib import ExitStack

from bitwright.codegen.c.reduce import loops
from bitwright.codegen.c.text import Idx, Index, plus, times
from bitwright.codegen.c.values import Evaluator
from bitwright.ir import ops
from bitwright.ir.graph import Node


def taps_of(e: Evaluator, node: Node, idx: Idx, stack: ExitStack) -> tuple[list[Index], str, Index]:
    """Loops over the taps (closed with ``stack``): the space index of the input at a tap, the C condition that it lies
    in the image ("" if it always does), and the tap's number in row-major order."""
    op, (x, w) = node.op, node.inputs[:2]
    assert isinstance(op, ops.IntConv | ops.Conv)
    source, kernel = e.shape(x), e.shape(w)[2:]
    n, last = len(kernel), op.channels_last
    space, at = (source[1:-1], idx[1:-1]) if last else (source[2:], idx[2:])
    taps = loops(e, stack, kernel)
    here: list[Index] = []
    checks: list[str] = []
    tap: Index = 0
    for a in range(n):
        pad, after = (op.padding[a], op.padding[n + a]) if op.padding else (0, 0)
        step, spread = (op.stride or (1,) * n)[a], (op.dilation or (1,) * n)[a]
        i = plus(plus(times(at[a], step), times(taps[a], spread)), -pad)
        i = i if isinstance(i, int) else e.w.let("int32_t", i, "p")
        here.append(i)
        checks += [f"{i} >= 0"] if pad else []
        checks += [f"{i} < {space[a]}"] if after else []
        tap = plus(times(tap, kernel[a]), taps[a])
    return here, " && ".join(checks), tap
