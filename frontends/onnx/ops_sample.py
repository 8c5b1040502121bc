"""Sampling at computed positions: GridSample, DeformConv, RoiAlign; and Col2Im."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product as combinations

import numpy as np

from bitwright.frontends.onnx.call import Call
from bitwright.frontends.onnx.ops_contract import kernel_of, windows
from bitwright.frontends.onnx.symbolic import product
from bitwright.frontends.onnx.values import Val
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import S64
from bitwright.ir.weights import Array


def sample(c: Call, x: Val, at: Sequence[Val], mode: str, padding: str, aligned: bool) -> Val:
    """x[N, C, *S] read at pixel positions ``at`` (one [N, P] tensor per space axis) -> [N, C, P]."""
    space = c.static(x)[2:]
    flat = c.reshape(x, (*x.dims[:2], product(x.dims[2:])))
    taps = [_taps(c, p, mode) for p in at]
    total: Val | None = None
    for combo in combinations(*taps):
        index: Val | None = None
        weight: Val | None = None
        for (place, w), size in zip(combo, space, strict=True):
            place, valid = _inside(c, place, size, padding, aligned)
            index = place if index is None else c.add(c.mul(index, size), place)
            w = w if valid is None else c.where(valid, w, c.scalar(0, w.type.dtype))
            weight = w if weight is None else c.mul(weight, w)
        assert index is not None
        assert weight is not None
        read = _read(c, flat, c.cast(index, S64))
        term = c.mul(read, c.unsqueeze(weight, 1))
        total = term if total is None else c.add(total, term)
    assert total is not None
    return total


def _read(c: Call, flat: Val, index: Val) -> Val:
    wide = c.expand(c.unsqueeze(index, 1), (flat.dims[0], flat.dims[1], index.dims[1]))
    return c.emit(ops.GatherElements(2), flat, wide)


def _taps(c: Call, p: Val, mode: str) -> list[tuple[Val, Val]]:
    """Whole positions around p with their weights."""
    if mode == "nearest":
        place = c.unary("round", p)
        return [(place, c.add(c.mul(place, 0.0), 1.0))]
    low = c.unary("floor", p)
    t = c.sub(p, low)
    if mode == "linear":
        return [(low, c.add(c.unary("neg", t), 1.0)), (c.add(low, 1.0), t)]
    return [(c.add(low, float(i - 1)), w) for i, w in enumerate(_cubic(c, t))]


def _cubic(c: Call, t: Val) -> list[Val]:
    a = -0.75
    one = c.add(c.unary("neg", t), 1.0)

    def near(d: Val) -> Val:
        return c.add(c.mul(c.mul(c.sub(c.mul(d, a + 2), a + 3), d), d), 1.0)

    def far(d: Val) -> Val:
        return c.sub(c.mul(c.add(c.mul(c.sub(c.mul(d, a), 5 * a), d), 8 * a), d), 4 * a)

    return [far(c.add(t, 1.0)), near(t), near(one), far(c.add(one, 1.0))]


def _inside(c: Call, place: Val, size: int, padding: str, aligned: bool) -> tuple[Val, Val | None]:
    """The position brought into the axis, and (for zeros) where it was inside."""
    clamp = ops.Clamp(0.0, float(size - 1))
    if padding == "zeros":
        valid = c.binary("and", c.binary("ge", place, 0.0), c.binary("le", place, float(size - 1)))
        return c.emit(clamp, place), valid
    if padding == "reflection":
        place = c.unary("round", reflect(c, place, size, aligned))
    return c.emit(clamp, place), None


def reflect(c: Call, p: Val, size: int, aligned: bool) -> Val:
    """Reflect at the axis's borders: the pixel centres when aligned, the pixel edges otherwise."""
    low, high = (0.0, size - 1.0) if aligned else (-0.5, size - 0.5)
    if high <= low:
        return c.mul(p, 0.0)
    span = high - low
    d = c.binary("mod", c.unary("abs", c.sub(p, low)), 2 * span)
    folded = c.binary("min", d, c.add(c.unary("neg", d), 2 * span))
    return c.add(folded, low)


