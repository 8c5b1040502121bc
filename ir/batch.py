"""Can a graph be computed a few rows of its batch at a time? Then one plan serves every batch size."""

from __future__ import annotations

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import Dim, TensorType, symbols_of

_ROWWISE: tuple[type[ops.Op], ...] = (
    ops.Linear, ops.Conv, ops.ConvTranspose, ops.IntLinear, ops.IntConv, ops.BatchNorm, ops.GroupNorm, ops.MaxPool,
    ops.AvgPool, ops.Resize, ops.SmallLinear, ops.SmallConv,
)  # fmt: skip


def why_not_separable(graph: Graph, symbol: str) -> str:
    """Why rows along ``symbol`` are not independent, or the empty string.

    Every value that depends on the symbol must have it, and only it, in its first axis, and every operator must act
    on the rows of that axis alone.
    """
    for name, t in graph.types.items():
        if any(symbol in symbols_of(d) for d in t.shape[1:]):
            return f"%{name}: {t} has {symbol!r} in an axis that is not the first"
        if t.shape and symbol in symbols_of(t.shape[0]) and set(symbols_of(t.shape[0])) != {symbol}:
            return f"%{name}: {t} mixes {symbol!r} with another symbol"
    for node in graph.nodes:
        operands = [graph.types[x] for x in node.inputs]
        if any(_leads(t, symbol) for t in (*operands, *node.types)) and not _by_rows(node, operands, symbol):
            return f"%{node.output} = {node.op.spelling} does not treat the rows of the batch one by one"
    if not all(_leads(graph.types[o], symbol) for o in graph.outputs):
        return "an output does not depend on the batch"
    return ""


def _leads(t: TensorType, symbol: str) -> bool:
    return bool(t.shape) and symbol in symbols_of(t.shape[0])


def _by_rows(node: Node, operands: list[TensorType], symbol: str) -> bool:
    op, out = node.op, node.type
    if not _leads(out, symbol):
        return False
    if isinstance(op, ops.POINTWISE):
        axis = getattr(op, "axis", None)
        return (axis is None or axis % out.rank != 0) and all(_broadcasts(t, out, symbol) for t in operands)
    if isinstance(op, _ROWWISE):
        return _leads(operands[0], symbol) and not any(_leads(t, symbol) for t in operands[1:])
    if isinstance(op, ops.DynamicQuantize):
        return out.rank > 1
    if isinstance(op, ops.GroupLinear):  # codes and their scales come by rows, the weights do not
        return all(_leads(t, symbol) for t in operands[:2]) and not any(_leads(t, symbol) for t in operands[2:])
    if isinstance(op, (ops.MatMul, ops.IntMatMul, ops.SmallMatMul, ops.Attention)):
        return out.rank > 2 and all(_broadcasts(t, out, symbol) for t in operands)
    if isinstance(op, ops.Gather):
        return _gathers_by_rows(op, operands, symbol)
    if isinstance(op, (ops.Reshape, ops.Expand)):
        return _leads(operands[0], symbol) or isinstance(op, ops.Expand)
    return _axes_by_rows(op, operands, symbol)


def _gathers_by_rows(op: ops.Gather, operands: list[TensorType], symbol: str) -> bool:
    x, index = operands
    if _leads(index, symbol):
        return op.axis == 0 and not _leads(x, symbol)
    return op.axis % x.rank != 0


def _axes_by_rows(op: ops.Op, operands: list[TensorType], symbol: str) -> bool:
    """Operators with axes: none of them may be the first one."""
    rank = operands[0].rank
    if isinstance(op, ops.Transpose):
        return op.perm[0] == 0
    if isinstance(op, (ops.LayerNorm, ops.RmsNorm)):
        return op.axes < rank
    if isinstance(op, ops.Pad):
        return op.padding[0] == 0 and op.padding[rank] == 0
    if isinstance(op, ops.Tile):
        return op.repeats[0] == 1
    if isinstance(op, (ops.Reduce, ops.Flip)):
        return all(a % rank != 0 for a in op.axes) and bool(op.axes)
    if isinstance(op, ops.Concat):
        return op.axis % rank != 0 and all(_leads(t, symbol) for t in operands)
    if isinstance(op, (ops.Slice, ops.Softmax, ops.ArgReduce, ops.CumSum, ops.TopK)):
        return op.axis % rank != 0
    if isinstance(op, ops.GatherElements):
        return op.axis % rank != 0 and all(_leads(t, symbol) for t in operands)
    return False


def _broadcasts(t: TensorType, out: TensorType, symbol: str) -> bool:
    """A row of the operand for every row of the result, or one operand for all rows."""
    first: Dim = t.shape[0] if t.rank == out.rank else 1
    if symbol in symbols_of(first):
        return first == out.shape[0]
    return not _leads(t, symbol) and first == 1
