"""An instruction is its meaning plus its spelling, both frozen values.

The meaning is a NumPy function over whole vectors; the spelling is what LLVM calls it. Tests evaluate each
meaning against the compiled spelling on random and adversarial inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from bitwright.ir.types import DType

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class VecType:
    """A machine vector: number format and lanes."""

    dtype: DType
    lanes: int

    def __str__(self) -> str:
        return f"{self.dtype}x{self.lanes}"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One vector instruction.

    ``spelling`` is an LLVM intrinsic; ``operands`` are the types LLVM wants (signedness as bits are read by
    ``meaning``); ``feature`` is the CPU feature that must be present (as /proc/cpuinfo names it). Where TVM cannot
    pass the types (bf16), ``wrapper`` is LLVM IR of a function of that name which takes bf16 operands as s32 pairs.
    """

    name: str
    spelling: str
    feature: str
    result: VecType
    operands: tuple[VecType, ...]
    meaning: Callable[..., Array]
    wrapper: str = ""

    def __str__(self) -> str:
        return f"{self.name}: ({', '.join(map(str, self.operands))}) -> {self.result} [{self.feature}]"
