"""Contractions that models spell in s32 (MatMulInteger, ConvInteger, after a dynamic quantization) as integer ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import to_torch
from bitwright.ir.types import S8, S32, U8, TensorType
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of
from bitwright.passes._pass import Context

_LARGEST_MAP = 1 << 22
"""Sums of weights by output position that are worth storing."""


class _Codes(NamedTuple):
    """An s32 value as ``codes - zero``: old names; zero is a number, or the name of a scalar known at run time."""

    codes: str
    zero: int | str


def exact_contraction(rw: Rewriter, node: Node, context: Context) -> bool:
    """Put an integer contraction in the place of a Linear or Conv in s32; False leaves the node to be kept.

    For x = codes - zero (u8 codes, one zero) and a weight whose values fit s8. A zero z that is known at run time
    stays outside: sum (c - z) w = sum c w - z sum w, with the sums of w over the taps that padding leaves.
    """
    graph, op = rw.graph, node.op
    if not isinstance(op, ops.Linear | ops.Conv) or node.type.dtype != S32:
        return False
    x, weight = _codes(graph, node.inputs[0]), _narrow(graph, node.inputs[1])
    if x is None:
        return False
    if weight is None:
        why = "stays s32: the weights less their zero point are not constants that fit s8"
        context.refuse("lower-to-integer", layer_of(graph, node), why, "quantize weights symmetrically to s8")
        return False
    fixed = x.zero if isinstance(x.zero, int) else 0
    exact: ops.Op = ops.IntLinear(fixed)
    if isinstance(op, ops.Conv):
        exact = ops.IntConv(op.stride, op.padding, op.dilation, op.groups, op.channels_last, fixed)
    sums = None if isinstance(x.zero, int) else _sums(graph, node, exact, weight)
    if not isinstance(x.zero, int) and sums is None:
        why = "stays s32: padding and a zero point known at run time, with sizes that are open or too large"
        context.refuse("lower-to-integer", layer_of(graph, node), why, "fix the sizes of the image")
        return False
    rw.free(node)
    source = graph.producers[node.inputs[1]]
    encoding = source.type.encoding
    w = rw.weight(f"{node.output}.codes", weight, TensorType(S8, weight.shape, encoding), origin=source.origin)
    codes = rw.of(x.codes)[0]
    value = rw.emit(exact, codes, w, name=f"{node.output}.acc", origin=node.origin)
    if sums is not None:
        assert isinstance(x.zero, str)
        known = rw.constant(sums, TensorType(S32, sums.shape), name=f"{node.output}.sums", origin=node.origin)
        (zero,) = rw.of(x.zero)
        shift = rw.emit(ops.Binary("mul"), zero, known, name=f"{node.output}.shift", origin=node.origin)
        value = rw.emit(ops.Binary("sub"), value, shift, name=f"{node.output}.exact", origin=node.origin)
    for bias in node.inputs[2:]:
        (b,) = rw.of(bias)
        if isinstance(op, ops.Conv):
            b = rw.emit(ops.Reshape((*rw.types[b].shape, *[1] * (node.type.rank - 2))), b, origin=node.origin)
        value = rw.emit(ops.Binary("add"), value, b, name=f"{node.output}.biased", origin=node.origin)
    rw.replace(node, value)
    return True


def _codes(graph: Graph, value: str) -> _Codes | None:
    n = graph.producers.get(value)
    zero: int | str = 0
    if n is not None and isinstance(n.op, ops.Binary) and n.op.fn == "sub":
        found = _zero(graph, n.inputs[1])
        if found is None:
            return None
        zero, n = found, graph.producers.get(n.inputs[0])
    if n is None or not isinstance(n.op, ops.Cast) or n.type.dtype != S32 or graph.types[n.inputs[0]].dtype != U8:
        return None
    return _Codes(n.inputs[0], zero)


def _zero(graph: Graph, value: str) -> int | str | None:
    known = graph.constant(value)
    if known is not None:
        array = np.asarray(known)
        return int(array.reshape(())) if array.size == 1 and 0 <= array.reshape(()) <= U8.hi else None
    return value if graph.types[value].shape == () else None


def _narrow(graph: Graph, value: str) -> Array | None:
    """A constant s32 weight in s8, where its values fit; a cast of s8 codes too."""
    n = graph.producers.get(value)
    if n is not None and isinstance(n.op, ops.Cast) and graph.is_constant(n.inputs[0]):
        value = n.inputs[0]
    known = graph.constant(value)
    if known is None or not graph.types[value].dtype.is_integer:
        return None
    array = np.asarray(known)
    fits = array.size and int(array.min()) >= S8.lo and int(array.max()) <= S8.hi
    return array.astype(np.int8) if fits else None


def _sums(graph: Graph, node: Node, exact: ops.Op, weight: Array) -> Array | None:
    """Sum of the weights that each output reads: [O] of a linear layer, [O, 1, ...] or, with padding, [O, *S]."""
    if not isinstance(exact, ops.IntConv):
        return np.asarray(weight.astype(np.int64).sum(1), np.int32)
    if not any(exact.padding):
        return np.asarray(weight.astype(np.int64).sum(tuple(range(1, weight.ndim)), keepdims=True)[:, 0], np.int32)
    shape, out = graph.types[node.inputs[0]].shape[1:], node.type.shape[1:]
    if exact.channels_last or not all(isinstance(d, int) for d in (*shape, *out)):
        return None
    if int(np.prod([int(d) for d in out])) > _LARGEST_MAP:
        return None
    from bitwright.ir.semantics import apply

    ones = np.ones([1, *(int(d) for d in shape)], np.uint8)
    (found,) = apply(exact, to_torch(ones), to_torch(weight))
    return np.asarray(found[0].numpy(), np.int32)