def _grid_sample(c: Call) -> Val:
    x, grid = c.x(0), c.x(1)
    n, mode = (
        x.rank - 2,
        {"bilinear": "linear", "bicubic": "cubic"}.get(c.text("mode", "linear"), c.text("mode", "linear")),
    )
    padding, aligned = c.text("padding_mode", "zeros"), bool(c.int_("align_corners"))
    if (
        mode not in ("nearest", "linear", "cubic")
        or padding not in ("zeros", "border", "reflection")
        or n not in (1, 2, 3)
    ):
        raise InvalidInput(f"mode {mode!r}, padding {padding!r} for {x.type}")
    if grid.rank != x.rank or grid.shape[-1] != n:
        raise InvalidInput(f"a grid of {grid.type} for {x.type}")
    points = product(grid.dims[1:-1])
    at = []
    for i in range(n):  # the grid names axes last to first
        g = c.reshape(c.slice(grid, grid.rank - 1, n - 1 - i, n - i), (grid.dims[0], points))
        g = c.cast(g, x.type.dtype)
        size = c.size(x, 2 + i)
        g = (
            c.mul(c.add(g, 1.0), (size - 1) / 2)
            if aligned
            else c.div(c.sub(c.mul(c.add(g, 1.0), float(size)), 1.0), 2.0)
        )
        if padding == "reflection":
            g = reflect(c, g, size, aligned)
        at.append(g)
    y = sample(c, x, at, mode, padding, aligned)
    return c.reshape(y, (*x.dims[:2], *grid.dims[1:-1]))


