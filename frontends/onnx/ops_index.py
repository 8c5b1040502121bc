"""Indexing: gather, scatter, top-k, one-hot, running sums, data-dependent shapes when the data is known."""

from __future__ import annotations

import numpy as np

from bitwright.frontends.onnx.call import Call
from bitwright.frontends.onnx.symbolic import Entry
from bitwright.frontends.onnx.values import Val
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import BOOL, S64
from bitwright.ir.weights import Array


def in_range(c: Call, index: Val, size: Entry) -> None:
    """A constant index must address an element."""
    if index.handle is None or not isinstance(size, int) or not index.type.size:
        return
    lo, hi = int(index.handle.array.min()), int(index.handle.array.max())
    if lo < -size or hi >= size:
        raise InvalidInput(f"an index of {lo}..{hi} is outside an axis of size {size}")


def _gather(c: Call) -> Val:
    x, index = c.x(0), c.x(1)
    axis = c.axis(c.int_("axis"), x.rank)
    size = x.shape[axis]
    in_range(c, index, x.dims[axis])
    if index.rank == 0 and index.handle is not None and isinstance(size, int) and x.handle is None:
        at = int(index.handle.array) % size  # one known row: a view, no table look-up
        return c.squeeze(c.slice(x, axis, at, at + 1), axis)
    return c.emit(ops.Gather(axis), x, index)


def _gather_elements(c: Call) -> Val:
    x, index = c.x(0), c.x(1)
    axis = c.axis(c.int_("axis"), x.rank)
    in_range(c, index, x.dims[axis])
    return c.emit(ops.GatherElements(axis), x, index)


def _gather_nd(c: Call) -> Val:
    x, index = c.x(0), c.x(1)
    batch, depth = c.int_("batch_dims"), c.size(index, index.rank - 1)
    if not 0 <= batch < min(x.rank, index.rank) or not 1 <= depth <= x.rank - batch:
        raise InvalidInput(f"gather of {x.type} by {index.type} with {batch} batch axes")
    return c.emit(ops.GatherNd(batch), x, index)


def _scatter_elements(c: Call) -> Val:
    x, index, updates = c.x(0), c.x(1), c.x(2)
    axis = c.axis(c.int_("axis"), x.rank)
    in_range(c, index, x.dims[axis])
    if index.shape != updates.shape or index.rank != x.rank:
        raise InvalidInput(f"scatter of {updates.type} by {index.type} into {x.type}")
    return c.emit(ops.ScatterElements(axis, _reduction(c)), x, index, updates)


def _reduction(c: Call) -> str:
    r = c.text("reduction", "none")
    if r not in ("none", "add", "mul", "min", "max"):
        raise InvalidInput(f"reduction is {r!r}")
    return r


def _scatter_nd(c: Call) -> Val:
    x, index = c.x(0), c.x(1)
    if not 1 <= c.size(index, index.rank - 1) <= x.rank:
        raise InvalidInput(f"scatter into {x.type} by {index.type}")
    return c.emit(ops.ScatterNd(_reduction(c)), x, index, c.x(2))


def _topk(c: Call) -> tuple[Val, ...]:
    x = c.x()
    k = c.int_("k") if c.since < 10 else int(c.const(1).reshape(-1)[0])
    axis = c.axis(c.int_("axis", -1), x.rank)
    if not 0 <= k <= c.size(x, axis):
        raise InvalidInput(f"the {k} largest of {c.size(x, axis)}")
    return c.emit_all(ops.TopK(k, axis, bool(c.int_("largest", 1))), x)


def _one_hot(c: Call) -> Val:
    index, values = c.x(0), c.x(2)
    depth = int(c.const(1, "depth").reshape(-1)[0])
    if not 0 <= depth <= 1 << 24:
        raise InvalidInput(f"depth {depth}")
    axis = c.axis(c.int_("axis", -1), index.rank + 1)
    index = c.cast(index, S64)
    index = c.where(c.binary("lt", index, 0), c.add(index, depth), index)
    places = c.reshape(c.iota(depth), [depth if i == axis else 1 for i in range(index.rank + 1)])
    hit = c.binary("eq", c.unsqueeze(index, axis), places)
    off, on = (c.reshape(c.slice(values, 0, i, i + 1), ()) for i in (0, 1))
    return c.where(hit, on, off)


def _cumsum(c: Call) -> Val:
    x = c.x()
    axis = c.axis(int(c.const(1, "axis").reshape(())), x.rank)
    return c.emit(ops.CumSum(axis, bool(c.int_("exclusive")), bool(c.int_("reverse"))), x)


