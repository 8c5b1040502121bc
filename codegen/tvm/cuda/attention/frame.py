"""What both attention kernels share: where operands start, masks, what follows, the way results go out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from bitwright.codegen.tvm.attention_views import Attend, Operand
from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.generic_eval import div
from bitwright.codegen.tvm.rows_values import apply, loaded, rounded, stored
from bitwright.codegen.tvm.tir import Index, Pointer, Vec, const, width
from bitwright.codegen.tvm.vecmath import INF
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.types import BOOL, F16, F32, S32, DType

LOG2E = math.log2(math.e)


def piece_of(operand: Operand, size: int) -> int:
    """Bytes of a row that can be moved at once, up to 16, for elements of ``size`` bytes."""
    if operand.col != 1:
        return size
    return math.gcd(16, operand.offset * size, operand.row * size, *(s * size for s in operand.batch))


@dataclass(eq=False)
class Frame:
    """Pointers of one kernel; ``""`` is the output."""

    b: CudaBuilder
    body: Graph
    a: Attend
    pointers: dict[str, Pointer]
    scalars: dict[str, Vec] = field(default_factory=dict)

    def dtype(self, operand: Operand) -> DType:
        return self.body.types[operand.name].dtype

    def before(self) -> None:
        """Read the scalars that follow the attention."""
        for node in self.a.after:
            for x in node.inputs:
                maker = self.body.producers.get(x)
                dtype = self.body.types[x].dtype
                if maker is None and x in self.pointers:
                    self.scalars[x] = self.keep(loaded(self.b.load(self.pointers[x], 0), dtype))
                elif maker is not None and isinstance(maker.op, ops.Constant):
                    self.scalars[x] = rounded(self.b, const(maker.op.values[0], F32), dtype)

    def keep(self, value: Vec) -> Vec:
        """Evaluated once: TVM writes bindings out wherever they are used, registers it leaves alone."""
        return self.b.register(value.dtype, value.lanes, value).get()

    def wide(self, value: Vec, dtype: DType) -> Vec:
        """An element of memory as f32."""
        return self.keep(loaded(value, dtype)).cast(F32)

    def start(self, operand: Operand, idx: tuple[Index, ...], groups: int = 1) -> Index:
        """Where the operand's matrix of this batch index begins."""
        total: Index = operand.offset
        for k, (i, stride) in enumerate(zip(idx, operand.batch, strict=True)):
            if stride:
                total = total + (div(i, groups) if k == len(idx) - 1 else i) * stride
        return self.b.index(total)

    # ---- scores
    def scaled(self, score: Vec, mask: Index, row: Index, key: Index, inside: Any) -> Vec:
        """A sum of products as a power of two's exponent: scaled and masked; ``inside``: whether the place exists."""
        b, a = self.b, self.a
        value = self.keep(score * (a.op.scale * LOG2E))
        if a.mask is None:
            return value
        dtype = self.dtype(a.mask)
        found = b.register(S32 if dtype == BOOL else F32, 1, const(0, S32 if dtype == BOOL else F32))
        with b.when(inside):
            m = b.load(self.pointers[a.mask.name], mask + row * a.mask.row + key * a.mask.col)
            found.set(m.cast(S32) if dtype == BOOL else self.wide(m, dtype))
        if dtype == BOOL:
            return self.keep(found.get().ne(0).select(value, const(-INF, F32)))
        return self.keep(value + found.get() * LOG2E)

    def power(self, exponent: Vec) -> Vec:
        return self.b.value("bw_exp2", F32, exponent)

    def base(self, top: Vec) -> Vec:
        """What is taken off exponents: their largest, or 0 where all are -infinity."""
        return self.keep(top.eq(-INF).select(const(0.0, F32), top))

    # ---- results
    def result(self, value: Vec) -> Vec:
        """A finished element with what follows the attention, as it is stored."""
        value = self.keep(rounded(self.b, value, self.a.node.type.dtype))
        for node in self.a.after:
            args = [self.scalars.get(x, value) for x in node.inputs]
            value = self.keep(apply(self.b, node.op, args, node.type.dtype, "cuda", False))
        return stored(value, self.body.types[self.body.outputs[0]].dtype)

    def store(self, base: Index, row: Index, col: Index, values: list[Vec]) -> None:
        """Neighbouring columns of a row, of which those inside the result are written."""
        b, out, limit = self.b, self.a.out, self.a.width
        n, dtype = len(values), self.pointers[""].dtype
        place = b.index(base + row * out.row + col * out.col)
        nbytes = n * width(dtype)
        if limit % n == 0 and nbytes in (4, 8, 16) and piece_of(out, width(dtype)) % nbytes == 0:
            line = b.local(dtype, n, "line")
            for k, v in enumerate(values):
                b.store(line, k, self.result(v))
            with b.when(col < limit):
                b.call(f"bw_copy{nbytes}", b.address(self.pointers[""], place), b.address(line))
            return
        for k, v in enumerate(values):
            with b.when(col + k < limit):
                b.store(self.pointers[""], place + k * out.col, self.result(v))


def halves(frame: Frame, word: Vec, dtype: DType) -> list[Vec]:
    """The two 16-bit floats of a word as f32."""
    b = frame.b
    if dtype == F16:
        return [b.value("bw_low_f16", F32, word), b.value("bw_high_f16", F32, word)]
    return [frame.keep(v.bits(F32)) for v in (frame.keep(word << 16), frame.keep(word & 0xFFFF0000))]


__all__ = ["LOG2E", "Frame", "halves", "piece_of"]
