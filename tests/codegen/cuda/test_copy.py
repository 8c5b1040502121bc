"""Moves of rows on a GPU in the emulator: concatenation, slices, padding, repetition, in every format."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.cuda.machine_code import sass
from bitwright.codegen.tvm.cuda.copy import CudaCopy, parts_of
from bitwright.ir import ops
from tests.codegen.cuda.gpu_batch import GpuBatch, refusal
from tests.codegen.kernel_batch import Case, body_of

RNG = np.random.default_rng(6)
KINDS = (np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.bool_, np.int64)


def case(op: ops.Op, *shapes: tuple[int, ...], kind: Any = np.float32) -> Case:
    inputs = {f"x{i}": RNG.integers(0, 2 if kind == np.bool_ else 99, s).astype(kind) for i, s in enumerate(shapes)}
    return Case(f"{op} {shapes} {np.dtype(kind)}", body_of((op, tuple(inputs)), inputs=inputs), inputs, 0, 0)


def cases() -> list[Case]:
    made = []
    for kind in KINDS:
        made.append(case(ops.Concat(1), (2, 5, 16), (2, 1, 16), kind=kind))
        made.append(case(ops.Concat(1), (3, 8), (3, 5), (3, 1), kind=kind))
        made.append(case(ops.Slice(1, 2, 9, 3), (2, 11, 24), kind=kind))
        made.append(case(ops.Slice(2, 8, 20), (2, 3, 24), kind=kind))
        made.append(case(ops.Slice(1, 3, 20), (2, 23), kind=kind))
        made.append(case(ops.Transpose((1, 0, 2)), (5, 6, 12), kind=kind))
        made.append(case(ops.Tile((2, 1, 3)), (2, 3, 8), kind=kind))
    made.append(case(ops.Expand((4, 5, 8)), (5, 8)))
    made.append(case(ops.Pad((0, 1, 4, 0, 2, 3), value=7.5), (2, 3, 8)))
    made.append(case(ops.Pad((0, 2, 1, 3), value=0.0), (3, 9), kind=ml_dtypes.bfloat16))
    return made


def test_matches_interpreter() -> None:
    assert GpuBatch(CudaCopy(), cases()).run(orders=(1, 2)) == []


def test_pieces_are_as_large_as_alignment_allows() -> None:
    def pieces(it: Case) -> list[int]:
        parts = parts_of(it.body)
        assert not isinstance(parts, str)
        return [p.piece for p in parts]

    assert pieces(case(ops.Concat(2), (1, 8, 31, 64), (1, 8, 1, 64))) == [4, 4]
    assert pieces(case(ops.Concat(1), (3, 8), (3, 5), kind=np.int8)) == [1, 1]
    assert pieces(case(ops.Slice(2, 8, 20), (2, 3, 24), kind=np.float16)) == [4]


def test_refusals() -> None:
    assert "no rows" in refusal(CudaCopy(), case(ops.Transpose((1, 0)), (4, 5)))
    assert "by itself" in refusal(CudaCopy(), case(ops.Unary("relu"), (4, 5)))
    odd = case(ops.Pad((1, 1), value=2.0), (8,), kind=ml_dtypes.bfloat16)
    assert "other than 0" in refusal(CudaCopy(), odd)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_machine_code(arch: str) -> None:
    cache = case(ops.Concat(2), (1, 8, 1023, 128), (1, 8, 1, 128), kind=np.float16)
    shown = sass(GpuBatch(CudaCopy(), [cache]).compiled(arch).cubin)
    assert len(re.findall(r"LDG\.E\.128", shown)) == len(re.findall(r"STG\.E\.128", shown)) == 2