def _cumprod(c: Call) -> Val:
    """Running product by doubling: log2(n) shifted multiplications."""
    x = c.x()
    axis = c.axis(int(c.const(1, "axis").reshape(())), x.rank)
    size, back = c.size(x, axis), bool(c.int_("reverse"))
    y = c.emit(ops.Flip((axis,)), x) if back else x
    shift = 1
    if c.int_("exclusive"):
        y = _shift_in_ones(c, y, axis, 1, size)
    while shift < size:
        y = c.mul(y, _shift_in_ones(c, y, axis, shift, size))
        shift *= 2
    return c.emit(ops.Flip((axis,)), y) if back else y


def _shift_in_ones(c: Call, x: Val, axis: int, by: int, size: int) -> Val:
    pads = [0] * (2 * x.rank)
    pads[axis] = by
    return c.slice(c.emit(ops.Pad(tuple(pads), 1.0), x), axis, 0, size)


def _compress(c: Call) -> Val:
    x, keep = c.x(0), c.x(1)
    chosen = np.flatnonzero(c.known(keep, "condition", bindable=False))
    if not c.has("axis"):
        return c.emit(ops.Gather(0), c.reshape(x, (c.x().type.size,)), c.literal(chosen))
    return c.emit(ops.Gather(c.axis(c.int_("axis"), x.rank)), x, c.literal(chosen))


def _non_zero(c: Call) -> Val:
    a = c.known(c.x(), "input", bindable=False)
    return c.literal(np.stack(np.nonzero(a)) if a.ndim else np.zeros((0, int(bool(a))), np.int64))


def _unique(c: Call) -> list[Val]:
    x = c.x()
    a, axis = c.known(x, "input", bindable=False), c.int_("axis") if c.has("axis") else None
    values, first, inverse, counts = np.unique(a, True, True, True, axis=axis)
    if not c.int_("sorted", 1):
        order = np.argsort(first)
        rank = np.argsort(order)
        values = np.take(values, order, axis if axis is not None else 0)
        first, inverse, counts = first[order], rank[inverse], counts[order]
    return [c.literal(values, x.type.dtype), *(c.literal(v.reshape(-1)) for v in (first, inverse, counts))]


def _reverse_sequence(c: Call) -> Val:
    x, lengths = c.x(0), c.cast(c.x(1), S64)
    time, batch = c.int_("time_axis"), c.int_("batch_axis", 1)
    if {time, batch} != {0, 1}:
        raise InvalidInput(f"time_axis {time}, batch_axis {batch}")
    steps = x.dims[time]
    t = c.reshape(c.iota(steps), [steps if i == time else 1 for i in range(2)])
    n = c.reshape(lengths, [x.dims[batch] if i == batch else 1 for i in range(2)])
    index = c.where(c.binary("lt", t, n), c.sub(c.sub(n, t), 1), t)
    return take_along(c, x, index, time)


def take_along(c: Call, x: Val, index: Val, axis: int) -> Val:
    """GatherElements with an index over the leading axes, the same for all trailing ones."""
    shape = [*index.dims, *[1] * (x.rank - index.rank)]
    wide = c.expand(c.reshape(index, shape), [*index.dims, *x.dims[index.rank :]])
    return c.emit(ops.GatherElements(axis), x, wide)


def _tensor_scatter(c: Call) -> Val:
    """Write updates into a cache at per-batch positions along an axis."""
    x, updates, at = c.x(0), c.x(1), c.opt(2)
    axis = c.axis(c.int_("axis", -2), x.rank)
    mode = c.text("mode", "linear")
    steps, size = c.size(updates, axis), c.size(x, axis)
    where = c.reshape(c.iota(steps), (1, steps))
    if at is not None:
        where = c.add(where, c.reshape(c.cast(at, S64), (at.dims[0], 1)))
    if mode == "circular":
        where = c.binary("mod", where, size)
    elif mode != "linear":
        raise InvalidInput(f"mode is {mode!r}")
    shape = [1] * x.rank
    index = c.reshape(where, [*(where.dims[0] if i == 0 else steps if i == axis else d for i, d in enumerate(shape))])
    return c.emit(ops.ScatterElements(axis), x, c.expand(index, updates.dims), updates)


# --- max pooling with indices ---------------------------------------------------------------------------------------


