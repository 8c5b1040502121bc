"""Weights as entries, K block by K block, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.tvm.contract.spec import ContractSpec
from bitwright.codegen.tvm.lanes.spec import LanesKnobs, Shape, quad_of
from bitwright.ir.errors import InvalidInput

Array = NDArray[Any]
OFFSET = 8
"""Stored offsets count in so many bytes, which an address scales for nothing."""


def units_of(spec: ContractSpec, weight: Array) -> Array:
    """Logical weights as [outputs, units, quad]; a convolution's units run over taps, then channels."""
    flat = weight if weight.ndim == 2 else np.moveaxis(weight, 1, -1)
    return np.ascontiguousarray(flat).reshape(spec.cols, spec.depth // quad_of(spec), quad_of(spec))


def from_units(spec: ContractSpec, units: Array) -> Array:
    """The inverse of :func:`units_of`."""
    if len(spec.weight_shape) == 2:
        return units.reshape(spec.weight_shape)
    outputs, channels, *kernel = spec.weight_shape
    return np.ascontiguousarray(np.moveaxis(units.reshape(outputs, *kernel, channels), -1, 1))


def kept_of(units: Array, shared: int) -> Array:
    """Which units a group of ``shared`` outputs has weights for: bool [groups, units]."""
    kept: Array = np.any(units != 0, -1)
    kept = np.concatenate([kept, np.zeros((-len(kept) % shared, kept.shape[1]), bool)])
    joined: Array = np.any(kept.reshape(-1, shared, kept.shape[1]), 1)
    return joined


def counts_of(kept: Array, block: int) -> Array:
    """Entries of every (group, K block)."""
    starts = np.arange(0, kept.shape[1], block)
    return np.add.reduceat(kept, starts, axis=1, dtype=np.int64)


def pack(spec: ContractSpec, knobs: LanesKnobs, weight: Array) -> list[Array]:
    """Weights [entries, shared, quad], offsets u16 [entries] and, for row pointers, spans s32.

    Order: blocks of outputs, K blocks, groups of outputs (with row pointers: by falling number of entries), units.
    """
    shape = Shape(spec, knobs)
    units = units_of(spec, weight)
    kept = kept_of(units, knobs.shared)
    parts: list[tuple[Array, Array, Array]] = []
    spans = np.zeros((shape.output_blocks, shape.blocks, shape.span_row), np.int32)
    first = 0
    for t in range(shape.output_blocks):
        groups = np.arange(t * shape.per_block, min((t + 1) * shape.per_block, shape.groups))
        for k in range(shape.blocks):
            piece = kept[groups, k * knobs.block : (k + 1) * knobs.block]
            counts = piece.sum(1)
            if shape.pointers:
                order = np.argsort(-counts, kind="stable")
                spans[t, k, 0 : 2 * len(order) : 2] = first + np.concatenate([[0], counts[order].cumsum()[:-1]])
                spans[t, k, 1 : 2 * len(order) : 2] = order
                first += int(counts.sum())
                spans[t, k, 2 * len(order) :: 2] = first
                local, unit = np.nonzero(piece[order])
                parts.append((groups[order][local], unit, unit + k * knobs.block))
            else:
                parts.append(_padded(piece, groups, k, shape))
    group, local, unit = (np.concatenate([p[i] for p in parts]) for i in range(3))
    rows = np.concatenate([units, np.zeros((-len(units) % knobs.shared, *units.shape[1:]), units.dtype)])
    rows = rows.reshape(-1, knobs.shared, *units.shape[1:])
    values = np.where((unit >= 0)[:, None, None], rows[group, :, unit], np.zeros((), units.dtype))
    step = shape.pitch // OFFSET
    packed = [np.ascontiguousarray(values), (local * step).astype(np.uint16)]
    return [*packed, spans] if shape.pointers else packed


def _padded(piece: Array, groups: Array, k: int, shape: Shape) -> tuple[Array, Array, Array]:
    """Group, unit in the K block and unit (-1: none) of the entries of one piece, all groups filled up."""
    assert shape.knobs.counts
    count = shape.knobs.counts[0 if k < shape.full_blocks else 1]
    if int(piece.sum(1).max(initial=0)) > count:
        raise InvalidInput(f"a group has more than {count} entries in K block {k}")
    order = np.argsort(~piece, axis=1, kind="stable")[:, :count]
    real = np.take_along_axis(piece, order, 1)
    local = np.where(real, order, 0)
    unit = np.where(real, order + k * shape.knobs.block, -1)
    return np.repeat(groups, count), local.reshape(-1), unit.reshape(-1)


def unpack(spec: ContractSpec, knobs: LanesKnobs, arrays: list[Array]) -> Array:
    """The logical weights that packed constants hold; raises :class:`InvalidInput` for offsets outside."""
    shape = Shape(spec, knobs)
    values = arrays[0].reshape(-1, knobs.shared, shape.quad)
    local = arrays[1].astype(np.int64) // (shape.pitch // OFFSET)
    group, block = _places(shape, arrays)
    unit = local + block * knobs.block
    if np.any((unit >= shape.units) | (local >= knobs.block)):
        raise InvalidInput("a packed offset points outside its reduction")
    rows = np.zeros((shape.groups, knobs.shared, shape.units, shape.quad), values.dtype)
    real = np.any(values != 0, (1, 2))  # filling entries share unit 0 with real ones
    rows[group[real], :, unit[real]] = values[real]
    return from_units(spec, rows.reshape(-1, shape.units, shape.quad)[: spec.cols])


def _places(shape: Shape, arrays: list[Array]) -> tuple[Array, Array]:
    """Group and K block of every entry."""
    groups, blocks = [], []
    for t in range(shape.output_blocks):
        here = shape.per_block if t < shape.output_blocks - 1 else shape.last_groups
        for k in range(shape.blocks):
            if shape.pointers:
                span = arrays[2].reshape(shape.output_blocks, shape.blocks, -1)[t, k]
                each = np.diff(span[0 : 2 * here + 1 : 2])
                number = span[1 : 2 * here : 2]
            else:
                assert shape.knobs.counts
                each = np.full(here, shape.knobs.counts[0 if k < shape.full_blocks else 1])
                number = np.arange(here)
            groups.append(np.repeat(t * shape.per_block + number, each))
            blocks.append(np.full(int(each.sum()), k))
    return np.concatenate(groups), np.concatenate(blocks)


__all__ = ["OFFSET", "counts_of", "from_units", "kept_of", "pack", "units_of", "unpack"]
