"""16-bit sums in AVX2 kernels: exact on inputs made to overflow them, as long as the weights allow and no longer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright import certificates
from bitwright.codegen.instructions.x86 import VPMADDUBSW_256
from bitwright.codegen.tvm.contract import ContractSpec, Conv, Knobs, Matrix, StoreAcc, emit, knobs, pack, unpack
from bitwright.codegen.tvm.contract.choose import contraction_plan, terms_between_spills, unsafe_sums
from bitwright.codegen.tvm.contract.narrow import safe_steps, spill_of
from bitwright.codegen.tvm.contract.packing import in_steps
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.errors import InvalidInput
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.types import NM, TensorType, parse_type
from tests.codegen import test_contract as plain

Array = np.ndarray[Any, Any]
PAIRS = Knobs("avx2", 2, 4, safe_pairs=True)


def extremes(spec: ContractSpec, weight: Array, rng: np.random.Generator) -> Array:
    """Activations, a row for each end of an output's sums, all of them largest, and random ones for the rest."""
    x = rng.integers(0, 256, spec.input_elements).astype(np.uint8)
    if not isinstance(spec.geometry, Matrix):
        return np.where(rng.random(x.size) < 0.8, np.uint8(255), x)
    rows = x.reshape(spec.geometry.rows, -1)
    for i in range(len(rows) - 1):
        end = weight[i // 2 % len(weight)] > 0 if i % 2 else weight[i // 2 % len(weight)] < 0
        rows[i] = 255 * end
    rows[-1] = 255
    return x


def check(spec: ContractSpec, weight: Array, folder: Path, shown: Any) -> Knobs:
    """Compile with 16-bit sums, run, compare; the knobs for a closer look."""
    rng = np.random.default_rng(spec.depth)
    chosen = knobs(spec, "avx2", weight, narrow=True)
    init = rng.integers(-(2**20), 2**20, spec.cols).astype(np.int32)
    arrays = pack(spec, chosen, weight, init=init if spec.init else None)
    np.testing.assert_array_equal(unpack(spec, chosen, arrays[: 2 if spec.pattern else 1])[0], weight)
    x = extremes(spec, weight, rng)
    func = emit(spec, chosen, StoreAcc(spec.rows, spec.cols, spec.acc_dtype), "kernel")
    folder = folder / f"{len(list(folder.iterdir()))}"  # a library is loaded once per path
    folder.mkdir()
    got = plain.execute(func, "avx2", folder, spec, [x, *arrays])
    np.testing.assert_array_equal(got, plain.reference(spec, x, weight, init if spec.init else None), err_msg=shown)
    return chosen


def codes(hi: int, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Mostly the two extremes: then sums are as long as they get."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-hi, hi, hi, 0], shape)
    return np.where(rng.random(shape) < 0.7, signs, rng.integers(-hi, hi + 1, shape)).astype(np.int8)


@pytest.mark.parametrize("hi", [1, 3, 7, 15, 21, 31, 63, 64])
@pytest.mark.parametrize("sizes", [(9, 37, 203), (1, 70, 260), (5, 8, 64)], ids=str)
def test_dense(hi: int, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    spec = ContractSpec("u8s8", Matrix(*sizes), init=hi == 7)
    chosen = check(spec, codes(hi, spec.weight_shape), tmp_path, (hi, sizes))
    assert chosen.safe_pairs
    most = 128 // hi // 2  # steps in which a lane has nothing but the largest weight
    assert chosen.spill >= spill_of(contraction_plan(spec, chosen), most)
    assert bool(chosen.spill) == (hi < 63)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (2, 8), (3, 8), (4, 16), (2, 6)], ids=str)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("hi", [2, 7, 20])
def test_patterns(pattern: tuple[int, int], rows: int, hi: int, tmp_path: Path) -> None:
    spec = ContractSpec("u8s8", Matrix(rows, 21, 230), NM(*pattern, axis=1))
    weight = plain.sparsify(spec, codes(hi, spec.weight_shape), np.random.default_rng(3)).astype(np.int8)
    chosen = check(spec, weight, tmp_path, (pattern, rows))
    plan = contraction_plan(spec, chosen)
    assert bool(chosen.spill) == (safe_steps(spec, plan, weight, 99) >= max(2, len(plan.block.steps)))
    assert chosen.spill or hi == 20 or len(plan.block.steps) > 4


@pytest.mark.parametrize("name", ["3x3", "1x1", "asymmetric, dilated", "grouped", "no padding, cropped"])
def test_convolutions(name: str, tmp_path: Path) -> None:
    spec = ContractSpec("u8s8", plain.CONVOLUTIONS[name], init=True, pad_value=255)
    chosen = check(spec, codes(7, spec.weight_shape), tmp_path, name)
    assert chosen.spill or spec.depth < 12 or contraction_plan(spec, chosen).steps < 2


def test_sums_at_the_very_edge(tmp_path: Path) -> None:
    """128 in one lane is 32640 with inputs of 255; 129 would be 32895."""
    spec = ContractSpec("u8s8", Matrix(4, 8, 64))
    weight = np.zeros((8, 64), np.int8)
    weight[0, 0::4] = 8  # the even lane of every step: 16 times 8
    weight[1, 1::4] = -8
    plan = contraction_plan(spec, PAIRS)
    assert safe_steps(spec, plan, weight, 64) == 16
    assert check(spec, weight, tmp_path, "edge").spill == 16
    for row, change in ((0, 9), (1, -9)):
        more = weight.copy()
        more[row, 20 + row] = change
        assert safe_steps(spec, plan, more, 64) == 15
        assert check(spec, more, tmp_path, "beyond").spill == 8, "dealt evenly"
        with pytest.raises(InvalidInput, match="16-bit sums of 16 steps can overflow"):
            pack(spec, replace(PAIRS, spill=16), more)
        overflowing = emit(spec, replace(PAIRS, spill=16), StoreAcc(4, 8, spec.acc_dtype), "kernel")
        x = np.tile(255 * (more[row] * change > 0), 4).astype(np.uint8)
        streams = pack(spec, PAIRS, more)
        (tmp_path / f"wrong{row}").mkdir()
        wrong = plain.execute(overflowing, "avx2", tmp_path / f"wrong{row}", spec, [x, *streams])
        assert not np.array_equal(wrong, plain.reference(spec, x, more, None)), "one more is one too many"


def test_the_proof_is_exact() -> None:
    """The longest window by brute force, in the lanes in which the instruction adds."""
    rng = np.random.default_rng(0)
    for trial in range(40):
        pattern = NM(2, 4, axis=1) if trial % 2 else None
        spec = ContractSpec("u8s8", Matrix(2, 3, int(rng.integers(1, 90))), pattern)
        weight = plain.sparsify(spec, codes(int(rng.integers(1, 40)), spec.weight_shape, trial), rng).astype(np.int8)
        plan = contraction_plan(spec, PAIRS)
        lanes = in_steps(spec, plan, weight).reshape(-1, plan.steps, 2, 2).astype(int)
        safe = 0
        for n in range(1, plan.steps + 1):
            windows = [lanes[:, s : s + n].transpose(0, 2, 1, 3).reshape(-1, 2 * n) for s in range(plan.steps - n + 1)]
            ends = [(255 * np.maximum(sign * v, 0)).sum(1).max() for v in windows for sign in (1, -1)]
            if max(ends[::2]) > 32767 or max(ends[1::2]) > 32768:
                break
            safe = n
        assert safe_steps(spec, plan, weight, spec.depth) == safe


@pytest.mark.parametrize("pattern", [None, NM(2, 4, axis=1), NM(1, 4, axis=1)], ids=str)
def test_weights_that_saturate_the_instruction_never_reach_it(pattern: NM | None, tmp_path: Path) -> None:
    """Pairs of 255 x 127: the plain instruction gives 32767 for 64770, as other engines' AVX2 kernels do."""
    once = VPMADDUBSW_256.meaning(np.full(32, 255, np.uint8), np.full(32, 127, np.int8))
    assert set(once.tolist()) == {32767}
    spec = ContractSpec("u8s8", Matrix(6, 20, 64), pattern)
    weight = plain.sparsify(spec, np.full(spec.weight_shape, 127, np.int8), np.random.default_rng(0)).astype(np.int8)
    chosen = check(spec, weight, tmp_path, "saturating")
    assert (chosen.safe_pairs, chosen.spill) == (False, 0)
    with pytest.raises(InvalidInput, match="saturate"):
        pack(spec, PAIRS, weight)
    assert "only 0 are safe" in unsafe_sums(spec, replace(PAIRS, spill=2), weight)


def test_sums_that_do_not_pay_or_have_no_kernel() -> None:
    spec = ContractSpec("u8s8", Matrix(4, 8, 64))
    plan = contraction_plan(spec, PAIRS)
    assert [spill_of(plan, n) for n in (0, 1, 2, 3, 5, 16, 99)] == [0, 0, 2, 3, 4, 16, 16]
    weight = codes(3, spec.weight_shape)
    for isa in ("avx512-vnni", "avx-vnni", "portable"):
        chosen = knobs(spec, isa, weight, narrow=True)
        assert chosen.spill == terms_between_spills(spec, chosen) == 0
        with pytest.raises(InvalidInput, match="AVX2"):
            pack(spec, replace(chosen, spill=2), weight)
    deep = ContractSpec("u8s8", Conv(1, 8, 8, 16, 16, (3, 3), groups=16))
    assert knobs(deep, "avx2", codes(1, deep.weight_shape), narrow=True).spill == 0


@pytest.mark.parametrize("target", ["x86-avx2", "x86-avx512-vnni", "x86-portable"])
def test_whole_programs_agree_and_say_what_they_do(target: str) -> None:
    rng = np.random.default_rng(1)
    b = Builder(level="integer")
    x = b.input("x", parse_type("u8[7, 8, 6, 6]"))
    acc = b.emit(ops.IntConv((1, 1), (1, 1, 1, 1), x_zero=255), x, b.weight("c.weight", codes(7, (12, 8, 3, 3))))
    m, e = (b.weight(n, np.full(12, v, np.int32)) for n, v in (("m", 1 << 30), ("e", 41)))
    flat = b.emit(ops.Reshape((7, 432)), b.emit(ops.Requantize(parse_type("u8[1]").dtype, 9, 1), acc, m, e))
    wide = b.emit(ops.IntLinear(x_zero=9), flat, b.weight("wide.weight", codes(127, (20, 432))))
    graph = b.finish([wide, b.emit(ops.IntLinear(x_zero=9), flat, b.weight("fc.weight", codes(7, (20, 432))))])
    inputs = [np.where(rng.random((7, 8, 6, 6)) < 0.5, 255, 0).astype(np.uint8)]
    program = bw.compile(graph, target=target)
    for got, want in zip(program(*inputs), evaluate(graph, inputs), strict=True):
        np.testing.assert_array_equal(got, to_numpy(want))
    layers = {x.weight: x for x in program.report.layers if x.weight}
    for name, narrow in (("c", True), ("fc", True), ("wide", False)):
        assert ("s16 sums, spilled every" in layers[name].reason) == (narrow and target == "x86-avx2")
    told = " ".join(layers["wide"].notes)
    assert ("a pair of products reaches 64770" in told) == (target == "x86-avx2")


def test_a_recipe_may_decide_instead() -> None:
    b = Builder(level="integer")
    acc = b.emit(ops.IntLinear(), b.input("x", parse_type("u8[4, 64]")), b.weight("fc.weight", codes(7, (8, 64))))
    graph = b.finish([acc])
    for width, narrow in (("auto", True), ("16", True), ("32", False)):
        program = bw.compile(graph, target="x86-avx2", recipe=f"lower-accumulators{{width={width}}}")
        assert program.report.pipeline.count("lower-accumulators") == 1
        assert ("s16 sums" in program.report.layers[0].reason) == narrow
    assert "lower-accumulators, fuse" in bw.compile(graph, target="x86-avx2").report.pipeline


@pytest.mark.parametrize("target", ["x86-avx2", "x86-avx512-vnni", "x86-portable"])
@pytest.mark.parametrize(
    ("x_type", "w_type", "terms"), [("u4", "s4", 272), ("u4", "ternary", 600), ("u2", "s8", 84), ("u8", "s4", 16)]
)
def test_formats_below_8_bits_run_in_bytes(x_type: str, w_type: str, terms: int, target: str) -> None:
    """The largest activation counts: 16-bit sums take 17 times as many products of u4 x s4 as of u8 x s4."""
    x_dtype, w_dtype = parse_type(f"{x_type}[1]").dtype, parse_type(f"{w_type}[1]").dtype
    rng = np.random.default_rng(5)
    b = Builder(level="integer")
    x, i = b.input("x", parse_type(f"{x_type}[6, 1200]")), b.input("i", parse_type(f"{x_type}[2, 8, 9, 9]"))
    w, k = (rng.choice([w_dtype.lo, w_dtype.hi], s).astype(np.int8) for s in ((16, 1200), (16, 8, 3, 3)))
    weight, kernel = (b.weight(n, v, TensorType(w_dtype, v.shape)) for n, v in (("fc.weight", w), ("c.weight", k)))
    conv = ops.IntConv((1, 1), (1, 1, 1, 1), x_zero=x_dtype.hi)
    graph = b.finish([b.emit(ops.IntLinear(x_zero=1), x, weight), b.emit(conv, i, kernel)])
    program = bw.compile(graph, target=target)
    data = [rng.choice([0, x_dtype.hi], shape).astype(np.uint8) for shape in ((6, 1200), (2, 8, 9, 9))]
    data[0][:3], data[1][0] = np.where(w[:3] < 0, x_dtype.hi, 0), x_dtype.hi
    for got, want in zip(program(*data), evaluate(graph, data), strict=True):
        np.testing.assert_array_equal(got, to_numpy(want))
    layers = {x.weight: x for x in program.report.layers if x.weight}
    assert {x.kernel for x in layers.values()} == {"contract"}
    assert all(("s16 sums" in x.reason) == (target == "x86-avx2") for x in layers.values())
    if target == "x86-avx2":
        assert terms // 2 < int(layers["fc"].reason.split("every ")[1].split()[0]), "dealt evenly"


def test_verify_proves_the_sums_from_the_packed_weights() -> None:
    """One more product in the program's weights than its 16-bit sums hold is found."""
    weight = np.zeros((8, 64), np.int8)
    weight[0, 0::4] = 8
    b = Builder(level="integer")
    graph = b.finish([b.emit(ops.IntLinear(), b.input("x", parse_type("u8[4, 64]")), b.weight("fc.weight", weight))])
    contents = bw.compile(graph, target="x86-avx2").contents
    assert [c.fault for c in certificates.check(contents)] == [""]
    damaged = contents.weights.copy()
    at = np.flatnonzero(damaged == 8)
    assert at.size == 16
    damaged[at[3]] = 9
    (found,) = certificates.check(replace(contents, weights=damaged))
    assert "16-bit sums of 16 steps can overflow with these weights: only 15 are safe" in found.fault
