"""Torch operators that read and write at computed places: indexing, gather, scatter, slice assignment, search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitwright.frontends.torch_context import Context, Handler
from bitwright.ir import ops
from bitwright.ir.types import BOOL, S64, Dim


def _gather(cx: Context, x: str, dim: int, index: str, *_: Any, **__: Any) -> str:
    if cx.rank(x) == 0:
        return x
    return cx.emit(ops.GatherElements(cx.axis(x, dim)), x, index)


def _index_select(cx: Context, x: str, dim: int, index: str) -> str:
    index = cx.reshape(index, (1,)) if cx.rank(index) == 0 else index
    return cx.emit(ops.Gather(cx.axis(x, dim)), x, index)


def _embedding(cx: Context, weight: str, index: str, *_: Any, **__: Any) -> str:
    return cx.emit(ops.Gather(0), weight, index)


def _positions(cx: Context, x: str, indices: Sequence[str | None]) -> tuple[list[int], list[str]]:
    """Indexed axes and integer indices; constant masks become the places where they are true."""
    axes: list[int] = []
    found: list[str] = []
    axis = 0
    for index in indices:
        if index is None:
            axis += 1
            continue
        if cx.dtype(index).kind in ("bool", "uint") and cx.dtype(index).bits in (1, 8):
            mask = cx.literal(index)
            if mask is None:
                raise cx.refuse(
                    "a computed mask selects elements, so the result's size depends on the data",
                    "use torch.where or masked_fill instead of indexing with a mask",
                )
            for places in np.nonzero(mask):
                axes, found, axis = [*axes, axis], [*found, cx.constant(places.astype(np.int64))], axis + 1
            continue
        axes, found, axis = [*axes, axis], [*found, cx.cast(index, S64)], axis + 1
    return axes, found


def _broadcast(shapes: Sequence[tuple[Dim, ...]]) -> tuple[Dim, ...]:
    rank = max(len(s) for s in shapes)
    padded = [(1,) * (rank - len(s)) + s for s in shapes]
    return tuple(next((d for d in column if d != 1), 1) for column in zip(*padded, strict=True))


def _stacked(cx: Context, indices: Sequence[str]) -> str:
    """Indices broadcast together and stacked as a new last axis."""
    shape = _broadcast([cx.shape(i) for i in indices])
    parts = [cx.unsqueeze(cx.expand(i, shape), len(shape)) for i in indices]
    return cx.concat(parts, len(shape))


def _fronted(rank: int, axes: Sequence[int]) -> list[int]:
    return [*axes, *(a for a in range(rank) if a not in axes)]


def _landing(axes: Sequence[int]) -> int:
    """Where the index axes stand in the result: in place when the indexed axes are adjacent, else in front."""
    return axes[0] if list(axes) == list(range(axes[0], axes[0] + len(axes))) else 0


def _settle(cx: Context, y: str, width: int, at: int, back: bool = False) -> str:
    """Move the first ``width`` axes behind the next ``at`` ones (or back)."""
    rank = cx.rank(y)
    order = [*range(width, width + at), *range(width), *range(width + at, rank)]
    if back:
        order = [*range(at, at + width), *range(at), *range(at + width, rank)]
    return cx.transpose(y, order)


def _counts(cx: Context, index: str, size: Dim) -> int | None:
    """The axis (from the end, from 1) along which an index counts 0 to size-1; 0: a lone zero; None: neither."""
    shape = cx.shape(index)
    long = [i for i, d in enumerate(shape) if d != 1]
    if len(long) > 1 or (shape[long[0]] if long else 1) != size:
        return None
    array = cx.literal(index)
    if array is None:
        while isinstance((node := cx.b.defined_by.get(index)) and node.op, ops.Reshape):
            index = node.inputs[0]  # type: ignore[union-attr]
        if index not in cx.iotas:
            return None
    elif array.reshape(-1).tolist() != list(range(array.size)):
        return None
    return len(shape) - long[0] if long else 0


def _view_of(cx: Context, x: str, axes: list[int], found: list[str]) -> str | None:
    """x indexed by whole ranges along different result axes: a transposition with axes of size 1 between."""
    places = [_counts(cx, i, cx.shape(x)[a]) for a, i in zip(axes, found, strict=True)]
    used = [p for p in places if p]
    if None in places or len(set(used)) != len(used):
        return None
    shape = _broadcast([cx.shape(i) for i in found])
    order = sorted(range(len(axes)), key=lambda k: -(places[k] or 0))
    y = cx.transpose(x, _fronted(cx.rank(x), [axes[k] for k in order]))
    y = cx.reshape(y, shape + cx.shape(y)[len(axes) :])
    return _settle(cx, y, len(shape), _landing(axes))


def _index(cx: Context, x: str, indices: Sequence[str | None]) -> str:
    axes, found = _positions(cx, x, indices)
    if not axes:
        return x
    if (view := _view_of(cx, x, axes, found)) is not None:
        return view
    if len(axes) == 1:
        return cx.emit(ops.Gather(axes[0]), x, found[0])
    index = _stacked(cx, found)
    y = cx.emit(ops.GatherNd(), cx.transpose(x, _fronted(cx.rank(x), axes)), index)
    return _settle(cx, y, cx.rank(index) - 1, _landing(axes))


def _index_put(cx: Context, x: str, indices: Sequence[str | None], values: str, accumulate: bool = False) -> str:
    first = next(i for i in indices if i is not None)
    if cx.dtype(first) == BOOL and cx.literal(first) is None:
        return _put_mask(cx, x, indices, values, accumulate)
    axes, found = _positions(cx, x, indices)
    index = _stacked(cx, found)
    order = _fronted(cx.rank(x), axes)
    target, at, width = cx.transpose(x, order), _landing(axes), cx.rank(index) - 1
    rest = cx.shape(target)[len(axes) :]
    shape = (*rest[:at], *cx.shape(index)[:-1], *rest[at:])
    updates = _settle(cx, cx.expand(values, shape), width, at, back=True)
    y = cx.emit(ops.ScatterNd("add" if accumulate else "none"), target, index, updates)
    return cx.transpose(y, np.argsort(order).tolist())


def _put_mask(cx: Context, x: str, indices: Sequence[str | None], values: str, accumulate: bool) -> str:
    mask = indices[0]
    if len(indices) != 1 or mask is None or cx.rank(values) != 0 or accumulate:
        raise cx.refuse("elements under a computed mask are assigned from a tensor", "use torch.where")
    mask = cx.reshape(mask, (*cx.shape(mask), *[1] * (cx.rank(x) - cx.rank(mask))))
    return cx.emit(ops.Where(), mask, cx.cast(values, cx.dtype(x)), x)


def _front(cx: Context, x: str, axis: int) -> str:
    return cx.move(x, axis, 0)


def _write_rows(cx: Context, x: str, axis: int, index: str, source: str, reduction: str = "none") -> str:
    """Rows of ``source`` along an axis into the rows ``index`` of x."""
    rows = cx.unsqueeze(index if cx.rank(index) else cx.reshape(index, (1,)), 1)
    y = cx.emit(ops.ScatterNd(reduction), _front(cx, x, axis), cx.cast(rows, S64), _front(cx, source, axis))
    return cx.move(y, 0, axis)


def _index_copy(cx: Context, x: str, dim: int, index: str, source: str) -> str:
    return _write_rows(cx, x, cx.axis(x, dim), index, source)


def _index_add(cx: Context, x: str, dim: int, index: str, source: str, *, alpha: Any = 1) -> str:
    source = source if alpha == 1 else cx.binary("mul", source, cx.constant(alpha, cx.dtype(source)))
    return _write_rows(cx, x, cx.axis(x, dim), index, source, "add")


def _index_fill(cx: Context, x: str, dim: int, index: str, value: Any) -> str:
    axis = cx.axis(x, dim)
    shape = list(cx.shape(x))
    shape[axis] = cx.shape(index)[0] if cx.rank(index) else 1
    return _write_rows(cx, x, axis, index, cx.expand(cx.as_value(value, cx.dtype(x)), shape))


_REDUCTIONS = {"sum": "add", "add": "add", "prod": "mul", "multiply": "mul", "amax": "max", "amin": "min"}


def _scatter(cx: Context, x: str, dim: int, index: str, source: Any, reduction: str = "none") -> str:
    """torch reads only the part of the source that the index covers."""
    if isinstance(source, str) and cx.rank(source):
        for axis, (have, want) in enumerate(zip(cx.shape(source), cx.shape(index), strict=True)):
            if have != want:
                source = cx.slice(source, axis, 0, cx.static(want, "a scattered axis"))
    else:
        source = cx.expand(cx.as_value(source, cx.dtype(x)), cx.shape(index))
    return cx.emit(ops.ScatterElements(cx.axis(x, dim), reduction), x, index, cx.cast(source, cx.dtype(x)))


def _scatter_reduce(
    cx: Context, x: str, dim: int, index: str, source: Any, reduce: str, include_self: bool = True
) -> str:
    if reduce not in _REDUCTIONS or not include_self:
        raise cx.refuse(f"scatter with reduce={reduce!r}, include_self={include_self}", "use sum, prod, amax or amin")
    return _scatter(cx, x, dim, index, source, _REDUCTIONS[reduce])


def _slice_scatter(
    cx: Context, x: str, source: str, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> str:
    axis = cx.axis(x, dim)
    size, count = cx.shape(x)[axis], cx.shape(source)[axis]
    if size == count:
        return cx.cast(source, cx.dtype(x))
    size, count = cx.static(size, "the assigned axis"), cx.static(count, "the assigned axis")
    first = int(start or 0)
    first = max(first + size, 0) if first < 0 else first
    source = cx.cast(source, cx.dtype(x))
    if step == 1:
        parts = [(0, first), None, (first + count, size)]
        return cx.concat(
            [source if p is None else cx.slice(x, axis, *p) for p in parts if p is None or p[0] < p[1]], axis
        )
    rows = cx.constant(np.arange(count, dtype=np.int64) * step + first)
    return _write_rows(cx, x, axis, rows, source)


def _select_scatter(cx: Context, x: str, source: str, dim: int, index: int) -> str:
    axis = cx.axis(x, dim)
    size = cx.static(cx.shape(x)[axis], "the assigned axis")
    return _slice_scatter(cx, x, cx.unsqueeze(source, axis), axis, index % size, index % size + 1)


def _diagonal(cx: Context, x: str, offset: int = 0, dim1: int = 0, dim2: int = 1) -> str:
    a, b = cx.axis(x, dim1), cx.axis(x, dim2)
    count = cx.static(cx.out.shape[-1], "the diagonal")
    at = np.arange(count)[:, None] + np.array([[max(0, -offset), max(0, offset)]])
    y = cx.emit(ops.GatherNd(), cx.transpose(x, _fronted(cx.rank(x), (a, b))), cx.constant(at.astype(np.int64)))
    return cx.move(y, 0, cx.rank(y) - 1)


def _bucketize(cx: Context, x: str, edges: str, *, out_int32: bool = False, right: bool = False) -> str:
    """The number of edges below (or not above) each value; edges are sorted."""
    beyond = cx.binary("ge" if right else "gt", *cx.promoted(cx.unsqueeze(x, cx.rank(x)), edges))
    return cx.emit(ops.Reduce("sum", (cx.rank(beyond) - 1,)), cx.cast(beyond, cx.out.dtype))


def _searchsorted(cx: Context, edges: str, x: str, *, out_int32: bool = False, right: bool = False, **_: Any) -> str:
    if cx.rank(edges) > 1:
        edges = cx.unsqueeze(edges, cx.rank(edges) - 1)
    return _bucketize(cx, x, edges, out_int32=out_int32, right=right)


def _cdist(cx: Context, a: str, b: str, p: float = 2.0, *_: Any) -> str:
    gap = cx.binary("sub", cx.unsqueeze(a, cx.rank(a) - 1), cx.unsqueeze(b, cx.rank(b) - 2))
    if p not in (1, 2):
        raise cx.refuse(f"distance of order {p}", "use p=1 or p=2")
    return cx.emit(ops.Reduce(f"l{int(p)}", (cx.rank(gap) - 1,)), gap)


def _data_dependent(cx: Context, *_: Any, **__: Any) -> str:
    raise cx.refuse(
        "the result's size depends on the data", "use torch.where, masked_fill or top-k with a fixed size instead"
    )


def random_numbers(cx: Context, *_: Any, **__: Any) -> str:
    raise cx.refuse("it draws random numbers", "pass the random tensor as an input, or remove it for inference")


def _native_dropout(cx: Context, x: str, p: float, train: bool | None) -> tuple[str, None]:
    if train and p:
        raise cx.refuse("dropout is active", "export the module in eval() mode")
    return x, None


_RANDOM = """
    rand.default rand_like.default randn.default randn_like.default randint.low randint.default bernoulli.default
    bernoulli.p multinomial.default normal.float_float randperm.default uniform.default exponential.default
    randint_like.default randint_like.low_dtype normal_functional.default
