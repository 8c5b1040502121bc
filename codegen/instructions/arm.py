"""The vector instructions of 64-bit Arm that the kernels use."""

from __future__ import annotations

import numpy as np

from bitwright.codegen.instructions.core import Array, Instruction, VecType
from bitwright.ir.types import F32, S8, S32, U8


def _dot4(acc: Array, a: Array, w: Array) -> Array:
    products = a.astype(np.int64).reshape(-1, 4) * w.astype(np.int64).reshape(-1, 4)
    return np.asarray((acc.astype(np.int64) + products.sum(1)).astype(np.uint64).astype(np.uint32).view(np.int32))


def _tbl(table: Array, index: Array) -> Array:
    i = index.view(np.uint8).astype(np.int64)
    return np.asarray(np.where(i < table.size, table[i & (table.size - 1)], 0), table.dtype)


def _fma(a: Array, b: Array, c: Array) -> Array:
    exact = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)
    return np.asarray(exact, np.float32)


_WORDS, _SIGNED, _UNSIGNED = VecType(S32, 4), VecType(S8, 16), VecType(U8, 16)


def _dot(name: str, feature: str, a: VecType, w: VecType) -> Instruction:
    return Instruction(name, f"llvm.aarch64.neon.{name}.v4i32.v16i8", feature, _WORDS, (_WORDS, a, w), _dot4)


USDOT = _dot("usdot", "i8mm", _UNSIGNED, _SIGNED)
SDOT = _dot("sdot", "asimddp", _SIGNED, _SIGNED)
TBL = Instruction("tbl", "llvm.aarch64.neon.tbl1.v16i8", "asimd", _SIGNED, (_SIGNED, _SIGNED), _tbl)
FMLA = Instruction("fmla", "llvm.fma.v4f32", "asimd", VecType(F32, 4), (VecType(F32, 4),) * 3, _fma)

INSTRUCTIONS: tuple[Instruction, ...] = (USDOT, SDOT, TBL, FMLA)
"""Every instruction with a spelling on 64-bit Arm."""
