"""Group normalisation on a GPU: a row is a group of channels with all of space, as the kernel of rows has it.

The body is seen with groups as rows, ``[N, groups, channels of a group * space]``; scale and bias belong to channels,
which are runs of columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.rows import CudaRowKernel, CudaRows, CudaRowsConfig, cut_rows
from bitwright.codegen.tvm.generic_eval import memory
from bitwright.codegen.tvm.pointwise import needs_exact
from bitwright.codegen.tvm.rows import levels, plan_of
from bitwright.codegen.tvm.rows_passes import Span
from bitwright.codegen.tvm.rows_values import Cells, Unfit, loaded
from bitwright.codegen.tvm.template import Config, Refused, plain_args
from bitwright.codegen.tvm.tir import Pointer, Vec, concat, minimum
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node, Value
from bitwright.ir.target import Target
from bitwright.ir.types import F32, DType, TensorType
from bitwright.ir.weights import Array


class CudaGroupNorm(CudaRows):
    """Pointwise work, one group normalisation, pointwise work."""

    name: ClassVar[str] = "cuda_group_norm"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes f32, f16 and bf16; operands beside the normalised one are scalars or of its shape."""
        try:
            seen = rows_of(body)
            plan = plan_of(seen)
            levels(seen, plan)
        except Unfit as why:
            return Refused(str(why))
        return replace(cut_rows(seen, plan, target), args=plain_args(body))

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        """One launch over all groups."""
        assert isinstance(config, CudaRowsConfig)
        seen, root = rows_of(body), _root(body)
        plan = plan_of(seen)
        b = CudaBuilder(symbol, grid=config.grid, threads=config.threads)
        pointers = {v.name: b.param(f"x{i}", memory(v.type.dtype), v.type.size) for i, v in enumerate(body.inputs)}
        result = body.types[body.outputs[0]]
        out = b.param("y", memory(result.dtype), result.size)
        cells = Cells(seen, plan.root.output, plan.inner, plan.outer, b, pointers, "cuda", needs_exact(body))
        assert isinstance(root.op, ops.GroupNorm)
        beside = [(pointers[n], body.types[n].dtype) for n in root.inputs[1:]]
        shape = body.types[root.inputs[0]].static_shape
        kernel = _Groups(
            b, cells, plan.root, out, None, config.lanes, config.turns if config.resident else 1, config.resident,
            device=b, config=config, beside=beside, groups=root.op.groups, channels=shape[1] // root.op.groups,
        )  # fmt: skip
        first = b.index(b.block() * (config.threads // config.per_row) + b.thread // config.per_row)
        rows = plan.inner.rows
        kernel.exists = None if rows * config.per_row % config.threads == 0 else first < rows
        kernel.run(b.index(minimum(first, rows - 1)))
        return b.finish()


def _root(body: Graph) -> Node:
    found = [n for n in body.nodes if isinstance(n.op, ops.GroupNorm)]
    if len(found) != 1:
        raise Unfit("not one group normalisation")
    return found[0]


def rows_of(body: Graph) -> Graph:
    """The body with groups as rows and a plain norm in the place of the group norm; raises :class:`Unfit`."""
    root = _root(body)
    assert isinstance(root.op, ops.GroupNorm)
    if not all(t.is_static and t.size for t in body.types.values()):
        raise Unfit("symbolic or empty tensors")
    shape = root.type.static_shape
    size = body.types[root.inputs[0]].size // (shape[0] * root.op.groups)
    beside = set(root.inputs[1:])
    if any(n in body.producers for n in beside):
        raise Unfit("a computed scale")

    def row(t: TensorType) -> TensorType:
        if t.static_shape != shape and t.size != 1:
            raise Unfit(f"an operand of shape {list(t.static_shape)} beside {list(shape)}")
        return replace(t, shape=(shape[0], root.op.groups, size)) if t.size != 1 else t  # type: ignore[attr-defined]

    nodes = []
    for n in body.nodes:
        if n is root:
            nodes.append(replace(n, op=ops.LayerNorm(1, root.op.eps), inputs=root.inputs[:1], types=(row(n.type),)))
        elif beside & set(n.inputs):
            raise Unfit("a scale that is used behind the norm, too")
        else:
            nodes.append(replace(n, types=tuple(row(t) for t in n.types)))
    inputs = tuple(v if v.name in beside else Value(v.name, row(v.type)) for v in body.inputs)
    return replace(body, inputs=inputs, nodes=tuple(nodes))


@dataclass(eq=False)
class _Groups(CudaRowKernel):
    """Rows whose scale and bias belong to runs of columns."""

    beside: list[tuple[Pointer, DType]] = field(kw_only=True)
    groups: int = field(kw_only=True)
    channels: int = field(kw_only=True)

    def _affine(self, span: Span, y: Vec) -> Vec:
        for k, (pointer, dtype) in enumerate(self.beside):
            value = self._channels(span, pointer, dtype)
            y = self._narrow(y) * value if k == 0 else self._narrow(y) + value
        return y

    def _channels(self, span: Span, pointer: Pointer, dtype: DType) -> Vec:
        """The values of the channels of these columns."""
        b, space = self.b, self.count // self.channels
        first = self.row % self.groups * self.channels
        lanes = range(1 if space % self.lanes == 0 else self.lanes)
        found = [b.load(pointer, first + (span.col + k) // space) for k in lanes]
        wide = [self.m.keep(loaded(v, dtype).cast(F32)) for v in found]
        return wide[0].spread(self.lanes) if len(wide) == 1 else b.let(concat(wide))


__all__ = ["CudaGroupNorm", "rows_of"]
