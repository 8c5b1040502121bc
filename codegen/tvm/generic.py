"""The kernel of last resort: any body around one costly operator, as scalar loops that are right.

Slower than the special kernels and complete: every operator, every number format, every shape that is static.
Sums of f32 run in f64, of narrower floats in f32, of integers in 64 bits where 32 do not suffice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

import bitwright.codegen.tvm.generic_contract  # fills RULES
import bitwright.codegen.tvm.generic_small_float
from bitwright.codegen.tvm.generic_eval import RULES, Evaluator, memory
from bitwright.codegen.tvm.generic_move import taps_of
from bitwright.codegen.tvm.generic_nest import (
    MIN_TASKS,
    after_is_pointwise,
    plan,
    run_nest,
    run_scan,
    run_scatter,
    run_topk,
    sort_bytes,
)
from bitwright.codegen.tvm.generic_random import mask_bytes
from bitwright.codegen.tvm.generic_rows import ROWS, scores_bytes
from bitwright.codegen.tvm.pointwise import needs_exact, why_unsupported
from bitwright.codegen.tvm.template import Arg, Config, Refused, Template
from bitwright.codegen.tvm.tir import Builder, Pointer, width
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.target import Target
from bitwright.ir.types import F64, S32
from bitwright.ir.weights import Array

SCATTERS = (ops.ScatterElements, ops.ScatterNd)
WHOLE = (ops.CumSum, ops.TopK, *SCATTERS)
"""Operators that need their own nest: they do not know a single element by itself."""
COSTLY = (*ops.CONTRACTION, ops.Reduce, ops.ArgReduce, ops.MaxPool, ops.AvgPool, *ROWS, *WHOLE)
LIMIT = 1 << 31


@dataclass(frozen=True)
class GenericConfig(Config):
    """No knobs."""


class Generic(Template):
    """One costly operator of any kind (or none), with pointwise and shape operators around it."""

    name: ClassVar[str] = "generic"
    spread: ClassVar[int] = MIN_TASKS
    """A nest has so many tasks at least, where its shape has."""

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes every body whose shapes are static and that has one costly operator at most."""
        reason = refusal(body)
        if reason:
            return Refused(reason)
        root = root_of(body)
        args = [Arg("input", i) for i in range(len(body.inputs))]
        args += [Arg("packed", i) for i in range(len(_tables(body)))]
        args += [Arg("output", i) for i in range(len(body.outputs))]
        return GenericConfig(
            tasks=_tasks(body, root, self.spread), scratch_bytes=_scratch(body, root), args=tuple(args), isa=target.isa,
            mcpu=target.mcpu, reason="scalar loops: no special kernel takes this body",
        )  # fmt: skip

    def pack(self, body: Graph, config: Config, constants: Mapping[str, Array]) -> list[Array]:
        """Index and weight table of every space axis of a Resize."""
        return _tables(body)

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        """One nest per shape of output."""
        b = self.builder(config, symbol)
        pointers = {v.name: b.param(f"x{i}", memory(v.type.dtype), v.type.size) for i, v in enumerate(body.inputs)}
        tables = [b.param(f"t{i}", F64 if t.dtype == np.float64 else S32, t.size) for i, t in enumerate(_tables(body))]
        outs = [b.param(f"y{i}", memory(body.types[o].dtype), body.types[o].size) for i, o in enumerate(body.outputs)]
        scratch = self.scratch(b, config)
        ev = Evaluator(b, body, pointers, tables, scratch, config.isa, needs_exact(body))
        root = root_of(body)
        if root is not None and isinstance(root.op, SCATTERS):
            self.scatter(ev, root, dict(zip(body.outputs, outs, strict=True)))
            return b.finish()
        first, groups = 0, _groups(body)
        for shape, names in groups.items():
            nest = plan(body, root, shape, self.spread)
            mine: dict[str, Pointer] = {n: outs[body.outputs.index(n)] for n in names}
            if root is not None and isinstance(root.op, ops.CumSum):
                run_scan(ev, nest, root, mine)
            elif root is not None and isinstance(root.op, ops.TopK):
                run_topk(ev, nest, root, mine)
            else:
                run_nest(ev, nest, root, mine, first if len(groups) > 1 else None)
            first += nest.tasks
        return b.finish()

    def builder(self, config: Config, symbol: str) -> Builder:
        """What the kernel is written with."""
        return Builder(symbol)

    def scratch(self, b: Builder, config: Config) -> Pointer | None:
        """The running thread's scratch."""
        return b.scratch(config.scratch_bytes) if config.scratch_bytes else None

    def scatter(self, ev: Evaluator, root: Node, outputs: dict[str, Pointer]) -> None:
        """A body around a scatter."""
        run_scatter(ev, root, outputs)


