"""u8 x s8 with pmaddubsw for all weights: activations less 128 take the weights' signs, so no pair leaves 16 bits.

pmaddubsw multiplies unsigned by signed bytes and saturates. With ``t = x - 128`` where a weight is positive and
``~(x - 128) = 127 - x`` where it is negative, both within -128 to 127, ``sum(w * x)`` is ``sum(abs(w) * t)`` plus 128
times the sum of the weights plus the sum of the magnitudes of the negative ones: constants of an output, which sums
begin with. Two products are at most 2 * 128 * 128, and that only below zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.instructions import x86
from bitwright.codegen.tvm.contract.engine import Bytes, Operand
from bitwright.codegen.tvm.contract.plan import Plan
from bitwright.codegen.tvm.spelling import call
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec, const, constants
from bitwright.ir.types import S8, S16, S64, U8

Array = NDArray[Any]
SIGN = 8
"""The bit of an index into eight activations that picks the flipped one."""


@dataclass(frozen=True)
class FlippedBytes(Bytes):
    """pmaddubsw of magnitudes, pmaddwd by one. Windows of eight activations hold the flipped ones as well, and indices
    say which; elsewhere the weights' signs flip what was selected or broadcast."""

    def _activations(self, b: Builder, a: Vec) -> Operand:
        return (b.let(a ^ 0x80),)

    def window(self, b: Builder, x: Pointer, at: Index, reach: int) -> Vec:
        found = super().window(b, x, at, reach)
        if reach > self.selector.loads[0]:
            return b.let(found ^ 0x80)
        both = constants([-0x7F7F7F7F7F7F7F80, 0x7F7F7F7F7F7F7F7F] * (self.lanes // 4), S64)
        return b.let((found.bits(S64) ^ both).bits(U8))

    def select(self, b: Builder, window: Vec, index: Vec) -> Operand:
        return (b.let(call(self.shuffle, window, index).bits(U8)),)

    def weights(self, b: Builder, w: Pointer, at: Index, part: int = 0) -> Operand:
        raw = b.let(b.load(w, at, self.lanes * 4))
        signs = b.let(raw >> 7)
        return b.let((raw ^ signs) - signs), signs

    def signless(self, w: Operand, plan: Plan) -> Operand:
        """The weights for activations that were selected with their signs, if the plan's indices do that."""
        return w[:1] if signed_indices(plan) else w

    def mac(self, acc: Vec, a: Operand, w: Operand) -> Vec:
        flipped = a[0].bits(S8) ^ w[1] if len(w) > 1 else a[0]
        return acc + call(x86.VPMADDWD_256, call(x86.VPMADDUBSW_256, w[0], flipped), const(1, S16, 16))


def signed_indices(plan: Plan) -> bool:
    """Whether indices, a byte each, pick from eight activations and leave the bit of the sign free."""
    return plan.sparse and plan.load == SIGN and plan.bits == 8


def with_signs(plan: Plan, arrays: list[Array]) -> list[Array]:
    """Packed weights and indices with the weights' signs in the indices where :func:`signed_indices` says so."""
    if not signed_indices(plan):
        return arrays
    weights, indices = arrays
    return [weights, indices | np.where(weights < 0, SIGN, 0).astype(indices.dtype)]


def without_signs(plan: Plan, arrays: list[Array]) -> list[Array]:
    """Inverse of :func:`with_signs`; arrays behind the indices are left out."""
    return [arrays[0], arrays[1] & (SIGN - 1)] if signed_indices(plan) else arrays


def lacking(weight: Array) -> Array:
    """What the products of every output (the first axis) lack, s64."""
    wide = weight.reshape(weight.shape[0], -1).astype(np.int64)
    missing: Array = 128 * wide.sum(1) - np.minimum(wide, 0).sum(1)
    return missing


__all__ = ["FlippedBytes", "lacking", "signed_indices", "with_signs", "without_signs"]