def _deform_conv(c: Call) -> Val:
    x, w, offset, bias, mask = c.x(0), c.x(1), c.x(2), c.opt(3), c.opt(4)
    kernel = kernel_of(c, w)
    if len(kernel) != 2:
        raise c.refuse("deformable convolution over two space axes is supported")
    stride, dilation, pads = windows(c, x, kernel)
    groups, parts = c.int_("group", 1), c.int_("offset_group", 1)
    n, channels = c.size(x, 0), c.size(x, 1)
    oh, ow = (c.size(offset, i) for i in (2, 3))
    kh, kw = kernel
    taps, points = kh * kw, kh * kw * oh * ow
    shifts = c.reshape(offset, (n, parts, taps, 2, oh, ow))
    base = [_tap_positions(kernel, (oh, ow), stride, dilation, pads, i) for i in range(2)]
    each, columns = channels // parts, []
    for g in range(parts):
        part = c.slice(shifts, 1, g, g + 1)
        at = [
            c.reshape(
                c.add(c.reshape(c.slice(part, 3, i, i + 1), (n, taps, oh, ow)), c.literal(base[i], x.type.dtype)),
                (n, points),
            )
            for i in range(2)
        ]
        column = sample(c, c.slice(x, 1, g * each, (g + 1) * each), at, "linear", "zeros", True)
        if mask is not None:
            m = c.slice(c.reshape(mask, (n, parts, points)), 1, g, g + 1)
            column = c.mul(column, m)
        columns.append(column)
    full = c.reshape(c.concat(columns, 1), (n, groups, channels // groups * taps, oh * ow))
    out = c.size(w, 0)
    weight = c.reshape(w, (groups, out // groups, channels // groups * taps))
    y = c.reshape(c.emit(ops.MatMul(), weight, full), (n, out, oh, ow))
    return y if bias is None else c.add(y, c.reshape(bias, (out, 1, 1)))


def _tap_positions(kernel: tuple[int, ...], outs: tuple[int, int], stride: tuple[int, ...], dilation: tuple[int, ...],
                   pads: tuple[int, ...], axis: int) -> Array:  # fmt: skip
    """[taps, oh, ow]: the undeformed position along one axis that each kernel tap reads for each output."""
    k = np.indices(kernel)[axis].reshape(-1, 1, 1) * dilation[axis]
    o = np.indices(outs)[axis][None] * stride[axis] - pads[axis]
    return np.asarray(k + o, np.float32)


def _roi_align(c: Call) -> Val:
    x, rois, batch = c.x(0), c.x(1), c.x(2)
    oh, ow, ratio = c.int_("output_height", 1), c.int_("output_width", 1), c.int_("sampling_ratio")
    half = c.since >= 16 and c.text("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    mode = c.text("mode", "avg")
    if ratio < 1 or ratio * max(oh, ow) > 4096 or mode != "avg":
        raise c.refuse("RoiAlign needs a fixed sampling_ratio and mode avg")
    c.ignore("coordinate_transformation_mode")
    count, scale = c.size(rois, 0), c.float_("spatial_scale", 1.0)
    edges = [c.reshape(c.slice(rois, 1, i, i + 1), (count, 1)) for i in range(4)]
    edges = [c.sub(c.mul(e, scale), 0.5 if half else 0.0) for e in edges]
    per_axis, outside = [], []
    for start, end, out, axis in ((edges[1], edges[3], oh, 2), (edges[0], edges[2], ow, 3)):
        length = c.sub(end, start)
        length = length if half else c.binary("max", length, 1.0)
        fractions = ((np.arange(out * ratio) + 0.5) / ratio / out)[None]
        p = c.add(c.mul(length, c.literal(fractions, x.type.dtype)), start)
        outside.append(c.binary("or", c.binary("lt", p, -1.0), c.binary("gt", p, float(c.size(x, axis)))))
        per_axis.append(c.emit(ops.Clamp(0.0, c.size(x, axis) - 1.0), p))
    grid = (count, oh * ratio, ow * ratio)
    ys = c.reshape(c.expand(c.unsqueeze(per_axis[0], 2), grid), (count, grid[1] * grid[2]))
    xs = c.reshape(c.expand(c.unsqueeze(per_axis[1], 1), grid), (count, grid[1] * grid[2]))
    y = c.reshape(
        sample(c, c.emit(ops.Gather(0), x, batch), [ys, xs], "linear", "border", True), (count, x.dims[1], *grid[1:])
    )
    away = c.binary("or", c.unsqueeze(outside[0], 2), c.unsqueeze(outside[1], 1))
    y = c.where(c.unsqueeze(away, 1), c.scalar(0, x.type.dtype), y)
    return c.reduce("mean", c.reshape(y, (count, x.dims[1], oh, ratio, ow, ratio)), (3, 5))


def _col2im(c: Call) -> Val:
    """Overlapping blocks summed into an image: a transposed convolution with one-hot weights."""
    x = c.x()
    image, block = c.const_ints(1) or (), c.const_ints(2) or ()
    n = len(image)
    if len(block) != n or not 1 <= n <= 3:
        raise c.refuse(f"an image of {image} from blocks of {block}")
    stride, dilation = c.ints("strides") or (1,) * n, c.ints("dilations") or (1,) * n
    pads, taps = c.ints("pads") or (0,) * (2 * n), int(np.prod(block))
    reach = [dilation[i] * (block[i] - 1) + 1 for i in range(n)]
    columns = [(image[i] + pads[i] + pads[n + i] - reach[i]) // stride[i] + 1 for i in range(n)]
    extra = tuple(image[i] + pads[i] + pads[n + i] - (columns[i] - 1) * stride[i] - reach[i] for i in range(n))
    channels = c.size(x, 1) // taps
    if taps * taps * channels > 1 << 22:
        raise c.refuse("the blocks are too large")
    weight = np.tile(np.eye(taps).reshape(taps, 1, *block), (channels, 1, *[1] * n))
    cols = c.reshape(x, (x.dims[0], channels * taps, *columns))
    op = ops.ConvTranspose(stride, pads, extra, dilation, channels)
    return c.emit(op, cols, c.literal(weight, x.type.dtype))


TABLE = {
    ("", "GridSample"): _grid_sample, ("", "DeformConv"): _deform_conv, ("", "RoiAlign"): _roi_align,
    ("", "Col2Im"): _col2im,
}  # fmt: skip
