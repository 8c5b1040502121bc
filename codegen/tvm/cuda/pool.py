"""Maximum pooling on a GPU: a thread has four channels of some neighbouring windows, channels-last images.

Loads and sharing are those of depthwise convolutions (``windows.py``): neighbouring threads have neighbouring channels,
and what several windows of a row need is loaded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.config import CudaConfig
from bitwright.codegen.tvm.cuda.store import RowEpilogue
from bitwright.codegen.tvm.cuda.windows import THREADS, Shape, Windows
from bitwright.codegen.tvm.generic_eval import better, conjunction, lowest, memory
from bitwright.codegen.tvm.generic_reduce import geometry_of
from bitwright.codegen.tvm.pointwise import why_unsupported
from bitwright.codegen.tvm.template import Config, Refused, Template, plain_args
from bitwright.codegen.tvm.tir import Index, Vec, const
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.target import Target
from bitwright.ir.types import BF16, F16, F32, S8, U8
from bitwright.ir.weights import Array


class CudaPool(Template):
    """max_pool with a pointwise epilogue."""

    name: ClassVar[str] = "cuda_pool"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes channels-last images of one or two axes in f32, f16, bf16, s8 and u8."""
        root = _root(body)
        if isinstance(root, str):
            return Refused(root)
        s = _shape(body, root)
        return CudaConfig(
            args=plain_args(body), mcpu=target.mcpu, threads=THREADS, grid=(math.ceil(s.tasks / THREADS), 1, 1),
            reason=f"{s.lanes} channels of {s.across} neighbouring windows a thread",
        )  # fmt: skip

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        assert isinstance(config, CudaConfig)
        root = _root(body)
        assert isinstance(root, Node)
        b = CudaBuilder(symbol, grid=config.grid, threads=config.threads)
        inputs = {v.name: b.param(f"x{i}", memory(v.type.dtype), v.type.size) for i, v in enumerate(body.inputs)}
        types = [body.types[o] for o in body.outputs]
        outputs = [b.param(f"y{i}", memory(t.dtype), t.size) for i, t in enumerate(types)]
        epilogue = RowEpilogue(b, body, root, inputs, outputs)
        _Maxima(b, _shape(body, root), inputs[root.inputs[0]], body, root, epilogue).run()
        return b.finish()


def _root(body: Graph) -> Node | str:
    """The pooling, or why the body is none for this kernel."""
    roots = [n for n in body.nodes if not isinstance(n.op, (*ops.POINTWISE, ops.Constant))]
    if len(roots) != 1 or not isinstance(roots[0].op, ops.MaxPool):
        return "not one maximum pooling with pointwise operators behind it"
    root, x = roots[0], body.types[roots[0].inputs[0]]
    if not all(t.is_static and 0 < t.size < 1 << 31 for t in body.types.values()):
        return "symbolic, empty or huge tensors"
    if not roots[0].op.channels_last or x.rank not in (3, 4) or x.dtype not in (F32, F16, BF16, S8, U8):
        return f"images are not channels last, of three axes, or {x.dtype}"
    if root.inputs[0] in body.producers or any(body.types[o].shape != root.type.shape for o in body.outputs):
        return "work before the pooling, or a result of another shape"
    for n in body.nodes:
        if n is not root and isinstance(n.op, ops.POINTWISE):
            if why := why_unsupported(n.op, [body.types[v].dtype for v in n.inputs]):
                return why
    return root


def _shape(body: Graph, root: Node) -> Shape:
    assert isinstance(root.op, ops.MaxPool)
    x, rank = body.types[root.inputs[0]].static_shape, len(root.op.kernel)
    stride, begin, dilation = geometry_of(root.op, rank)
    return Shape.of(x, root.type.static_shape, root.op.kernel, (stride, begin, dilation))


@dataclass(eq=False)
class _Maxima(Windows):
    epilogue: RowEpilogue

    def start(self) -> Vec:
        return const(lowest(self.total), self.total)

    def taps(self, ky: Index) -> None:
        """One row of taps: columns of the image that several windows need are loaded once."""
        for offset, there, values in self.columns(ky):
            for j, _ in self.uses(offset):
                for k, value in enumerate(values):
                    with self.b.when(conjunction([there, better(value, self.sums[j][k].get()).expr])):
                        self.sums[j][k].set(value)

    def finish(self, lead: tuple[Index, ...], values: list[Vec]) -> None:
        self.epilogue.store_row(lead, self.channel, values, self.s.channels, True)


__all__ = ["CudaPool"]