def max_pool_indices(c: Call, x: Val, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...],
                     pads: tuple[int, ...]) -> Val:  # fmt: skip
    """Flat positions of the window maxima: gather every window of x and of its position numbers, take the argmax."""
    n, shape = len(kernel), c.static(x)
    space = shape[2:]
    outs = [(space[i] + pads[i] + pads[n + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(n)]
    if not x.type.dtype.is_float or int(np.prod(outs)) * int(np.prod(kernel)) > 1 << 22:
        raise c.refuse("max pooling with indices of this type or size")
    axes = [np.arange(o)[:, None] * s + np.arange(k) * d - p
            for o, s, k, d, p in zip(outs, stride, kernel, dilation, pads[:n], strict=True)]  # fmt: skip
    flat: Array = np.zeros((), np.int64)
    valid: Array = np.ones((), bool)
    for i in range(n):
        view = [1] * (2 * n)
        view[i], view[n + i] = axes[i].shape
        flat = flat * space[i] + np.clip(axes[i], 0, space[i] - 1).reshape(view)
        valid = valid & ((axes[i] >= 0) & (axes[i] < space[i])).reshape(view)
    flat = flat.reshape(int(np.prod(outs)), -1)
    rows = c.reshape(x, (shape[0] * shape[1], int(np.prod(space))))
    windows = c.emit(ops.Gather(1), rows, c.literal(flat))
    masked = c.where(c.literal(valid.reshape(flat.shape), BOOL), windows, c.scalar(float("-inf"), x.type.dtype))
    best = c.emit(ops.ArgReduce("argmax", 2, True), masked)
    numbers = flat if not c.int_("storage_order") else _column_major(flat, space)
    table = c.expand(c.literal(numbers[None]), (shape[0] * shape[1], *flat.shape))
    inside = c.squeeze(c.emit(ops.GatherElements(2), table, best), 2)
    base = c.literal((np.arange(shape[0] * shape[1]) * int(np.prod(space)))[:, None])
    return c.reshape(c.add(inside, base), (shape[0], shape[1], *outs))


def _column_major(flat: Array, space: tuple[int, ...]) -> Array:
    return np.ravel_multi_index(np.unravel_index(flat, space), space, order="F")


def _max_unpool(c: Call) -> Val:
    x, index = c.x(0), c.x(1)
    shape = c.static(x)
    if c.value(2) is not None:
        out = [int(v) for v in c.const(2, "output_shape").reshape(-1)]
    else:
        kernel = c.ints("kernel_shape") or ()
        n = len(kernel)
        stride, pads = c.ints("strides") or (1,) * n, c.ints("pads") or (0,) * (2 * n)
        space = [(shape[2 + i] - 1) * stride[i] + kernel[i] - pads[i] - pads[n + i] for i in range(n)]
        out = [*shape[:2], *space]
    count = int(np.prod(out))
    if count > 1 << 28:
        raise InvalidInput(f"an unpooling to {out}")
    zeros = c.expand(c.scalar(0, x.type.dtype), (count,))
    inner = index
    if c.value(2) is not None:  # indices count in the shape that the pooling saw
        kernel = c.ints("kernel_shape") or ()
        n = len(kernel)
        stride = c.ints("strides") or (1,) * n
        seen = [*shape[:2], *((shape[2 + i] - 1) * stride[i] + kernel[i] for i in range(n))]
        inner = _renumber(c, index, seen, out)
    flat = c.emit(
        ops.ScatterElements(0), zeros, c.reshape(inner, (x.type.size,)), c.reshape(x, (x.type.size,))
    )  # fmt: skip
    return c.reshape(flat, out)


def _renumber(c: Call, index: Val, seen: list[int], out: list[int]) -> Val:
    """Flat positions in one shape as flat positions in another with the same coordinates."""
    total: Val | None = None
    rest = index
    for i in range(len(seen)):
        below = int(np.prod(seen[i + 1 :]))
        place = c.mul(c.binary("floordiv", rest, below), int(np.prod(out[i + 1 :])))
        rest = c.binary("mod", rest, below)
        total = place if total is None else c.add(total, place)
    assert total is not None
    return total


TABLE = {
    ("", "Gather"): _gather, ("", "GatherElements"): _gather_elements, ("", "GatherND"): _gather_nd,
    ("", "ScatterElements"): _scatter_elements, ("", "Scatter"): _scatter_elements, ("", "ScatterND"): _scatter_nd,
    ("", "TopK"): _topk, ("", "OneHot"): _one_hot, ("", "CumSum"): _cumsum, ("", "CumProd"): _cumprod,
    ("", "Compress"): _compress, ("", "NonZero"): _non_zero, ("", "Unique"): _unique,
    ("", "ReverseSequence"): _reverse_sequence, ("", "TensorScatter"): _tensor_scatter,
    ("", "MaxUnpool"): _max_unpool,
}  # fmt: skip
