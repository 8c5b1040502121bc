"""Torch operators that move data by a fixed rule: views, permutations, slices, joins, pads, factories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitwright.frontends.torch_context import Context, Handler, Size, dims, dtype_from_torch, same_dim
from bitwright.ir import ops
from bitwright.ir.types import S64, Dim

_FAR = 2**62


def _view(cx: Context, x: str, *_: Any, **__: Any) -> str:
    return cx.reshape(x, cx.out.shape)


def _view_dtype(cx: Context, x: str, dtype: Any) -> str:
    if dtype_from_torch(dtype) != cx.dtype(x):
        raise cx.refuse("bits are reinterpreted as another dtype", "convert with .to(dtype)")
    return x


def _expand(cx: Context, x: str, *_: Any, **__: Any) -> str:
    return cx.expand(x, cx.out.shape)


def _permute(cx: Context, x: str, order: Sequence[int]) -> str:
    return cx.transpose(x, order)


def _swap(cx: Context, x: str, a: int, b: int) -> str:
    if cx.rank(x) == 0:
        return x
    order = list(range(cx.rank(x)))
    a, b = cx.axis(x, a), cx.axis(x, b)
    order[a], order[b] = order[b], order[a]
    return cx.transpose(x, order)


def _t(cx: Context, x: str) -> str:
    return x if cx.rank(x) < 2 else cx.transpose(x, range(cx.rank(x) - 1, -1, -1))


def _clip(bound: Any, size: int) -> int:
    at = int(bound)
    return min(max(at + size if at < 0 else at, 0), size)


def _slice(cx: Context, x: str, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> str:
    axis = cx.axis(x, dim)
    size, out = cx.shape(x)[axis], cx.out.shape[axis]
    start, end = 0 if start is None else start, _FAR if end is None else end
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        first = _clip(start, size)
        return cx.slice(x, axis, first, max(first, _clip(end, size)), int(step))
    if start == 0 and step == 1 and same_dim(size, out):
        return x
    if isinstance(start, int) and start >= 0 and isinstance(out, int):
        return cx.slice(x, axis, start, start + (out - 1) * int(step) + 1, int(step))
    index = cx.iota(out)
    if step != 1:
        index = cx.binary("mul", index, cx.constant(int(step), S64))
    if start != 0:
        index = cx.binary("add", index, cx.as_value(start, S64))
    return cx.emit(ops.Gather(axis), x, index)


def _select(cx: Context, x: str, dim: int, index: Any) -> str:
    axis = cx.axis(x, dim)
    size = cx.shape(x)[axis]
    if isinstance(index, int) and (index >= 0 or isinstance(size, int)):
        start = index if index >= 0 else index + int(size)
        return cx.squeeze(cx.slice(x, axis, start, start + 1), axis)
    return cx.emit(ops.Gather(axis), x, cx.as_value(index, S64))


def _pieces(cx: Context, x: str, sizes: Sequence[int], axis: int) -> tuple[str, ...]:
    parts, at = [], 0
    for s in sizes:
        parts.append(cx.slice(x, axis, at, at + s))
        at += s
    return tuple(parts)


def _split(cx: Context, x: str, size: Any, dim: int = 0) -> tuple[str, ...]:
    """split, split_with_sizes, chunk and tensor_split alike: torch's result shapes say where to cut."""
    axis = cx.axis(x, dim)
    sizes = [cx.dim(f.shape[axis]) for f in cx.fake]
    if len(sizes) == 1:
        return (x,)
    return _pieces(cx, x, [cx.static(s, "the split axis") for s in sizes], axis)


def _unbind(cx: Context, x: str, dim: int = 0) -> tuple[str, ...]:
    axis = cx.axis(x, dim)
    size = cx.static(cx.shape(x)[axis], "the unbound axis")
    return tuple(cx.squeeze(p, axis) for p in _pieces(cx, x, [1] * size, axis))


def _cat(cx: Context, parts: Sequence[str], dim: int = 0) -> str:
    dtype = cx.out.dtype
    kept = [cx.cast(p, dtype) for p in parts if cx.shape(p) != (0,) or cx.out.rank == 1]
    return cx.concat(kept, dim % max(cx.out.rank, 1))


def _stack(cx: Context, parts: Sequence[str], dim: int = 0) -> str:
    dtype, axis = cx.out.dtype, dim % cx.out.rank
    return cx.concat([cx.unsqueeze(cx.cast(p, dtype), axis) for p in parts], axis)


