"""Row kernels of GPUs in the emulator: softmax, norms and reductions with what is fused around them; machine code."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bitwright.codegen.cuda.machine_code import sass
from bitwright.codegen.tvm.cuda.rows import CudaRows, CudaRowsConfig, shared_by
from bitwright.ir import ops
from tests.codegen.cuda.gpu_batch import GpuBatch, refusal
from tests.codegen.kernel_batch import Array
from tests.codegen.test_rows import (
    ADD,
    Cases,
    fused_cases,
    half_cases,
    normal,
    plain_cases,
    reduce_cases,
    special_cases,
)


def gathered() -> list[Cases]:
    made = []
    for fill in (plain_cases, special_cases, reduce_cases, fused_cases, half_cases):
        fill(cases := Cases())
        made.append(cases)
    return made


@pytest.mark.parametrize("which", range(5))
def test_matches_interpreter(which: int) -> None:
    assert GpuBatch(CudaRows(), gathered()[which]).run(orders=(1, 2)) == []


def long_cases() -> Cases:
    cases = Cases()
    for n in (256, 1280, 2051, 4096, 20_000, 16_389):
        x, g = normal(3, n), normal(n)
        cases.add_case(f"softmax {n}", {"x": x * 5, "g": g}, (ADD, ("x", "g")), (ops.Softmax(), ("v0",)))
        cases.add_case(f"layer norm {n}", {"x": x, "g": g}, (ops.LayerNorm(), ("x", "g", "g")))
        cases.add_case(
            f"logsumexp {n}", {"x": x, "g": g}, (ops.Reduce("logsumexp", (1,), True), ("x",)), (ADD, ("v0", "g"))
        )
        cases.add_case(f"log softmax {n}", {"x": x}, (ops.Softmax(log=True), ("x",)))
    return cases


def test_rows_of_blocks_and_rows_that_are_read_again() -> None:
    batch = GpuBatch(CudaRows(), long_cases())
    assert batch.run(orders=(3, 4)) == []
    kinds = {(c.per_row > 32, c.resident) for c in batch.configs if isinstance(c, CudaRowsConfig)}
    assert kinds == {(False, True), (True, True), (True, False)}


def test_refuses_as_on_a_cpu() -> None:
    cases = Cases()
    cases.add_case("inner axis", {"x": normal(3, 4, 5)}, (ops.Reduce("sum", (1,)), ("x",)))
    assert "trailing" in refusal(CudaRows(), cases[0])


def test_threads_of_a_row() -> None:
    assert [shared_by(n, 8) for n in (1, 3, 10, 32, 256, 257, 1024, 100_000)] == [1, 4, 16, 32, 32, 64, 128, 512]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_machine_code(arch: str) -> None:
    cases = Cases()
    for kind in (np.float32, np.float16):
        x, g = normal(64, 4096, dtype=kind), normal(4096, dtype=kind)
        residual: dict[str, Array] = {"x": x, "y": x, "g": g}
        cases.add_case("norm", residual, (ADD, ("x", "y")), (ops.RmsNorm(), ("v0", "g")))
        cases.add_case("softmax", {"x": x}, (ops.Softmax(), ("x",)))
    batch = GpuBatch(CudaRows(), cases)
    made = batch.compiled(arch)
    shown = sass(made.cubin)
    assert len(re.findall(r"LDG\.E\.128", shown)) == (2 + 1 + 1) * 8
    assert len(re.findall(r"LDG\.E\.64", shown)) == (2 + 1 + 1) * 8
    assert len(re.findall(r"STG\.E\.128", shown)) == len(re.findall(r"STG\.E\.64", shown)) == 2 * 8
    assert "SHFL" in shown
    assert not re.findall(r"\b(LDL|STL)\b", shown)
