"""Quantization of f32 to unsigned bytes with one known scale: a product with two parts of its inverse, no division.

``fma(x, high, x * low)`` with ``high + low = 1 / scale`` is the rounded quotient but for quotients very near to the
middle of two floats (Brisebarre, Muller, Raina, IEEE TC 53(8), 2004). A code jumps at n + 1/2 only, so few middles
matter: :func:`parts_of` takes the scales for which no float divided by them comes as near to those as the two products
are off, and codes are exactly those of the division.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from bitwright.codegen.instructions import x86
from bitwright.codegen.tvm.spelling import call
from bitwright.codegen.tvm.template import Arg, Config, Refused, Template
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec, const, fma, intrinsic, minimum
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.types import F32, S16, S32, U8, DType
from bitwright.ir.weights import Array

TASK_BYTES = 32768
BEYOND = 1024.0
"""Scales from which values may as well be larger: all of their codes are the largest."""
AHEAD = 2048 // 4
"""Floats that are asked for ahead: 94 % of the speed of reading alone from the third-level cache, 85 % without."""
TOGETHER = 4
"""Vectors of floats that make one of bytes."""
_LOW_BITS, _NEAR = 1 << 15, 4
_LEAST, _MOST = 2.0**-60, 2.0**60
_ROUND = {16: (x86.VCVTPS2DQ_512, x86.VPACKSSDW_512, x86.VPACKUSWB_512),
          8: (x86.VCVTPS2DQ_256, x86.VPACKSSDW_256, x86.VPACKUSWB_256)}  # fmt: skip


@dataclass(frozen=True)
class QuantizeConfig(Config):
    """``size`` elements of which ``chunk`` are a task; codes up to ``most``; ``lanes`` of f32."""

    size: int = 0
    chunk: int = 0
    most: int = 255
    lanes: int = 16


class Quantizer(Template):
    """One quantize to an unsigned format of at most 8 bits, per tensor, with constant scale and zero point."""

    name = "quantize"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes AVX2 and AVX-512, and scales that :func:`parts_of` takes."""
        nodes = [n for n in body.nodes if not isinstance(n.op, ops.Constant)]
        op = nodes[0].op if len(nodes) == 1 else None
        if not isinstance(op, ops.Quantize) or body.outputs != nodes[0].outputs:
            return Refused("not a quantization alone")
        if target.kind != "cpu" or target.isa not in ("avx512-vnni", "avx-vnni", "avx2"):
            return Refused("quantization by products is for AVX2 and AVX-512")
        x, out = body.types[nodes[0].inputs[0]], nodes[0].type
        unsigned = op.dtype.kind == "uint" and op.dtype.bits <= 8
        if x.dtype != F32 or not unsigned or x.static_shape != out.static_shape or nodes[0].inputs[0] in body.producers:
            return Refused("not from f32 to unsigned bytes")
        if not x.size or x.size >= 1 << 31:
            return Refused("nothing to compute, or more than 2^31 elements")
        known = _constants(body, constants)
        if isinstance(known, str):
            return Refused(known)
        chunk = TASK_BYTES // 5 // 64 * 64
        position = next(i for i, v in enumerate(body.inputs) if v.name == nodes[0].inputs[0])
        return QuantizeConfig(
            tasks=math.ceil(x.size / chunk), args=(Arg("input", position), Arg("packed", 0), Arg("output", 0)),
            isa=target.isa, mcpu=target.mcpu, reason="products with two parts of 1 / scale, exact for this scale",
            size=x.size, chunk=chunk, most=op.dtype.hi, lanes=target.vector_bits // 32,
        )  # fmt: skip

    def pack(self, body: Graph, config: Config, constants: Mapping[str, Array]) -> list[Array]:
        """f32: high and low part of the inverse, the value from which codes are the largest, the zero point."""
        known = _constants(body, constants)
        assert not isinstance(known, str)
        return [np.array(known, np.float32)]

    def verify(self, body: Graph, config: Config, constants: Mapping[str, Array], packed: list[Array]) -> str:
        same = len(packed) == 1 and np.array_equal(packed[0], self.pack(body, config, constants)[0])
        return "" if same else "the packed inverse is not that of the scale"

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        assert isinstance(config, QuantizeConfig)
        b = Builder(symbol)
        x, packed = b.param("x", F32, config.size), b.param("packed", F32, 4)
        kernel = _Kernel(b, config, x, packed, b.param("out", U8, config.size))
        b.require(_ROUND[config.lanes][0].wrapper)
        with b.loop(b.end, b.begin, name="task") as task:
            kernel.task(b.index(task))
        return b.finish()


