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
from bitwright.codegen.tvm.cuda.windows import THREADS, Shape, Windows
from bitwright.codegen.tvm.generic_eval import memory
from bitwright.codegen.tvm.generic_reduce import geometry_of
from bitwright.codegen.tvm.pointwise import why_unsupported
from bitwright.codegen.tvm.template import Arg, Config, Refused, Template
from bitwright.codegen.tvm.tir import Index, Pointer, Register, Vec, const
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.target import Target
from bitwright.ir.types import BF16, F16, F32, S8, S32, U8
from bitwright.ir.weights import Array


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
        x = inputs[root.inputs[0]]
        _Kernel(b, shape_of(body, root), x, body, root, weights, inputs, epilogue).run()
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
    """The convolution's sizes."""
    x, w = (body.types[n].static_shape for n in root.inputs[:2])
    zero = getattr(root.op, "x_zero", 0)
    return Shape.of(x, root.type.static_shape, w[2:], geometry_of(root.op, len(x) - 2), zero)


@dataclass(eq=False)
class _Kernel(Windows):
    weights: Pointer
    inputs: Mapping[str, Pointer]
    epilogue: RowEpilogue

    def start(self) -> Vec:
        return const(0, self.total)

    def taps(self, ky: Index) -> None:
        """One row of taps."""
        s, dtype = self.s, self.body.types[self.root.inputs[1]].dtype
        starts = [(ky * s.kernel[1] + kx) * s.channels for kx in range(s.kernel[1])]
        weights = [self.load(self.weights, dtype, at, True) for at in starts]
        for offset, there, found in self.columns(ky):
            values = [self._centred(v, there) for v in found] if s.zero else found
            for j, kx in self.uses(offset):
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

    def finish(self, lead: tuple[Index, ...], values: list[Vec]) -> None:
        if len(self.root.inputs) > 2:
            name = self.root.inputs[2]
            bias = self.load(self.inputs[name], self.body.types[name].dtype, 0, True)
            values = [self.b.register(F32, 1, v + c).get() for v, c in zip(values, bias, strict=True)]
        self.epilogue.store_row(lead, self.channel, values, self.s.channels, True)


__all__ = ["CudaDepthwise", "shape_of"]