def _repeat(cx: Context, x: str, repeats: Sequence[Any]) -> str:
    counts = dims(repeats)
    shape = (1,) * (len(counts) - cx.rank(x)) + cx.shape(x)
    x = cx.reshape(x, shape)
    if all(isinstance(c, int) for c in counts):
        fixed = tuple(int(c) for c in counts)
        return cx.emit(ops.Tile(fixed), x) if any(c != 1 for c in fixed) else x
    paired: list[Dim] = [d for s in shape for d in (1, s)]
    wide: list[Dim] = [d for c, s in zip(counts, shape, strict=True) for d in (c, s)]
    return cx.reshape(cx.expand(cx.reshape(x, paired), wide), cx.out.shape)


def _flip(cx: Context, x: str, axes: Sequence[int]) -> str:
    found = tuple(cx.axis(x, a) for a in axes)
    return cx.emit(ops.Flip(found), x) if found else x


def _roll(cx: Context, x: str, shifts: Any, axes: Any = ()) -> str:
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    axes = [axes] if isinstance(axes, int) else list(axes)
    if not axes:
        shape = cx.shape(x)
        flat = int(np.prod([cx.static(d, "a rolled axis") for d in shape]))
        return cx.reshape(_roll(cx, cx.reshape(x, (flat,)), shifts, [0]), shape)
    for shift, dim in zip(shifts, axes, strict=True):
        axis = cx.axis(x, dim)
        size = cx.static(cx.shape(x)[axis], "a rolled axis")
        if size and (by := int(shift) % size):
            x = cx.concat([cx.slice(x, axis, size - by, size), cx.slice(x, axis, 0, size - by)], axis)
    return x


