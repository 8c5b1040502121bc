"""How constant weights lie in flash: rows of runs, 8, 4, 2 or 1 bits an element, dense or N:M with packed indices.

A *run* is what one output reads consecutively: all K of a linear layer, the channels of one tap of a convolution (the
taps, where there is one channel). Fields fill bytes from the low bits; each row (output) starts at a byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import NM, TensorType

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Form:
    """The layout of one weight.

    ``rows`` outputs of ``runs`` runs of ``length`` elements; ``bits`` of an element, of which ``offset`` was added to
    make it unsigned (1 bit: +1 and -1). ``keep`` of every ``group`` are stored, with indices of ``index_bits``
    (group 1: dense).
    """

    rows: int
    runs: int
    length: int
    bits: int
    offset: int = 0
    keep: int = 1
    group: int = 1
    index_bits: int = 0

    @property
    def sparse(self) -> bool:
        return self.group > 1

    @property
    def per_run(self) -> int:
        """Stored elements of a run; dense runs of several elements are filled up to whole bytes."""
        if self.sparse:
            return ceil(self.length / self.group) * self.keep
        per = 8 // self.bits if self.bits < 8 else 1
        return self.length if self.runs == 1 else ceil(self.length / per) * per

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of values."""
        return ceil(self.runs * self.per_run * self.bits / 8)

    @property
    def index_row_bytes(self) -> int:
        return ceil(self.runs * self.per_run * self.index_bits / 8)

    @property
    def nbytes(self) -> int:
        return self.rows * (self.row_bytes + self.index_row_bytes)

    def __str__(self) -> str:
        text = f"{self.bits} {'bit' if self.bits == 1 else 'bits'} a weight"
        return f"{self.keep}:{self.group} with {self.index_bits}-bit indices, {text}" if self.sparse else text


def form_of(t: TensorType, weight: Array) -> Form:
    """The smallest layout for a weight of this type: N:M where the indices do not eat what the zeros save."""
    shape = t.static_shape
    rows, length, taps = shape[0], int(shape[1]) if len(shape) > 1 else 1, int(np.prod(shape[2:], dtype=np.int64))
    runs = taps
    if length == 1:
        length, runs = taps, 1
    bits, offset = _bits(t, weight)
    dense = Form(rows, runs, length, bits, offset)
    nm = t.encoding
    if not isinstance(nm, NM) or nm.axis % len(shape) != 1 or shape[1] == 1:
        return dense
    keep, group = nm.keep * nm.block, nm.group * nm.block
    index_bits = next((b for b in (1, 2, 4, 8) if group <= 1 << b), 16)
    sparse = Form(rows, runs, length, bits, offset, keep, group, index_bits)
    return sparse if index_bits <= 8 and sparse.nbytes < dense.nbytes else dense


def _bits(t: TensorType, weight: Array) -> tuple[int, int]:
    """Field width and offset of what the weights can be, or happen to be."""
    if not t.dtype.is_integer:
        return 8 * weight.dtype.itemsize, 0
    lo, hi = (int(weight.min()), int(weight.max())) if weight.size else (0, 0)
    if weight.size and (np.abs(weight) == 1).all():
        return 1, 0
    for bits in (2, 4):
        if -(1 << (bits - 1)) <= lo and hi < 1 << (bits - 1):
            return bits, 1 << (bits - 1)
    return 8 * weight.dtype.itemsize, 0


def runs_of(weight: Array, form: Form) -> Array:
    """[rows, runs, length] from the logical weight [O, C, *kernel]."""
    flat = weight.reshape(form.rows, weight.shape[1] if weight.ndim > 1 else 1, -1)
    return np.ascontiguousarray(flat.transpose(0, 2, 1)).reshape(form.rows, form.runs, form.length)


def pack(weight: Array, form: Form) -> tuple[Array, Array | None]:
    """(values, indices or None) as they lie in flash; raises :class:`InvalidInput` when the pattern does not hold."""
    runs = runs_of(weight, form)
    indices = None
    if form.sparse:
        runs, kept = _compress(runs, form)
        indices = _fields(kept.reshape(form.rows, -1), form.index_bits)
    else:
        runs = np.pad(runs, ((0, 0), (0, 0), (0, form.per_run - form.length)))
    row = runs.reshape(form.rows, -1)
    if form.bits >= 8:
        return np.ascontiguousarray(row.reshape(-1)), indices
    codes = (row > 0).astype(np.uint8) if form.bits == 1 else (row.astype(np.int64) + form.offset).astype(np.uint8)
    return _fields(codes, form.bits), indices


def unpack(values: Array, indices: Array | None, form: Form) -> Array:
    """[rows, runs, length]: what the stored bytes mean."""
    if form.bits >= 8:
        row = values.reshape(form.rows, -1)
    else:
        codes = _unfields(values, form.rows, form.runs * form.per_run, form.bits).astype(np.int64)
        row = codes * 2 - 1 if form.bits == 1 else codes - form.offset
    stored = row.reshape(form.rows, form.runs, form.per_run)
    if not form.sparse:
        return stored[:, :, : form.length]
    assert indices is not None
    at = _unfields(indices, form.rows, form.runs * form.per_run, form.index_bits).reshape(stored.shape)
    group = np.arange(form.per_run) // form.keep * form.group
    out = np.zeros((form.rows, form.runs, ceil(form.length / form.group) * form.group), stored.dtype)
    r, t, _ = np.indices(stored.shape)
    np.add.at(out, (r, t, at.astype(np.int64) + group), stored)
    return out[:, :, : form.length]


def _compress(runs: Array, form: Form) -> tuple[Array, Array]:
    """Kept values and their places in the group, [rows, runs, per_run] each; fewer are filled up with zeros."""
    groups = ceil(form.length / form.group)
    padded = np.pad(runs, ((0, 0), (0, 0), (0, groups * form.group - form.length)))
    grouped = padded.reshape(form.rows, form.runs, groups, form.group)
    if int((grouped != 0).sum(-1).max(initial=0)) > form.keep:
        raise InvalidInput(f"a group of {form.group} holds more than {form.keep} non-zeros")
    order = np.argsort(grouped == 0, axis=-1, kind="stable")[..., : form.keep]
    order.sort(axis=-1)
    last = form.length - 1 - np.arange(groups)[:, None] * form.group
    order = np.minimum(order, np.maximum(last, 0))  # fillers stay inside a shorter last group
    kept = np.take_along_axis(grouped, order, -1)
    repeated = np.zeros_like(kept, bool)
    repeated[..., 1:] = order[..., 1:] == order[..., :-1]
    kept = np.where(repeated, 0, kept)
    shape = (form.rows, form.runs, groups * form.keep)
    return kept.reshape(shape), order.reshape(shape).astype(np.uint8)


def _fields(codes: Array, bits: int) -> Array:
    """Rows of unsigned codes as bytes, low bits first, every row filled up to a byte."""
    per = 8 // bits
    padded = np.pad(codes.astype(np.uint8), ((0, 0), (0, -codes.shape[1] % per)))
    grouped = padded.reshape(codes.shape[0], -1, per)
    shifts = (np.arange(per) * bits).astype(np.uint8)
    return np.ascontiguousarray(np.bitwise_or.reduce(grouped << shifts, -1).astype(np.uint8).reshape(-1))


def _unfields(data: Array, rows: int, count: int, bits: int) -> Array:
    per = 8 // bits
    shifts = (np.arange(per) * bits).astype(np.uint8)
    codes = (data.reshape(rows, -1, 1) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(rows, -1)[:, :count]
