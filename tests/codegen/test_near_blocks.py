"""Kernels whose tasks are panels of a block of rows: exact for any task range, and which layers get them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.codegen.tvm.contract import ContractSpec, Conv, Matrix, emit, knobs
from bitwright.codegen.tvm.contract.epilogue import StoreAcc
from bitwright.codegen.tvm.contract.nest import near_blocks, nest_of
from bitwright.codegen.tvm.contract.spec import Isa
from bitwright.ir.types import NM
from tests.codegen import harness as h
from tests.codegen.test_contract import check

MANY = {
    "1x1": ContractSpec("u8s8", Conv(2, 56, 56, 64, 160, (1, 1)), init=True),
    "padded": ContractSpec(
        "u8s8", Conv(3, 57, 53, 32, 96, (3, 3), padding=(1, 1, 1, 1)), NM(2, 4, 1), init=True, pad_value=9
    ),
    "strided groups": ContractSpec(
        "u8s8", Conv(2, 61, 53, 128, 196, (3, 3), (2, 2), padding=(1, 1, 1, 1), groups=4), init=True, pad_value=3
    ),
    "floats": ContractSpec("f32", Matrix(3001, 100, 64)),
}


@pytest.mark.parametrize("isa", ["avx512-vnni", "avx2", "portable"])
@pytest.mark.parametrize("name", MANY)
def test_exact_in_any_range(name: str, isa: Isa, tmp_path: Path) -> None:
    if not h.runnable(isa):
        pytest.skip(f"this machine has no {isa}")
    assert near_blocks(MANY[name]) > 1
    check(MANY[name], isa, tmp_path)


def test_few_rows_and_large_weights_go_panel_by_panel() -> None:
    assert near_blocks(ContractSpec("u8s8", Matrix(128, 3072, 768))) == 0  # 2.3 MB of weights
    assert near_blocks(ContractSpec("u8s8", Conv(1, 56, 56, 64, 64, (1, 1)))) == 0  # 0.6 MB in all
    assert near_blocks(ContractSpec("f32", Matrix(4096, 64, 64), right="kn")) == 0
    assert near_blocks(ContractSpec("u8s8", Conv(1, 56, 56, 64, 256, (1, 1)))) == 5


def test_a_task_is_a_panel_of_a_block() -> None:
    spec = MANY["1x1"]
    made = knobs(spec, "avx512-vnni")
    nest = nest_of(spec.rows, made, 5)
    kernel = emit(spec, made, StoreAcc(spec.rows, spec.cols, spec.acc_dtype), "k")
    assert kernel.tasks == 5 * nest.blocks
    assert nest.blocks >= near_blocks(spec)
