"""Rules of simplify for pointwise and shape operators. Each takes an old node and returns True having replaced it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import DType
from bitwright.passes._match import array, fn, made_by, uniform, used_once

_NEUTRAL = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0, "pow": 1.0}
_COMMUTES = ("add", "mul")


def same(rw: Rewriter, node: Node, value: str) -> bool:
    """Let an existing old value stand for the node."""
    rw.replace(node, *rw.of(value))
    return True


def binary(rw: Rewriter, node: Node) -> bool:
    """x + 0 = x * 1 = x / 1 = x; x * x = pow(x, 2) = square(x); max and min by a constant = clamp."""
    g, (a, b), name = rw.graph, node.inputs, node.op.fn  # type: ignore[attr-defined]
    if name in _NEUTRAL:
        for x, c in ((a, b), (b, a)) if name in _COMMUTES else ((a, b),):
            if g.types[x] == node.type and uniform(g, c) == _NEUTRAL[name]:
                return same(rw, node, x)
    if not node.type.dtype.is_float:
        return False
    if name == "mul" and a == b:
        return _emit(rw, node, ops.Unary("square"), a)
    if name == "pow" and g.types[a] == node.type and (power := _POWERS.get(uniform(g, b) or 0.0)):
        return _emit(rw, node, ops.Unary(power), a)
    if name == "div" and (root := fn(g, b, "sqrt")) is not None and uniform(g, a) == 1.0 and g.types[b] == node.type:
        return _emit(rw, node, ops.Unary("rsqrt"), root.inputs[0])
    if name in ("max", "min"):
        for x, c in ((a, b), (b, a)):
            if g.types[x] == node.type and (k := uniform(g, c)) is not None and not math.isnan(k):
                return _emit(rw, node, ops.Clamp(lo=k) if name == "max" else ops.Clamp(hi=k), x)
    return False


_POWERS = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}


def expanded(rw: Rewriter, node: Node) -> bool:
    """x + expand(c) = x + c when x has the result's shape: operators broadcast by themselves."""
    g = rw.graph
    for i, (v, other) in enumerate((node.inputs, node.inputs[::-1])):
        inner = made_by(g, v, ops.Expand)
        if inner is not None and g.types[other].shape == node.type.shape:
            inputs = (inner.inputs[0], other) if i == 0 else (other, inner.inputs[0])
            return _emit(rw, node, node.op, *inputs)
    return False


def gather(rw: Rewriter, node: Node) -> bool:
    """gather(w, k everywhere) = expand(w[k]) for a constant table and one constant index."""
    g, (w, index) = rw.graph, node.inputs
    inner = made_by(g, index, ops.Expand)
    k = uniform(g, inner.inputs[0] if inner is not None else index)
    rows = g.types[w].shape[0] if g.types[w].rank else 0
    if k is None or node.op.axis != 0 or not g.is_constant(w) or g.types[w].encoding is not None:  # type: ignore[attr-defined]
        return False
    row = int(k) + (int(rows) if k < 0 else 0)
    if not 0 <= row < int(rows) or g.types[index].rank == 0:
        return False
    out = rw.emit(ops.Slice(0, row, row + 1), rw.of(w)[0], name=f"{node.output}.row", origin=node.origin)
    rw.keep_as(node, ops.Expand(node.type.shape), (out,))
    return True


def rising(rw: Rewriter, node: Node) -> bool:
    """relu(max_pool(x)) = max_pool(relu(x)), and so for clamp: the result can then join what computed x, and the pool
    moves values of fewer bits. Padding never wins: below zero it would, and a window may lie in padding alone."""
    g, (x,) = rw.graph, node.inputs
    pool = made_by(g, x, ops.MaxPool)
    if pool is None or not used_once(g, x) or not node.type.dtype.is_float or _only_padding(pool):
        return False
    if isinstance(node.op, ops.Unary) and node.op.fn != "relu":
        return False
    (inner,) = rw.of(pool.inputs[0])
    first = rw.emit(node.op, inner, name=f"{node.output}.first", origin=node.origin)
    rw.keep_as(node, pool.op, (first,))
    return True


def _only_padding(pool: Node) -> bool:
    """Whether a window can lie in the padding alone, where the maximum is minus infinity."""
    op = pool.op
    assert isinstance(op, ops.MaxPool)
    n = len(op.kernel)
    spread = [d * (k - 1) for k, d in zip(op.kernel, op.dilation or (1,) * n, strict=True)]
    return any(max(op.padding[a], op.padding[n + a]) > spread[a] for a in range(n)) if op.padding else False


def unary(rw: Rewriter, node: Node) -> bool:
    """reciprocal(sqrt(x)) = rsqrt(x); not(not(x)) = neg(neg(x)) = x; relu(relu(x)) = relu(x)."""
    name, (x,) = node.op.fn, node.inputs  # type: ignore[attr-defined]
    inner = rw.graph.producers.get(x)
    if inner is None or not isinstance(inner.op, ops.Unary):
        return False
    pair = (name, inner.op.fn)
    if pair == ("reciprocal", "sqrt"):
        return _emit(rw, node, ops.Unary("rsqrt"), inner.inputs[0])
    if pair in (("not", "not"), ("neg", "neg")):
        return same(rw, node, inner.inputs[0])
    return pair in (("relu", "relu"), ("abs", "abs")) and same(rw, node, x)


