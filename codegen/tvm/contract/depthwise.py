"""Depthwise convolution: channels in lanes, a small tile of output pixels, taps unrolled.

8-bit kernels interleave four input rows of a column into 32-bit lanes, so that one dot-product instruction takes
four vertical taps; one interleaving serves every output of the tile that touches the column. With 512-bit registers
two vectors of channels are interleaved together, bytes first and then pairs of them. Tiles that reach outside the
image read clamped addresses and select the padding value; no padded copy is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.tvm.contract.engine import Engine, Operand
from bitwright.codegen.tvm.contract.engines import engine_of
from bitwright.codegen.tvm.contract.epilogue import Epilogue
from bitwright.codegen.tvm.contract.spec import ContractSpec, Conv, KernelFunc, Knobs
from bitwright.codegen.tvm.tir import (
    Builder,
    Index,
    Pointer,
    Register,
    Vec,
    both,
    choose,
    const,
    maximum,
    minimum,
    scalar,
)
from bitwright.ir.errors import InvalidInput

Array = NDArray[Any]
MAX_TAPS = 128
"""Taps are unrolled; larger kernels are refused."""


@dataclass(frozen=True)
class Columns:
    """The vertical taps of ``height`` output rows: which input rows they read and how those share quads."""

    height: int
    quad: int
    conv: Conv

    @property
    def offsets(self) -> list[int]:
        """Input rows, relative to the first, in ascending order."""
        c = self.conv
        taps = {r * c.stride[0] + k * c.dilation[0] for r in range(self.height) for k in range(c.kernel[0])}
        return sorted(taps)

    @property
    def quads(self) -> int:
        return ceil(len(self.offsets) / self.quad)

    def tap(self, row: int, quad: int, t: int) -> int | None:
        """The vertical tap that output ``row`` has in place ``t`` of a quad."""
        place = quad * self.quad + t
        if place >= len(self.offsets):
            return None
        k, rest = divmod(self.offsets[place] - row * self.conv.stride[0], self.conv.dilation[0])
        return k if rest == 0 and 0 <= k < self.conv.kernel[0] else None

    @property
    def slots(self) -> int:
        """Weight vectors per column of the kernel: with quads, output rows need their own arrangement."""
        return self.height * self.quads if self.quad > 1 else self.conv.kernel[0]

    def slot(self, row: int, quad: int) -> int:
        """The weight vector that output ``row`` uses for a quad."""
        if self.quad > 1:
            return row * self.quads + quad
        tap = self.tap(row, quad, 0)
        assert tap is not None
        return tap

    def places(self) -> list[tuple[int, int, int]]:
        """(vertical tap, slot, place in the quad) of every packed weight."""
        if self.quad == 1:
            return [(k, k, 0) for k in range(self.conv.kernel[0])]
        every = np.ndindex(self.height, self.quads, self.quad)
        taps = [(self.tap(r, q, t), r * self.quads + q, t) for r, q, t in every]
        return [(k, slot, t) for k, slot, t in taps if k is not None]

    def used(self, row: int, quad: int) -> bool:
        """Whether an output row has any tap in a quad."""
        return any(self.tap(row, quad, t) is not None for t in range(self.quad))


def height_of(conv: Conv, quad: int) -> int:
    """Output rows per tile: so many that their input rows fill whole quads."""
    if quad == 1:
        return 2 if conv.output[0] > 1 else 1
    if conv.stride[0] == conv.dilation[0] == 1:
        return min(conv.output[0], 4 - (conv.kernel[0] - 1) % 4)
    return 1


def pack_depthwise(spec: ContractSpec, knobs: Knobs, weight: Array) -> list[Array]:
    """``[channel block][slot][kx][lane][quad]``."""
    engine, columns = engine_of(spec, knobs), _columns(spec, knobs)
    if weight.shape != spec.weight_shape:
        raise InvalidInput(f"weights of shape {weight.shape}, expected {spec.weight_shape}")
    blocks = ceil(spec.cols / engine.lanes)
    shape = (blocks * engine.lanes, columns.slots, columns.conv.kernel[1], engine.quad)
    out = np.zeros(shape, spec.weight_dtype.numpy)
    for k, slot, t in columns.places():
        out[: spec.cols, slot, :, t] = weight[:, 0, k, :]
    out = out.reshape(blocks, engine.lanes, *shape[1:]).transpose(0, 2, 3, 1, 4)
    return [np.ascontiguousarray(out).reshape(-1)]


def unpack_depthwise(spec: ContractSpec, knobs: Knobs, arrays: list[Array]) -> tuple[Array, Array]:
    """The logical weights, which every output row of the tile must hold alike."""
    engine, columns = engine_of(spec, knobs), _columns(spec, knobs)
    width = columns.conv.kernel[1]
    flat = arrays[0].reshape(-1, columns.slots, width, engine.lanes, engine.quad)
    flat = flat.transpose(0, 3, 1, 2, 4).reshape(-1, columns.slots, width, engine.quad)
    out = np.zeros(spec.weight_shape, flat.dtype)
    seen: set[int] = set()
    for k, slot, t in columns.places():
        found = flat[: spec.cols, slot, :, t]
        if k in seen and np.any(out[:, 0, k, :] != found):
            raise InvalidInput("the output rows of a packed depthwise tile disagree")
        out[:, 0, k, :] = found
        seen.add(k)
    return out, np.ones(out.shape, bool)


def emit_depthwise(spec: ContractSpec, knobs: Knobs, epilogue: Epilogue, name: str) -> KernelFunc:
    """``void name(begin, end, x, weights, [init], epilogue operands..., outputs...)``; a task is a row of tiles."""
    conv, engine, columns = spec.geometry, engine_of(spec, knobs), _columns(spec, knobs)
    assert isinstance(conv, Conv)
    b = Builder(name)
    blocks = ceil(conv.channels / engine.lanes)
    x = b.param("x", spec.input_dtype, spec.input_elements)
    size = blocks * engine.lanes * columns.slots * conv.kernel[1] * engine.quad
    weights = b.param("weights", spec.weight_dtype, size)
    init = b.param("init", spec.acc_dtype, spec.cols) if spec.init else None
    pointers = {p.name: b.param(p.name, p.dtype, p.elements) for p in epilogue.params}
    writer = _Depthwise(
        b, spec, conv, engine, columns, min(knobs.rows, conv.output[1]), x, weights, init, epilogue, pointers
    )
    whole, rest = divmod(conv.output[0], columns.height)
    per_image = whole + (rest > 0)
    with b.loop(b.end, b.begin, name="task") as task:
        image = b.index(task // per_image)
        band = b.index(task % per_image)
        with b.when(band < whole):
            writer.band(image, b.index(band * columns.height), columns.height)
        if rest:
            with b.when(band == whole):
                writer.band(image, whole * columns.height, rest)
    return KernelFunc(b.finish(), name, conv.batch * per_image, 0, b.param_names)


def _columns(spec: ContractSpec, knobs: Knobs) -> Columns:
    assert isinstance(spec.geometry, Conv)
    return Columns(knobs.vectors, engine_of(spec, knobs).quad, spec.geometry)


@dataclass(frozen=True)
class _Depthwise:
    b: Builder
    spec: ContractSpec
    conv: Conv
    engine: Engine
    columns: Columns
    wide: int
    x: Pointer
    weights: Pointer
    init: Pointer | None
    epilogue: Epilogue
    pointers: Mapping[str, Pointer]

    def band(self, image: Index, oh: Index, height: int) -> None:
        """All tiles of ``height`` output rows."""
        b, c = self.b, self.conv
        y = b.index(oh * c.stride[0] - c.padding[0])
        last = (height - 1) * c.stride[0] + (c.kernel[0] - 1) * c.dilation[0]
        rows_inside = both(y >= 0, y + last < c.height)
        whole, rest = divmod(c.output[1], self.wide)
        first, final = self._inside()
        with b.loop(whole, name="tile") as tile:
            inside = b.index(choose(both(rows_inside, tile >= first, tile < final), 1, 0))
            ow = b.index(tile * self.wide)
            with b.when(inside == 1):
                self._tile(image, oh, ow, y, height, self.wide, checked=False)
            if any(c.padding):
                with b.when(inside == 0):
                    self._tile(image, oh, ow, y, height, self.wide, checked=True)
        if rest:
            self._tile(image, oh, whole * self.wide, y, height, rest, checked=any(c.padding))

    def _inside(self) -> tuple[int, int]:
        """The tiles of a row that read no column outside the image."""
        c = self.conv
        step, reach = self.wide * c.stride[1], (self.wide - 1) * c.stride[1] + (c.kernel[1] - 1) * c.dilation[1]
        first = ceil(c.padding[1] / step)
        final = (c.width - 1 - reach + c.padding[1]) // step + 1
        return first, max(first, min(final, c.output[1] // self.wide))

    def _tile(self, image: Index, oh: Index, ow: Index, y: Index, height: int, wide: int, checked: bool) -> None:
        b, c, lanes = self.b, self.conv, self.engine.lanes
        left = b.index(ow * c.stride[1] - c.padding[1])
        reader = _Reader(self, image, y, left, checked)
        row = b.index((image * c.output[0] + oh) * c.output[1] + ow)
        together = self.engine.together
        with b.loop(c.channels // (together * lanes), name="block") as block:
            self._channels(reader, row, b.index(block * together), height, wide, together * lanes)
        done = c.channels // (together * lanes) * together
        if (rest := c.channels - done * lanes) >= lanes:
            self._channels(reader, row, done, height, wide, lanes)
            done, rest = done + 1, rest - lanes
        if rest:
            self._channels(reader, row, done, height, wide, rest)

    def _channels(self, reader: _Reader, row: Index, block: Index, height: int, wide: int, valid: int) -> None:
        """``valid`` channels from the ``block``-th vector on: of one vector, or of several whole ones together."""
        b, c, lanes, columns = self.b, self.conv, self.engine.lanes, self.columns
        channel, parts = b.index(block * lanes), ceil(valid / lanes)
        acc = self._started(channel, height, wide, parts)
        step = lanes * self.engine.quad
        stride = columns.slots * c.kernel[1] * step
        base = b.index(block * stride)
        uses: dict[int, list[tuple[int, int]]] = {}
        for column in range(wide):
            for k in range(c.kernel[1]):
                uses.setdefault(column * c.stride[1] + k * c.dilation[1], []).append((column, k))
        held: dict[tuple[int, int], Operand] = {}

        def weights(part: int, slot: int) -> Operand:
            if (part, slot) not in held:
                held[part, slot] = self.engine.weights(b, self.weights, base + (part * stride + slot * step))
            return held[part, slot]

        for at, quad in itertools.product(sorted(uses), range(columns.quads)):
            rows = [r for r in range(height) if columns.used(r, quad)]
            if not rows:
                continue
            taps = [(r, *use) for r in rows for use in uses[at]]
            for part, a in enumerate(reader.column(quad, at, channel, parts)):
                for r, column, k in taps:
                    w, sums = weights(part, columns.slot(r, quad) * c.kernel[1] + k), acc[r][column][part]
                    sums.set(self.engine.mac(sums.get(), a, w))
        self._finish(acc, row, channel, valid)

    def _started(self, channel: Index, height: int, wide: int, parts: int) -> list[list[list[Register]]]:
        """Accumulators by row, column and vector of channels."""
        b, lanes = self.b, self.engine.lanes
        acc: list[list[list[Register]]] = [[[] for _ in range(wide)] for _ in range(height)]
        for part in range(parts):
            start = const(0, self.engine.acc, lanes)
            if self.init is not None:
                start = b.let(b.load(self.init, channel + part * lanes, lanes))
            for pixel in itertools.chain(*acc):
                pixel.append(b.register(self.engine.acc, lanes, start, "acc"))
        return acc

    def _finish(self, acc: list[list[list[Register]]], row: Index, channel: Index, valid: int) -> None:
        b, lanes, pitch, wide = self.b, self.engine.lanes, self.conv.output[1], len(acc[0])
        if not self.epilogue.heavy:
            for r, line in enumerate(acc):
                for i, place in enumerate(line):
                    self._store([register.get() for register in place], row + r * pitch + i, channel, valid)
            return
        for r, line in enumerate(acc):
            memory = [b.stack(self.engine.acc, wide * lanes, "tile") for _ in line[0]]
            for i, place in enumerate(line):
                for part, register in enumerate(place):
                    b.store(memory[part], i * lanes, register.get())
            with b.loop(wide, name="column") as column:
                sums = [b.load(m, column * lanes, lanes) for m in memory]
                self._store(sums, row + r * pitch + column, channel, valid)

    def _store(self, accs: list[Vec], row: Index, channel: Index, valid: int) -> None:
        kept = [self.b.let(a) for a in accs]
        self.epilogue.store_row(self.b, self.pointers, kept, row, channel, valid)


class _Reader:
    """Activations of one tile: plain loads, or clamped loads with the padding value selected."""

    def __init__(self, kernel: _Depthwise, image: Index, y: Index, left: Index, checked: bool) -> None:
        b, c = kernel.b, kernel.conv
        self.kernel, self.left, self.checked = kernel, left, checked
        self.valid: list[Index] = []
        self.lines: list[Index] = []
        for offset in kernel.columns.offsets:
            at = y + offset
            if checked:
                at = minimum(maximum(at, 0), c.height - 1)
                self.valid.append(b.index(choose(both(y + offset >= 0, y + offset < c.height), 1, 0)))
            self.lines.append(b.index((image * c.height + at) * (c.width * c.channels)))

    def column(self, quad: int, offset: int, channel: Index, parts: int) -> list[Operand]:
        """The rows of a quad at one input column: an operand for each of ``parts`` vectors of channels."""
        k = self.kernel
        b, c, size = k.b, k.conv, k.engine.quad
        across = self.left + offset
        if self.checked:
            clamped = b.index(minimum(maximum(across, 0), c.width - 1) * c.channels + channel)
            inside = b.index(choose(both(across >= 0, across < c.width), 1, 0))
        else:
            clamped = b.index(across * c.channels + channel)
        rows: list[Vec] = []
        for place in range(quad * size, quad * size + size):
            if place >= len(self.lines):
                rows.append(rows[-1])
                continue
            value = b.load(k.x, self.lines[place] + clamped, parts * k.engine.lanes)
            if self.checked:
                there = b.index(inside * self.valid[place])
                outside = const(k.spec.pad_value, k.spec.input_dtype, value.lanes)
                value = scalar(there).spread(value.lanes).ne(0).select(value, outside)
            rows.append(b.let(value))
        return [k.engine.interleave(b, rows)] if parts == 1 else k.engine.interleave_pair(b, rows)
