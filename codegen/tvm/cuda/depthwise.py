"""Depthwise convolution on a GPU: a thread has four channels of some neighbouring places of the result.

Neighbouring threads have neighbouring channels, so that loads of channels-last images and of weights (one row of
channels a tap) are whole lines; what several places of the result need is loaded and unpacked once. Sums of integers
are exact in s32, those of floats f32 with one rounding a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bitwright.codegen.tvm.contract_template import root_of
from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.config import CudaConfig
from bitwright.codegen.tvm.cuda.store import RowEpilogue
from bitwright.codegen.tvm.generic_eval import conjunction, memory, unflatten
from bitwright.codegen.tvm.generic_reduce import geometry_of
from bitwright.codegen.tvm.pointwise import why_unsupported
from bitwright.codegen.tvm.template import Arg, Config, Refused, Template
from bitwright.codegen.tvm.tir import Index, Pointer, Register, Vec, const, width
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.target import Target
from bitwright.ir.types import BF16, F16, F32, S8, S32, U8, U32, DType
from bitwright.ir.weights import Array

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
    zero: int

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


class CudaDepthwise(Template):
    """conv and int_conv with one input and one output channel a group, and a pointwise epilogue."""

    name: ClassVar[str] = "cuda_depthwise"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes channels-last images of one or two axes in f32, f16, bf16, s8 and u8."""
        root = root_of(body)
        if root is None or not isinstance(root.op, ops.Conv | ops.IntConv):
            return Refused("no convolution")
        if why := _why_not(body, root, constants):
            return Refused(why)
        s = shape_of(body, root)
        others = [Arg("input", i) for i, v in enumerate(body.inputs) if v.name != root.inputs[1]]
        return CudaConfig(
            args=(*others, Arg("packed", 0), *(Arg("output", i) for i in range(len(body.outputs)))), mcpu=target.mcpu,
            threads=THREADS, grid=(math.ceil(s.tasks / THREADS), 1, 1),
            reason=f"{s.lanes} channels of {s.across} neighbouring places a thread",
        )  # fmt: skip

    def pack(self, body: Graph, config: Config, constants: Mapping[str, Array]) -> list[Array]:
        root = root_of(body)
        assert root is not None
        weight = constants[root.inputs[1]]
        taps = np.ascontiguousarray(weight.reshape(weight.shape[0], -1).T)
        return [taps.view(np.uint16) if body.types[root.inputs[1]].dtype == BF16 else taps]

    def verify(self, body: Graph, config: Config, constants: Mapping[str, Array], packed: list[Array]) -> str:
        root = root_of(body)
        assert root is not None
        weight = constants[root.inputs[1]]
        same = np.ascontiguousarray(packed[0].T).tobytes() == np.ascontiguousarray(weight).tobytes()
        return "" if same else "the packed weights are not the weights"

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        assert isinstance(config, CudaConfig)
        root = root_of(body)
        assert root is not None
        b = CudaBuilder(symbol, grid=config.grid, threads=config.threads)
        inputs = {}
        for i, v in enumerate(body.inputs):
            if v.name != root.inputs[1]:
                inputs[v.name] = b.param(f"x{i}", memory(v.type.dtype), v.type.size)
        w = body.types[root.inputs[1]]
        weights = b.param("weights", memory(w.dtype), w.size)
        types = [body.types[o] for o in body.outputs]
        outputs = [b.param(f"y{i}", memory(t.dtype), t.size) for i, t in enumerate(types)]
        epilogue = RowEpilogue(b, body, root, inputs, outputs)
        _Kernel(b, shape_of(body, root), inputs[root.inputs[0]], weights, body, root).run(inputs, epilogue)
        return b.finish()


def _why_not(body: Graph, root: Node, constants: Mapping[str, Array]) -> str:
    """Why a convolution is not for this kernel, or the empty string."""
    op, x, w = root.op, body.types[root.inputs[0]], body.types[root.inputs[1]]
    assert isinstance(op, ops.Conv | ops.IntConv)
    if not all(t.is_static and 0 < t.size < 1 << 31 for t in body.types.values()):
        return "symbolic, empty or huge tensors"
    if not op.channels_last or x.rank not in (3, 4):
        return "images are not channels last, or of three axes"
    if not op.groups == w.static_shape[0] == x.static_shape[-1]:
        return "not one input and one output channel a group"
    if root.inputs[1] not in constants or any(n in body.producers for n in root.inputs):
        return "weights or operands are computed"
    floats = x.dtype in (F32, F16, BF16) and w.dtype == x.dtype
    integers = isinstance(op, ops.IntConv) and x.dtype in (S8, U8) and w.dtype.lo < 0 and op.acc == S32
    if not (floats or integers):
        return f"{x.dtype} by {w.dtype}"
    return _behind(body, root)


def _behind(body: Graph, root: Node) -> str:
    """Why what follows cannot be computed here."""
    if any(body.types[o].shape != root.type.shape for o in body.outputs):
        return "a result of another shape than the convolution's"
    for n in body.nodes:
        if n is root or isinstance(n.op, ops.Constant):
            continue
        if root.inputs[1] in n.inputs:
            return "the weights are used behind the convolution, too"
        if why := why_unsupported(n.op, [body.types[x].dtype for x in n.inputs]):
            return why
    return ""


