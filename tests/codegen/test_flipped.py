"""pmaddubsw of magnitudes: exact for all weights and activations, packed weights unpack, what has no sums to begin with
keeps its products of words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitwright.codegen.tvm.contract import ContractSpec, Conv, Matrix, StoreAcc, emit, knobs, pack, unpack
from bitwright.codegen.tvm.contract.choose import contraction_plan
from bitwright.codegen.tvm.contract.engine import WideBytes
from bitwright.codegen.tvm.contract.engines import engine_of
from bitwright.codegen.tvm.contract.flipped import FlippedBytes, lacking, signed_indices
from bitwright.ir.types import NM
from tests.codegen import harness as h
from tests.codegen.test_contract import execute, reference, sparsify

RNG = np.random.default_rng(3)
CASES = {
    "2:4": ContractSpec("u8s8", Matrix(13, 37, 52), NM(2, 4, 1), init=True),
    "4:8": ContractSpec("u8s8", Matrix(9, 64, 60), NM(4, 8, 1), init=True),
    "1:4": ContractSpec("u8s8", Matrix(9, 64, 61), NM(1, 4, 1), init=True),
    "2:16": ContractSpec("u8s8", Matrix(5, 24, 129), NM(2, 16, 1), init=True),
    "3:8": ContractSpec("u8s8", Matrix(5, 24, 72), NM(3, 8, 1), init=True),
    "1 row": ContractSpec("u8s8", Matrix(1, 40, 64), NM(2, 4, 1), init=True),
    "conv": ContractSpec(
        "u8s8", Conv(1, 7, 9, 16, 24, (3, 3), padding=(1, 1, 1, 1)), NM(2, 4, 1), init=True, pad_value=117
    ),
    "1:4 conv": ContractSpec("u8s8", Conv(1, 7, 9, 16, 24, (3, 3), (2, 2)), NM(1, 4, 1), init=True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("values", ["random", "extreme"])
def test_exact(name: str, values: str, tmp_path: Path) -> None:
    if not h.runnable("avx2"):
        pytest.skip("this machine has no AVX2")
    spec = CASES[name]
    made = knobs(spec, "avx2")
    assert isinstance(engine_of(spec, made), FlippedBytes)
    if values == "random":
        x = RNG.integers(0, 256, spec.input_elements).astype(np.uint8)
        weight = RNG.integers(-128, 128, spec.weight_shape).astype(np.int8)
    else:  # where pmaddubsw saturates, and where a negated activation would not fit a byte
        x = RNG.choice(np.array([0, 255], np.uint8), spec.input_elements)
        weight = RNG.choice(np.array([-128, -127, 127], np.int8), spec.weight_shape)
    weight = sparsify(spec, weight, RNG)
    init = RNG.integers(-(1 << 20), 1 << 20, spec.cols).astype(np.int32)
    packed = pack(spec, made, weight, init=init)
    got = execute(emit(spec, made, StoreAcc(spec.rows, spec.cols, spec.acc_dtype), "k"), "avx2", tmp_path, spec,
                  [x, *packed])  # fmt: skip
    np.testing.assert_array_equal(got, reference(spec, x, weight, init))
    again, _ = unpack(spec, made, packed)
    np.testing.assert_array_equal(again, weight)


def test_indices_hold_signs_where_windows_are_short() -> None:
    for name, held in (("2:4", True), ("4:8", True), ("1:4", False), ("2:16", False), ("1 row", False)):
        spec = CASES[name]
        assert signed_indices(contraction_plan(spec, knobs(spec, "avx2"))) == held, name


def test_what_products_lack() -> None:
    x = RNG.integers(0, 256, (20, 33))
    weight = RNG.integers(-128, 128, (6, 33))
    moved = np.where(weight[:, None] < 0, 127 - x, x - 128)
    sums = (np.abs(weight)[:, None] * moved).sum(-1)
    np.testing.assert_array_equal(sums + lacking(weight)[:, None], weight @ x.T)


def test_without_sums_to_begin_with_products_are_of_words() -> None:
    spec = replace(CASES["2:4"], init=False)
    assert isinstance(engine_of(spec, knobs(spec, "avx2")), WideBytes)
    assert isinstance(engine_of(replace(CASES["2:4"], pattern=None), knobs(CASES["2:4"], "avx2")), WideBytes)
