"""Every instruction's meaning against its compiled spelling, on random and adversarial operands."""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bitwright.codegen.instructions.core import Instruction, VecType
from bitwright.codegen.instructions.x86 import INSTRUCTIONS
from bitwright.codegen.tvm.adapter import Machine, build_object
from bitwright.codegen.tvm.spelling import call
from bitwright.codegen.tvm.tir import Builder, const
from bitwright.ir.types import S32

ROUNDS = 64


@cache
def cpu_features() -> frozenset[str]:
    text = Path("/proc/cpuinfo").read_text()
    return frozenset(next(line for line in text.split("\n") if line.startswith("flags")).split())


def operands(kind: VecType, rng: np.random.Generator) -> NDArray[Any]:
    """Extremes first, then random values over the whole range."""
    shape, dtype = (ROUNDS, kind.lanes), kind.dtype.numpy
    if kind.dtype.is_float:
        return rng.standard_normal(shape).astype(dtype)
    out = rng.integers(kind.dtype.lo, kind.dtype.hi, shape, endpoint=True, dtype=dtype)
    extremes = [kind.dtype.lo, kind.dtype.hi, 0, -1 & kind.dtype.hi]
    for n, value in enumerate(extremes):
        out[n] = value
    out[4:12] = rng.choice(np.array([kind.dtype.lo, kind.dtype.hi], dtype), (8, kind.lanes))
    return out


@pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=lambda i: i.name)
def test_meaning_equals_spelling(instruction: Instruction, tmp_path: Path) -> None:
    if instruction.feature not in cpu_features():
        pytest.skip(f"this CPU has no {instruction.feature}")
    b = Builder("one")
    kinds = instruction.operands
    inputs = [b.param(f"p{n}", k.dtype, k.lanes * ROUNDS) for n, k in enumerate(kinds)]
    out = b.param("out", instruction.result.dtype, instruction.result.lanes * ROUNDS)
    b.require(instruction.wrapper)
    with b.loop(b.end, b.begin) as i:
        values = [b.load(p, i * k.lanes, k.lanes) for p, k in zip(inputs, kinds, strict=True)]
        b.store(out, i * instruction.result.lanes, call(instruction, *values))
    (tmp_path / "k.o").write_bytes(build_object([b.finish()], cpu(instruction)))
    subprocess.run(["gcc", "-shared", "-o", tmp_path / "k.so", tmp_path / "k.o"], check=True)
    rng = np.random.default_rng(7)
    arrays = [operands(k, rng) for k in kinds]
    if instruction.name.startswith("vpdpbusd"):
        arrays[0] //= 4  # sums stay in 32 bits: what accumulators are certified for
    got = np.zeros((ROUNDS, instruction.result.lanes), instruction.result.dtype.numpy)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in [*arrays, got]]
    ctypes.CDLL(str(tmp_path / "k.so")).one(0, ROUNDS, *pointers)
    for n in range(ROUNDS):
        want = instruction.meaning(*(a[n] for a in arrays))
        np.testing.assert_array_equal(got[n], want, err_msg=f"{instruction} on {[a[n] for a in arrays]}")


def cpu(instruction: Instruction) -> Machine:
    """The smallest machine that has the instruction."""
    if instruction.spelling.endswith(".512") or "512" in instruction.name:
        return Machine("znver4")
    return Machine("alderlake") if instruction.feature == "avx_vnni" else Machine("haswell")


def test_wrong_operands_are_refused() -> None:
    with pytest.raises(TypeError, match="takes 3 operands"):
        call(INSTRUCTIONS[0], const(0, S32, 16))
    with pytest.raises(TypeError, match="wants"):
        call(INSTRUCTIONS[0], const(0, S32, 8), const(0, S32, 16), const(0, S32, 16))
    assert str(INSTRUCTIONS[0]) == "vpdpbusd.512: (s32x16, u8x64, s8x64) -> s32x16 [avx512_vnni]"
