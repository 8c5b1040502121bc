"""Weights of 2 to 4 bits, packed and unpacked in the kernel: exact on every level, packed and back, half the bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright import certificates
from bitwright.codegen.cost import cost_of, stored_bits, unpacking, weight_bytes
from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.tvm import contract
from bitwright.codegen.tvm.contract import ContractSpec, Conv, Knobs, Matrix, StoreAcc
from bitwright.codegen.tvm.contract.spec import ISAS, Isa
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.text import parse
from bitwright.ir.types import NM, TensorType, parse_dtype, parse_type
from bitwright.prices import Prices
from tests.codegen.harness import runnable
from tests.codegen.test_contract import execute, reference, sparsify

Array = np.ndarray[Any, Any]
SPECS = {
    "row": ContractSpec("u8s8", Matrix(1, 70, 259), init=True),
    "short": ContractSpec("u8s8", Matrix(3, 64, 3)),
    "rows": ContractSpec("u8s8", Matrix(9, 130, 515), init=True),
    "conv": ContractSpec("u8s8", Conv(2, 9, 8, 12, 20, (3, 3), padding=(1, 1, 1, 1)), init=True, pad_value=7),
    "grouped": ContractSpec("u8s8", Conv(1, 7, 7, 24, 16, (1, 3), groups=2), init=True),
    "2:4": ContractSpec("u8s8", Matrix(6, 70, 100), NM(2, 4, 1), init=True),
    "2:8": ContractSpec("u8s8", Matrix(1, 33, 104), NM(2, 8, 1)),
    "5:9": ContractSpec("u8s8", Matrix(5, 40, 63), NM(5, 9, 1)),
}
"""Nothing here is a multiple of a vector, a step or a byte of fields; ``init`` is any number, not a zero point's."""


def codes(spec: ContractSpec, bits: int, extreme: bool) -> Array:
    """Random codes of all values, or the smallest one alone: the sums and their multiples are then the largest."""
    rng = np.random.default_rng(spec.cols)
    low = -(1 << (bits - 1))
    made = rng.integers(low, -low, spec.weight_shape).astype(np.int8)
    return sparsify(spec, np.full_like(made, low) if extreme else made, rng)


def computed(spec: ContractSpec, knobs: Knobs, weight: Array, extreme: bool, folder: Path) -> None:
    """Pack, unpack, run, compare."""
    rng = np.random.default_rng(1)
    x = rng.integers(255 if extreme else 0, 256, spec.input_elements).astype(np.uint8)
    ends = np.iinfo(np.int32)
    init = rng.integers(ends.min, ends.max, spec.cols).astype(np.int32) if spec.init else None
    packed = contract.pack(spec, knobs, weight, init=init)
    again, _ = contract.unpack(spec, knobs, packed[:-1] if spec.init else packed)
    np.testing.assert_array_equal(again, weight)
    made = contract.emit(spec, knobs, StoreAcc(spec.rows, spec.cols, spec.acc_dtype), "kernel")
    got = execute(made, knobs.isa, folder, spec, [x, *packed])
    np.testing.assert_array_equal(got, reference(spec, x, weight, init).astype(np.int64).astype(np.int32))


@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("isa", ISAS)
def test_exact(isa: Isa, name: str, bits: int, extreme: bool, tmp_path: Path) -> None:
    if not runnable(isa):
        pytest.skip(f"this machine has no {isa}")
    spec = SPECS[name]
    weight = codes(spec, bits, extreme)
    for panel in (False, True):
        knobs = contract.knobs(spec, isa, weight, narrow=isa == "avx2", bits=bits, panel=panel)
        assert (knobs.bits, knobs.panel) == (bits, panel)
        (folder := tmp_path / str(panel)).mkdir()
        computed(spec, knobs, weight, extreme, folder)


