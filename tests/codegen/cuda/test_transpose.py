"""Transposes of GPUs in the emulator: every order of axes, sizes that are no multiples, formats, what follows them."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.cuda.machine_code import sass
from bitwright.codegen.tvm.cuda.transpose import Axis, CudaTranspose, axes_of
from bitwright.ir import ops
from bitwright.ir.types import S8
from tests.codegen.cuda.gpu_batch import GpuBatch, refusal
from tests.codegen.kernel_batch import Array, Case, body_of

RNG = np.random.default_rng(4)


def case(label: str, inputs: dict[str, Array], *chain: tuple[ops.Op, Any]) -> Case:
    return Case(label, body_of(*chain, inputs=inputs), inputs, 0, 0)


def cases() -> list[Case]:
    made = []
    for perm in permutations(range(4)):
        x = RNG.integers(-99, 99, (2, 3, 35, 5)).astype(np.int32)
        made.append(case(str(perm), {"x": x}, (ops.Transpose(perm), ("x",))))
    made = [c for c in made if "3)" not in c.label]
    for kind in (np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.bool_, np.int64, np.float64):
        x = RNG.integers(0, 2, (70, 33)).astype(kind)
        made.append(case(str(np.dtype(kind)), {"x": x}, (ops.Transpose((1, 0)), ("x",))))
    image = {"x": RNG.standard_normal((2, 3, 20, 17)).astype(np.float32), "s": np.array(0.02, np.float32)}
    to_last = (ops.Transpose((0, 2, 3, 1)), ("x",))
    made.append(case("channels last, s8", image, to_last, (ops.Quantize(S8), ("v0", "s"))))
    half = {"x": RNG.standard_normal((40, 50)).astype(ml_dtypes.bfloat16), "y": np.ones((50, 1), ml_dtypes.bfloat16)}
    made.append(case("added", half, (ops.Transpose((1, 0)), ("x",)), (ops.Binary("add"), ("v0", "y"))))
    return made


def test_matches_interpreter() -> None:
    assert GpuBatch(CudaTranspose(), cases()).run(orders=(1, 2)) == []


def test_axes_that_stay_together_are_one() -> None:
    body = case("", {"x": np.zeros((2, 3, 4, 5), np.float32)}, (ops.Transpose((0, 2, 3, 1)), ("x",))).body
    assert axes_of(body, body.nodes[0]) == [Axis(2, 60, 60), Axis(20, 1, 3), Axis(3, 20, 1)]


def test_refusals() -> None:
    x = {"x": np.zeros((2, 3, 4), np.float32)}
    assert refusal(CudaTranspose(), case("", x, (ops.Transpose((1, 0, 2)), ("x",)))) == "rows stay rows"
    before = case("", x, (ops.Unary("relu"), ("x",)), (ops.Transpose((2, 1, 0)), ("v0",)))
    assert refusal(CudaTranspose(), before) == "work before the transpose"
    assert "not one transpose" in refusal(CudaTranspose(), case("", x, (ops.Unary("relu"), ("x",))))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_machine_code(arch: str) -> None:
    shown = sass(GpuBatch(CudaTranspose(), cases()[-2:]).compiled(arch).cubin)
    assert "LDS" in shown
    assert "BAR.SYNC" in shown
