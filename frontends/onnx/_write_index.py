"""Writes the shape and indexing operators."""

from __future__ import annotations

import math

from bitwright.frontends.onnx._write_context import Handler, Writing, container
from bitwright.ir import ops
from bitwright.ir.graph import Node
from bitwright.ir.types import S64

_LAST = -(1 << 63)
"""Before the first index, for a Slice that runs backwards to the beginning."""


def reshape(w: Writing, n: Node, op: ops.Reshape) -> str:
    """Reshape with open symbolic sizes."""
    return w.reshape(w.name(n.inputs[0]), w.type(n.inputs[0]).shape, op.shape)


def expand(w: Writing, n: Node, op: ops.Expand) -> str:
    """Expand; a symbolic size that is there already is left as it is."""
    have = w.type(n.inputs[0]).shape
    lead = len(op.shape) - len(have)
    shape = [1 if isinstance(d, str) and i >= lead and have[i - lead] == d else d for i, d in enumerate(op.shape)]
    return w.emit("Expand", w.name(n.inputs[0]), w.shape(shape))


def concat(w: Writing, n: Node, op: ops.Concat) -> str:
    """Concat."""
    return w.emit("Concat", *w.names(n.inputs), axis=op.axis)


def slice_(w: Writing, n: Node, op: ops.Slice) -> str:
    """Slice along one axis."""
    ends = [[op.start], [op.stop], [op.axis], [op.step]]
    return w.emit("Slice", w.name(n.inputs[0]), *(w.ints(v) for v in ends))


def pad(w: Writing, n: Node, op: ops.Pad) -> str:
    """Pad; a constant other than 0 in the operand's format."""
    held = container(w.type(n.inputs[0]).dtype)
    value = []
    if op.mode == "constant" and op.value:
        value = [w.literal(op.value if held.is_float else int(op.value), held)]
    return w.emit("Pad", w.name(n.inputs[0]), w.ints(op.padding), *value, mode=op.mode)


def flip(w: Writing, n: Node, op: ops.Flip) -> str:
    """A Slice with step -1."""
    k = len(op.axes)
    ends = ([-1] * k, [_LAST] * k, op.axes, [-1] * k)
    return w.emit("Slice", w.name(n.inputs[0]), *(w.ints(v) for v in ends))


def _wide_index(w: Writing, value: str) -> str:
    return w.name(value) if w.type(value).dtype == S64 else w.cast(w.name(value), S64)


def gather_nd(w: Writing, n: Node, op: ops.GatherNd) -> str:
    """GatherND, whose indices are s64."""
    return w.emit("GatherND", w.name(n.inputs[0]), _wide_index(w, n.inputs[1]), batch_dims=op.batch)


def scatter_nd(w: Writing, n: Node, op: ops.ScatterNd) -> str:
    """ScatterND, whose indices are s64."""
    x, index, updates = n.inputs
    return w.emit("ScatterND", w.name(x), _wide_index(w, index), w.name(updates), reduction=op.reduction)


def scatter_elements(w: Writing, n: Node, op: ops.ScatterElements) -> str:
    """ScatterElements."""
    return w.emit("ScatterElements", *w.names(n.inputs), axis=op.axis, reduction=op.reduction)


def resize(w: Writing, n: Node, op: ops.Resize) -> str:
    """Resize by sizes where these say the same as the scales, else by scales."""
    have = w.type(n.inputs[0]).shape[2:]
    if not all(isinstance(d, int) for d in have):
        w.refuse("interpolation of symbolic sizes", "give the model fixed heights and widths")
    space = [int(d) for d in have]
    given = {
        "axes": [2 + i for i in range(len(space))], "mode": op.mode, "coordinate_transformation_mode": op.coordinates,
        "nearest_mode": op.rounding if op.mode == "nearest" else None,
        "cubic_coeff_a": op.cubic if op.mode == "cubic" else None,
    }  # fmt: skip
    x = w.name(n.inputs[0])
    exact = all(math.isclose(s, o / i, rel_tol=1e-9) for s, o, i in zip(op.scales, op.size, space, strict=True))
    if exact or op.coordinates == "align_corners":
        return w.emit("Resize", x, "", "", w.ints(op.size), **given)
    if any(math.floor(i * s) != o for s, o, i in zip(op.scales, op.size, space, strict=True)):
        w.refuse(f"scales {list(op.scales)} do not give the size {list(op.size)}")
    from bitwright.ir.types import F32

    return w.emit("Resize", x, "", w.literal(op.scales, F32, "scales"), **given)


TABLE: dict[type[ops.Op], Handler] = {
    ops.Reshape: reshape, ops.Expand: expand, ops.Concat: concat, ops.Slice: slice_, ops.Pad: pad, ops.Flip: flip,
    ops.GatherNd: gather_nd, ops.ScatterNd: scatter_nd, ops.ScatterElements: scatter_elements, ops.Resize: resize,
    ops.Transpose: lambda w, n, op: w.emit("Transpose", w.name(n.inputs[0]), perm=list(op.perm)),
    ops.Tile: lambda w, n, op: w.emit("Tile", w.name(n.inputs[0]), w.ints(op.repeats)),
    ops.Gather: lambda w, n, op: w.emit("Gather", *w.names(n.inputs), axis=op.axis),
    ops.GatherElements: lambda w, n, op: w.emit("GatherElements", *w.names(n.inputs), axis=op.axis),
}  # fmt: skip
