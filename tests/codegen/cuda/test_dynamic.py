"""Codes found at run time on a GPU: bit for bit the interpreter's, at the ends of the numbers, too."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bitwright.codegen.cuda.machine_code import sass
from bitwright.codegen.tvm.cuda.dynamic import CudaDynamic, CudaDynamicConfig
from bitwright.ir import ops
from bitwright.ir.types import S8, U8
from tests.codegen.cuda.gpu_batch import GpuBatch, refusal
from tests.codegen.kernel_batch import Array, Case, body_of

RNG = np.random.default_rng(11)


def rows(*shape: int) -> Array:
    x = RNG.standard_normal(shape).astype(np.float32)
    flat = x.reshape(-1, shape[-1])
    special = (np.nan, np.inf, -np.inf, 1e-37, 3e38, 0.0, 2.0**-121)
    for i, value in zip(range(1, len(flat)), special, strict=False):
        flat[i] = flat[i] * 1e-38 if value in (1e-37, 2.0**-121) else flat[i]
        flat[i, -1] = value
    if len(flat) > 9:
        flat[9] = (np.arange(shape[-1]) % 255 - 127) / 2  # ties
    return x


def cases() -> list[Case]:
    made = []
    for shape in ((12, 7), (3, 5, 64), (11, 100), (10, 4096), (3, 20_000), (2, 16_390), (1, 1)):
        for dtype in (S8, U8):
            inputs = {"x": rows(*shape)}
            made.append(
                Case(f"{shape} {dtype}", body_of((ops.DynamicQuantize(dtype), ("x",)), inputs=inputs), inputs, 0, 0)
            )
    return made


def test_matches_interpreter_bit_for_bit() -> None:
    batch = GpuBatch(CudaDynamic(), cases())
    assert batch.run(orders=(1, 2)) == []
    assert {c.per_row > 32 for c in batch.configs if isinstance(c, CudaDynamicConfig)} == {True, False}


def test_refuses_other_bodies() -> None:
    inputs = {"x": rows(3, 4)}
    other = Case("exp", body_of((ops.Unary("exp"), ("x",)), inputs=inputs), inputs)
    assert "run time" in refusal(CudaDynamic(), other)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_machine_code(arch: str) -> None:
    batch = GpuBatch(CudaDynamic(), [c for c in cases() if c.label == "(10, 4096) s8"])
    shown = sass(batch.compiled(arch).cubin)
    assert len(re.findall(r"LDG\.E\.128", shown)) == 8  # read once
    assert len(re.findall(r"STG\.E\b", shown)) == 8 + 1  # four codes at once, and the scale