"""
_DATA_SIZED = """
    nonzero.default masked_select.default unique2.default _unique2.default unique_consecutive.default unique_dim.default
    bincount.default repeat_interleave.Tensor item.default _local_scalar_dense.default nonzero_static.default
    equal.default masked_scatter.default
"""

TABLE: dict[str, Handler] = {
    "aten.native_dropout.default": _native_dropout,
    "aten.gather.default": _gather, "aten.index_select.default": _index_select, "aten.embedding.default": _embedding,
    "aten.index.Tensor": _index, "aten._unsafe_index.Tensor": _index,
    "aten.index_put.default": _index_put, "aten._unsafe_index_put.default": _index_put,
    "aten.index_copy.default": _index_copy, "aten.index_add.default": _index_add,
    "aten.index_fill.int_Scalar": _index_fill, "aten.index_fill.int_Tensor": _index_fill,
    "aten.scatter.src": _scatter, "aten.scatter.value": _scatter,
    "aten.scatter.reduce": lambda cx, x, dim, index, src, *, reduce: _scatter_reduce(cx, x, dim, index, src, reduce),
    "aten.scatter.value_reduce": lambda cx, x, d, index, v, *, reduce: _scatter_reduce(cx, x, d, index, v, reduce),
    "aten.scatter_add.default": lambda cx, x, dim, index, src: _scatter(cx, x, dim, index, src, "add"),
    "aten.scatter_reduce.two": lambda cx, x, d, i, s, reduce, *, include_self=True: _scatter_reduce(
        cx, x, d, i, s, reduce, include_self),
    "aten.slice_scatter.default": _slice_scatter, "aten.select_scatter.default": _select_scatter,
    "aten.diagonal.default": _diagonal, "aten.diagonal_copy.default": _diagonal,
    "aten.bucketize.Tensor": _bucketize, "aten.searchsorted.Tensor": _searchsorted,
    "aten.cdist.default": _cdist, "aten._cdist_forward.default": _cdist,
    **{f"aten.{name}": random_numbers for name in _RANDOM.split()},
    **{f"aten.{name}": _data_dependent for name in _DATA_SIZED.split()},
}  # fmt: skip
