"""Meanings of the shape and indexing operators (part of ``semantics.py``, split by size)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bitwright.ir import ops

Tensor = torch.Tensor


def _concrete(shape: tuple[Any, ...]) -> tuple[int, ...]:
    assert all(isinstance(d, int) for d in shape), f"symbols must be bound before running: {shape}"
    return tuple(shape)


def _slice(op: ops.Slice, x: Tensor) -> Tensor:
    at = [slice(None)] * x.dim()
    at[op.axis] = slice(op.start, op.stop, op.step)
    return x[tuple(at)]


def _pad_index(size: int, begin: int, end: int, mode: str) -> Tensor:
    i = torch.arange(-begin, size + end)
    if mode == "edge":
        return i.clamp(0, size - 1)
    if mode == "wrap":
        return i % size
    if size == 1:
        return torch.zeros_like(i)
    period = 2 * (size - 1)
    i = i.abs() % period
    return torch.where(i >= size, period - i, i)


def _pad(op: ops.Pad, x: Tensor) -> Tensor:
    n = x.dim()
    begin, end = op.padding[:n], op.padding[n:]
    if op.mode == "constant":
        flat = [p for b, e in zip(reversed(begin), reversed(end), strict=True) for p in (b, e)]
        value = op.value if x.is_floating_point() else bool(op.value) if x.dtype == torch.bool else int(op.value)
        return F.pad(x, flat, value=value) if any(flat) else x
    for axis in range(n):
        if begin[axis] or end[axis]:
            x = x.index_select(axis, _pad_index(x.shape[axis], begin[axis], end[axis], op.mode).to(x.device))
    return x


def _gather(op: ops.Gather, x: Tensor, index: Tensor) -> Tensor:
    axis = op.axis % x.dim()
    flat = index.reshape(-1).to(torch.int64)
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    out = x.index_select(axis, flat)
    return out.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _positive(index: Tensor, size: int) -> Tensor:
    index = index.to(torch.int64)
    return torch.where(index < 0, index + size, index)


def _gather_elements(op: ops.GatherElements, x: Tensor, index: Tensor) -> Tensor:
    return torch.gather(x, op.axis, _positive(index, x.shape[op.axis]))


def _nd_offsets(x: Tensor, index: Tensor, batch: int) -> tuple[Tensor, tuple[int, ...], int]:
    """Flat row numbers that ``index`` addresses, the shape of one row, and the number of rows."""
    depth = index.shape[-1]
    dims = x.shape[batch : batch + depth]
    rows = 1
    for d in dims:
        rows *= d
    offset = torch.zeros(index.shape[:-1], dtype=torch.int64, device=index.device)
    for i, d in enumerate(dims):
        offset = offset * d + _positive(index[..., i], d)
    return offset, tuple(x.shape[batch + depth :]), rows


def _gather_nd(op: ops.GatherNd, x: Tensor, index: Tensor) -> Tensor:
    offset, tail, rows = _nd_offsets(x, index, op.batch)
    lead = x.shape[: op.batch]
    batches = 1
    for d in lead:
        batches *= d
    offset = offset.reshape(batches, -1) + torch.arange(batches, device=offset.device).reshape(-1, 1) * rows
    return x.reshape(batches * rows, *tail)[offset.reshape(-1)].reshape((*index.shape[:-1], *tail))


def _combine(old: Tensor, new: Tensor, reduction: str) -> Tensor:
    return {"none": lambda: new, "add": lambda: old + new, "mul": lambda: old * new,
            "min": lambda: torch.minimum(old, new), "max": lambda: torch.maximum(old, new)}[reduction]()  # fmt: skip


def _scatter_rows(flat: Tensor, rows: Tensor, updates: Tensor, reduction: str) -> Tensor:
    """Write updates into rows of ``flat`` in order (duplicates meet the reduction one after the other)."""
    if flat.device.type == "meta":
        return flat
    out = flat.clone()
    for r, u in zip(rows.tolist(), updates, strict=True):
        out[r] = _combine(out[r], u, reduction)
    return out


def _scatter_elements(op: ops.ScatterElements, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    axis = op.axis % x.dim()
    if x.device.type == "meta":
        return x.clone()
    index = _positive(index, x.shape[axis])
    grid = list(torch.meshgrid(*[torch.arange(d) for d in index.shape], indexing="ij"))
    grid[axis] = index
    flat = torch.zeros(index.shape, dtype=torch.int64)
    for d, g in zip(x.shape, grid, strict=True):
        flat = flat * d + g
    return _scatter_rows(x.reshape(-1), flat.reshape(-1), updates.reshape(-1), op.reduction).reshape(x.shape)


def _scatter_nd(op: ops.ScatterNd, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    if x.device.type == "meta":
        return x.clone()
    offset, tail, rows = _nd_offsets(x, index, 0)
    flat = _scatter_rows(x.reshape(rows, *tail), offset.reshape(-1), updates.reshape(-1, *tail), op.reduction)
    return flat.reshape(x.shape)


def _arg(op: ops.ArgReduce, x: Tensor) -> Tensor:
    fn = torch.argmax if op.fn == "argmax" else torch.argmin
    if x.dtype == torch.bool:
        x = x.to(torch.uint8)
    if not op.last:
        return fn(x, dim=op.axis, keepdim=op.keepdim)
    return x.shape[op.axis] - 1 - fn(x.flip(op.axis), dim=op.axis, keepdim=op.keepdim)


def _cumsum(op: ops.CumSum, x: Tensor) -> Tensor:
    x = x.flip(op.axis) if op.reverse else x
    y = torch.cumsum(x, op.axis, dtype=x.dtype)
    y = y - x if op.exclusive else y
    return y.flip(op.axis) if op.reverse else y


def _topk(op: ops.TopK, x: Tensor) -> tuple[Tensor, Tensor]:
    values, index = torch.sort(x, dim=op.axis, descending=op.largest, stable=True)
    return values.narrow(op.axis, 0, op.k), index.narrow(op.axis, 0, op.k)


# --- resize ----------------------------------------------------------------------------------------------------


def source_coordinates(op: ops.Resize, axis: int, size: int) -> Tensor:
    """Where each output position of one space axis reads, in input coordinates (f64)."""
    out, scale = op.size[axis], op.scales[axis]
    i = torch.arange(out, dtype=torch.float64)
    if op.coordinates == "align_corners":
        return i * ((size - 1) / (out - 1)) if out > 1 else torch.zeros_like(i)
    if op.coordinates == "asymmetric":
        return i / scale
    if op.coordinates == "pytorch_half_pixel" and out == 1:
        return torch.zeros_like(i)
    return (i + 0.5) / scale - 0.5


_NEAREST: dict[str, Callable[[Tensor], Tensor]] = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round_prefer_floor": lambda v: torch.ceil(v - 0.5),
    "round_prefer_ceil": lambda v: torch.floor(v + 0.5),
}


def resize_taps(op: ops.Resize, axis: int, size: int) -> tuple[Tensor, Tensor]:
    """Index [out, taps] and weight [out, taps] of one space axis; shared with code generation."""
    x = source_coordinates(op, axis, size)
    if op.mode == "nearest":
        near = _NEAREST[op.rounding](x)
        return near.clamp(0, size - 1).to(torch.int64)[:, None], torch.ones(len(x), 1, dtype=torch.float64)
    base = torch.floor(x)
    t = (x - base)[:, None]
    if op.mode == "linear":
        weights = torch.cat([1 - t, t], 1)
        reach = torch.arange(0, 2)
    else:
        a, d = op.cubic, torch.cat([1 + t, t, 1 - t, 2 - t], 1)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        weights = torch.where(d <= 1, near, far)
        reach = torch.arange(-1, 3)
    index = (base[:, None].to(torch.int64) + reach).clamp(0, size - 1)
    return index, weights


def _resize(op: ops.Resize, x: Tensor) -> Tensor:
    y = x.float() if x.dtype in (torch.float16, torch.bfloat16) or not x.is_floating_point() else x
    for i in range(len(op.size)):
        axis = 2 + i
        index, weight = (t.to(x.device) for t in resize_taps(op, i, x.shape[axis]))
        taps = y.index_select(axis, index.reshape(-1))
        taps = taps.reshape(*taps.shape[:axis], *index.shape, *taps.shape[axis + 1 :])
        shape = [1] * taps.dim()
        shape[axis], shape[axis + 1] = index.shape
        y = (taps * weight.to(y.dtype).reshape(shape)).sum(axis + 1)
    return y.to(x.dtype) if x.is_floating_point() else torch.round(y).to(x.dtype)


INDEX_MEANING: dict[type[ops.Op], Callable[..., Tensor | tuple[Tensor, ...]]] = {
    ops.Reshape: lambda op, x: x.reshape(_concrete(op.shape)),
    ops.Transpose: lambda op, x: x.permute(op.perm),
    ops.Expand: lambda op, x: x.expand(_concrete(op.shape)),
    ops.Concat: lambda op, *xs: torch.cat(xs, op.axis),
    ops.Slice: _slice, ops.Pad: _pad,
    ops.Tile: lambda op, x: x.repeat(op.repeats),
    ops.Flip: lambda op, x: x.flip(op.axes),
    ops.Gather: _gather, ops.GatherElements: _gather_elements, ops.GatherNd: _gather_nd,
    ops.ScatterElements: _scatter_elements, ops.ScatterNd: _scatter_nd,
    ops.ArgReduce: _arg, ops.CumSum: _cumsum, ops.TopK: _topk, ops.Resize: _resize,
}  # fmt: skip
