"""Contractions of bf16 by bf16 with f32 sums: what has a kernel, and how bf16 reaches it (as 16-bit words)."""

from __future__ import annotations

from typing import overload

import numpy as np

from bitwright.codegen.tvm.contract.spec import ContractSpec, Conv, runs_of
from bitwright.ir.target import Target
from bitwright.ir.types import BF16
from bitwright.ir.weights import Array

PAIR = 2


def refusal(spec: ContractSpec, isa: str) -> str:
    """Why there is no bf16 kernel of this contraction; the empty string if there is one."""
    if isa != "avx512-vnni":
        return f"{isa} has no products of bf16"
    if spec.right != "constant":
        return "a run-time right operand of bf16 has no tiled kernel"
    if runs_of(spec).length % PAIR:
        return f"a reduction of {runs_of(spec).length} has no pairs of bf16"
    if isinstance(spec.geometry, Conv) and spec.geometry.is_depthwise:
        return "a depthwise convolution has no bf16 kernel"
    if spec.pattern is not None and spec.pattern.shared > 1:
        return "patterns shared by outputs have no bf16 kernel"
    return ""


def bf16_refusal(target: Target) -> str:
    """Why the target runs no kernel of this module; the empty string if it does."""
    return "" if target.rate(BF16, BF16) else f"{target.name} has no products of bf16"


@overload
def as_words(array: Array) -> Array: ...
@overload
def as_words(array: Array | None) -> Array | None: ...
def as_words(array: Array | None) -> Array | None:
    """bf16 as the 16-bit words that kernels read, -0 as 0 (which patterns take for a zero); others as they are."""
    if array is None or array.dtype != BF16.numpy:
        return array
    return np.where(array == 0, np.zeros_like(array), array).view(np.uint16)
