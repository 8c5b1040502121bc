"""The kernel of dynamic_quantize: the largest magnitude of a row, then its codes; exact as the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.codegen.tvm.template import Config, Refused, Template, plain_args
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec, const, constants, minimum
from bitwright.codegen.tvm.vecmath import VecMath
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.types import F32, S32, U8, DType
from bitwright.ir.weights import Array

SMALLEST_BITS, INFINITY_BITS = 0x03800000, 0x7F800000
"""2^-120, and infinity, as f32 bits: magnitudes compare like their bits."""
TASK_BYTES = 1 << 15
UNROLL = 4


@dataclass(frozen=True)
class DynamicConfig(Config):
    """``rows`` of ``columns``, ``block`` rows a task, ``lanes`` of f32."""

    rows: int = 1
    columns: int = 1
    block: int = 1
    lanes: int = 4


class Dynamic(Template):
    """dynamic_quantize by itself."""

    name = "dynamic"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes any static shape."""
        if len(body.nodes) != 1 or not isinstance(body.nodes[0].op, ops.DynamicQuantize):
            return Refused("not a quantization of rows at run time")
        if target.kind != "cpu":
            return Refused("for CPUs")
        shape = body.inputs[0].type.static_shape
        rows, columns = math.prod(shape[:-1]), shape[-1]
        if not rows * columns or rows * columns >= 1 << 31:
            return Refused("nothing to compute, or more than 2^31 elements")
        block = max(1, min(rows, TASK_BYTES // (4 * columns)))
        return DynamicConfig(
            tasks=-(-rows // block), args=plain_args(body), isa=target.isa, mcpu=target.mcpu,
            reason=f"largest magnitude of each row of {columns}, then its codes", rows=rows, columns=columns,
            block=block, lanes=target.vector_bits // 32,
        )  # fmt: skip

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        assert isinstance(config, DynamicConfig)
        op = body.nodes[0].op
        assert isinstance(op, ops.DynamicQuantize)
        b, size = Builder(symbol), config.rows * config.columns
        row = _Row(
            b, config, b.param("x", F32, size), b.param("codes", op.dtype, size), b.param("scale", F32, config.rows),
            op.dtype,
        )  # fmt: skip
        with b.loop(b.end, b.begin, name="task") as task:
            first = b.index(task * config.block)
            with b.loop(minimum(first + config.block, config.rows), first, name="row") as r:
                row.run(b.index(r))
        return b.finish()


@dataclass(frozen=True)
class _Row:
    b: Builder
    c: DynamicConfig
    x: Pointer
    codes: Pointer
    scale: Pointer
    dtype: DType

    def run(self, row: Index) -> None:
        b = self.b
        at = b.index(row * self.c.columns)
        bits = b.let(self._top(at))
        top = b.let(bits.bits(F32))
        finite = bits.lt(INFINITY_BITS)
        b.store(self.scale, row, finite.select(top / 127.0, const(0x7FC00000, S32).bits(F32)))
        with b.when(bits.lt(INFINITY_BITS)):
            usable = bits.ge(SMALLEST_BITS)
            safe = b.let(usable.select(top, const(1.0, F32)))
            inverse = b.let(usable.select(const(127.0, F32) / safe, const(0.0, F32)))
            self._columns(lambda k, valid: self._store(at, k, valid, self._code(at, k, inverse)))
        with b.when(bits.ge(INFINITY_BITS)):
            zero = const(0, S32, self.c.lanes)
            self._columns(lambda k, valid: self._store(at, k, valid, zero))

    def _columns(self, step: Any) -> None:
        """``step(column, how many are there)`` for every vector."""
        whole, rest = divmod(self.c.columns, self.c.lanes)
        with self.b.loop(whole, name="k") as k:
            step(self.b.index(k * self.c.lanes), self.c.lanes)
        if rest:
            step(whole * self.c.lanes, rest)

    def _magnitude(self, at: Index, k: Index) -> Vec:
        return self.b.load(self.x, at + k, self.c.lanes).bits(S32) & 0x7FFFFFFF

    def _top(self, at: Index) -> Vec:
        """Bits of the row's largest magnitude; a NaN is larger than all numbers."""
        b, lanes = self.b, self.c.lanes
        whole, rest = divmod(self.c.columns, lanes)
        tops = [b.register(S32, lanes, const(0, S32, lanes), "top") for _ in range(UNROLL)]
        with b.loop(whole // UNROLL, name="k") as k:
            for u, top in enumerate(tops):
                top.set(top.get().max(self._magnitude(at, k * (UNROLL * lanes) + u * lanes)))
        for u in range(whole % UNROLL):
            tops[u].set(tops[u].get().max(self._magnitude(at, (whole // UNROLL * UNROLL + u) * lanes)))
        if rest:
            inside = constants(range(lanes), S32).lt(rest)
            last = inside.select(b.let(self._magnitude(at, whole * lanes)), const(0, S32, lanes))
            tops[0].set(tops[0].get().max(last))
        value = b.let(tops[0].get().max(tops[1].get()).max(tops[2].get().max(tops[3].get())))
        while value.lanes > 2:
            half = value.lanes // 2
            value = b.let(value.part(0, half).max(value.part(half, half)))
        return value.shuffle([0]).max(value.shuffle([1]))

    def _code(self, at: Index, k: Index, inverse: Vec) -> Vec:
        m = VecMath(self.b, self.c.isa)
        scaled = self.b.let(self.b.load(self.x, at + k, self.c.lanes) * inverse.spread(self.c.lanes))
        return m.round(scaled).cast(S32)

    def _store(self, at: Index, k: Index, valid: int, code: Vec) -> None:
        moved = code + 128 if self.dtype == U8 else code
        self.b.store(self.codes, at + k, self.b.let(moved).cast(self.dtype), valid)


__all__ = ["Dynamic", "DynamicConfig"]
