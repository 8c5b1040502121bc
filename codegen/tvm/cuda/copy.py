"""Parts of tensors moved on a GPU, rows staying rows: concatenation, slices, padding, repetition, transposes of rows.

Every part of the result is an operand seen through strides (``codegen/tvm/move_boxes.py``); a thread moves up to 16
bytes, whatever the format, and all parts are one launch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.config import CudaConfig
from bitwright.codegen.tvm.generic_eval import conjunction, memory, unflatten
from bitwright.codegen.tvm.move_boxes import Box, boxes_of
from bitwright.codegen.tvm.template import Config, Refused, Template, plain_args
from bitwright.codegen.tvm.tir import Index, Pointer, const, width
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.types import BF16
from bitwright.ir.weights import Array

MOVES = (ops.Concat, ops.Slice, ops.Pad, ops.Tile, ops.Expand, ops.Transpose)
THREADS = 256


@dataclass(frozen=True, slots=True)
class Part:
    """A box cut into pieces of ``piece`` elements along its last axis; ``count`` of them from block ``first`` on."""

    box: Box
    piece: int
    count: int
    first: int

    @property
    def blocks(self) -> int:
        return math.ceil(self.count / THREADS)


class CudaCopy(Template):
    """One shape operator by itself whose rows are rows of its operands."""

    name: ClassVar[str] = "cuda_copy"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes any format and static shape."""
        parts = parts_of(body)
        if isinstance(parts, str):
            return Refused(parts)
        size = width(memory(body.nodes[0].type.dtype))
        blocks = parts[-1].first + parts[-1].blocks
        return CudaConfig(
            args=plain_args(body), mcpu=target.mcpu, threads=THREADS, grid=(blocks, 1, 1),
            reason=f"rows moved {max(p.piece for p in parts) * size} bytes at a time",
        )  # fmt: skip

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        assert isinstance(config, CudaConfig)
        parts = parts_of(body)
        assert not isinstance(parts, str)
        b = CudaBuilder(symbol, grid=config.grid, threads=config.threads)
        inputs = {v.name: b.param(f"x{i}", memory(v.type.dtype), v.type.size) for i, v in enumerate(body.inputs)}
        result = body.types[body.outputs[0]]
        out = b.param("y", memory(result.dtype), result.size)
        for p in parts:
            at = b.index((b.block() - p.first) * THREADS + b.thread)
            here = [b.block() >= p.first, at < p.count] if len(parts) > 1 else [at < p.count]
            with b.when(conjunction(here)):
                _move(b, p, at, inputs, out, result.dtype == BF16)
        return b.finish()


def _move(b: CudaBuilder, p: Part, at: Index, inputs: Mapping[str, Pointer], out: Pointer, half: bool) -> None:
    """One piece of a part."""
    axes = p.box.axes
    place = unflatten(at, [*(x.size for x in axes[:-1]), axes[-1].size // p.piece])
    to, start = p.box.out, p.box.src
    for k, (x, i) in enumerate(zip(axes, place, strict=True)):
        step = p.piece if k == len(axes) - 1 else 1
        to, start = to + i * (x.out * step), start + i * (x.src * step)
    to, nbytes = b.index(to), p.piece * width(out.dtype)
    if p.box.source is None:
        assert p.box.fill == 0 or not half
        for k in range(p.piece):
            b.store(out, to + k, const(p.box.fill, out.dtype))
        return
    source, start = inputs[p.box.source], b.index(start)
    if p.piece > 1 and nbytes in (4, 8, 16):
        b.call(f"bw_copy{nbytes}", b.address(out, to), b.address(source, start))
        return
    for k in range(p.piece):
        b.store(out, to + k, b.load(source, start + k))


def parts_of(body: Graph) -> list[Part] | str:
    """The parts of the result, or why a body is none for this kernel."""
    if len(body.nodes) != 1 or not isinstance(body.nodes[0].op, MOVES):
        return "not one shape operator by itself"
    node = body.nodes[0]
    if not all(t.is_static and 0 < t.size < 1 << 31 for t in body.types.values()):
        return "symbolic, empty or huge tensors"
    made = boxes_of(body, node, [])
    if isinstance(made, str):
        return made
    size, parts, first = width(memory(node.type.dtype)), [], 0
    for box in made:
        if box.indirect is not None or box.axes[-1].out != 1 or (box.source is not None and box.axes[-1].src != 1):
            return "a result whose rows are no rows of its operands"
        if box.source is None and box.fill and node.type.dtype == BF16:
            return "padding with a number of bf16 other than 0"
        piece = _piece(box, size)
        parts.append(Part(box, piece, box.size // piece, first))
        first += parts[-1].blocks
    return parts


def _piece(box: Box, size: int) -> int:
    """Elements that can be moved at once: all rows and both sides are aligned to them."""
    steps = [s for x in box.axes[:-1] for s in (x.out, x.src if box.source is not None else 0)]
    offsets = [box.out, box.src if box.source is not None else 0]
    return math.gcd(16 // size, box.axes[-1].size, *steps, *offsets)


__all__ = ["CudaCopy", "Part", "parts_of"]