def shape_of(body: Graph, root: Node) -> Shape:
    """The convolution's sizes, with two axes of space."""
    op, x, w = root.op, body.types[root.inputs[0]].static_shape, body.types[root.inputs[1]].static_shape
    stride, begin, dilation = geometry_of(op, len(x) - 2)

    def two(v: tuple[int, ...], fill: int) -> tuple[int, int]:
        return (fill, v[0]) if len(v) == 1 else (v[0], v[1])

    return Shape(
        x[0], x[-1], two(x[1:-1], 1), two(root.type.static_shape[1:-1], 1), two(w[2:], 1), two(stride, 1),
        two(begin, 0), two(dilation, 1), getattr(op, "x_zero", 0),
    )  # fmt: skip


@dataclass(eq=False)
class _Kernel:
    b: CudaBuilder
    s: Shape
    x: Pointer
    weights: Pointer
    body: Graph
    root: Node

    def run(self, inputs: Mapping[str, Pointer], epilogue: RowEpilogue) -> None:
        b, s = self.b, self.s
        task = b.index(b.block() * b.threads + b.thread)
        pieces = math.ceil(s.out[1] / s.across)
        self.kind, self.w_kind = (self.body.types[n].dtype for n in self.root.inputs[:2])
        self.total = F32 if self.kind.is_float else S32
        with b.when(True if s.tasks % b.threads == 0 else task < s.tasks):
            image, row, piece, vector = unflatten(task, (s.images, s.out[0], pieces, s.channels // s.lanes))
            self.image, self.channel = b.index(image), b.index(vector * s.lanes)
            self.top = b.index(row * s.stride[0] - s.begin[0])
            first = b.index(piece * s.across)
            self.left = b.index(first * s.stride[1] - s.begin[1])
            zero = const(0, self.total)
            self.sums = [[b.register(self.total, 1, zero) for _ in range(s.lanes)] for _ in range(s.across)]
            if math.prod(s.kernel) <= UNROLLED:
                for ky in range(s.kernel[0]):
                    self._taps(ky)
            else:
                with b.loop(s.kernel[0], name="ky") as ky:
                    self._taps(b.index(ky))
            self._finish(inputs, epilogue, b.index(row), first)

    def _taps(self, ky: Index) -> None:
        """One row of taps: columns of the image that several results need are loaded once."""
        b, s = self.b, self.s
        y = b.index(self.top + ky * s.dilation[0])
        inside = conjunction([y >= 0, y < s.space[0]])
        weights = [
            self._load(self.weights, self.w_kind, (ky * s.kernel[1] + kx) * s.channels, True)
            for kx in range(s.kernel[1])
        ]
        wanted = sorted({j * s.stride[1] + kx * s.dilation[1] for j in range(s.across) for kx in range(s.kernel[1])})
        for offset in wanted:
            column = b.index(self.left + offset)
            there = conjunction([inside, column >= 0, column < s.space[1]])
            place = ((self.image * s.space[0] + y) * s.space[1] + column) * s.channels
            values = self._load(self.x, self.kind, place, there)
            if s.zero:
                values = [self._centred(v, there) for v in values]
            for j in range(s.across):
                kx, rest = divmod(offset - j * s.stride[1], s.dilation[1])
                if not rest and 0 <= kx < s.kernel[1]:
                    for k in range(s.lanes):
                        self._add(self.sums[j][k], values[k], weights[kx][k])

    def _centred(self, value: Vec, there: Any) -> Vec:
        """Without the zero point; what lies outside of the image contributes nothing."""
        moved = self.b.register(S32, 1, const(0, S32))
        with self.b.when(there):
            moved.set(value - self.s.zero)
        return moved.get()

    def _add(self, to: Register, x: Vec, w: Vec) -> None:
        if self.total == F32:
            to.set(self.b.value("bw_fma", F32, x, w, to.get()))
        else:
            to.set(to.get() + x * w)

    def _load(self, pointer: Pointer, dtype: DType, at: Index, there: Any) -> list[Vec]:
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

    def _finish(self, inputs: Mapping[str, Pointer], epilogue: RowEpilogue, row: Index, first: Index) -> None:
        b, s = self.b, self.s
        bias = [const(0.0, F32)] * s.lanes
        if len(self.root.inputs) > 2:
            name = self.root.inputs[2]
            bias = self._load(inputs[name], self.body.types[name].dtype, 0, True)
        for j, line in enumerate(self.sums):
            column = b.index(first + j)
            values = [b.register(self.total, 1, r.get()).get() for r in line]
            if len(self.root.inputs) > 2:
                values = [b.register(F32, 1, v + c).get() for v, c in zip(values, bias, strict=True)]
            lead = (self.image, column) if self.root.type.rank == 3 else (self.image, row, column)
            with b.when(True if s.out[1] % s.across == 0 else column < s.out[1]):
                epilogue.store_row(lead, self.channel, values, s.channels, True)


__all__ = ["CudaDepthwise", "Shape", "shape_of"]