def clamp(rw: Rewriter, node: Node) -> bool:
    """clamp(x, 0, inf) = relu(x); clamps of clamps and of relu merge; a clamp without bounds is its operand."""
    op, g = node.op, rw.graph
    assert isinstance(op, ops.Clamp)
    if (op.lo, op.hi) == (-math.inf, math.inf):
        return same(rw, node, node.inputs[0])
    if (op.lo, op.hi) == (0.0, math.inf) and node.type.dtype.is_float:
        return _emit(rw, node, ops.Unary("relu"), node.inputs[0])
    inner = g.producers.get(node.inputs[0])
    if inner is None or not used_once(g, inner.output):
        return False
    if isinstance(inner.op, ops.Unary) and inner.op.fn == "relu":
        lo, hi = 0.0, math.inf
    elif isinstance(inner.op, ops.Clamp):
        lo, hi = inner.op.lo, inner.op.hi
    else:
        return False
    merged = ops.Clamp(min(max(lo, op.lo), op.hi), min(max(hi, op.lo), op.hi))
    return _emit(rw, node, merged, inner.inputs[0])


def cast(rw: Rewriter, node: Node) -> bool:
    """A cast to the same format is its operand; widening and casting back too."""
    t = rw.graph.types[node.inputs[0]]
    if t.dtype == node.type.dtype:
        return same(rw, node, node.inputs[0])
    inner = made_by(rw.graph, node.inputs[0], ops.Cast)
    if inner is not None:
        first = rw.graph.types[inner.inputs[0]].dtype
        if first == node.type.dtype and _holds(t.dtype, first):
            return same(rw, node, inner.inputs[0])
    return False


def _holds(wide: DType, narrow: DType) -> bool:
    """True when every value of ``narrow`` is one of ``wide``."""
    if wide.is_float and narrow.is_float:
        return (
            wide.exponent >= narrow.exponent and wide.mantissa >= narrow.mantissa and wide.bias is narrow.bias is None
        )
    if wide.is_integer and narrow.is_integer:
        return wide.lo <= narrow.lo and wide.hi >= narrow.hi
    return wide.is_float and narrow.is_integer and max(-narrow.lo, narrow.hi) <= 1 << (wide.mantissa + 1)


def transpose(rw: Rewriter, node: Node) -> bool:
    """An identity permutation is its operand; transposes merge."""
    perm = node.op.perm  # type: ignore[attr-defined]
    if perm == tuple(range(len(perm))):
        return same(rw, node, node.inputs[0])
    inner = made_by(rw.graph, node.inputs[0], ops.Transpose)
    if inner is None:
        return False
    merged = tuple(inner.op.perm[p] for p in perm)  # type: ignore[attr-defined]
    return _emit(rw, node, ops.Transpose(merged), inner.inputs[0])


def reshape(rw: Rewriter, node: Node) -> bool:
    """A reshape (or expand) to the same shape is its operand; reshapes merge."""
    if rw.graph.types[node.inputs[0]].shape == node.type.shape:
        return same(rw, node, node.inputs[0])
    inner = made_by(rw.graph, node.inputs[0], type(node.op))
    return inner is not None and _emit(rw, node, node.op, inner.inputs[0])


def nothing_moves(rw: Rewriter, node: Node) -> bool:
    """A concatenation of one, a slice of the whole, padding by zero and tiling once are their operand."""
    op, t = node.op, rw.graph.types[node.inputs[0]]
    done = (
        (isinstance(op, ops.Concat) and len(node.inputs) == 1)
        or (isinstance(op, ops.Slice) and op.step == 1 and t.shape == node.type.shape)
        or (isinstance(op, ops.Pad) and not any(op.padding))
        or (isinstance(op, ops.Tile) and all(r == 1 for r in op.repeats))
    )
    return done and same(rw, node, node.inputs[0])


def quantize(rw: Rewriter, node: Node) -> bool:
    """quantize(dequantize(q, s, z), s, z) = q when scale, zero point, axis and format agree."""
    op, inner = node.op, made_by(rw.graph, node.inputs[0], ops.Dequantize)
    assert isinstance(op, ops.Quantize)
    if (
        inner is None
        or rw.graph.types[inner.inputs[0]].dtype != op.dtype
        or not op.dtype.is_integer
        or op.dtype.bits > 16
    ):
        return False
    if (inner.op.axis, inner.op.group) != (op.axis, op.group) or node.type.with_encoding(None) != rw.graph.types[  # type: ignore[attr-defined]
        inner.inputs[0]
    ].with_encoding(None):
        return False
    return same_parameters(rw.graph, node, inner) and same(rw, node, inner.inputs[0])


def same_parameters(graph: Graph, a: Node, b: Node) -> bool:
    """True when two quantize or dequantize nodes have equal scales and zero points."""
    for i in (1, 2):
        x, y = (n.inputs[i] if len(n.inputs) > i else None for n in (a, b))
        if x == y:
            continue
        u, v = (np.zeros((), np.int64) if n is None else array(graph, n) for n in (x, y))
        if u is None or v is None or not np.array_equal(np.broadcast_arrays(u, v)[0], np.broadcast_arrays(u, v)[1]):
            return False
    return True


def _emit(rw: Rewriter, node: Node, op: ops.Op, *inputs: str) -> bool:
    rw.keep_as(replace(node, op=op), op, rw.of(*inputs))
    return True
