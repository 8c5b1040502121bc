"""Pointwise GPU kernels against the interpreter; vectors in the machine code."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.codegen.cuda.machine_code import compile_cuda, sass
from bitwright.codegen.targets import GPUS
from bitwright.codegen.tvm.cuda.elementwise import CudaElementwise
from bitwright.codegen.tvm.template import Refused
from bitwright.ir import ops
from bitwright.ir.types import S8, U8
from tests.codegen.cuda.emulated import Batch
from tests.codegen.kernel_batch import Case, body_of
from tests.codegen.test_generic import ALL, FLOATS, Maker, fused_cases, pointwise_cases

RELU = ops.Unary("relu")


def cases() -> list[Case]:
    m = Maker(5)
    pointwise_cases(m)
    fused_cases(m)
    for dtype in ALL:
        m.add(ops.Binary("max"), m.array(3, 8, dtype=dtype), m.array(3, 8, dtype=dtype))
        m.add(ops.Binary("min"), m.array(5, 6, dtype=dtype), m.array(6, dtype=dtype))
    for dtype in FLOATS:
        for fn in ("exp", "tanh", "gelu", "sigmoid", "erf", "log"):
            m.add(ops.Unary(fn), m.array(7, 4, dtype=dtype, special=fn != "gelu"), then=(RELU,))
    scale, zero = np.array(0.05, np.float32), np.array(3, np.int8)
    m.add(ops.Quantize(S8), m.array(4, 300) * 9, scale, zero)
    m.add(ops.Dequantize(), m.array(4, 300, dtype=np.int8), scale, zero)
    m.add(ops.Cast(U8), m.array(2, 2, 2))
    target = GPUS["cuda-sm80"]
    return [c for c in m.cases if not isinstance(CudaElementwise().configure(c.body, {}, target), Refused)]


def test_pointwise_kernels_give_the_references_values() -> None:
    taken = cases()
    assert len(taken) > 60
    assert not Batch(CudaElementwise(), taken).run()


def test_elements_move_as_vectors() -> None:
    m = Maker(6)
    m.add(ops.Binary("add"), m.array(16, 1024), m.array(16, 1024))
    batch = Batch(CudaElementwise(), m.cases)
    batch.emit()
    for arch in ("sm_80", "sm_90a"):
        made = compile_cuda(batch.text, arch)
        assert made.resources["k0"].stack_bytes == made.resources["k0"].spill_stores == 0
        code = sass(made.cubin)
        assert "LDG.E.128" in code
        assert "STG.E.128" in code


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (body_of((ops.Softmax(), "x"), inputs={"x": np.zeros((2, 4), np.float32)}), "not only pointwise"),
        (body_of((RELU, "x"), inputs={"x": np.zeros((3, 5), np.float32)}), "15 elements of 4 bytes make no whole"),
        (body_of((RELU, "x"), inputs={"x": np.zeros((0, 4), np.float32)}), "0 elements"),
    ],
)  # fmt: skip
def test_refusals(body: object, why: str) -> None:
    answer = CudaElementwise().configure(body, {}, GPUS["cuda-sm80"])  # type: ignore[arg-type]
    assert isinstance(answer, Refused)
    assert why in answer.reason
