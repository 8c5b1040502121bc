"""Kernels of pointwise operators only: any rank, NumPy broadcasting, several results of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np

from bitwright.codegen.tvm.pointwise_program import (
    Leaf,
    NotPointwise,
    Program,
    divide,
    literals,
    modulo,
    outer_offset,
    program_args,
    reader,
)
from bitwright.codegen.tvm.template import Arg, Config, Refused, Template
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, minimum, width
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.weights import Array

TASK_BYTES = 32768
"""Outer work of about this size is one task."""


@dataclass(frozen=True)
class ElementwiseConfig(Config):
    """``lanes`` per vector; a task is ``rows`` of the outer axes, or ``chunk`` elements of one (0: whole rows)."""

    lanes: int = 16
    rows: int = 1
    chunk: int = 0


class Elementwise(Template):
    """Regions whose nodes are all pointwise."""

    name = "elementwise"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        if target.kind != "cpu":
            return Refused("elementwise kernels are for CPUs")
        try:
            program = _program(body)
        except NotPointwise as e:
            return Refused(str(e))
        types = [body.types[o].dtype for o in body.outputs]
        lanes = program.lanes(target.vector_bits, types)
        inner, outer = program.axes[-1], prod(program.axes[:-1])
        moved = sum(width(t) for t in types) + sum(width(x.dtype) for x in program.leaves.values() if any(x.strides))
        elements = max(lanes, TASK_BYTES // max(moved, 1))
        if inner > elements:
            chunk, rows = elements // lanes * lanes, 1
            tasks = outer * ceil(inner / chunk)
        else:
            chunk, rows = 0, max(1, min(outer, elements // inner))
            tasks = ceil(outer / rows)
        return ElementwiseConfig(
            tasks, 0, _args(body, program), target.isa, target.mcpu,
            f"{len(program.nodes)} pointwise operators over {'x'.join(map(str, program.axes))}, {lanes} lanes",
            _inplace(body, program), lanes, rows, chunk,
        )  # fmt: skip

    def pack(self, body: Graph, config: Config, constants: Mapping[str, Array]) -> list[Array]:
        return [np.asarray(body.constant(x)).reshape(-1) for x in literals(body, _program(body).reads)]

    def verify(self, body: Graph, config: Config, constants: Mapping[str, Array], packed: list[Array]) -> str:
        want = self.pack(body, config, constants)
        same = len(want) == len(packed) and all(np.array_equal(a, c) for a, c in zip(want, packed, strict=True))
        return "" if same else "packed literals differ"

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        assert isinstance(config, ElementwiseConfig)
        return _Kernel(body, config, symbol).emit()


def _program(body: Graph) -> Program:
    shapes = {body.types[o].static_shape for o in body.outputs}
    if len(shapes) != 1:
        raise NotPointwise("results of several shapes")
    if any(not isinstance(n.op, (*ops.POINTWISE, ops.Constant)) for n in body.nodes) or not body.nodes:
        raise NotPointwise("not only pointwise operators")
    shape = shapes.pop()
    if prod(shape) == 0:
        raise NotPointwise("an empty result")
    if any(o not in body.producers for o in body.outputs):
        raise NotPointwise("a result that is an input")
    return Program(body, shape, body.outputs)


def _args(body: Graph, program: Program) -> tuple[Arg, ...]:
    outputs = tuple(Arg("output", i) for i in range(len(body.outputs)))
    return program_args(body, program.reads) + outputs


def _inplace(body: Graph, program: Program) -> tuple[tuple[int, int], ...]:
    """Inputs of the result's size and format that are read element by element (single results only)."""
    if len(body.outputs) != 1:
        return ()
    out, total = body.types[body.outputs[0]], prod(program.axes)
    full = tuple(prod(program.axes[i + 1 :]) for i in range(len(program.axes)))
    pairs = []
    for i, v in enumerate(body.inputs):
        leaves = [x for x in program.leaves.values() if x.name == v.name]
        whole = all(x.strides == full for x in leaves) and v.type.size == total
        if leaves and whole and width(v.type.dtype) == width(out.dtype):
            pairs.append((0, i))
    return tuple(pairs)


class _Kernel:
    def __init__(self, body: Graph, config: ElementwiseConfig, symbol: str) -> None:
        self.body, self.config, self.program = body, config, _program(body)
        self.b = Builder(symbol)
        self.pointers: dict[str, Pointer] = {}
        for i, name in enumerate(self.program.reads):
            t = body.types[name]
            self.pointers[name] = self.b.param(f"p{i}", t.dtype, t.size)
        self.results = [
            self.b.param(f"out{i}", body.types[o].dtype, body.types[o].size) for i, o in enumerate(body.outputs)
        ]

    def emit(self) -> Any:
        b, config, axes = self.b, self.config, self.program.axes
        inner, outer = axes[-1], prod(axes[:-1])
        if not config.chunk:
            with b.loop(minimum(b.end * config.rows, outer), b.begin * config.rows, name="row") as row:
                self._row(row, 0, inner, True)
        else:
            pieces = ceil(inner / config.chunk)
            with b.loop(b.end, b.begin, name="task") as task:
                at = b.index(task)
                piece = modulo(at, pieces)
                start = b.index(piece * config.chunk)
                last = True if pieces == 1 else piece == pieces - 1
                self._row(divide(at, pieces), start, minimum(start + config.chunk, inner), last)
        return b.finish()

    def _row(self, row: Index, start: Index, stop: Index, last: Any) -> None:
        """Elements ``start`` to ``stop`` of the innermost axis; the axis' tail where ``last`` holds."""
        b, axes, lanes = self.b, self.program.axes, self.config.lanes
        inner, rest = axes[-1], axes[-1] % lanes
        offsets = {x: b.index(outer_offset(x.strides[:-1], axes[:-1], row)) for x in self.program.leaves.values()}
        out = b.index(row * inner)
        with b.loop(minimum(stop, inner - rest), start, lanes, name="col") as col:
            self._point(offsets, out, col, lanes, lanes)
        if rest:
            with b.when(last):
                self._point(offsets, out, inner - rest, lanes, rest)

    def _point(self, offsets: Mapping[Leaf, Index], out: Index, col: Index, lanes: int, valid: int) -> None:
        b, lanes = self.b, 1 if valid == 1 else lanes
        read = reader(b, self.pointers, offsets, col, lanes)
        values = self.program.evaluate(b, self.config.isa, lanes, read, {})
        for pointer, name in zip(self.results, self.body.outputs, strict=True):
            b.store(pointer, out + col, values[name], valid)
