"""The GPU kernel of last resort: the CPU's generic loops, one element or one row a thread. Right for every body.

Neighbouring threads take neighbouring elements of the last axis, so what they read and write of it is coalesced.
Operators that need memory of their own (attention, TopK, unbiased masks) get it per thread in the work memory; of a
scatter a thread takes all elements that the same updates can reach, in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.config import CudaConfig
from bitwright.codegen.tvm.generic import SCATTERS, Generic, root_of
from bitwright.codegen.tvm.generic_eval import Evaluator, Idx, conjunction, flatten, memory, unflatten
from bitwright.codegen.tvm.generic_nest import store, update
from bitwright.codegen.tvm.template import Config, Refused
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, minimum
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.target import Target
from bitwright.ir.weights import Array

_ALL = 1 << 31
_WORK_LIMIT = 64 << 20
"""Bytes of work memory: of operators that need some, threads take several tasks each rather than more."""
_FILL = 132 * 128
"""Threads that occupy a device; a kernel of fewer has smaller blocks, so that they spread over it."""


@dataclass(frozen=True)
class CudaGenericConfig(CudaConfig):
    """``each`` tasks a thread; ``own_bytes`` of the work memory belong to each thread (0: it is shared)."""

    each: int = 1
    own_bytes: int = 0


class CudaGeneric(Generic):
    """One costly operator of any kind (or none), with pointwise and shape operators around it."""

    name: ClassVar[str] = "cuda_generic"
    spread: ClassVar[int] = _ALL

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes every body whose shapes are static and that has one costly operator at most."""
        made = super().configure(body, constants, target)
        if isinstance(made, Refused):
            return made
        root = root_of(body)
        tasks, own = made.tasks, made.scratch_bytes
        if root is not None and isinstance(root.op, SCATTERS):
            tasks, own = math.prod(_columns(body, root)), 0
        running = max(1, min(tasks, _WORK_LIMIT // own)) if own else tasks
        each = max(1, math.ceil(tasks / max(running, 1)))
        running = max(1, math.ceil(tasks / each))
        threads = 128 if running >= 2 * _FILL else 64 if running >= _FILL else 32
        blocks = math.ceil(running / threads)
        return CudaGenericConfig(
            tasks=tasks, args=made.args, mcpu=target.mcpu, threads=threads, grid=(blocks, 1, 1), each=each,
            own_bytes=own, work_bytes=own * blocks * threads if own else made.scratch_bytes,
            reason="one element or row a thread: no special kernel takes this body",
        )  # fmt: skip

    def builder(self, config: Config, symbol: str) -> Builder:
        """Blocks of threads over the tasks."""
        assert isinstance(config, CudaGenericConfig)
        b = CudaBuilder(symbol, grid=config.grid, threads=config.threads)
        first = b.block() * config.threads + b.thread
        b.begin = first * config.each if config.each > 1 else first
        b.end = minimum(b.begin + config.each, config.tasks)
        return b

    def scratch(self, b: Builder, config: Config) -> Pointer | None:
        """This thread's part of the work memory, or all of it where it is shared."""
        assert isinstance(config, CudaGenericConfig)
        assert isinstance(b, CudaBuilder)
        if not config.work_bytes:
            return None
        whole = b.scratch(config.work_bytes)
        return b.at(whole, (b.block() * config.threads + b.thread) * config.own_bytes) if config.own_bytes else whole

    def scatter(self, ev: Evaluator, root: Node, outputs: dict[str, Pointer]) -> None:
        """Copy, update in index order, then the pointwise rest; a task is one column of the operand."""
        x = root.inputs[0]
        shape, dtype = ev.shape(x), ev.dtype(x)
        direct = list(outputs) == [root.output]
        target = outputs[root.output] if direct else ev.b.view(ev.scratch, memory(dtype))  # type: ignore[arg-type]
        with ev.loop(ev.b.end, ev.b.begin) as task:
            fixed = unflatten(task, _columns(ev.body, root))
            with ev.loops(_along(ev.body, root)) as at:
                place = _place(root, fixed, at)
                ev.store(target, flatten(place, shape), ev.at(x, place), dtype)
            if not ev.empty(x):
                _updates(ev, root, target, fixed)
            if direct:
                return
            with ev.layer():
                ev.pointers[root.output] = target
                with ev.loops(_along(ev.body, root)) as at:
                    store(ev, outputs, _place(root, fixed, at))


def _columns(body: Graph, root: Node) -> tuple[int, ...]:
    """The shape of a scatter's tasks: axes that indices name have size 1 (ScatterElements) or are gone (ScatterNd)."""
    shape = body.types[root.inputs[0]].static_shape
    if isinstance(root.op, ops.ScatterNd):
        return shape[body.types[root.inputs[1]].static_shape[-1] :]
    axis = _axis(root, shape)
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _along(body: Graph, root: Node) -> tuple[int, ...]:
    """The sizes of the axes that indices name."""
    shape = body.types[root.inputs[0]].static_shape
    if isinstance(root.op, ops.ScatterNd):
        return shape[: body.types[root.inputs[1]].static_shape[-1]]
    return (shape[_axis(root, shape)],)


def _axis(root: Node, shape: Sequence[int]) -> int:
    assert isinstance(root.op, ops.ScatterElements)
    return root.op.axis % len(shape)


def _place(root: Node, column: Idx, at: Sequence[Index]) -> Idx:
    """The index of an element from its column's and its place along the named axes."""
    if isinstance(root.op, ops.ScatterNd):
        return (*at, *column)
    axis = _axis(root, column)
    return (*column[:axis], at[0], *column[axis + 1 :])


def _updates(ev: Evaluator, root: Node, target: Pointer, column: Idx) -> None:
    """All updates of a column, in index order."""
    x, index, updates = root.inputs
    shape, many = ev.shape(x), ev.shape(index)
    if isinstance(root.op, ops.ScatterNd):
        with ev.loops(many[:-1]) as at:
            lead = [ev.integer(index, (*at, k), shape[k]) for k in range(many[-1])]
            update(ev, root, target, flatten((*lead, *column), shape), ev.at(updates, (*at, *column)))
        return
    axis = _axis(root, shape)
    inside = [i < n for d, (i, n) in enumerate(zip(column, many, strict=True)) if d != axis and n < shape[d]]
    with ev.when(conjunction(inside)), ev.loops([many[axis]]) as at:
        source = _place(root, column, at)
        place = _place(root, column, [ev.integer(index, source, shape[axis])])
        update(ev, root, target, flatten(place, shape), ev.at(updates, source))
