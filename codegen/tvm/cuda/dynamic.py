"""Codes found at run time on a GPU: the largest magnitude of a row, then its codes; exact as the reference.

A row is read once where it fits the registers of the lanes or the block that share it, else once more for the codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.config import CudaConfig
from bitwright.codegen.tvm.cuda.rows import BLOCK, RESIDENT, shared_by
from bitwright.codegen.tvm.grouped.dynamic import INFINITY_BITS, SMALLEST_BITS
from bitwright.codegen.tvm.template import Config, Refused, Template, plain_args
from bitwright.codegen.tvm.tir import Condition, Index, Pointer, Register, Vec, const, minimum
from bitwright.codegen.tvm.vecmath import VecMath
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.types import F32, S32, U8, DType
from bitwright.ir.weights import Array


@dataclass(frozen=True)
class CudaDynamicConfig(CudaConfig):
    """``rows`` of ``columns``, ``lanes`` a load, ``per_row`` threads a row, ``turns`` loads a thread."""

    rows: int = 1
    columns: int = 1
    lanes: int = 1
    per_row: int = 1
    turns: int = 1


class CudaDynamic(Template):
    """dynamic_quantize by itself."""

    name: ClassVar[str] = "cuda_dynamic"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes any static shape."""
        if len(body.nodes) != 1 or not isinstance(body.nodes[0].op, ops.DynamicQuantize):
            return Refused("not a quantization of rows at run time")
        if not body.inputs[0].type.is_static:
            return Refused("symbolic sizes")
        shape = body.inputs[0].type.static_shape
        rows, columns = math.prod(shape[:-1]), shape[-1]
        if not rows * columns or rows * columns >= 1 << 31:
            return Refused("nothing to compute, or more than 2^31 elements")
        lanes = math.gcd(columns, 4)
        per_row = shared_by(columns // lanes, RESIDENT // lanes)
        threads = max(BLOCK, per_row)
        return CudaDynamicConfig(
            args=plain_args(body), mcpu=target.mcpu, threads=threads, grid=(-(-rows * per_row // threads), 1, 1),
            rows=rows, columns=columns, lanes=lanes, per_row=per_row, turns=-(-columns // (lanes * per_row)),
            reason=f"largest magnitude of each row of {columns} by {per_row} threads, then its codes",
        )  # fmt: skip

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        assert isinstance(config, CudaDynamicConfig)
        op = body.nodes[0].op
        assert isinstance(op, ops.DynamicQuantize)
        b, size = CudaBuilder(symbol, grid=config.grid, threads=config.threads), config.rows * config.columns
        x, codes = b.param("x", F32, size), b.param("codes", op.dtype, size)
        _Rows(b, config, x, codes, b.param("scale", F32, config.rows), op.dtype).run()
        return b.finish()


@dataclass(eq=False)
class _Rows:
    b: CudaBuilder
    c: CudaDynamicConfig
    x: Pointer
    codes: Pointer
    scale: Pointer
    dtype: DType

    def run(self) -> None:
        b, c = self.b, self.c
        first = b.index(b.block() * (c.threads // c.per_row) + b.thread // c.per_row)
        self.row = b.index(minimum(first, c.rows - 1))
        self.share = b.index(b.thread % c.per_row)
        held = c.turns * c.lanes <= RESIDENT
        self.held = [b.register(F32, c.lanes, const(0.0, F32, c.lanes)) for _ in range(c.turns if held else 0)]
        top = b.register(S32, 1, self._top()).get()
        value = b.register(F32, 1, top.bits(F32)).get()
        with b.when(first < c.rows):
            with b.when(self.share < 1):
                bits = b.register(S32, 1, const(0x7FC00000, S32)).get()
                b.store(self.scale, self.row, top.lt(INFINITY_BITS).select(value / 127.0, bits.bits(F32)))
            finite = Condition(both_below(top))
            safe = b.register(F32, 1, finite.select(value, const(1.0, F32))).get()
            inverse = b.register(F32, 1, finite.select(const(127.0, F32) / safe, const(0.0, F32))).get()
            self._columns(lambda k, slot: self._store(k, slot, inverse, top))

    def _columns(self, step: Callable[[Index, int], None]) -> None:
        """``step(column, slot)`` for every load of this thread."""
        b, c = self.b, self.c
        vectors = c.columns // c.lanes

        def one(turn: Index, slot: int) -> None:
            at = b.index(turn * c.per_row + self.share)
            whole = vectors % c.per_row == 0 or (isinstance(turn, int) and (turn + 1) * c.per_row <= vectors)
            with b.when(True if whole else at < vectors):
                step(b.index(at * c.lanes), slot)

        if self.held:
            for turn in range(c.turns):
                one(turn, turn)
        else:
            with b.loop(c.turns, name="turn") as turn:
                one(turn, 0)

    def _read(self, k: Index) -> Vec:
        return self.b.load(self.x, self.row * self.c.columns + k, self.c.lanes)

    def _top(self) -> Vec:
        """Bits of the row's largest magnitude; a NaN is larger than all numbers."""
        b, c = self.b, self.c
        top = b.register(S32, 1, const(0, S32))

        def one(k: Index, slot: int) -> None:
            value = b.register(F32, c.lanes, self._read(k))
            if self.held:
                self.held[slot].set(value.get())
            for i in range(c.lanes):
                part = value.get().shuffle([i]) if c.lanes > 1 else value.get()
                single = b.register(F32, 1, part).get()
                top.set(top.get().max(single.bits(S32) & 0x7FFFFFFF))

        self._columns(one)
        self._across(top, min(c.per_row, 32))
        if c.per_row > 32:
            warps, parts = c.per_row // 32, b.shared(S32, c.threads // 32, align=4)
            with b.when(b.lane < 1):
                b.store(parts, b.warp, top.get())
            b.sync()
            top.set(b.load(parts, b.warp // warps * warps + b.lane % warps))
            self._across(top, warps)
        return top.get()

    def _across(self, top: Register, threads: int) -> None:
        while threads > 1:
            threads //= 2
            top.set(top.get().max(self.b.value("bw_shfl_xor_s32", S32, top.get(), threads)))

    def _store(self, k: Index, slot: int, inverse: Vec, top: Vec) -> None:
        """Codes of the columns from ``k`` on; zeros in a row that is not finite."""
        b, m = self.b, VecMath(self.b, "cuda")
        value = self.held[slot].get() if self.held else b.register(F32, self.c.lanes, self._read(k)).get()
        codes, at = b.local(self.dtype, self.c.lanes, "codes"), self.row * self.c.columns + k
        for i in range(self.c.lanes):
            x = value.shuffle([i]) if self.c.lanes > 1 else value
            scaled = b.register(F32, 1, x * inverse).get()
            safe = b.register(F32, 1, top.lt(INFINITY_BITS).select(scaled, const(0.0, F32))).get()
            code = b.register(S32, 1, m.round(safe).cast(S32)).get()
            b.store(codes, i, (code + 128 if self.dtype == U8 else code).cast(self.dtype))
        if self.c.lanes == 4:
            b.call("bw_copy4", b.address(self.codes, at), b.address(codes))
            return
        for i in range(self.c.lanes):
            b.store(self.codes, at + i, b.load(codes, i))


def both_below(top: Vec) -> Any:
    """Whether a row's largest magnitude is finite and large enough to divide by."""
    return (top.ge(SMALLEST_BITS).expr) & (top.lt(INFINITY_BITS).expr)


__all__ = ["CudaDynamic", "CudaDynamicConfig"]
