"""Operators that know channels-first only, spelled with those that have a channels-last form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter
from bitwright.ir.graph import Node
from bitwright.ir.types import F32


class Twins(Rewriter):
    """A rewriter that keeps, beside the plain form of a value, its channels-last twin in ``last``."""

    last: dict[str, str]

    def plain(self, old: str) -> str:
        """The new value in the old layout."""
        raise NotImplementedError

    def twin(self, old: str) -> str:
        """The channels-last form of a rank-4 value."""
        raise NotImplementedError


def group_norm(rw: Twins, node: Node, op: ops.GroupNorm) -> bool:
    """Means of channels, of groups of them, and one multiply-add: two passes over the input, and the last."""
    n, channels, *space = node.type.shape
    if node.type.rank != 4 or node.type.dtype != F32 or not isinstance(channels, int):
        return False
    if not all(isinstance(d, int) and d > 0 for d in space) or op.groups <= 0 or channels % op.groups:
        return False
    x, origin, stem = rw.twin(node.inputs[0]), node.origin, node.output
    grouped, column = (n, op.groups, channels // op.groups), (n, 1, 1, channels)

    def mean(value: str, name: str) -> str:
        by_channel = rw.emit(ops.Reduce("mean", (1, 2)), value, name=f"{stem}.{name}.channels", origin=origin)
        by_channel = rw.emit(ops.Reshape(grouped), by_channel, origin=origin)
        return rw.emit(ops.Reduce("mean", (2,), keepdim=True), by_channel, name=f"{stem}.{name}", origin=origin)

    def spread(value: str) -> str:
        return rw.emit(ops.Reshape(column), rw.emit(ops.Expand(grouped), value, origin=origin), origin=origin)

    centre = spread(mean(x, "mean"))
    distance = rw.emit(ops.Binary("sub"), x, centre, origin=origin)
    variance = mean(rw.emit(ops.Unary("square"), distance, origin=origin), "variance")
    eps = rw.constant(np.array(op.eps, np.float32), name=f"{stem}.eps", origin=origin)
    factor = rw.emit(ops.Unary("rsqrt"), rw.emit(ops.Binary("add"), variance, eps, origin=origin), origin=origin)
    again = rw.emit(ops.Binary("sub"), x, centre, origin=origin)  # not kept in memory between the two
    y = rw.emit(ops.Binary("mul"), again, spread(factor), origin=origin)
    for operand, fn in zip(node.inputs[1:], ("mul", "add"), strict=False):
        affine = rw.emit(ops.Reshape((1, 1, 1, channels)), rw.plain(operand), origin=origin)
        y = rw.emit(ops.Binary(fn), y, affine, origin=origin)
    rw.last[node.output] = y
    return True


def conv_transpose(rw: Twins, node: Node, op: ops.ConvTranspose) -> bool:
    """Where windows do not overlap, every input pixel makes its own outputs: a 1x1 convolution, then depth to space."""
    weight = rw.graph.constant(node.inputs[1])
    bias = rw.graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    n, _, *space = rw.graph.types[node.inputs[0]].shape
    if node.type.rank != 4 or weight is None or (len(node.inputs) > 2 and bias is None) or op.groups != 1:
        return False
    kernel = np.asarray(weight).shape[2:]
    plain = not any(op.padding) and not any(op.output_padding) and all(d == 1 for d in op.dilation)
    if not plain or (op.stride or (1, 1)) != kernel or not all(isinstance(d, int) for d in space):
        return False
    (h, w), (high, wide), origin = space, kernel, node.origin
    assert isinstance(h, int)
    assert isinstance(w, int)
    inside, outside = np.asarray(weight).shape[:2]
    turned = np.ascontiguousarray(np.asarray(weight).transpose(2, 3, 1, 0)).reshape(-1, inside, 1, 1)
    operands = [rw.weight(f"{node.output}.taps", turned, name=f"{node.output}.taps", origin=origin)]
    if bias is not None:
        repeated = np.tile(np.asarray(bias), math.prod(kernel))
        operands.append(rw.weight(f"{node.output}.bias", repeated, name=f"{node.output}.bias", origin=origin))
    conv = ops.Conv((1, 1), (0, 0, 0, 0), (1, 1), 1, True)
    deep = rw.emit(conv, rw.twin(node.inputs[0]), *operands, name=f"{node.output}.deep", origin=origin)
    split = rw.emit(ops.Reshape((n, h, w, high, wide, outside)), deep, origin=origin)
    rows = rw.emit(ops.Transpose((0, 1, 3, 2, 4, 5)), split, name=f"{node.output}.space", origin=origin)
    shape = (n, h * high, w * wide, outside)
    rw.last[node.output] = rw.emit(ops.Reshape(shape), rows, name=f"{node.output}.last", origin=origin)
    return True


RESPELLED: dict[type[ops.Op], Callable[[Twins, Node, Any], bool]] = {
    ops.GroupNorm: group_norm,
    ops.ConvTranspose: conv_transpose,
}
"""By operator: emits the channels-last form into the layout's builder; False if there is none."""
