"""Row kernels: softmax, normalisations and reductions over the trailing axes, with the pointwise work around them.

One kernel makes two or three passes over a row that stays in the first-level cache: the pointwise work before the
operator runs once, its result waits in a row of scratch memory; what follows runs as the results are stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bitwright.codegen.tvm.generic_eval import memory
from bitwright.codegen.tvm.pointwise import needs_exact
from bitwright.codegen.tvm.rows_passes import RowKernel
from bitwright.codegen.tvm.rows_values import Cells, Space, Unfit, layout
from bitwright.codegen.tvm.template import Config, Refused, Template, plain_args
from bitwright.codegen.tvm.tir import Builder, minimum
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.target import Target
from bitwright.ir.types import BF16, F16, F32
from bitwright.ir.weights import Array

ROOTS = (ops.Softmax, ops.LayerNorm, ops.RmsNorm, ops.Reduce)
REDUCTIONS = frozenset("sum mean max min prod l1 l2 sumsq logsum logsumexp".split())
WORK_BYTES = 32 << 10
"""Bytes of f32 that a task reads."""
LIMIT = 1 << 31


@dataclass(frozen=True)
class RowsConfig(Config):
    """``lanes`` columns at a time, ``unroll`` independent vectors, ``block`` rows per task."""

    lanes: int = 4
    unroll: int = 4
    block: int = 1
    staged: bool = False
    """Whether the row operator's operand is computed (and then kept in scratch) rather than read."""


@dataclass(frozen=True)
class Plan:
    """The body's row operator and its spaces."""

    root: Node
    inner: Space
    outer: Space


class Rows(Template):
    """Pointwise work, one operator over rows, pointwise work."""

    name: ClassVar[str] = "rows"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes f32, f16 and bf16 rows along trailing axes; one output."""
        try:
            plan = plan_of(body)
            levels(body, plan)
        except Unfit as why:
            return Refused(str(why))
        columns = plan.inner.columns
        lanes = min(target.vector_bits // 32, max(4, 1 << (columns - 1).bit_length()))
        source = plan.root.inputs[0]
        staged = source in body.producers or body.types[source].dtype != F32
        padded = -(-columns // lanes) * lanes
        keep = staged or isinstance(plan.root.op, ops.Softmax)
        block = max(1, WORK_BYTES // (4 * columns))
        return RowsConfig(
            tasks=-(-plan.inner.rows // block), scratch_bytes=4 * padded + 64 if keep else 0, args=plain_args(body),
            isa=target.isa, mcpu=target.mcpu, reason=f"rows of {columns} in vectors of {lanes}", lanes=lanes,
            unroll=4 if len(body.nodes) <= 8 else 2, block=block, staged=staged,
        )  # fmt: skip

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        """A loop over the rows of the task range."""
        assert isinstance(config, RowsConfig)
        plan = plan_of(body)
        b = Builder(symbol)
        pointers = {v.name: b.param(f"x{i}", memory(v.type.dtype), v.type.size) for i, v in enumerate(body.inputs)}
        result = body.types[body.outputs[0]]
        out = b.param("y", memory(result.dtype), result.size)
        scratch = b.scratch(config.scratch_bytes) if config.scratch_bytes else None
        cells = Cells(
            body, plan.root.output, plan.inner, plan.outer, b, pointers, config.isa, needs_exact(body)
        )  # fmt: skip
        kernel = RowKernel(
            b, cells, plan.root, out, b.view(scratch, F32) if scratch else None, config.lanes, config.unroll,
            config.staged,
        )  # fmt: skip
        kernel.before()
        rows = plan.inner.rows
        with b.loop(b.end, b.begin, name="task") as task:
            first = b.index(task * config.block)
            with b.loop(minimum(first + config.block, rows), first, name="row") as row:
                kernel.run(b.index(row))
        return b.finish()


def plan_of(body: Graph) -> Plan:
    """The body's row operator and its spaces; raises :class:`Unfit`."""
    if not all(t.is_static and t.size < LIMIT for t in body.types.values()):
        raise Unfit("symbolic or huge sizes")
    roots = [n for n in body.nodes if not isinstance(n.op, (*ops.POINTWISE, ops.Constant))]
    if len(roots) != 1 or not isinstance(roots[0].op, ROOTS):
        raise Unfit("not one row operator with pointwise work")
    if len(body.outputs) != 1:
        raise Unfit("several outputs")
    root = roots[0]
    kind = body.types[root.inputs[0]]
    if kind.dtype not in (F32, F16, BF16):
        raise Unfit(f"rows of {kind.dtype}")
    if kind.size == 0 or body.types[body.outputs[0]].size == 0:
        raise Unfit("nothing to compute")
    inner = Space(*_split(root.op, kind.static_shape))
    dropped = isinstance(root.op, ops.Reduce) and not root.op.keepdim
    outer = Space(root.type.static_shape, ()) if dropped else inner
    return Plan(root, inner, outer)


def _split(op: ops.Op, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape's row axes and column axes."""
    rank = len(shape)
    if not rank:
        raise Unfit("a scalar has no rows")
    if isinstance(op, (ops.LayerNorm, ops.RmsNorm)):
        at = rank - op.axes
        return shape[:at], shape[at:]
    if isinstance(op, ops.Softmax):
        axes: tuple[int, ...] = (op.axis % rank,)
    else:
        assert isinstance(op, ops.Reduce)
        axes = tuple(a % rank for a in op.axes)
        if not axes or op.fn not in REDUCTIONS:
            raise Unfit(f"reduction {op.fn} over axes {list(op.axes)}")
    at = min((a for a in axes if shape[a] != 1), default=rank - 1)
    if any(n != 1 and a not in axes for a, n in enumerate(shape) if a >= at):
        raise Unfit("not over the trailing axes")
    return shape[:at], shape[at:]


def levels(body: Graph, plan: Plan) -> None:
    """Check that every value broadcasts into its space and that the output fills it; raises :class:`Unfit`."""
    cells = Cells(body, plan.root.output, plan.inner, plan.outer, Builder("check"), {}, "portable", False)
    for x in plan.root.inputs:
        cells.level(x, plan.inner)
    out = body.outputs[0]
    cells.level(out, plan.outer)
    shape = body.types[out].static_shape
    if math.prod(shape) != plan.outer.rows * (plan.outer.columns if layout(shape, plan.outer).along else 1):
        raise Unfit("the output is not as large as the rows")
