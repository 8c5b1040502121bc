"""Operators whose results are elements of their operands: only the index changes."""

from __future__ import annotations

from bitwright.codegen.c.text import Idx, Index, flatten, literal, plus, rest, times, unflatten
from bitwright.codegen.c.values import Evaluator, broadcast, rule
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Node


@rule(ops.Reshape)
def _reshape(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    source, shape = e.shape(node.inputs[0]), node.type.static_shape
    kept = [(i, n) for i, n in zip(idx, shape, strict=True) if n != 1]
    if [n for _, n in kept] == [n for n in source if n != 1]:  # axes of size 1 came or went
        left = iter(kept)
        return e.at(node.inputs[0], tuple(0 if n == 1 else next(left)[0] for n in source))
    at = flatten(idx, shape)
    at = at if isinstance(at, int) else e.w.let("int32_t", at, "at")
    return e.at(node.inputs[0], unflatten(at, source))


@rule(ops.Transpose)
def _transpose(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    assert isinstance(node.op, ops.Transpose)
    source: list[Index] = [0] * len(idx)
    for i, p in enumerate(node.op.perm):
        source[p] = idx[i]
    return e.at(node.inputs[0], tuple(source))


@rule(ops.Expand)
def _expand(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    return e.at(node.inputs[0], broadcast(idx, e.shape(node.inputs[0])))


@rule(ops.Slice)
def _slice(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    op = node.op
    assert isinstance(op, ops.Slice)
    axis = op.axis % len(idx)
    moved = plus(times(idx[axis], op.step), op.start)
    return e.at(node.inputs[0], (*idx[:axis], moved, *idx[axis + 1 :]))


@rule(ops.Flip)
def _flip(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    assert isinstance(node.op, ops.Flip)
    shape = node.type.static_shape
    axes = {a % len(idx) for a in node.op.axes}

    def mirrored(a: int, i: Index) -> Index:
        return shape[a] - 1 - i if isinstance(i, int) else f"({shape[a] - 1} - {i})"

    return e.at(node.inputs[0], tuple(mirrored(a, i) if a in axes else i for a, i in enumerate(idx)))


@rule(ops.Tile)
def _tile(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    source = e.shape(node.inputs[0])
    return e.at(node.inputs[0], tuple(rest(i, n) for i, n in zip(idx[-len(source) :], source, strict=True)))


@rule(ops.Concat)
def _concat(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    assert isinstance(node.op, ops.Concat)
    axis, w = node.op.axis % len(idx), e.w
    i, start = idx[axis], 0
    sizes = [e.shape(x)[axis] for x in node.inputs]
    if isinstance(i, int):
        for x, n in zip(node.inputs, sizes, strict=True):
            if i < start + n:
                return e.at(x, (*idx[:axis], i - start, *idx[axis + 1 :]))
            start += n
    result = w.variable(e.ctype(node.output), "0")
    for k, (x, n) in enumerate(zip(node.inputs, sizes, strict=True)):
        head = f"if ({i} < {start + n})" if k + 1 < len(sizes) else ""
        with w.block(f"else {head}".strip() if k else head or "if (1)"):
            w.put(f"{result} = {e.at(x, (*idx[:axis], plus(i, -start), *idx[axis + 1 :]))};")
        start += n
    return result


@rule(ops.Pad)
def _pad(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    op, source = node.op, e.shape(node.inputs[0])
    assert isinstance(op, ops.Pad)
    if op.mode != "constant":
        raise InvalidInput(f"the C back end pads with constants, not by {op.mode}")
    inner = [plus(i, -b) for i, b in zip(idx, op.padding[: len(idx)], strict=True)]
    checks = []
    for a, (i, n) in enumerate(zip(inner, source, strict=True)):
        if op.padding[a] or op.padding[a + len(idx)]:
            checks.append(f"{i} >= 0 && {i} < {n}")
    if not checks:
        return e.at(node.inputs[0], tuple(inner))
    result = e.w.variable(e.ctype(node.output), literal(op.value, node.type.dtype))
    with e.w.block(f"if ({' && '.join(checks)})"):
        e.w.put(f"{result} = {e.at(node.inputs[0], tuple(inner))};")
    return result


@rule(ops.Gather)
def _gather(e: Evaluator, node: Node, _: int, idx: Idx) -> str:
    op = node.op
    assert isinstance(op, ops.Gather)
    source, index = e.shape(node.inputs[0]), e.shape(node.inputs[1])
    axis = op.axis % len(source)
    at = e.at(node.inputs[1], idx[axis : axis + len(index)])
    i = e.w.let("int32_t", f"bw_index((int32_t){at}, {source[axis]})", "at")
    return e.at(node.inputs[0], (*idx[:axis], i, *idx[axis + len(index) :]))