def root_of(body: Graph) -> Node | None:
    """The body's costly operator."""
    return next((n for n in body.nodes if isinstance(n.op, COSTLY)), None)


def refusal(body: Graph) -> str:
    """Why the generic kernel cannot run the body, or the empty string."""
    if not all(t.is_static for t in body.types.values()):
        return "symbolic sizes"
    if any(t.size >= LIMIT for t in body.types.values()):
        return "more than 2^31 elements"
    known = (*RULES, *ops.POINTWISE, *WHOLE, ops.Constant)
    unknown = sorted({n.op.spelling for n in body.nodes if not isinstance(n.op, known)})
    if unknown:
        return f"no rule for {', '.join(unknown)}"
    for n in body.nodes:
        if isinstance(n.op, ops.POINTWISE) and (why := why_unsupported(n.op, [body.types[x].dtype for x in n.inputs])):
            return why
    if sum(isinstance(n.op, COSTLY) for n in body.nodes) > 1:
        return "more than one costly operator"
    if sum(isinstance(n.op, ops.Resize) for n in body.nodes) > 1:
        return "more than one resize"
    root = root_of(body)
    if root is None or not isinstance(root.op, WHOLE):
        return ""
    if not after_is_pointwise(body, root):
        return f"a shape operator follows {root.op.spelling}"
    shape = root.type.shape
    if any(body.types[o].shape != shape for o in body.outputs):
        return f"outputs of another shape than {root.op.spelling}"
    return ""


def _groups(body: Graph) -> dict[tuple[int, ...], list[str]]:
    groups: dict[tuple[int, ...], list[str]] = {}
    for o in body.outputs:
        groups.setdefault(body.types[o].static_shape, []).append(o)
    return groups


def _tasks(body: Graph, root: Node | None, spread: int) -> int:
    if root is not None and isinstance(root.op, SCATTERS):
        return 1
    return max(sum(plan(body, root, shape, spread).tasks for shape in _groups(body)), 1)


def _scratch(body: Graph, root: Node | None) -> int:
    if root is None:
        return 0
    shapes = [body.types[x].static_shape for x in root.inputs]
    if isinstance(root.op, ops.TopK):
        return sort_bytes(root.op, shapes[0][root.op.axis])
    if isinstance(root.op, ops.Attention):
        return scores_bytes(shapes)
    if isinstance(root.op, ops.UnbiasedMask):
        return mask_bytes(root.op, shapes[0])
    if isinstance(root.op, SCATTERS) and body.outputs != (root.output,):
        return max(math.prod(shapes[0]) * width(root.type.dtype), 1)
    return 0


def _tables(body: Graph) -> list[Array]:
    """Per space axis of the body's Resize: where each output reads, and with which weight."""
    from bitwright.ir.semantics_index import resize_taps

    tables: list[Array] = []
    for n in body.nodes:
        if isinstance(n.op, ops.Resize):
            space = body.types[n.inputs[0]].static_shape[2:]
            for a in range(len(n.op.size)):
                index, weight = resize_taps(n.op, a, space[a])
                assert index.shape[1] == taps_of(n.op)
                tables += [index.numpy().astype(np.int32), weight.numpy()]
    return tables


assert bitwright.codegen.tvm.generic_contract is not None
assert bitwright.codegen.tvm.generic_small_float is not None
