"""Instructions as TIR expressions."""

from __future__ import annotations

from bitwright.codegen.instructions.core import Instruction
from bitwright.codegen.tvm.values import Vec, intrinsic


def call(instruction: Instruction, *args: Vec) -> Vec:
    """The instruction applied to values, whose bits are taken as the operand types it wants."""
    if len(args) != len(instruction.operands):
        raise TypeError(f"{instruction.name} takes {len(instruction.operands)} operands, not {len(args)}")
    exact = []
    for arg, kind in zip(args, instruction.operands, strict=True):
        value = arg.bits(kind.dtype)
        if value.lanes != kind.lanes:
            raise TypeError(f"{instruction.name} wants {kind}, got {arg.lanes} x {arg.dtype}")
        exact.append(value)
    return intrinsic(instruction.spelling, instruction.result.dtype, instruction.result.lanes, *exact)
