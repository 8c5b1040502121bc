"""N:M patterns that blocks of outputs share: exact on every level, packed and back, refused where blocks do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright import certificates
from bitwright.codegen.cost import cost_of
from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.tvm import contract
from bitwright.codegen.tvm.contract import ContractSpec, Conv, Knobs, Matrix, StoreAcc
from bitwright.codegen.tvm.contract.compact import compaction_of
from bitwright.codegen.tvm.contract.shared import shared_of
from bitwright.codegen.tvm.contract.spec import ISAS, Element, Isa
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.target import Target
from bitwright.ir.types import NM, S8, U8, TensorType, parse_type
from tests.codegen.harness import runnable
from tests.codegen.test_contract import execute, reference

Array = np.ndarray[Any, Any]


def nm(keep: int, group: int, shared: int = 64, block: int = 1) -> NM:
    return NM(keep, group, 1, shared, block)


GEOMETRIES: dict[str, tuple[Matrix | Conv, NM]] = {
    "2:4, ragged": (Matrix(13, 200, 150), nm(2, 4)),
    "one row": (Matrix(1, 70, 259), nm(1, 4)),
    "1:8 by 32": (Matrix(9, 100, 133), nm(1, 8, 32)),
    "2:16 by 16": (Matrix(6, 40, 75), nm(2, 16, 16)),
    "3:8": (Matrix(5, 64, 96), nm(3, 8)),
    "5:9, fewer outputs than a block": (Matrix(7, 33, 63), nm(5, 9)),
    "by 128": (Matrix(21, 300, 64), nm(2, 4, 128)),
    "blocks of 4": (Matrix(5, 70, 70), nm(1, 4, 64, 4)),
    "8:64": (Matrix(5, 70, 200), nm(8, 64)),
    "4:4": (Matrix(4, 64, 10), nm(4, 4)),
    "3x3": (Conv(2, 6, 7, 24, 70, (3, 3), padding=(1, 1, 1, 1)), nm(2, 4)),
    "merged taps": (Conv(1, 7, 7, 8, 64, (3, 3), (2, 2), padding=(1, 1, 1, 1)), nm(1, 4)),
    "1x1": (Conv(2, 5, 4, 40, 130, (1, 1)), nm(1, 8)),
    "dilated, groups cut by taps": (Conv(1, 9, 10, 6, 33, (3, 2), (2, 1), (1, 2), (1, 0, 2, 3)), nm(2, 4)),
    "convolution groups of two blocks": (Conv(1, 5, 5, 16, 256, (3, 3), padding=(1, 1, 1, 1), groups=2), nm(1, 4)),
    "convolution groups within a block": (Conv(1, 5, 5, 16, 64, (3, 3), groups=2), nm(2, 4)),
}


def shared_weights(spec: ContractSpec, weight: Array, rng: np.random.Generator) -> Array:
    """Obeys the spec's shared pattern; one group of the first block is empty, others have fewer than ``keep``."""
    pattern, sparsity = spec.pattern, spec.sparsity
    assert pattern is not None
    assert sparsity is not None
    keep, group = sparsity
    last = weight if weight.ndim == 2 else weight.transpose(0, 2, 3, 1)
    blocks, groups = -(-len(last) // pattern.shared), -(-last.shape[-1] // group)
    order = rng.random((blocks, *last.shape[1:-1], groups, group)).argsort(-1)
    kept = (order < keep).reshape(blocks, *last.shape[1:-1], groups * group)
    kept[0, ..., :group] = False
    kept = np.repeat(kept, pattern.shared, 0)[: len(last), ..., : last.shape[-1]]
    out = last * kept * (rng.random(last.shape) < 0.9)
    return np.ascontiguousarray(out if weight.ndim == 2 else out.transpose(0, 3, 1, 2)).astype(weight.dtype)


def check(spec: ContractSpec, isa: Isa, folder: Path, extreme: bool = False, **options: Any) -> Knobs:
    """Pack, unpack, run in two ranges of tasks, compare."""
    if not runnable(isa):
        pytest.skip(f"this machine has no {isa}")
    rng = np.random.default_rng(spec.rows * 1000 + spec.cols)
    init: Array
    if spec.element == "u8s8":
        low = -(1 << (options.get("bits", 8) - 1))
        x = rng.integers(255 if extreme else 0, 256, spec.input_elements).astype(np.uint8)
        weight = rng.integers(low, low + 1 if extreme else -low, spec.weight_shape).astype(np.int8)
        init = rng.integers(-(2**20), 2**20, spec.cols).astype(np.int32)
    else:
        x = rng.standard_normal(spec.input_elements).astype(np.float32)
        weight = rng.standard_normal(spec.weight_shape).astype(np.float32)
        init = rng.standard_normal(spec.cols).astype(np.float32)
    weight = shared_weights(spec, weight, rng)
    assert contract.supports(spec, isa) is None
    knobs = contract.knobs(spec, isa, weight, **options)
    packed = contract.pack(spec, knobs, weight, init=init if spec.init else None)
    back, stored = contract.unpack(spec, knobs, packed[:2])
    np.testing.assert_array_equal(back, weight)
    np.testing.assert_array_equal(stored, weight != 0)
    func = contract.emit(spec, knobs, StoreAcc(spec.rows, spec.cols, spec.acc_dtype), "kernel")
    got = execute(func, isa, folder, spec, [x, *packed])
    want = reference(spec, x, weight, init if spec.init else None)
    if spec.element == "u8s8":
        np.testing.assert_array_equal(got, want)
    else:
        assert np.abs(got - want).max() <= 1e-5 * max(1.0, np.abs(want).max())
    return knobs


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("element", ["u8s8", "f32"])
@pytest.mark.parametrize("isa", ISAS)
def test_against_the_reference(isa: Isa, element: Element, name: str, tmp_path: Path) -> None:
    geometry, pattern = GEOMETRIES[name]
    spec = ContractSpec(element, geometry, pattern, init="by" in name, pad_value=9 if element == "u8s8" else 0)
    check(spec, isa, tmp_path)


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_values_never_saturate(isa: Isa, tmp_path: Path) -> None:
    check(ContractSpec("u8s8", Matrix(6, 70, 64), nm(2, 4)), isa, tmp_path, extreme=True)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_low_bit_weights_are_unpacked_behind_the_compaction(isa: Isa, bits: int, tmp_path: Path) -> None:
    spec = ContractSpec("u8s8", Matrix(6, 70, 100), nm(2, 4), init=True)
    assert check(spec, isa, tmp_path, bits=bits).bits == bits


def test_sums_of_16_bits_are_proved_in_compacted_order(tmp_path: Path) -> None:
    spec = ContractSpec("u8s8", Matrix(6, 70, 400), nm(2, 4), x_hi=255)
    knobs = check(spec, "avx2", tmp_path, bits=4, narrow=True)
    assert knobs.spill
    assert contract.terms_between_spills(spec, knobs) >= 16
    weight = shared_weights(spec, np.full(spec.weight_shape, 127, np.int8), np.random.default_rng(0))
    assert not contract.pairs_are_safe(spec, weight)
    assert "can overflow" in contract.unsafe_sums(spec, replace(knobs, bits=8), weight)


def test_values_that_no_weight_reads_do_not_leak(tmp_path: Path) -> None:
    """Selections reach beyond a row, and slots too many read an activation of their own group: never another row's."""
    spec = ContractSpec("f32", Matrix(4, 64, 19), nm(2, 4))
    x = np.ones((4, 19), np.float32)
    x[1:, 0] = np.inf
    weight = shared_weights(spec, np.ones(spec.weight_shape, np.float32), np.random.default_rng(0))
    weight[:, 16:] = 0
    weight[:, 18] = 1
    knobs = contract.knobs(spec, "avx512-vnni")
    func = contract.emit(spec, knobs, StoreAcc(4, 64, spec.acc_dtype), "kernel")
    got = execute(func, "avx512-vnni", tmp_path, spec, [x, *contract.pack(spec, knobs, weight)])
    np.testing.assert_array_equal(got[0], weight.sum(1))


def test_several_panels_of_a_block_share_one_compaction() -> None:
    spec = ContractSpec("u8s8", Matrix(128, 256, 768), nm(2, 4))
    wide, narrow = (shared_of(spec, contract.knobs(spec, isa)) for isa in ("avx512-vnni", "avx2"))
    assert wide.panels_per_unit == wide.chunk(4) == 1
    assert narrow.panels_per_unit == 4
    assert narrow.chunk(4) > 1
    with pytest.raises(InvalidInput, match="panels of 48"):
        contract.emit(spec, Knobs("avx512-vnni", 4, 3), StoreAcc(128, 256, spec.acc_dtype), "kernel")


def test_the_index_stream_is_a_byte_per_kept_activation_of_a_block() -> None:
    spec = ContractSpec("u8s8", Matrix(8, 128, 512), nm(1, 8))
    knobs = contract.knobs(spec, "avx512-vnni")
    weight = shared_weights(spec, np.ones(spec.weight_shape, np.int8), np.random.default_rng(0))
    values, index = contract.pack(spec, knobs, weight)
    assert (values.nbytes, index.nbytes) == (128 * 512 // 8, 2 * 512 // 8)


def test_refusals_say_why() -> None:
    spec = ContractSpec("u8s8", Matrix(4, 64, 64), nm(2, 4, 24))
    assert "no whole vectors of 16" in str(contract.supports(spec, "avx512-vnni"))
    assert contract.supports(spec, "avx2") is None
    grouped = ContractSpec("u8s8", Conv(1, 4, 4, 16, 192, (1, 1), groups=2), nm(2, 4))
    assert "across convolution groups of 96" in str(contract.supports(grouped, "avx2"))
    long = ContractSpec("u8s8", Matrix(4, 64, 512), nm(1, 64, block=8))
    assert "more than a byte" in str(contract.supports(long, "avx2"))
    depthwise = ContractSpec("u8s8", Conv(1, 4, 4, 64, 64, (3, 3), groups=64), nm(1, 2))
    assert "depthwise" in str(contract.supports(depthwise, "avx512-vnni"))
    found = compaction_of(ContractSpec("f32", Matrix(4, 64, 64), nm(2, 16)), "avx2")
    assert not isinstance(found, str)
    assert found.gathered


def test_weights_must_obey_the_shared_pattern() -> None:
    spec = ContractSpec("u8s8", Matrix(2, 64, 8), nm(2, 4))
    knobs = contract.knobs(spec, "avx512-vnni")
    weight = np.zeros(spec.weight_shape, np.int8)
    weight[0, :2] = weight[1, 2:4] = 1  # each row obeys 2:4, together they do not
    with pytest.raises(InvalidInput, match="64 outputs together"):
        contract.pack(spec, knobs, weight)
    mask = np.zeros(spec.weight_shape, bool)
    with pytest.raises(InvalidInput, match="outside the mask"):
        contract.pack(spec, knobs, weight, mask)
    weight[1] = 0
    mask[:, [0, 1, 4, 6]] = True
    back, _ = contract.unpack(spec, knobs, contract.pack(spec, knobs, weight, mask))
    np.testing.assert_array_equal(back, weight)


def test_corrupt_packed_weights_are_found() -> None:
    spec = ContractSpec("u8s8", Matrix(2, 64, 10), nm(1, 4))
    knobs = contract.knobs(spec, "avx512-vnni")
    weight = np.zeros(spec.weight_shape, np.int8)
    weight[:, [1, 6, 8]] = 3
    values, index = contract.pack(spec, knobs, weight)
    with pytest.raises(InvalidInput, match="packed indices have"):
        contract.unpack(spec, knobs, [values, index[:-1]])
    with pytest.raises(InvalidInput, match="points outside"):
        contract.unpack(spec, knobs, [values, index | np.uint8(3)])
    assert not np.array_equal(contract.unpack(spec, knobs, [values, index ^ np.uint8(1)])[0], weight)


# --- whole programs ----------------------------------------------------------------------------------------------


def layer(pattern: NM, rows: int = 37, shape: tuple[int, int] = (128, 256)) -> tuple[Graph, Array]:
    rng, b = np.random.default_rng(0), Builder(level="integer")
    spec = ContractSpec("u8s8", Matrix(rows, *shape), pattern)
    w = shared_weights(spec, rng.integers(-127, 128, shape).astype(np.int8), rng)
    x = b.input("x", parse_type(f"u8[{rows}, {shape[1]}]"))
    out = b.emit(ops.IntLinear(x_zero=7), x, b.weight("fc.weight", w, TensorType(S8, shape, pattern)))
    return b.finish([out]), rng.integers(0, 256, (rows, shape[1])).astype(np.uint8)


CHOICES = {
    ("x86-avx512-vnni", 64): "compacted for 64 outputs",
    ("x86-avx512-vnni", 16): "compacting activations is no faster here",
    ("x86-avx512-vnni", 4): "no whole vectors of 16",
    ("x86-avx2", 64): "compacted for 64 outputs",
    ("x86-portable", 32): "compacted for 32 outputs",
}


@pytest.mark.parametrize(("target", "shared"), CHOICES, ids=str)
def test_a_program_takes_the_kernel_that_the_target_says_is_faster(target: str, shared: int) -> None:
    graph, x = layer(nm(1, 4, shared))
    program = bw.compile(graph, target=target)
    (row,) = program.report.layers
    np.testing.assert_array_equal(program(x), to_numpy(evaluate(graph, [x])[0]))
    assert [c.fault for c in certificates.check(program.contents)] == [""]
    assert CHOICES[target, shared] in row.reason


@pytest.mark.parametrize("target", BUILTIN.values(), ids=lambda t: t.name)
def test_the_more_outputs_share_a_pattern_the_more_a_target_promises(target: Target) -> None:
    gains = [target.sparse_gain(U8, nm(1, 4, shared)) for shared in (1, 32, 64, 128)]
    assert gains == sorted(gains)
    assert gains[0] < gains[2] == gains[3] <= 4
    assert target.sparse_gain(U8, nm(1, 4, 48)) in gains[:2] or target.isa != "avx512-vnni"


def test_prices_follow_the_declared_gain() -> None:
    target = BUILTIN["x86-avx512-vnni"]
    one, many = (cost_of(layer(nm(2, 4, n), 128, (768, 768))[0], target).seconds for n in (1, 64))
    gains = [target.sparse_gain(U8, nm(2, 4, n)) for n in (1, 64)]
    assert one / many == pytest.approx(gains[1] / gains[0], rel=0.1)
