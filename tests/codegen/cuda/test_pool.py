"""Maximum pooling on a GPU in the emulator: windows, borders, NaN, formats, what follows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.cuda.machine_code import sass
from bitwright.codegen.tvm.cuda.pool import CudaPool
from bitwright.ir import ops
from tests.codegen.cuda.gpu_batch import GpuBatch, refusal
from tests.codegen.kernel_batch import Case, body_of

RNG = np.random.default_rng(9)


def case(
    image: tuple[int, ...], kernel: tuple[int, ...], kind: Any, *behind: Any, last: bool = True, **at: Any
) -> Case:
    floats = np.dtype(kind).kind not in "iu"
    x = RNG.standard_normal(image).astype(kind) if floats else RNG.integers(-120, 120, image).astype(kind)
    if floats:
        x.reshape(-1)[3], x.reshape(-1)[40], x.reshape(-1)[50:60] = np.nan, np.inf, -np.inf
    inputs = {"x": x}
    pool = (ops.MaxPool(kernel, channels_last=last, **at), ("x",))
    return Case(f"{image} {kernel} {np.dtype(kind)} {at}", body_of(pool, *behind, inputs=inputs), inputs, 0, 0)


def cases() -> list[Case]:
    made = []
    for kind in (np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8):
        made.append(case((2, 9, 9, 8), (3, 3), kind, stride=(2, 2), padding=(1, 1, 1, 1)))
        made.append(case((1, 8, 6, 5), (2, 2), kind, (ops.Unary("relu"), ("v0",)), stride=(2, 2)))
    made.append(case((1, 12, 11, 4), (5, 4), np.float32, padding=(2, 1, 2, 2), dilation=(1, 2)))
    made.append(case((2, 30, 8), (3,), np.int8, stride=(2,), padding=(1, 0)))
    return made


def test_matches_interpreter() -> None:
    assert GpuBatch(CudaPool(), cases()).run(orders=(1, 2)) == []


def test_refusals() -> None:
    assert "channels last" in refusal(CudaPool(), case((1, 9, 9, 8), (3, 3), np.float32, last=False))
    other = (ops.Softmax(), ("v0",))
    assert "not one" in refusal(CudaPool(), case((1, 9, 9, 8), (3, 3), np.float32, other))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_machine_code(arch: str) -> None:
    big = case((1, 112, 112, 64), (3, 3), np.float32, stride=(2, 2), padding=(1, 1, 1, 1))
    shown = sass(GpuBatch(CudaPool(), [big]).compiled(arch).cubin)
    assert "LDG.E.128" in shown
    assert "STG.E.128" in shown
