"""Depthwise convolutions of GPUs in the emulator: windows, borders, formats, epilogues; machine code."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.cuda.machine_code import sass
from bitwright.codegen.tvm.cuda.depthwise import CudaDepthwise
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.types import F32, S8, S32, TensorType, dtype_of
from bitwright.ir.weights import Array
from tests.codegen.cuda.gpu_batch import GpuBatch, refusal
from tests.codegen.kernel_batch import Case

RNG = np.random.default_rng(8)
WEIGHTS = ("w",)


def case(
    image: tuple[int, ...], kernel: tuple[int, ...], kind: Any = np.float32, *, zero: int = 0, bias: bool = False,
    behind: bool = True, groups: int = 0, **window: Any,
) -> Case:  # fmt: skip
    """A depthwise convolution; integers are requantized behind it, floats clamped and added to."""
    channels = image[-1]
    floats = np.dtype(kind).kind not in "iu"
    x = RNG.standard_normal(image).astype(kind) if floats else RNG.integers(*_ends(kind), image).astype(kind)
    shape = (channels, 1, *kernel) if not groups else (channels, channels // groups, *kernel)
    w = RNG.standard_normal(shape).astype(kind) if floats else RNG.integers(-128, 128, shape).astype(np.int8)
    data: dict[str, Array] = {"x": x, "w": w}
    if bias:
        data["c"] = RNG.standard_normal(channels).astype(kind)
    b = Builder("body", "kernel")
    names = [b.input(n, TensorType(dtype_of(a.dtype), a.shape)) for n, a in data.items()]
    if floats:
        y = b.emit(ops.Conv(**window, groups=groups or channels, channels_last=True), *names)
        y = b.emit(ops.Unary("relu"), y) if behind else y
    else:
        y = b.emit(ops.IntConv(**window, groups=groups or channels, channels_last=True, x_zero=zero), *names)
        if behind:
            data["m"] = RNG.integers(-9999, 9999, channels).astype(np.int32)
            m = b.input("m", TensorType(S32, (channels,)))
            y = b.emit(ops.Saturate(S8, -128, 127), b.emit(ops.Binary("add"), y, m))
    label = f"{image} {kernel} {np.dtype(kind)} {zero} {window}"
    return Case(label, b.finish([y]), data)


def _ends(kind: Any) -> tuple[int, int]:
    return int(np.iinfo(kind).min), int(np.iinfo(kind).max) + 1


def cases() -> list[Case]:
    same: dict[str, Any] = {"padding": (1, 1, 1, 1)}
    made = [
        case((2, 6, 7, 8), (3, 3), np.uint8, zero=131, **same), case((1, 5, 9, 12), (3, 3), np.int8, **same),
        case((1, 9, 9, 4), (3, 3), np.uint8, zero=7, stride=(2, 2), **same, behind=False),
        case((1, 8, 8, 5), (3, 3), np.int8, zero=-3, **same), case((1, 8, 3, 6), (3, 3), **same, bias=True),
        case((1, 9, 10, 8), (5, 4), padding=(2, 1, 2, 2), dilation=(1, 2)), case((2, 4, 4, 8), (1, 1)),
        case((1, 12, 11, 4), (7, 7), np.uint8, zero=100, padding=(3, 3, 3, 3)), case((1, 7, 12), (3,), padding=(1, 1)),
        case((2, 9, 8), (4,), np.int8, zero=5, stride=(3,), padding=(2, 0)),
    ]  # fmt: skip
    for kind in (np.float16, ml_dtypes.bfloat16):
        made.append(case((1, 5, 6, 8), (3, 3), kind, **same, bias=True))
        made.append(case((1, 5, 6, 7), (3, 3), kind, stride=(2, 1), bias=True, behind=False))
    return made


def test_matches_interpreter() -> None:
    assert GpuBatch(CudaDepthwise(), cases(), WEIGHTS).run(orders=(1, 2)) == []


def test_refusals() -> None:
    assert "one input and one output" in refusal(CudaDepthwise(), case((1, 4, 4, 8), (3, 3), groups=4), WEIGHTS)
    assert "computed" in refusal(CudaDepthwise(), cases()[0])
    assert "no convolution" in refusal(CudaDepthwise(), _relu(), WEIGHTS)


def _relu() -> Case:
    b = Builder("body", "kernel")
    y = b.emit(ops.Unary("relu"), b.input("x", TensorType(F32, (4,))))
    return Case("relu", b.finish([y]), {"x": np.zeros(4, np.float32)})


def test_other_weights_are_noticed() -> None:
    it = cases()[0]
    held = {"w": it.inputs["w"]}
    config = GpuBatch(CudaDepthwise(), [it], WEIGHTS).configs[0]
    assert "not the weights" in CudaDepthwise().verify(
        it.body, config, held, [CudaDepthwise().pack(it.body, config, held)[0] + 1]
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_machine_code(arch: str) -> None:
    big = [
        case((1, 56, 56, 96), (3, 3), np.uint8, zero=128, padding=(1, 1, 1, 1)),
        case((1, 28, 28, 64), (7, 7), padding=(3, 3, 3, 3)),
    ]
    shown = sass(GpuBatch(CudaDepthwise(), big, WEIGHTS).compiled(arch).cubin)
    parts = {int(m[1]): m[2] for m in re.finditer(r"\.text\.k(\d+):(.*?)(?=\.text\.k\d+:|\Z)", shown, re.S)}
    assert "IMAD" in parts[0]
    assert "FFMA" in parts[1]
    assert "LDG.E.128" in parts[1]
    assert not re.findall(r"\b(LDL|STL)\b", shown)
