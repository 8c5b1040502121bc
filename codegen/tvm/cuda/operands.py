"""Operands of matrix products in memory, and their way into shared memory: rows of a matrix, windows of an image.

An operand is a matrix of rows (for a convolution: output places, a row holds its window, channels innermost). A
:class:`Loader` brings a tile of rows by ``depth`` bytes of k into shared memory by asynchronous copies of the largest
pieces that alignment allows; what lies outside becomes zero, or the zero point where an image is padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.generic_eval import conjunction, div, mod, unflatten
from bitwright.codegen.tvm.tir import Index, Pointer, choose, const, width
from bitwright.ir.types import U8, U16, U32

CHUNK = 16


@dataclass(frozen=True, slots=True)
class Matrix:
    """``rows`` rows of ``length`` elements, ``stride`` elements apart, in batches ``step`` elements apart (0: one)."""

    rows: int
    length: int
    stride: int
    step: int = 0

    def piece(self, size: int) -> int:
        """Bytes that can be moved at once, for elements of ``size`` bytes."""
        return math.gcd(self.length * size, self.stride * size, self.step * size, CHUNK)


@dataclass(frozen=True, slots=True)
class Window:
    """Windows of images [images, *space, channels], channels last; a batch is a group of channels.

    Row (image, *place) element (*tap, channel) is the image at place * stride - begin + tap * dilation.
    """

    images: int
    channels: int
    space: tuple[int, ...]
    out: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    begin: tuple[int, ...]
    groups: int = 1

    @property
    def rows(self) -> int:
        """One for every place of the result."""
        return self.images * math.prod(self.out)

    @property
    def length(self) -> int:
        """Elements of a window, of one group."""
        return math.prod(self.kernel) * self.channels // self.groups

    @property
    def inside(self) -> bool:
        """Whether no window leaves the image."""
        ends = zip(self.out, self.stride, self.kernel, self.dilation, self.space, strict=True)
        return not any(self.begin) and all((o - 1) * s + (k - 1) * d < n for o, s, k, d, n in ends)

    def piece(self, size: int) -> int:
        """Bytes that can be moved at once: they belong to one tap."""
        return math.gcd(self.channels // self.groups * size, CHUNK)

    def plain(self) -> Matrix | Window:
        """The matrix that it is where windows are single elements in order."""
        ones = (1,) * len(self.space)
        if self.kernel == ones and self.stride == ones and self.inside and self.out == self.space:
            each = self.channels // self.groups
            return Matrix(self.rows, each, self.channels, each if self.groups > 1 else 0)
        return self


@dataclass(eq=False)
class Loader:
    """Copies tiles of ``rows`` x ``depth`` bytes of ``x`` (elements of ``source``) to ``shared`` (bytes).

    ``depth``: a power of two of at least 32; ``threads``: a power of two, the first of the block (0: all). ``fill``:
    the byte that stands outside of an image. Chunks of 16 bytes of a row are permuted (:func:`swizzled`), so that
    ``ldmatrix`` has no conflicts between banks.
    """

    b: CudaBuilder
    source: Matrix | Window
    shared: Pointer
    rows: int
    depth: int
    fill: int = 0
    x: Pointer = field(kw_only=True)
    threads: int = 0
    filled: Pointer | None = None
    _size: int = 0
    _piece: int = 0
    _origins: list[tuple[Index, list[Index]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.threads = self.threads or self.b.threads
        self._size = width(self.x.dtype)
        piece = self.source.piece(self._size)
        self._piece = piece if piece >= 4 else self._size  # asynchronous copies have 4 bytes at least
        self._across = self.depth // self._piece  # pieces of a row
        self._down = max(self.threads // self._across, 1)  # rows that all threads cover at once

    @property
    def asynchronous(self) -> bool:
        """Whether copies run behind the computation (else they are done when they return)."""
        return self._piece >= 4

    def start(self, first: Index, batch: Index) -> None:
        """Name the first row of the tile and the batch; emits what all copies share."""
        b, src = self.b, self.source
        self._first, self._batch = first, batch
        self._row = b.index(div(b.thread, self._across)) if self._across < self.threads else 0
        if isinstance(src, Window) and self.asynchronous:
            self._origins = [self._origin(self._row + i * self._down) for i in range(-(-self.rows // self._down))]

    def copy(self, to: Index, k: Index, first: Index | None = None) -> None:
        """Copy the columns from element ``k`` on to byte ``to`` of the shared memory (``first``: other first row)."""
        b = self.b
        if first is not None:
            self._first = first
        columns = max(self._across // self.threads, 1)
        for c in range(columns):
            column = b.index(mod(b.thread, self._across)) if columns == 1 else b.thread + c * self.threads
            e = b.index(k + column * (self._piece // self._size) if self.asynchronous else k + column)
            if not self.asynchronous:
                with b.loop(-(-self.rows // self._down)) as i:
                    self._put(to, self._row + i * self._down, column, e, None)
                continue
            for i in range(-(-self.rows // self._down)):
                self._put(to, self._row + i * self._down, column, e, i)

    # ---- inside
    def _put(self, to: Index, row: Index, column: Index, e: Index, i: int | None) -> None:
        b = self.b
        within = True if self.rows % self._down == 0 else row < self.rows
        byte = column * self._piece
        chunk = swizzled(div(byte, CHUNK), row, self.depth)
        at = to + row * self.depth + chunk * CHUNK + (mod(byte, CHUNK) if self._piece < CHUNK else 0)
        with b.when(within):
            place, known, inside = self._place(row, e, i)
            if self.asynchronous:
                self._copy(at, place, conjunction([*known, *inside]), bool(inside))
            else:
                self._move(at, place, known, inside)

    def _copy(self, at: Index, place: Index, ok: Any, leaves: bool) -> None:
        b, p = self.b, self._piece
        if self.filled is not None and leaves:  # beyond rows and k as well: weights are zero there, sums not stored
            source, other = b.address(self.x, place), b.address(self.filled)
            b.call(f"bw_cp_async{p}_or", b.address(self.shared, at), source, other, ok)
            return
        if self.fill and leaves:
            with b.when(ok):
                b.call(f"bw_cp_async{p}", b.address(self.shared, at), b.address(self.x, place), p)
            with b.when(tirx.Not(ok)):
                words = b.view(self.shared, U32)
                for w in range(p // 4):
                    b.store(words, div(at, 4) + w, const(self.fill * 0x01010101, U32))
            return
        valid = choose(ok, p, 0)
        b.call(f"bw_cp_async{p}", b.address(self.shared, at), b.address(self.x, place), valid)

    def _move(self, at: Index, place: Index, known: list[Any], inside: list[Any]) -> None:
        """One element, by registers."""
        b = self.b
        kind = U16 if self._size == 2 else U8
        to = b.view(self.shared, kind)
        value = b.register(kind, 1, const(self.fill if inside else 0, kind))
        with b.when(conjunction([*known, *inside])):
            value.set(b.load(b.view(self.x, kind), place))
        b.store(to, div(at, self._size), value.get())

    def _place(self, row: Index, e: Index, i: int | None) -> tuple[Index, list[Any], list[Any]]:
        """Element of memory, conditions that it is one, conditions that it is inside of the image."""
        src, at = self.source, self._first + row
        reaches = [e < src.length]
        if isinstance(src, Matrix):
            return at * src.stride + e + self._batch * src.step, [at < src.rows, *reaches], []
        origin, corner = self._origins[i] if i is not None else self._origin(row)
        each = src.channels // src.groups
        tap, channel = div(e, each), mod(e, each)
        taps = unflatten(tap, src.kernel)
        offset: Index = channel
        for a, t in enumerate(taps):
            offset = offset + t * (src.dilation[a] * math.prod(src.space[a + 1 :]) * src.channels)
        if src.inside:
            return origin + offset, [at < src.rows, *reaches], []
        inside: list[Any] = []
        for a, t in enumerate(taps):
            y = corner[a] + t * src.dilation[a]
            inside += [y >= 0, y < src.space[a]]
        return origin + offset, reaches, inside

    def _origin(self, row: Index) -> tuple[Index, list[Index]]:
        """Where a row's window starts: its element of memory, its corner (far outside for rows that are none)."""
        src, b = self.source, self.b
        assert isinstance(src, Window)
        at = self._first + row
        image, *places = unflatten(b.index(at), (src.images, *src.out)) if src.rows > 1 else (0,) * (1 + len(src.out))
        total, corner = image, []
        for a, y in enumerate(places):
            c = y * src.stride[a] - src.begin[a]
            total = total * src.space[a] + c
            corner.append(b.index(choose(at < src.rows, c, -(1 << 24))) if not src.inside else c)
        origin = total * src.channels + self._batch * (src.channels // src.groups)
        return b.index(origin), corner


def swizzled(chunk: Index, row: Index, depth: int) -> Index:
    """Where a 16-byte chunk of a row of ``depth`` bytes lies: eight rows' chunks of one number touch all banks."""
    if depth >= 128:
        return tirx.bitwise_xor(_expr(chunk), _expr(mod(row, 8)))
    share = 128 // depth
    return tirx.bitwise_xor(_expr(chunk), _expr(mod(div(row, share), 8 // share)))


def _expr(i: Index) -> Index:
    return tirx.const(i, "int32") if isinstance(i, int) else i