@pytest.mark.parametrize("bits", [4, 2])
def test_the_scaled_sum_reaches_the_end_of_its_register(bits: int, tmp_path: Path) -> None:
    """The longest reduction that is not refused, largest activations, smallest weights: -2^31 + 2^15 or so."""
    spec = ContractSpec("u8s8", Matrix(1, 16, (1 << 24) // 255))
    weight = codes(spec, bits, True)
    scaled = 255 * -128 * spec.depth
    assert -(1 << 31) <= scaled < -(1 << 31) + 255 * 128
    if runnable("avx512-vnni"):
        computed(spec, contract.knobs(spec, "avx512-vnni", weight, bits=bits), weight, True, tmp_path)
    longer = ContractSpec("u8s8", Matrix(1, 16, spec.depth + 1))
    assert contract.knobs(longer, "avx512-vnni", bits=bits).bits == 8
    with pytest.raises(InvalidInput, match=f"times {256 >> bits} can leave 32 bits"):
        contract.unpack(longer, Knobs("avx512-vnni", 1, 1, bits=bits), [])


def test_what_is_not_packed() -> None:
    spec = SPECS["rows"]
    for other, knobs, why in (
        (spec, Knobs("avx512-vnni", 1, 1, bits=3), "2, 4 or 8 bits, not 3"),
        (spec, Knobs("avx2", 1, 1, bits=4), "proven to fit 16 bits"),
        (ContractSpec("f32", Matrix(1, 2, 3)), Knobs("avx2", 1, 1, bits=4), "only constant 8-bit weights"),
        (ContractSpec("u8s8", Conv(1, 9, 9, 8, 8, (3, 3), groups=8)), Knobs("avx-vnni", 1, 1, bits=4), "depthwise"),
    ):
        with pytest.raises(InvalidInput, match=why):
            contract.emit(other, knobs, StoreAcc(other.rows, other.cols, other.acc_dtype), "kernel")
    knobs = contract.knobs(spec, "avx512-vnni", bits=4)
    with pytest.raises(InvalidInput, match="weights of -8 to 8 do not fit 4 bits"):
        contract.pack(spec, knobs, np.resize(np.array([-8, 8], np.int8), spec.weight_shape), init=np.zeros(130))


@pytest.mark.parametrize("isa", ISAS)
def test_one_damaged_byte_changes_the_weights_it_holds_only(isa: Isa) -> None:
    spec = replace(SPECS["rows"], init=False)
    weight = codes(spec, 4, False)
    knobs = contract.knobs(spec, isa, weight, bits=4)
    (packed,) = contract.pack(spec, knobs, weight)
    packed[100] ^= 0x11
    assert np.count_nonzero(contract.unpack(spec, knobs, [packed])[0] != weight) == 2


# --- whole programs ----------------------------------------------------------------------------------------------


def layer(dtype: str, rows: int, shape: tuple[int, int] = (1024, 512)) -> tuple[Graph, Array]:
    rng, d = np.random.default_rng(0), parse_dtype(dtype)
    b = Builder(level="integer")
    w = rng.choice([d.lo, d.hi] if dtype == "bipolar" else np.arange(max(d.lo, -127), d.hi + 1), shape).astype(np.int8)
    x = b.input("x", parse_type(f"u8[{rows}, {shape[1]}]"))
    out = b.emit(ops.IntLinear(x_zero=7), x, b.weight("fc.weight", w, TensorType(d, shape)))
    return b.finish([out]), rng.integers(0, 256, (rows, shape[1])).astype(np.uint8)


@pytest.mark.parametrize("target", ["x86-avx512-vnni", "x86-avx2", "x86-portable"])
@pytest.mark.parametrize(("dtype", "bits"), [("s4", 4), ("s3", 4), ("ternary", 2), ("bipolar", 2), ("s5", 8)])
def test_program_takes_the_bytes_it_should(dtype: str, bits: int, target: str) -> None:
    graph, x = layer(dtype, 1, (96, 512))
    program = bw.compile(graph, target=target)
    (row,) = program.report.layers
    np.testing.assert_array_equal(program(x), to_numpy(evaluate(graph, [x])[0]))
    assert [c.fault for c in certificates.check(program.contents)] == [""]
    assert (f"{bits}-bit weights unpacked in the kernel" in row.reason) == (bits < 8)
    spare = program.manifest.weights_bytes - 96 * 512 * bits // 8
    assert 0 <= spare <= 96 * 4 + 2 * 64  # start values of the sums, and room behind the last array


def test_many_rows_share_a_panel_that_is_unpacked_once() -> None:
    graph, x = layer("s4", 96, (256, 512))
    program = bw.compile(graph, target="x86-avx2")
    (row,) = program.report.layers
    np.testing.assert_array_equal(program(x), to_numpy(evaluate(graph, [x])[0]))
    assert [c.fault for c in certificates.check(program.contents)] == [""]
    assert "4-bit weights unpacked in the kernel, once for all rows of a task; s16 sums" in row.reason
    assert program.manifest.weights_bytes < 256 * 512 // 2 + 256 * 4 + 2 * 64


def test_a_tampered_weight_breaks_its_certificate() -> None:
    graph, _ = layer("s4", 1)
    contents = bw.compile(graph, target="x86-avx512-vnni").contents
    damaged = contents.weights.copy()
    damaged[4096] ^= 0x80
    (found,) = certificates.check(replace(contents, weights=damaged))
    assert found.fault


BODY = """
graph @body (%x: u8[{rows}, 4096], %w: {dtype}[4096, 4096]{pattern}) -> (y = %y) level=integer {{
  %y = int_linear(%x, %w) : s32[{rows}, 4096]
}}
"""


def body(dtype: str, rows: int, pattern: str = "") -> Graph:
    return parse(BODY.format(dtype=dtype, rows=rows, pattern=pattern and f" nm<{pattern}, axis=1>").strip())


def test_prices() -> None:
    target = BUILTIN["x86-avx512-vnni"]
    assert [stored_bits(parse_dtype(t)) for t in ("s1", "s2", "s4", "s5", "u8", "f32")] == [2, 2, 4, 8, 8, 32]
    one = {d: cost_of(body(d, 1), target) for d in ("s8", "s4", "ternary")}
    small = 4096 * 5
    assert [c.bytes - small for c in one.values()] == [1 << 24, 1 << 23, 1 << 22]
    assert one["s8"].seconds > 1.5 * one["s4"].seconds > 1.5 * one["ternary"].seconds
    assert cost_of(body("s4", 1), target, packed="bytes") == one["s8"]
    assert [unpacking(body("s4", rows), target) for rows in (1, 128)] == ["registers", "registers"]
    assert unpacking(body("s8", 1), target) == "bytes"
    assert [unpacking(body("s4", rows, "2:4"), target) for rows in (1, 128)] == ["registers", "bytes"]
    avx2 = [unpacking(body("s4", rows), BUILTIN["x86-avx2"]) for rows in (1, 8, 512)]
    assert avx2 == ["registers", "bytes", "panel"]
    halves = [weight_bytes(body(d, 1, "2:4").inputs[1].type) for d in ("s8", "s4")]
    assert halves == [4096 * 2048 * 10 / 8, 4096 * 2048 * 6 / 8]


def test_low_bit_layers_are_priced_as_they_are_stored() -> None:
    """What the allocation of formats sees: fewer bits take less time where bytes count."""
    graph = parse(
        "graph @g (%x: f32[1, 4096], %w: f32[4096, 4096]) -> (y = %y) level=graph {\n"
        "  %y = linear(%x, %w) : f32[1, 4096]\n"
        "}"
    )
    prices = Prices(BUILTIN["x86-avx512-vnni"])
    eight, four, two = (prices(graph, "y", bits, None, False)[0] for bits in (8, 4, 2))
    assert eight > 1.5 * four > 1.5 * two