_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _pad(cx: Context, x: str, pad: Sequence[Any], mode: str = "constant", value: Any = None) -> str:
    """torch pads from the last axis inwards; negative amounts cut."""
    rank, amounts = cx.rank(x), [cx.static(d, "a padding") for d in dims(pad)]
    begin, end = [0] * rank, [0] * rank
    for i in range(len(amounts) // 2):
        begin[rank - 1 - i], end[rank - 1 - i] = amounts[2 * i], amounts[2 * i + 1]
    for axis in range(rank):
        if begin[axis] < 0 or end[axis] < 0:
            size = cx.static(cx.shape(x)[axis], "an axis that is cut")
            x = cx.slice(x, axis, max(0, -begin[axis]), size - max(0, -end[axis]))
    padding = tuple(max(0, p) for p in begin + end)
    return cx.emit(ops.Pad(padding, float(value or 0), _MODES[mode]), x) if any(padding) else x


def _pad_as(mode: str) -> Handler:
    return lambda cx, x, pad, *value: _pad(cx, x, pad, mode, *value)


def _triangle(upper: bool) -> Handler:
    def handler(cx: Context, x: str, diagonal: int = 0) -> str:
        rows, cols = cx.shape(x)[-2:]
        keep: str
        if isinstance(rows, int) and isinstance(cols, int):
            mask = np.ones((rows, cols), dtype=bool)
            keep = cx.constant(np.triu(mask, diagonal) if upper else np.tril(mask, diagonal))
        else:
            distance = cx.binary("sub", cx.unsqueeze(cx.iota(cols), 0), cx.unsqueeze(cx.iota(rows), 1))
            keep = cx.binary("ge" if upper else "le", distance, cx.constant(int(diagonal), S64))
        return cx.emit(ops.Where(), keep, x, cx.constant(0, cx.dtype(x)))

    return handler


def _unfold(cx: Context, x: str, dim: int, size: int, step: int) -> str:
    """Windows of ``size`` every ``step`` along an axis, as a new last axis."""
    axis = cx.axis(x, dim)
    if size == step and size * cx.static(cx.out.shape[axis], "the window count") == cx.shape(x)[axis]:
        shape = list(cx.shape(x))
        shape[axis : axis + 1] = [cx.out.shape[axis], size]
        y = cx.reshape(x, shape)
    else:
        count = cx.static(cx.out.shape[axis], "the number of windows")
        index = np.arange(count)[:, None] * step + np.arange(size)
        y = cx.emit(ops.Gather(axis), x, cx.constant(index.astype(np.int64)))
    return cx.move(y, axis + 1, cx.rank(y) - 1)


# --- factories: reached only where a size is symbolic or large; the rest folds when captured ------------------


def _filled(cx: Context, value: Any) -> str:
    out = cx.out
    return cx.expand(cx.as_value(value, out.dtype), out.shape)


def _full(cx: Context, _: Any, value: Any, **__: Any) -> str:
    return _filled(cx, value)


def _fill_with(value: Any) -> Handler:
    return lambda cx, *_, **__: _filled(cx, value)


def _arange(cx: Context, *args: Any, **_: Any) -> str:
    start, step = (args[0], args[2] if len(args) > 2 else 1) if len(args) > 1 else (0, 1)
    dtype = cx.out.dtype
    y = cx.iota(cx.out.shape[0])
    if not isinstance(step, int) or not isinstance(start, (int, Size)):
        y = cx.cast(y, dtype)
    if step != 1:
        y = cx.binary("mul", y, cx.as_value(step, cx.dtype(y)))
    if start != 0:
        y = cx.binary("add", y, cx.as_value(start, cx.dtype(y)))
    return cx.cast(y, dtype)


def _eye(cx: Context, *_: Any, **__: Any) -> str:
    rows, cols = (cx.iota(d) for d in cx.out.shape)
    return cx.cast(cx.binary("eq", cx.unsqueeze(rows, 1), cx.unsqueeze(cols, 0)), cx.out.dtype)


def _scalar(cx: Context, value: Any, **_: Any) -> str:
    return cx.as_value(value, cx.out.dtype)


def _fill(cx: Context, x: str, value: Any) -> str:
    return _filled(cx, value)


TABLE: dict[str, Handler] = {
    **{f"aten.{name}": _view for name in (
        "view.default", "_unsafe_view.default", "reshape.default", "view_copy.default", "unsqueeze.default",
        "squeeze.default", "squeeze.dim", "squeeze.dims", "flatten.using_ints", "unflatten.int",
        "_reshape_alias.default", "reshape_as.default", "view_as.default", "squeeze_copy.dim", "unsqueeze_copy.default",
        "_reshape_copy.default")},
    "aten.view.dtype": _view_dtype,
    "aten.expand.default": _expand, "aten.expand_copy.default": _expand, "aten.expand_as.default": _expand,
    "aten.broadcast_to.default": _expand,
    "aten.permute.default": _permute, "aten.permute_copy.default": _permute,
    **{f"aten.{name}": _swap for name in (
        "transpose.int", "transpose_copy.int", "swapaxes.default", "swapdims.default")},
    "aten.t.default": _t, "aten.t_copy.default": _t, "aten.numpy_T.default": _t,
    "aten.mT.default": lambda cx, x: _swap(cx, x, -2, -1),
    "aten.slice.Tensor": _slice, "aten.slice_copy.Tensor": _slice,
    "aten.select.int": _select, "aten.select_copy.int": _select,
    **{f"aten.{name}": _split for name in (
        "split.Tensor", "split_copy.Tensor", "split_with_sizes.default", "split_with_sizes_copy.default", "split.sizes",
        "chunk.default", "tensor_split.sections", "tensor_split.indices", "unsafe_split.Tensor", "unsafe_chunk.default",
        "unsafe_split_with_sizes.default")},
    "aten.unbind.int": _unbind, "aten.unbind_copy.int": _unbind,
    "aten.cat.default": _cat, "aten.concat.default": _cat, "aten.concatenate.default": _cat,
    "aten.stack.default": _stack, "aten.repeat.default": _repeat,
    "aten.flip.default": _flip, "aten.roll.default": _roll,
    "aten.pad.default": _pad, "aten.constant_pad_nd.default": _pad_as("constant"),
    **{f"aten.{k}_pad{n}d.default": _pad_as(m) for n in (1, 2, 3) for k, m in (
        ("reflection", "reflect"), ("replication", "replicate"))},
    "aten.tril.default": _triangle(False), "aten.triu.default": _triangle(True), "aten.unfold.default": _unfold,
    "aten.full.default": _full, "aten.full_like.default": _full,
    "aten.new_full.default": lambda cx, x, size, value, **_: _filled(cx, value),
    **{f"aten.{p}{name}{s}.default": _fill_with(v) for name, v in (("zeros", 0), ("ones", 1), ("empty", 0))
       for p, s in (("", ""), ("new_", ""), ("", "_like"))},
    "aten.empty.memory_format": _fill_with(0), "aten.empty_strided.default": _fill_with(0),
    "aten.empty_permuted.default": _fill_with(0), "aten.new_empty_strided.default": _fill_with(0),
    "aten.arange.default": _arange, "aten.arange.start": _arange, "aten.arange.start_step": _arange,
    "aten.eye.default": _eye, "aten.eye.m": _eye, "aten.scalar_tensor.default": _scalar,
    "aten.fill.Scalar": _fill, "aten.fill.Tensor": _fill,
}  # fmt: skip
