"""Memory asked for ahead of its use: rows lie apart, so that the hardware foresees little of what a task reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitwright.codegen.tvm.contract.spec import Conv
from bitwright.codegen.tvm.lanes.spec import Shape
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, width

LINE = 64
FAR = 2 << 20
"""Bytes from which a buffer is taken to lie beyond the second-level cache."""


@dataclass(frozen=True)
class Ahead:
    """While a task adds up its groups of outputs: its own part of ``own`` (results and operands of their shape), and
    the next rows of the input ``x``. Every group asks for an equal share."""

    b: Builder
    shape: Shape
    x: Pointer
    own: Mapping[str, Pointer]

    def group(self, group: Index, row: Index, part: Index, first: Index) -> None:
        """Ask for the share of a group of the block of outputs ``part``, which begins at output ``first``."""
        b, shape, spec = self.b, self.shape, self.shape.spec
        groups = min(shape.per_block, shape.groups)
        for name, pointer in self.own.items():
            size = width(pointer.dtype)
            if spec.rows * spec.cols * size < FAR:
                continue
            per_row = -(-min(shape.knobs.outputs, spec.cols) * size // LINE)
            for i in range(-(-shape.rows * per_row // groups)):
                line = b.index(group + i * groups)
                at = (row + line // per_row) * spec.cols + first + line % per_row * (LINE // size)
                b.prefetch(pointer, at, write=name == "out")
        if not self._in_order() or spec.input_elements * width(spec.input_dtype) < FAR:
            return
        run = LINE // width(spec.input_dtype)
        lines = -(-shape.rows * spec.depth // run)
        for i in range(-(-lines // (groups * shape.output_blocks))):
            line = (i * shape.output_blocks + part) * groups + group
            b.prefetch(self.x, (row + shape.rows) * spec.depth + line * run)

    def _in_order(self) -> bool:
        """Whether the activations of the next rows follow those of these."""
        g = self.shape.spec.geometry
        return not isinstance(g, Conv) or (g.kernel == (1, 1) == g.stride and not any(g.padding))
