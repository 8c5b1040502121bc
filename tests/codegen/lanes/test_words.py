"""Bytes made while rows lie in lanes: every way to them, on every level, against the reference interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitwright.codegen.tvm.contract import StoreAcc
from bitwright.codegen.tvm.contract_template import epilogue_of
from bitwright.codegen.tvm.lanes.words import words_of
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.target import Isa
from bitwright.ir.types import S32, U8, parse_type
from tests.codegen.lanes.test_template import linear, of_pattern, run, weights

Array = np.ndarray[Any, Any]
LEVELS: tuple[Isa, ...] = ("avx512-vnni", "avx-vnni", "avx2")


def residual(rows: int, outputs: int, inputs: int, encoding: str, skip: str = "u8") -> Graph:
    """A linear layer whose requantized sum meets bytes of another layer before it becomes bytes again."""
    b = Builder("body")
    x = b.input("x", parse_type(f"u8[{rows}, {inputs}]"))
    w = b.input("w", parse_type(f"s8[{outputs}, {inputs}] {encoding}"))
    other = b.input("s", parse_type(f"{skip}[{rows}, {outputs}]"))
    one = [b.input(n, parse_type(f"s32[{outputs}]")) for n in ("m", "e")]
    first = b.emit(ops.Requantize(S32, 0, 1), b.emit(ops.IntLinear(9), x, w), *one)
    both = b.emit(ops.Binary("add"), first, b.emit(ops.Cast(S32), other))
    two = [b.input(n, parse_type("s32[]")) for n in ("m2", "e2")]
    return b.finish([b.emit(ops.Requantize(U8, 7, None), both, *two)])


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize(("rows", "outputs"), [(16, 40), (61, 64), (150, 300)])
def test_shared_by_four_outputs(isa: Isa, rows: int, outputs: int) -> None:
    body = linear(rows, outputs, 96, "nm<1:4, axis=1, shared=4, block=4>")
    assert run(body, of_pattern(outputs, 96, 1, 4, 4, 4, True), isa).tile.shared >= 2


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("outputs", [30, 131])
def test_outputs_of_their_own(isa: Isa, outputs: int) -> None:
    config = run(linear(50, outputs, 128, "unstructured<0 per 0>"), weights(outputs, 128, 0.1, 4, 1, True), isa)
    assert config.tile.shared == 1


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("skip", ["u8", "s8"])
@pytest.mark.parametrize(("rows", "outputs"), [(45, 72), (64, 1036)])
def test_residual_bytes(isa: Isa, skip: str, rows: int, outputs: int) -> None:
    body = residual(rows, outputs, 64, "nm<1:4, axis=1, shared=4, block=4>", skip)
    config = run(body, of_pattern(outputs, 64, 1, 4, 4, 4, True), isa, "wmem2e2")
    assert words_of(epilogue_of(body, config)) == (2,)


def test_several_cuts_of_the_reduction() -> None:
    body = linear(64, 72, 2048, "nm<1:8, axis=1, shared=4, block=4>")
    config = run(body, of_pattern(72, 2048, 1, 8, 4, 4, True), "avx512-vnni")
    assert config.tile.block < 512


def test_operands_that_straddle_words_go_row_by_row() -> None:
    body = residual(45, 70, 128, "unstructured<0 per 0>")
    config = run(body, weights(70, 128, 0.1, 4, 1, True), "avx512-vnni", "wmem2e2")
    assert words_of(epilogue_of(body, config)) is None


def test_only_bytes_become_words() -> None:
    assert words_of(StoreAcc(16, 16, S32)) is None
