"""Instructions as TIR expressions."""

from __future__ import annotations

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.instructions.core import Instruction, VecType
from bitwright.codegen.tvm.values import Vec, intrinsic, tvm_dtype
from bitwright.ir.types import BF16, S32


def call(instruction: Instruction, *args: Vec) -> Vec:
    """The instruction applied to values, whose bits are taken as the operand types it wants.

    A function that calls one with a wrapper must be finished by a builder that was told so (:meth:`Builder.require`).
    """
    if len(args) != len(instruction.operands):
        raise TypeError(f"{instruction.name} takes {len(instruction.operands)} operands, not {len(args)}")
    exact = [_operand(instruction, *pair) for pair in zip(args, instruction.operands, strict=True)]
    kind = instruction.result
    if not instruction.wrapper:
        return intrinsic(instruction.spelling, kind.dtype, kind.lanes, *exact)
    found = tirx.call_pure_extern(tvm_dtype(kind.dtype, kind.lanes), instruction.spelling, *(a.expr for a in exact))
    return Vec(found, kind.dtype, kind.lanes)


def _operand(instruction: Instruction, arg: Vec, kind: VecType) -> Vec:
    """The bits of ``arg`` as the operand that LLVM wants: bf16 travels in pairs."""
    dtype, lanes = (S32, kind.lanes // 2) if kind.dtype == BF16 else (kind.dtype, kind.lanes)
    value = arg.bits(dtype)
    if value.lanes != lanes:
        raise TypeError(f"{instruction.name} wants {kind}, got {arg.lanes} x {arg.dtype}")
    return value
