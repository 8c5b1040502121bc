"""Transposes on a GPU: tiles of 32 x 32 through shared memory, so that reads and writes both run along memory.

The two axes of a tile are the one along which the source lies and the one along which the result does; all others are a
loop over blocks. Pointwise operators behind the transpose run as results are written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.config import CudaConfig
from bitwright.codegen.tvm.cuda.epilogue import Epilogue
from bitwright.codegen.tvm.generic_eval import conjunction, memory, unflatten
from bitwright.codegen.tvm.pointwise import why_unsupported
from bitwright.codegen.tvm.rows_values import loaded
from bitwright.codegen.tvm.template import Config, Refused, Template, plain_args
from bitwright.codegen.tvm.tir import Index
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.target import Target
from bitwright.ir.weights import Array

SIDE, THREADS = 32, 256


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of the result: its size, and how far apart its elements lie in the source and in the result."""

    size: int
    source: int
    result: int


class CudaTranspose(Template):
    """One transpose that changes the last axis, and pointwise operators behind it."""

    name: ClassVar[str] = "cuda_transpose"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes any static shape and format."""
        root = _root(body)
        if isinstance(root, str):
            return Refused(root)
        along, across, rest = _tile_axes(axes_of(body, root))
        tiles = math.ceil(along.size / SIDE) * math.ceil(across.size / SIDE)
        return CudaConfig(
            args=plain_args(body), mcpu=target.mcpu, threads=THREADS,
            grid=(tiles * math.prod(x.size for x in rest), 1, 1),
            reason=f"tiles of {SIDE} x {SIDE} of {along.size} x {across.size} through shared memory",
        )  # fmt: skip

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        assert isinstance(config, CudaConfig)
        root = _root(body)
        assert isinstance(root, Node)
        b = CudaBuilder(symbol, grid=config.grid, threads=config.threads)
        inputs = {v.name: b.param(f"x{i}", memory(v.type.dtype), v.type.size) for i, v in enumerate(body.inputs)}
        types = [body.types[o] for o in body.outputs]
        outputs = [b.param(f"y{i}", memory(t.dtype), t.size) for i, t in enumerate(types)]
        along, across, rest = _tile_axes(axes_of(body, root))
        dtype, source = root.type.dtype, inputs[root.inputs[0]]
        held = b.shared(memory(dtype), SIDE * (SIDE + 1))
        wide, high = math.ceil(along.size / SIDE), math.ceil(across.size / SIDE)
        tile, others = b.index(b.block() % (wide * high)), b.index(b.block() // (wide * high))
        first, second = b.index(tile % wide * SIDE), b.index(tile // wide * SIDE)
        place = unflatten(others, [x.size for x in rest])
        start, to = (b.index(_at(rest, place, which)) for which in ("source", "result"))
        x, y = b.index(b.thread % SIDE), b.index(b.thread // SIDE)
        steps = range(0, SIDE, THREADS // SIDE)
        for step in steps:
            with b.when(conjunction([first + x < along.size, second + (y + step) < across.size])):
                value = b.load(source, start + (first + x) * along.source + (second + (y + step)) * across.source)
                b.store(held, (y + step) * (SIDE + 1) + x, value)
        b.sync()
        epilogue = Epilogue(b, body, root, inputs, outputs)
        for step in steps:
            with b.when(conjunction([first + (y + step) < along.size, second + x < across.size])):
                value = b.load(held, x * (SIDE + 1) + (y + step))
                at = b.index(to + (first + (y + step)) * along.result + (second + x) * across.result)
                if list(body.outputs) == [root.output]:
                    b.store(outputs[0], at, value)
                else:
                    epilogue.store(unflatten(at, root.type.static_shape), b.let(loaded(value, dtype)))
        return b.finish()


def _root(body: Graph) -> Node | str:
    """The transpose, or why the body is none for this kernel."""
    if not all(t.is_static and 0 < t.size < 1 << 31 for t in body.types.values()):
        return "symbolic, empty or huge tensors"
    roots = [n for n in body.nodes if not isinstance(n.op, (*ops.POINTWISE, ops.Constant))]
    if len(roots) != 1 or not isinstance(roots[0].op, ops.Transpose):
        return "not one transpose with pointwise operators behind it"
    root = roots[0]
    if root.inputs[0] in body.producers:
        return "work before the transpose"
    if any(body.types[o].shape != root.type.shape for o in body.outputs):
        return "a result of another shape than the transpose"
    for n in body.nodes:
        if n is not root and isinstance(n.op, ops.POINTWISE):
            if why := why_unsupported(n.op, [body.types[x].dtype for x in n.inputs]):
                return why
    axes = axes_of(body, root)
    return root if axes and axes[-1].source != 1 else "rows stay rows"


def axes_of(body: Graph, root: Node) -> list[Axis]:
    """Axes of the result, those that are one axis for both sides merged, those of size 1 left out."""
    assert isinstance(root.op, ops.Transpose)
    shape = body.types[root.inputs[0]].static_shape
    strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    out = root.type.static_shape
    found: list[Axis] = []
    for k, p in enumerate(root.op.perm):
        made = Axis(out[k], strides[p], math.prod(out[k + 1 :]))
        if made.size == 1:
            continue
        if found and found[-1].source == made.source * made.size:
            made = Axis(found.pop().size * made.size, made.source, made.result)
        found.append(made)
    return found


def _tile_axes(axes: list[Axis]) -> tuple[Axis, Axis, list[Axis]]:
    """The axis along the source, the one along the result, the others."""
    along = next(x for x in axes if x.source == 1)
    return along, axes[-1], [x for x in axes[:-1] if x is not along]


def _at(axes: list[Axis], place: tuple[Index, ...], which: str) -> Index:
    total: Index = 0
    for x, i in zip(axes, place, strict=True):
        total = total + i * getattr(x, which)
    return total


__all__ = ["Axis", "CudaTranspose", "axes_of"]
