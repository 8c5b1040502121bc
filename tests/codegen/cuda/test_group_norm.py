"""Group normalisation of GPUs in the emulator: channels that are no multiples of a load, formats, what surrounds it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.tvm.cuda.group_norm import CudaGroupNorm
from bitwright.ir import ops
from tests.codegen.cuda.gpu_batch import GpuBatch, refusal
from tests.codegen.kernel_batch import Array, Case, body_of

RNG = np.random.default_rng(12)
ADD = ops.Binary("add")


def normal(*shape: int, kind: Any = np.float32) -> Array:
    return RNG.standard_normal(shape).astype(kind)


def case(shape: tuple[int, ...], groups: int, kind: Any = np.float32, beside: int = 2, around: bool = False) -> Case:
    inputs = {"x": normal(*shape, kind=kind)}
    inputs |= {n: normal(shape[1], kind=kind) for n in ("g", "h")[:beside]}
    norm = ops.GroupNorm(groups)
    if not around:
        return Case(f"{shape} {groups} {kind} {beside}", body_of((norm, tuple(inputs)), inputs=inputs), inputs)
    chain = (ADD, ("x", "y")), (norm, ("v0", "g", "h")), (ops.Unary("silu"), ("v1",)), (ADD, ("v2", "x"))
    inputs |= {"y": normal(*shape, kind=kind)}
    return Case(f"{shape} {groups} around", body_of(*chain, inputs=inputs), inputs)


def cases() -> list[Case]:
    made = [
        case((2, 6, 4, 4), 3), case((1, 8, 3, 3), 2), case((3, 4, 5), 4, beside=1), case((2, 10, 7), 5, beside=0),
        case((2, 6, 4, 5), 2, around=True), case((1, 32, 16, 16), 2), case((1, 3, 75, 75), 1), case((5, 8), 2),
    ]  # fmt: skip
    return made + [case((2, 6, 4, 4), 3, kind) for kind in (np.float16, ml_dtypes.bfloat16)]


def test_matches_interpreter() -> None:
    assert GpuBatch(CudaGroupNorm(), cases()).run(orders=(1, 2)) == []


def test_refusals() -> None:
    inputs: dict[str, Array] = {"x": normal(2, 4, 3), "c": normal(4, 1)}
    broadcast = body_of((ops.GroupNorm(2), ("x",)), (ADD, ("v0", "c")), inputs=inputs)
    assert "beside" in refusal(CudaGroupNorm(), Case("", broadcast, inputs))
    assert "not one group" in refusal(
        CudaGroupNorm(), Case("", body_of((ops.Unary("relu"), ("x",)), inputs=inputs), inputs)
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_machine_code(arch: str) -> None:
    GpuBatch(CudaGroupNorm(), [case((1, 64, 32, 32), 8), case((1, 64, 64, 64), 2)]).compiled(arch)