@dataclass(frozen=True)
class _Kernel:
    b: Builder
    c: QuantizeConfig
    x: Pointer
    packed: Pointer
    out: Pointer

    def task(self, task: Index) -> None:
        b, c = self.b, self.c
        width = TOGETHER * c.lanes
        first, whole, rest = b.index(task * c.chunk), c.size // width * width, c.size % width
        with b.loop(minimum(first + c.chunk, whole), first, width, name="i") as i:
            at = b.index(i)
            for line in range(0, width, 16):
                b.prefetch(self.x, at + AHEAD + line)
            b.store(self.out, at, self._limit(self._narrow([self._codes(at + j * c.lanes) for j in range(TOGETHER)])))
        if rest:
            with b.when(task == c.size // c.chunk - (c.size % c.chunk == 0)):
                for j in range(0, rest, c.lanes):
                    codes = self._codes(whole + j)
                    one = self._limit(self._narrow([codes] * TOGETHER))
                    b.store(self.out, whole + j, b.let(one).part(0, c.lanes), min(c.lanes, rest - j))

    def _codes(self, at: Index) -> Vec:
        """The rounded quotients, s32; the smallest for NaN and whatever is below all codes."""
        b, lanes = self.b, self.c.lanes
        x = b.let(b.load(self.x, at, lanes))
        high, low, most = (b.load(self.packed, i).spread(lanes) for i in range(3))
        near = b.let(x.gt(most).select(most, x))  # NaN stays
        quotient = b.let(fma(near, high, b.let(near * low)))
        return b.let(call(_ROUND[lanes][0], quotient))

    def _narrow(self, codes: list[Vec]) -> Vec:
        """Four vectors as bytes in order: saturating to 16 bits, adding the zero point, saturating to 8."""
        b, lanes = self.b, self.c.lanes
        _, words, packed_bytes = _ROUND[lanes]
        zero = b.let(b.load(self.packed, 3).cast(S32).cast(S16)).spread(2 * lanes)
        pairs = [b.let(call(words, codes[i], codes[i + 1])) for i in (0, 2)]
        moved = [b.let(intrinsic(f"llvm.sadd.sat.v{2 * lanes}i16", S16, 2 * lanes, p, zero)) for p in pairs]
        mixed = b.let(call(packed_bytes, *moved)).bits(S32)
        parts = lanes // 4
        return b.let(mixed.shuffle([4 * (i % parts) + i // parts for i in range(lanes)]).bits(U8))

    def _limit(self, codes: Vec) -> Vec:
        return codes if self.c.most == 255 else self.b.let(codes.min(const(self.c.most, U8, codes.lanes)))


def parts_of(scale: float) -> tuple[float, float] | None:
    """f32 values that add up to 1 / ``scale`` (an f32) but for a relative 2^-48, or None for a scale with which some
    code could differ from the division's.

    A quotient X * 2^k / S of significands (24 bits) lies within the error of the two products, 2^-23 of its last
    place, of a middle M / 2 only if abs(X * 2^(k+1) - M * S) <= 4. Beside n + 1/2 with n < 512, M is m * 2^15 ± 1, and
    X * 2^(k+1) is a multiple of 2^24: so S or -S would have to be within 4 of a multiple of 2^15. Powers of two are
    exact.

    >>> parts_of(0.25)
    (4.0, 0.0)
    >>> parts_of(float(np.float32(1.0 + 2.0**-23))) is None
    True
    """
    if not _LEAST <= scale <= _MOST or float(np.float32(scale)) != scale:
        return None
    significand = int(math.frexp(scale)[0] * 2**24)
    if significand != 1 << 23 and min(significand % _LOW_BITS, -significand % _LOW_BITS) <= _NEAR:
        return None
    inverse = 1 / Fraction(scale)
    high = float(np.float32(1.0 / scale))  # rounded twice: what is lost goes into the low part
    return high, float(np.float32(float(inverse - Fraction(high))))


def _constants(body: Graph, constants: Mapping[str, Array]) -> tuple[float, float, float, float] | str:
    """What :meth:`Quantizer.pack` packs, or why it cannot."""
    node = next(n for n in body.nodes if not isinstance(n.op, ops.Constant))
    found = []
    for name in node.inputs[1:]:
        array = constants.get(name) if name not in body.producers else np.asarray(body.constant(name))
        if array is None or array.size != 1:
            return "scale or zero point is not one constant"
        found.append(array.reshape(-1)[0])
    if body.types[node.inputs[1]].dtype != F32:
        return "the scale is no f32"
    if len(found) > 1 and not _small(body.types[node.inputs[2]].dtype):
        return "the zero point is no integer of at most 8 bits"
    scale, parts = float(found[0]), parts_of(float(found[0]))
    if parts is None:
        return f"quotients by {scale} need a division"
    return *parts, BEYOND * scale, float(found[1]) if len(found) > 1 else 0.0


def _small(dtype: DType) -> bool:
    return dtype.is_integer and dtype.bits <= 8


__all__ = ["QuantizeConfig", "Quantizer", "parts_of"]
