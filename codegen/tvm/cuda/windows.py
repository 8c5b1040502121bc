"""Windows over channels-last images: a thread has four channels of some neighbouring places of the result.

Neighbouring threads have neighbouring channels, so that loads are whole lines; what several places of a row need is
loaded and unpacked once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.generic_eval import conjunction, memory, unflatten
from bitwright.codegen.tvm.tir import Index, Pointer, Vec, const, width
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import BF16, F16, F32, S32, U32, DType

LANES, ACROSS, THREADS = 4, 4, 128
UNROLLED = 9
"""Taps up to which all are written out; beyond, rows of taps are a loop."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Images [images, rows, columns, channels] and windows of 2 axes (one-dimensional images have one row)."""

    images: int
    channels: int
    space: tuple[int, int]
    out: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    begin: tuple[int, int]
    dilation: tuple[int, int]
    zero: int = 0

    @staticmethod
    def of(
        image: tuple[int, ...], result: tuple[int, ...], kernel: tuple[int, ...],
        geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], zero: int = 0,
    ) -> Shape:  # fmt: skip
        """Sizes of images and windows of one or two axes; ``geometry`` is stride, begin, dilation."""
        stride, begin, dilation = geometry

        def two(v: tuple[int, ...], fill: int = 1) -> tuple[int, int]:
            return (fill, v[0]) if len(v) == 1 else (v[0], v[1])

        return Shape(
            image[0], image[-1], two(image[1:-1]), two(result[1:-1]), two(kernel), two(stride), two(begin, 0),
            two(dilation), zero,
        )  # fmt: skip

    @property
    def lanes(self) -> int:
        """Channels of a thread."""
        return LANES if self.channels % LANES == 0 else 1

    @property
    def across(self) -> int:
        """Neighbouring places of the result that a thread has."""
        return min(ACROSS, self.out[1])

    @property
    def tasks(self) -> int:
        return self.images * self.out[0] * math.ceil(self.out[1] / self.across) * (self.channels // self.lanes)


@dataclass(eq=False)
class Windows:
    """Emits a kernel: ``sums[place][channel]`` begin as :meth:`start`, rows of taps change them, then the results."""

    b: CudaBuilder
    s: Shape
    x: Pointer
    body: Graph
    root: Node

    def __post_init__(self) -> None:
        self.kind = self.body.types[self.root.inputs[0]].dtype
        self.total = F32 if self.kind.is_float else S32

    def start(self) -> Vec:
        raise NotImplementedError

    def taps(self, ky: Index) -> None:
        raise NotImplementedError

    def finish(self, lead: tuple[Index, ...], values: list[Vec]) -> None:
        raise NotImplementedError

    def run(self) -> None:
        b, s = self.b, self.s
        task = b.index(b.block() * b.threads + b.thread)
        pieces = math.ceil(s.out[1] / s.across)
        with b.when(True if s.tasks % b.threads == 0 else task < s.tasks):
            image, row, piece, vector = unflatten(task, (s.images, s.out[0], pieces, s.channels // s.lanes))
            self.image, self.channel = b.index(image), b.index(vector * s.lanes)
            self.top = b.index(row * s.stride[0] - s.begin[0])
            first = b.index(piece * s.across)
            self.left = b.index(first * s.stride[1] - s.begin[1])
            self.sums = [[b.register(self.total, 1, self.start()) for _ in range(s.lanes)] for _ in range(s.across)]
            if math.prod(s.kernel) <= UNROLLED:
                for ky in range(s.kernel[0]):
                    self.taps(ky)
            else:
                with b.loop(s.kernel[0], name="ky") as ky:
                    self.taps(b.index(ky))
            for j, line in enumerate(self.sums):
                column = b.index(first + j)
                values = [b.register(self.total, 1, r.get()).get() for r in line]
                lead = (self.image, column) if self.root.type.rank == 3 else (self.image, b.index(row), column)
                with b.when(True if s.out[1] % s.across == 0 else column < s.out[1]):
                    self.finish(lead, values)

    def columns(self, ky: Index) -> Iterator[tuple[int, Any, list[Vec]]]:
        """The columns that row ``ky`` of the windows needs: their offset, whether they exist, their channels."""
        b, s = self.b, self.s
        y = b.index(self.top + ky * s.dilation[0])
        inside = conjunction([y >= 0, y < s.space[0]])
        wanted = {j * s.stride[1] + kx * s.dilation[1] for j in range(s.across) for kx in range(s.kernel[1])}
        for offset in sorted(wanted):
            column = b.index(self.left + offset)
            there = conjunction([inside, column >= 0, column < s.space[1]])
            place = ((self.image * s.space[0] + y) * s.space[1] + column) * s.channels
            yield offset, there, self.load(self.x, self.kind, place, there)

    def uses(self, offset: int) -> Iterator[tuple[int, int]]:
        """Places and taps that a column belongs to."""
        s = self.s
        for j in range(s.across):
            kx, rest = divmod(offset - j * s.stride[1], s.dilation[1])
            if not rest and 0 <= kx < s.kernel[1]:
                yield j, kx

    def load(self, pointer: Pointer, dtype: DType, at: Index, there: Any) -> list[Vec]:
        """This thread's channels of a place, as the sums' format; zeros where there is none."""
        b, s = self.b, self.s
        size = width(memory(dtype))
        if s.lanes == 1:
            value = b.register(memory(dtype), 1, const(0, memory(dtype)))
            with b.when(there):
                value.set(b.load(pointer, at + self.channel))
            if dtype == BF16:
                return [b.register(F32, 1, (value.get().cast(U32) << 16).bits(F32)).get()]
            return [b.register(self.total, 1, value.get().cast(self.total)).get()]
        raw = b.local(U32, size, "raw")  # four channels: as many words as an element has bytes
        b.call(f"bw_pull{4 * size}", b.address(raw), b.address(pointer, at + self.channel), there)
        words = [b.load(raw, i) for i in range(size)]
        return [b.register(self.total, 1, v).get() for v in self._unpacked(words, dtype)]

    def _unpacked(self, words: list[Vec], dtype: DType) -> list[Vec]:
        if dtype == F32:
            return [w.bits(F32) for w in words]
        if dtype == F16:
            return [self.b.value(f"bw_{part}_f16", F32, w) for w in words for part in ("low", "high")]
        if dtype == BF16:
            return [self.b.register(U32, 1, v).get().bits(F32) for w in words for v in (w << 16, w & 0xFFFF0000)]
        word = words[0]
        if dtype.lo < 0:
            return [(word.cast(S32) << (24 - 8 * k)) >> 24 for k in range(4)]
        return [((word >> (8 * k)) & 255).cast(S32) for k in range(4)]


__all__ = ["ACROSS", "LANES", "THREADS", "Shape", "Windows"]
