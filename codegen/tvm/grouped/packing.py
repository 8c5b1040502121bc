"""Arrays of a grouped kernel: codes in the order it reads them, scales, zero points; and back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.tvm.grouped.spec import QUAD, GroupSpec
from bitwright.ir.errors import InvalidInput

Array = NDArray[Any]


def pack(spec: GroupSpec, weight: Array) -> Array:
    """u8 ``[panel][chunk][vector][lane][quad]``: a byte holds one weight, counted from the smallest, of each field."""
    codes = weight.astype(np.int16) - spec.low
    if codes.size and (codes.min() < 0 or codes.max() >= 1 << spec.bits):
        raise InvalidInput(f"weights of {int(weight.min())} to {int(weight.max())} do not fit {spec.bits} bits")
    full = np.zeros((spec.panels * spec.panel, spec.padded), np.uint8)
    full[: spec.outputs, : spec.depth] = codes
    vectors = spec.tile[1]
    shape = (spec.panels, vectors, spec.lanes, spec.padded // spec.chunk, spec.fields, QUAD)
    steps = full.reshape(shape).transpose(0, 3, 1, 2, 5, 4)
    shifts = np.arange(spec.fields, dtype=np.uint8) * np.uint8(spec.bits)
    return np.ascontiguousarray(np.bitwise_or.reduce(steps << shifts, axis=-1)).reshape(-1)


def unpack(spec: GroupSpec, packed: Array) -> Array:
    """The weights, s16 [outputs, inputs], from what :func:`pack` made; another size is an :class:`InvalidInput`."""
    if packed.size != spec.weight_bytes:
        raise InvalidInput(f"packed weights have {packed.size} bytes, expected {spec.weight_bytes}")
    stored = packed.reshape(spec.panels, spec.padded // spec.chunk, spec.tile[1], spec.lanes, QUAD, 1)
    shifts = np.arange(spec.fields, dtype=np.uint8) * np.uint8(spec.bits)
    steps = (stored >> shifts) & np.uint8((1 << spec.bits) - 1)
    full = steps.transpose(0, 2, 3, 1, 5, 4).reshape(spec.panels * spec.panel, spec.padded)
    weight: Array = full[: spec.outputs, : spec.depth].astype(np.int16) + np.int16(spec.low)
    return weight


def by_panel(spec: GroupSpec, values: Array) -> Array:
    """[outputs, groups] as ``[panel][group][output]``, zeros behind the last output."""
    full = np.zeros((spec.panels * spec.panel, spec.groups), values.dtype)
    full[: spec.outputs] = values
    return np.ascontiguousarray(full.reshape(spec.panels, spec.panel, spec.groups).transpose(0, 2, 1)).reshape(-1)


def pack_scales(spec: GroupSpec, scale: Array) -> Array:
    """f32, or the bits of bf16 (u16), by panel."""
    if spec.wide_scales:
        return by_panel(spec, scale.astype(np.float32))
    return by_panel(spec, np.asarray(scale, ml_dtypes.bfloat16).view(np.uint16))


def pack_zeros(spec: GroupSpec, zero: Array) -> Array:
    """Zero points counted from the smallest weight, s16, by panel."""
    return by_panel(spec, (zero.astype(np.int32) - spec.low).astype(np.int16))


__all__ = ["pack", "pack_scales", "pack_zeros", "unpack"]
