"""Row kernels of GPUs in the emulator: softmax, norms and reductions with what is fused around them; machine code."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.cuda.machine_code import sass
from bitwright.codegen.tvm.cuda.rows import CudaRows, CudaRowsConfig, shared_by
from bitwright.ir import ops
from bitwright.ir.types import BF16, F16, F32, S8, U8
from tests.codegen.cuda.gpu_batch import GpuBatch, refusal
from tests.codegen.kernel_batch import Array
from tests.codegen.test_rows import (
    ADD,
    MUL,
    RNG,
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


def wide_cases() -> Cases:
    """Four columns a load in every format."""
    cases = Cases()
    x, g = normal(9, 64), normal(64)
    s, z = np.array(0.03, np.float32), np.array(120, np.uint8)
    quantized: dict[str, Array] = {"x": RNG.integers(0, 255, (9, 64)).astype(np.uint8), "g": g, "s": s, "z": z}
    norm = (ops.LayerNorm(), ("v0", "g", "g"))
    for kind in (U8, S8):
        zero = {"z": z.astype(kind.numpy) // 2}
        chain = (ops.Dequantize(), ("x", "s", "z")), norm, (ops.Quantize(kind), ("v1", "s", "z"))
        codes = {"x": quantized["x"].astype(kind.numpy)}
        cases.add_case(f"{kind} in and out", {**quantized, **zero, **codes}, *chain, steps=1)
    cases.add_case("bool out", {"x": x, "g": g}, (ops.Softmax(), ("x",)), (ops.Binary("lt"), ("v0", "g")))
    bools = RNG.integers(0, 2, (9, 64)).astype(bool)
    masked: dict[str, Array] = {"x": x, "m": bools, "f": np.array(-1e9, np.float32)}
    cases.add_case("bool in", masked, (ops.Where(), ("m", "x", "f")), (ops.Softmax(), ("v0",)))
    cases.add_case(
        "s64 in",
        {"x": x, "m": bools.astype(np.int64)},
        (ops.Cast(F32), ("m",)),
        (MUL, ("v0", "x")),
        (ops.Softmax(), ("v1",)),
    )
    cases.add_case(
        "s32 in", {"x": (x * 1000).astype(np.int32), "t": s}, (ops.Dequantize(), ("x", "t")), (ops.Softmax(), ("v0",))
    )
    for half, dtype in ((np.float16, F16), (ml_dtypes.bfloat16, BF16)):
        y, h = normal(9, 64, dtype=half), normal(64, dtype=half)
        cases.add_case(f"norm {dtype}", {"x": y, "g": h}, (ADD, ("x", "g")), (ops.LayerNorm(), ("v0", "g", "g")))
        cases.add_case(f"to f32 {dtype}", {"x": y, "g": h}, (ops.RmsNorm(), ("x", "g")), (ops.Cast(F32), ("v0",)))
        cases.add_case(f"from f32 {dtype}", {"x": x}, (ops.Softmax(), ("x",)), (ops.Cast(dtype), ("v0",)))
        cases.add_case(f"max {dtype}", {"x": y}, (ops.Reduce("max", (1,)), ("x",)))
    return cases


def test_four_columns_of_every_format() -> None:
    assert GpuBatch(CudaRows(), wide_cases()).run() == []


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
    batch = GpuBatch(CudaRows(), [*cases, *wide_cases()])
    made = batch.compiled(arch)
    shown = "".join(re.findall(r"\.text\.k[0-3]:.*?EXIT.*?(?=\.text\.k\d+:|\Z)", sass(made.cubin), re.S))
    assert len(re.findall(r"LDG\.E\.128", shown)) == (2 + 1 + 1) * 8
    assert len(re.findall(r"LDG\.E\.64", shown)) == (2 + 1 + 1) * 8
    assert len(re.findall(r"STG\.E\.128", shown)) == len(re.findall(r"STG\.E\.64", shown)) == 2 * 8
    assert "SHFL" in shown
    assert not re.findall(r"\b(LDL|STL)\b", shown)
