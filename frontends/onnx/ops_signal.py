"""Fourier transforms of a fixed length, as products with cosines and sines."""

from __future__ import annotations

import numpy as np

from bitwright.frontends.onnx.call import Call
from bitwright.frontends.onnx.reader import dtype_of_element
from bitwright.frontends.onnx.values import Val
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import F32
from bitwright.ir.weights import Array

LONGEST = 4096


def _waves(length: int, rows: int, columns: int) -> tuple[Array, Array]:
    """cos and sin of 2 pi r k / length."""
    angle = 2 * np.pi * ((np.arange(rows)[:, None] * np.arange(columns)[None]) % length) / length
    return np.cos(angle), np.sin(angle)


def _times(c: Call, x: Val, matrix: Array) -> Val:
    return c.emit(ops.Linear(), x, c.literal(matrix, x.type.dtype))


def spectrum(c: Call, real: Val, imaginary: Val | None, length: int, inverse: bool, onesided: bool) -> list[Val]:
    """Transform the last axis (cropped or zero-padded to ``length``); real and imaginary part."""
    if not 1 <= length <= LONGEST:
        raise c.refuse(f"a Fourier transform of length {length}")
    used = min(length, c.size(real, real.rank - 1))
    real = c.slice(real, real.rank - 1, 0, used)
    imaginary = None if imaginary is None else c.slice(imaginary, imaginary.rank - 1, 0, used)
    if inverse and onesided:
        return [_from_half(c, real, imaginary, length)]
    rows = length // 2 + 1 if onesided else length
    cos, sin = _waves(length, rows, used)
    if inverse:
        cos, sin = cos / length, -sin / length
    if imaginary is None:
        return [_times(c, real, cos), _times(c, real, -sin)]
    return [
        c.add(_times(c, real, cos), _times(c, imaginary, sin)),
        c.sub(_times(c, imaginary, cos), _times(c, real, sin)),
    ]


def _from_half(c: Call, real: Val, imaginary: Val | None, length: int) -> Val:
    """A real signal from the first half of its spectrum."""
    half = length // 2 + 1
    used = min(half, c.size(real, real.rank - 1))
    cos, sin = _waves(length, length, used)
    weight = np.full(used, 2.0 / length)
    weight[0] = 1.0 / length
    if length % 2 == 0 and used == half:
        weight[-1] = 1.0 / length
    y = _times(c, c.slice(real, real.rank - 1, 0, used), cos * weight)
    if imaginary is None:
        return y
    return c.sub(y, _times(c, c.slice(imaginary, imaginary.rank - 1, 0, used), sin * weight))


def _complex(c: Call, x: Val) -> tuple[Val, Val | None]:
    last = x.rank - 1
    if c.size(x, last) not in (1, 2):
        raise InvalidInput(f"{x.type} holds neither real nor complex numbers")
    parts = [c.squeeze(c.slice(x, last, i, i + 1), last) for i in range(c.size(x, last))]
    return parts[0], parts[1] if len(parts) > 1 else None


def _dft(c: Call) -> Val:
    x, inverse, onesided = c.x(), bool(c.int_("inverse")), bool(c.int_("onesided"))
    if c.since < 20:
        axis = c.int_("axis", 1)
    else:
        axis = -2 if c.value(2) is None else int(c.const(2, "axis").reshape(()))
    axis = c.axis(axis, x.rank)
    if axis == x.rank - 1:
        raise InvalidInput("the last axis holds the parts of complex numbers")
    length = c.size(x, axis) if not (inverse and onesided) else 2 * (c.size(x, axis) - 1)
    if c.value(1) is not None:
        length = int(c.const(1, "dft_length").reshape(()))
    real, imaginary = _complex(c, x)
    order = [i for i in range(real.rank) if i != axis] + [axis]
    back = np.argsort(order).tolist()
    real = c.transpose(real, order)
    imaginary = None if imaginary is None else c.transpose(imaginary, order)
    parts = spectrum(c, real, imaginary, length, inverse, onesided)
    return c.concat([c.unsqueeze(c.transpose(p, back), real.rank) for p in parts], real.rank)


def _stft(c: Call) -> Val:
    x, step, window = c.x(), int(c.const(1, "frame_step").reshape(())), c.opt(2)
    signal = c.size(x, 1)
    length = c.size(window, 0) if window is not None else signal
    if c.value(3) is not None:
        length = int(c.const(3, "frame_length").reshape(()))
    if step < 1 or not 1 <= length <= signal:
        raise InvalidInput(f"frames of {length} every {step} in a signal of {signal}")
    frames = 1 + (signal - length) // step
    index = c.literal(np.arange(frames)[:, None] * step + np.arange(length)[None])
    real, imaginary = _complex(c, x if x.rank == 3 else c.unsqueeze(x, x.rank))
    pieces = [None if v is None else c.emit(ops.Gather(1), v, index) for v in (real, imaginary)]
    if window is not None:
        pieces = [None if v is None else c.mul(v, window) for v in pieces]
    assert pieces[0] is not None
    parts = spectrum(c, pieces[0], pieces[1], length, False, bool(c.int_("onesided", 1)))
    return c.concat([c.unsqueeze(p, p.rank) for p in parts], parts[0].rank)


def _mel_weight_matrix(c: Call) -> Val:
    """The filter bank of the ONNX definition, from constant operands."""
    bands, length, rate = (int(c.const(i).reshape(())) for i in range(3))
    low, high = (float(c.const(i).reshape(())) for i in (3, 4))
    dtype = dtype_of_element(c.int_("output_datatype", 1), c.importer.origin) if c.has("output_datatype") else F32
    rows = length // 2 + 1
    if not 1 <= bands <= 4096 or not 1 <= rows <= 1 << 16 or rate < 1:
        raise InvalidInput(f"a filter bank of {bands} bands over {length} samples")
    edges = np.linspace(2595 * np.log10(1 + low / 700), 2595 * np.log10(1 + high / 700), bands + 3)[: bands + 2]
    bins = np.floor((length + 1) * (700 * (np.power(10.0, edges / 2595) - 1)) / rate).astype(np.int64)
    out = np.zeros((rows, bands))
    for i in range(bands):
        lower, centre, upper = bins[i : i + 3]
        if centre == lower:
            out[centre, i] = 1
        else:
            out[lower : centre + 1, i] = (np.arange(lower, centre + 1) - lower) / (centre - lower)
        if upper > centre:
            out[centre:upper, i] = (upper - np.arange(centre, upper)) / (upper - centre)
    return c.literal(out, dtype)


TABLE = {("", "DFT"): _dft, ("", "STFT"): _stft, ("", "MelWeightMatrix"): _mel_weight_matrix}
