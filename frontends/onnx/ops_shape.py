"""Operators that move elements without computing: shapes, slices, joins, pads, blocks."""

from __future__ import annotations

import numpy as np

from bitwright.frontends.onnx.call import Call
from bitwright.frontends.onnx.reader import dtype_of_element, tensor_handle
from bitwright.frontends.onnx.symbolic import Entry, Poly, Unknown, add, compare, exact_div, negate, product
from bitwright.frontends.onnx.values import Val
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import BOOL, F32, S64, TensorType


def _shape(c: Call) -> Val:
    x = c.x()
    dims = x.dims[slice(c.int_("start"), c.int_("end") if c.has("end") else None)]
    return c.importer.sizes(np.array([*dims, None], dtype=object)[:-1], S64)


def _size(c: Call) -> Val:
    out = np.empty((), dtype=object)
    out[()] = product(c.x().dims)
    return c.importer.sizes(out, S64)


def _reshape(c: Call) -> Val:
    x = c.x()
    if c.since < 5:
        want: list[Entry] = list(c.ints("shape") or ())
    else:
        want = c.entries(1)
    if not c.int_("allowzero"):
        if any(d == 0 and i >= x.rank for i, d in enumerate(want)):
            raise InvalidInput(f"shape {want} copies an axis that {x.type} does not have")
        want = [x.dims[i] if d == 0 else d for i, d in enumerate(want)]
    return c.reshape(x, fill_in(c, x, want))


def fill_in(c: Call, x: Val, want: list[Entry]) -> list[Entry]:
    """The shape with its -1 replaced by what remains."""
    if want.count(-1) == 0:
        return want
    if want.count(-1) > 1:
        raise InvalidInput(f"shape {want} has -1 more than once")
    rest = product(d for d in want if d != -1)
    try:
        return [exact_div(product(x.dims), rest) if d == -1 else d for d in want]
    except (Unknown, ZeroDivisionError):
        raise InvalidInput(f"{x.type} cannot be reshaped to {want}") from None


