"""How a unit of activations meets a weight on each instruction set: rows in lanes, the weights broadcast."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.codegen.instructions import x86
from bitwright.codegen.instructions.core import Instruction
from bitwright.codegen.tvm.contract.spec import ContractSpec
from bitwright.codegen.tvm.lanes.spec import LanesKnobs
from bitwright.codegen.tvm.spelling import call
from bitwright.codegen.tvm.tir import Builder, Vec, const, fma
from bitwright.ir.types import F32, S8, S16, U8, U16

Operand = tuple[Vec, ...]


@dataclass(frozen=True)
class Products:
    """Floats, multiplied and added; on ``fused`` targets rounded once."""

    fused: bool = True

    def activations(self, b: Builder, raw: Vec) -> Operand:
        """A vector of units (s32 lanes) as the multiplication wants it."""
        return (b.let(raw.bits(F32)),)

    def weight(self, b: Builder, raw: Vec, lanes: int) -> Operand:
        """One word of weights (s32) in every lane."""
        return (b.let(raw.bits(F32).spread(lanes)),)

    def mac(self, acc: Vec, a: Operand, w: Operand) -> Vec:
        """acc + the products of a unit."""
        return fma(a[0], w[0], acc) if self.fused else acc + a[0] * w[0]


@dataclass(frozen=True)
class Dot(Products):
    """vpdpbusd."""

    dot: Instruction = x86.VPDPBUSD_512

    def activations(self, b: Builder, raw: Vec) -> Operand:
        return (b.let(raw.bits(U8)),)

    def weight(self, b: Builder, raw: Vec, lanes: int) -> Operand:
        return (b.let(raw.spread(lanes).bits(S8)),)

    def mac(self, acc: Vec, a: Operand, w: Operand) -> Vec:
        return call(self.dot, acc, a[0], w[0])


@dataclass(frozen=True)
class Pairs(Dot):
    """pmaddubsw, pmaddwd by one: exact where no pair of products leaves 16 bits."""

    def mac(self, acc: Vec, a: Operand, w: Operand) -> Vec:
        return acc + call(x86.VPMADDWD_256, call(x86.VPMADDUBSW_256, a[0], w[0]), const(1, S16, 16))


@dataclass(frozen=True)
class Wide(Products):
    """Even and odd bytes in 16 bits, two pmaddwd: exact for all weights."""

    def activations(self, b: Builder, raw: Vec) -> Operand:
        words = raw.bits(U16)
        return b.let((words & 0xFF).bits(S16)), b.let((words >> 8).bits(S16))

    def weight(self, b: Builder, raw: Vec, lanes: int) -> Operand:
        words = b.let(raw.spread(lanes)).bits(S16)
        return b.let((words << 8) >> 8), b.let(words >> 8)

    def mac(self, acc: Vec, a: Operand, w: Operand) -> Vec:
        return acc + call(x86.VPMADDWD_256, a[0], w[0]) + call(x86.VPMADDWD_256, a[1], w[1])


def products_of(spec: ContractSpec, knobs: LanesKnobs) -> Products:
    """The products of a kernel; int8 needs AVX2 at least."""
    if spec.element == "f32":
        return Products(knobs.isa != "portable")
    if knobs.isa == "avx512-vnni":
        return Dot(dot=x86.VPDPBUSD_512)
    if knobs.isa == "avx-vnni":
        return Dot(dot=x86.VPDPBUSD_256)
    return Pairs() if knobs.safe_pairs else Wide()


__all__ = ["Operand", "Products", "products_of"]
