"""Pointwise regions on a GPU: a thread moves up to 16 bytes of every operand of the result's shape at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.config import CudaConfig
from bitwright.codegen.tvm.generic import refusal
from bitwright.codegen.tvm.generic_eval import Evaluator, div, memory, unflatten
from bitwright.codegen.tvm.pointwise import needs_exact
from bitwright.codegen.tvm.template import Config, Refused, Template, plain_args
from bitwright.codegen.tvm.tir import Pointer, width
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.weights import Array

_BYTES = 16
_MOST = 8
"""Elements of a thread: more make its code long."""
_THREADS = 256


@dataclass(frozen=True)
class CudaElementwiseConfig(CudaConfig):
    """``lanes`` neighbouring elements a thread."""

    lanes: int = 4


class CudaElementwise(Template):
    """Regions whose nodes are all pointwise, of one shape of result."""

    name: ClassVar[str] = "cuda_elementwise"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        if not body.nodes or any(not isinstance(n.op, (*ops.POINTWISE, ops.Constant)) for n in body.nodes):
            return Refused("not only pointwise operators")
        if why := refusal(body):
            return Refused(why)
        shapes = {body.types[o].static_shape for o in body.outputs}
        if len(shapes) != 1 or any(o not in body.producers for o in body.outputs):
            return Refused("results of several shapes, or a result that is an input")
        total = math.prod(shapes.pop())
        widest = max(width(body.types[x].dtype) for x in (*_whole(body), *body.outputs))
        lanes = next((n for n in (_MOST, 4, 2) if n * widest <= _BYTES and total % n == 0), 0)
        if not lanes or not total:
            return Refused(f"{total} elements of {widest} bytes make no whole vectors")
        tasks = total // lanes
        blocks = math.ceil(tasks / _THREADS)
        return CudaElementwiseConfig(
            tasks=tasks, args=plain_args(body), mcpu=target.mcpu, threads=_THREADS, grid=(blocks, 1, 1), lanes=lanes,
            reason=f"{lanes} elements a thread, moved as vectors", inplace=_inplace(body),
        )  # fmt: skip

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        assert isinstance(config, CudaElementwiseConfig)
        n, shape = config.lanes, body.types[body.outputs[0]].static_shape
        b = CudaBuilder(symbol, grid=config.grid, threads=config.threads)
        given = {v.name: b.param(f"x{i}", memory(v.type.dtype), v.type.size) for i, v in enumerate(body.inputs)}
        outs = [b.param(f"y{i}", memory(body.types[o].dtype), body.types[o].size) for i, o in enumerate(body.outputs)]
        task = b.index(b.block() * config.threads + b.thread)
        with b.when(task < config.tasks if config.tasks % config.threads else True):
            at = b.index(task * n)
            rows = {x: b.local(given[x].dtype, n) for x in _whole(body)}
            for x, row in rows.items():
                _move(b, row, 0, given[x], at, n)
            results = [b.local(p.dtype, n) for p in outs]
            along = shape[-1] % n == 0 if shape else True
            first = unflatten(task if along else at, (*shape[:-1], div(shape[-1], n)) if along and shape else shape)
            for k in range(n):
                ev = Evaluator(b, body, given, isa="cuda", exact=needs_exact(body))
                with ev.layer():
                    for x, row in rows.items():
                        ev.fix(x, b.let(ev.load(row, k, ev.dtype(x))))
                    index = (*first[:-1], b.index(first[-1] * n + k)) if along and shape else unflatten(at + k, shape)
                    for name, row in zip(body.outputs, results, strict=True):
                        ev.store(row, k, ev.at(name, index), ev.dtype(name))
            for p, row in zip(outs, results, strict=True):
                _move(b, p, at, row, 0, n)
        return b.finish()


def _whole(body: Graph) -> list[str]:
    """Inputs of the result's shape: their elements lie as the result's."""
    shape = body.types[body.outputs[0]].static_shape
    return [v.name for v in body.inputs if v.type.static_shape == shape and math.prod(shape) > 1]


def _inplace(body: Graph) -> tuple[tuple[int, int], ...]:
    """A single result may overwrite an operand of its shape and width: a thread reads its elements before."""
    if len(body.outputs) != 1:
        return ()
    out, whole = width(body.types[body.outputs[0]].dtype), set(_whole(body))
    return tuple((0, i) for i, v in enumerate(body.inputs) if v.name in whole and width(v.type.dtype) == out)


def _move(b: CudaBuilder, to: Pointer, at: Any, source: Pointer, first: Any, n: int) -> None:
    """``n`` elements, in one move where there is one of their size."""
    nbytes = n * width(to.dtype)
    if nbytes in (4, 8, 16):
        b.call(f"bw_copy{nbytes}", b.address(to, at), b.address(source, first))
        return
    for k in range(n):
        b.store(to, at + k, b.load(source, first + k))