def _flatten(c: Call) -> Val:
    x = c.x()
    axis = c.int_("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    if not 0 <= axis <= x.rank:
        raise InvalidInput(f"axis {axis} is outside a tensor of rank {x.rank}")
    return c.reshape(x, (product(x.dims[:axis]), product(x.dims[axis:])))


def _squeeze(c: Call) -> Val:
    x, axes = c.x(), c.ints_at("axes", 1)
    drop = tuple(i for i, d in enumerate(x.shape) if d == 1) if axes is None else c.axes(axes, x.rank)
    if any(x.shape[i] != 1 for i in drop):
        raise InvalidInput(f"axes {drop} of {x.type} cannot be squeezed: their size is not 1")
    return c.reshape(x, [d for i, d in enumerate(x.dims) if i not in drop])


def _unsqueeze(c: Call) -> Val:
    x, axes = c.x(), c.ints_at("axes", 1)
    if axes is None:
        raise InvalidInput("axes are missing")
    rank = x.rank + len(axes)
    new, rest = set(c.axes(axes, rank)), iter(x.dims)
    return c.reshape(x, [1 if i in new else next(rest) for i in range(rank)])


def _transpose(c: Call) -> Val:
    x = c.x()
    perm = c.ints("perm") or tuple(reversed(range(x.rank)))
    if sorted(perm) != list(range(x.rank)):
        raise InvalidInput(f"perm {list(perm)} is no permutation of the axes of {x.type}")
    return transposed(c, x, perm)


def transposed(c: Call, x: Val, perm: tuple[int, ...]) -> Val:
    """Transpose; a dequantized constant is transposed before it is dequantized, so its integers stay visible."""
    p = x.packed
    if p is None or p.q.handle is None:
        return c.transpose(x, perm)
    from bitwright.frontends.onnx.ops_quant import dequantize

    axis = None if p.axis is None else perm.index(p.axis)
    blocked = p.scale.rank == x.rank and p.group
    scale = c.transpose(p.scale, perm) if blocked else p.scale
    zero = p.zero if p.zero is None or not blocked else c.transpose(p.zero, perm)
    return dequantize(c, c.transpose(p.q, perm), scale, zero, axis, p.group)


def broadcast_dims(c: Call, a: tuple[Entry, ...], b: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """NumPy's broadcast of two shapes with symbols."""
    rank = max(len(a), len(b))
    out: list[Entry] = []
    for x, y in zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True):
        if x != y and 1 not in (x, y):
            raise InvalidInput(f"shapes {list(map(str, a))} and {list(map(str, b))} do not broadcast")
        out.append(y if x == 1 else x)
    return tuple(out)


def _expand(c: Call) -> Val:
    x = c.x()
    return c.expand(x, broadcast_dims(c, x.dims, tuple(c.entries(1))))


def _concat(c: Call) -> Val:
    xs = c.all()
    if c.since < 4:
        return c.concat(xs, c.axis(c.int_("axis", 1), xs[0].rank))
    return c.concat(xs, c.axis(c.int_("axis"), xs[0].rank))


def split_sizes(c: Call, x: Val, axis: int, count: int, given: tuple[int, ...] | None) -> list[int]:
    """Sizes of the parts along an axis."""
    size = c.size(x, axis)
    if given is not None:
        if sum(given) != size or any(g < 0 for g in given):
            raise InvalidInput(f"split {list(given)} does not add up to {size}")
        return list(given)
    each = -(-size // max(count, 1))
    return [max(0, min(each, size - i * each)) for i in range(count)]


def _split(c: Call) -> list[Val]:
    x = c.x()
    axis = c.axis(c.int_("axis"), x.rank)
    given = c.ints_at("split", 1)
    count = len(given) if given is not None else c.int_("num_outputs", len(c.node.output))
    if count > 4096:
        raise InvalidInput(f"a split into {count} parts")
    sizes = split_sizes(c, x, axis, count, given)
    ends = np.cumsum(sizes).tolist()
    return [c.slice(x, axis, e - s, e) for s, e in zip(sizes, ends, strict=True)]


def _slice(c: Call) -> Val:
    x = c.x()
    if c.since < 10:
        starts: list[Entry] = list(c.ints("starts") or ())
        stops: list[Entry] = list(c.ints("ends") or ())
        axes, steps = c.ints("axes"), None
    else:
        starts, stops = c.entries(1), c.entries(2)
        axes, steps = c.const_ints(3), c.const_ints(4)
    axes = c.axes(axes if axes is not None else range(len(starts)), x.rank)
    steps = steps or (1,) * len(starts)
    if not len(starts) == len(stops) == len(axes) == len(steps):
        raise InvalidInput("starts, ends, axes and steps differ in length")
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        x = slice_axis(c, x, axis, start, stop, step)
    return x


def slice_axis(c: Call, x: Val, axis: int, start: Entry, stop: Entry, step: int) -> Val:
    """x[start:stop:step] along one axis with Python's rules for negative and large bounds."""
    if step == 0:
        raise InvalidInput("a slice has step 0")
    size = x.dims[axis]
    if isinstance(size, Poly) or isinstance(start, Poly) or isinstance(stop, Poly):
        return _slice_symbolic(c, x, axis, start, stop, step)
    whole = range(*slice(int(start), _python_stop(int(stop), int(size), step), step).indices(int(size)))
    if not whole:
        return c.slice(x, axis, 0, 0)
    if step > 0:
        return c.slice(x, axis, whole[0], whole[-1] + 1, step)
    part = c.slice(x, axis, whole[-1], whole[0] + 1, -step)
    return c.emit(ops.Flip((axis,)), part)


def _python_stop(stop: int, size: int, step: int) -> int | None:
    """ONNX clamps the end of a backward slice at -size - 1, which Python spells None."""
    return None if step < 0 and stop < -size else stop


def _slice_symbolic(c: Call, x: Val, axis: int, start: Entry, stop: Entry, step: int) -> Val:
    size = x.dims[axis]
    if step == -1 and start in (-1, _BIG) and not isinstance(stop, Poly) and stop < -_LARGE:
        return c.emit(ops.Flip((axis,)), x)
    if step != 1:
        raise c.refuse(f"a slice with step {step} of a symbolic axis")
    begin, end = (_bound(e, size) for e in (start, stop))
    if begin == 0 and _covers(c, end, size):
        return x
    if not isinstance(begin, Poly) and not isinstance(end, Poly) and 0 <= begin and end <= 1:
        return c.slice(x, axis, int(begin), max(int(begin), int(end)))
    if not isinstance(start, Poly) and start < 0 and _covers(c, end, size) and start >= -1:
        return c.emit(ops.Gather(axis), x, c.literal(np.arange(int(start), 0)))
    count = add(end, negate(begin))
    if not _covers(c, begin, 0) or (isinstance(size, Poly) and not _covers(c, size, end)) or not _covers(c, count, 0):
        raise c.refuse(f"the slice [{start}:{stop}] of an axis of size {x.shape[axis]!r}")
    index = c.iota(count)
    if begin != 0:
        offset = np.empty((), dtype=object)
        offset[()] = begin
        index = c.add(index, c.importer.sizes(offset, S64))
    return c.emit(ops.Gather(axis), x, index)


_LARGE = 1 << 30
_BIG = (1 << 63) - 1


def _bound(e: Entry, size: Entry) -> Entry:
    if not isinstance(e, Poly) and e > _LARGE:
        return size
    negative = e.sign == -1 if isinstance(e, Poly) else e < 0
    return add(e, size) if negative else e


def _covers(c: Call, end: Entry, size: Entry) -> bool:
    try:
        return compare(end, size) >= 0
    except Unknown:
        return False


def _pad(c: Call) -> Val:
    x = c.x()
    if c.since < 11:
        pads, value = c.ints("pads") or c.ints("paddings") or (), c.float_("value")
        axes = None
    else:
        pads = c.const_ints(1) or ()
        v = c.opt(2)
        value = 0.0 if v is None else float(c.known(v, "constant_value").reshape(-1)[0])
        axes = c.const_ints(3)
    where = tuple(range(x.rank)) if axes is None else c.axes(axes, x.rank)
    if len(pads) != 2 * len(where):
        raise InvalidInput(f"{len(pads)} pads for {len(where)} axes")
    begin, end = [0] * x.rank, [0] * x.rank
    for i, axis in enumerate(where):
        begin[axis], end[axis] = pads[i], pads[len(where) + i]
    return padded(c, x, begin, end, c.text("mode", "constant"), value)


def padded(c: Call, x: Val, begin: list[int], end: list[int], mode: str, value: float) -> Val:
    """Pad, where negative amounts crop."""
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise InvalidInput(f"{mode!r} is not a padding mode")
    if mode != "constant" and max([0, *begin, *end, *(d for d in x.shape if isinstance(d, int))]) > 1 << 24:
        raise c.refuse("the padding is too large")
    for axis in range(x.rank):
        if begin[axis] < 0 or end[axis] < 0:
            size = c.size(x, axis)
            x = c.slice(x, axis, max(0, -begin[axis]), max(max(0, -begin[axis]), size + min(0, end[axis])))
    padding = tuple(max(0, p) for p in (*begin, *end))
    return c.emit(ops.Pad(padding, value, mode), x) if any(padding) else x


def _tile(c: Call) -> Val:
    x = c.x()
    if c.since < 6:
        axis, count = int(c.const(2).reshape(())), int(c.const(1).reshape(()))
        repeats: list[Entry] = [count if i == axis else 1 for i in range(x.rank)]
    else:
        repeats = c.entries(1)
    if len(repeats) != x.rank:
        raise InvalidInput(f"{len(repeats)} repeats for {x.type}")
    if any(isinstance(r, Poly) for r in repeats):
        if any(isinstance(r, Poly) and x.shape[i] != 1 for i, r in enumerate(repeats)):
            raise c.refuse("a symbolic number of repeats of an axis that is longer than 1")
        x = c.expand(x, [r if isinstance(r, Poly) else d for r, d in zip(repeats, x.dims, strict=True)])
        repeats = [1 if isinstance(r, Poly) else r for r in repeats]
    return c.emit(ops.Tile(tuple(int(r) for r in repeats)), x)  # type: ignore[arg-type]


def _constant_of_shape(c: Call) -> Val:
    if not c.has("value"):
        value = c.scalar(0, F32)
    else:
        handle, kind = tensor_handle(c.attributes["value"].t, c.importer.folder, "value")
        value = c.importer.constant(handle.array.reshape(()), TensorType(kind.dtype, ()))
    return c.expand(value, c.entries(0))


def _range(c: Call) -> Val:
    start, limit, delta = (c.entries(i)[0] for i in range(3))
    dtype = c.x().type.dtype
    if any(isinstance(e, Poly) for e in (start, limit, delta)):
        if start != 0 or delta != 1:
            raise c.refuse("a range of symbolic size that does not count 0, 1, 2, ...")
        return c.iota(limit, dtype)
    a, b, d = (np.asarray(c.const(i)).reshape(()).astype(dtype.numpy) for i in range(3))
    if d == 0:
        raise InvalidInput("a range with step 0")
    count = max(0, int(np.ceil((float(b) - float(a)) / float(d))))
    if count > 1 << 24:
        raise c.refuse(f"a range of {count} elements")
    return c.literal(a + np.arange(count).astype(dtype.numpy) * d, dtype)


def _depth_to_space(c: Call) -> Val:
    x, b = c.x(), c.int_("blocksize")
    n, ch, h, w = x.dims
    if b < 1:
        raise InvalidInput(f"blocksize {b}")
    low = _divided(c, ch, b * b)
    if c.text("mode", "DCR") == "DCR":
        y = c.transpose(c.reshape(x, (n, b, b, low, h, w)), (0, 3, 4, 1, 5, 2))
    else:
        y = c.transpose(c.reshape(x, (n, low, b, b, h, w)), (0, 1, 4, 2, 5, 3))
    return c.reshape(y, (n, low, product((h, b)), product((w, b))))


def _space_to_depth(c: Call) -> Val:
    x, b = c.x(), c.int_("blocksize")
    n, ch, h, w = x.dims
    if b < 1:
        raise InvalidInput(f"blocksize {b}")
    th, tw = _divided(c, h, b), _divided(c, w, b)
    mode = c.text("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        raise InvalidInput(f"mode is {mode!r}")
    perm = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    y = c.transpose(c.reshape(x, (n, ch, th, b, tw, b)), perm)
    return c.reshape(y, (n, product((ch, b * b)), th, tw))


def _divided(c: Call, a: Entry, b: int) -> Entry:
    try:
        return exact_div(a, b)
    except Unknown:
        raise InvalidInput(f"a size is not a multiple of {b}") from None


def _eye_like(c: Call) -> Val:
    x = c.x()
    dtype = dtype_of_element(c.int_("dtype"), c.importer.origin) if c.has("dtype") else x.type.dtype
    rows, columns = c.static(x)
    if rows * columns > 1 << 24:
        raise c.refuse("the matrix is too large")
    return c.literal(np.eye(rows, columns, c.int_("k")), dtype)


def _trilu(c: Call) -> Val:
    x, k = c.x(), c.opt(1)
    offset = 0 if k is None else int(c.known(k, "'k'").reshape(()))
    rows, columns = x.dims[-2:]
    i, j = c.reshape(c.iota(rows), (rows, 1)), c.reshape(c.iota(columns), (1, columns))
    keep = c.binary("ge" if c.int_("upper", 1) else "le", j, c.add(i, offset))
    if x.type.dtype == BOOL:
        return c.binary("and", x, keep)
    return c.where(keep, x, c.scalar(0, x.type.dtype))


def _center_crop_pad(c: Call) -> Val:
    x = c.x()
    axes = c.axes(c.ints("axes") if c.has("axes") else range(x.rank), x.rank)  # type: ignore[arg-type]
    for axis, want in zip(axes, c.const(1).reshape(-1).tolist(), strict=True):
        size = c.size(x, axis)
        if want < size:
            start = (size - want) // 2
            x = c.slice(x, axis, start, start + want)
        else:
            begin, end = [0] * x.rank, [0] * x.rank
            begin[axis] = (want - size) // 2
            end[axis] = want - size - begin[axis]
            x = padded(c, x, begin, end, "constant", 0.0)
    return x


TABLE = {
    ("", "Shape"): _shape, ("", "Size"): _size, ("", "Reshape"): _reshape, ("", "Flatten"): _flatten,
    ("", "Squeeze"): _squeeze, ("", "Unsqueeze"): _unsqueeze, ("", "Transpose"): _transpose, ("", "Expand"): _expand,
    ("", "Concat"): _concat, ("", "Split"): _split, ("", "Slice"): _slice, ("", "Pad"): _pad, ("", "Tile"): _tile,
    ("", "ConstantOfShape"): _constant_of_shape, ("", "Range"): _range, ("", "DepthToSpace"): _depth_to_space,
    ("", "SpaceToDepth"): _space_to_depth, ("", "EyeLike"): _eye_like, ("", "Trilu"): _trilu,
    ("", "CenterCropPad"): _center_crop_pad,
}  # fmt: skip
