"""Low-bit linear layers in the emulator against the interpreter; packing; bytes against the floor; machine code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.cuda.machine_code import sass
from bitwright.codegen.tvm.cuda.lowbit import packing
from bitwright.codegen.tvm.cuda.lowbit.spec import LowbitSpec, place_of
from bitwright.codegen.tvm.cuda.lowbit.template import CudaLowbit, LowbitConfig
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.types import F32, NM, S8, S32, TensorType, parse_dtype
from bitwright.ir.weights import Array
from tests.codegen.cuda.gpu_batch import GpuBatch, refusal
from tests.codegen.kernel_batch import Case

WEIGHTS = ("w", "s", "z")


@dataclass(frozen=True)
class Layer:
    rows: int
    outputs: int
    depth: int
    group: int
    weights: str
    scales: str = "bf16"
    zeros: bool = False
    relu: bool = False
    pattern: tuple[int, int] = ()  # type: ignore[assignment]


LAYERS = (
    Layer(1, 64, 128, 128, "s4"),
    Layer(1, 70, 256, 64, "s4", "f32", relu=True),
    Layer(1, 130, 77, 0, "bipolar", "f32"),
    Layer(1, 64, 1000, 0, "s3", "f32"),
    Layer(2, 40, 96, 32, "s8"),
    Layer(3, 33, 200, 0, "ternary"),
    Layer(4, 100, 96, 96, "ternary", relu=True),
    Layer(5, 40, 100, 32, "u4", zeros=True),
    Layer(9, 65, 130, 48, "s4", "f32", zeros=True),
    Layer(16, 96, 320, 32, "s2"),
    Layer(19, 31, 64, 16, "s2", "f32"),
    Layer(40, 33, 208, 0, "s3", relu=True),
    Layer(70, 72, 192, 64, "s4"),
    Layer(3, 20, 144, 48, "u3", "f32"),
    Layer(2, 20, 2304, 768, "s4"),
    Layer(1, 20, 5000, 1024, "s3"),
    Layer(1, 48, 640, 16, "s3"),
    Layer(1, 48, 256, 128, "s4", pattern=(2, 4)),
    Layer(3, 37, 300, 32, "s4", "f32", relu=True, pattern=(2, 4)),
    Layer(17, 37, 272, 16, "s3", pattern=(1, 4)),
    Layer(2, 20, 130, 0, "s8", pattern=(2, 8)),
    Layer(1, 40, 512, 128, "s4", pattern=(1, 4)),
    Layer(4, 37, 300, 32, "s4", "f32", pattern=(1, 8)),
    Layer(16, 37, 1000, 64, "s4", "f32", relu=True, pattern=(2, 8)),
    Layer(1, 40, 512, 64, "ternary", pattern=(1, 4)),
    Layer(1, 40, 512, 0, "s3", pattern=(1, 16)),
    Layer(1, 40, 700, 16, "s8", pattern=(1, 4)),
    Layer(40, 40, 512, 128, "s4", pattern=(1, 8)),
    Layer(66, 20, 256, 64, "s4", pattern=(2, 4)),
    Layer(1, 48, 256, 64, "ternary", pattern=(2, 4)),
    Layer(1, 48, 256, 64, "s4", pattern=(4, 8)),
)


def body_of(it: Layer) -> Graph:
    b, d = Builder("body", "kernel"), parse_dtype(it.weights)
    count = -(-it.depth // it.group) if it.group else 1
    encoding: Any = {"encoding": NM(*it.pattern, 1)} if it.pattern else {}
    operands = [
        b.input("x", TensorType(S8, (it.rows, it.depth))), b.input("xs", TensorType(F32, (it.rows, 1))),
        b.input("w", TensorType(d, (it.outputs, it.depth), **encoding)),
        b.input("s", TensorType(parse_dtype(it.scales), (it.outputs, count))),
    ]  # fmt: skip
    if it.zeros:
        operands.append(b.input("z", TensorType(d, (it.outputs, count))))
    y = b.emit(ops.GroupLinear(it.group), *operands)
    if it.relu:
        bias = b.input("bias", TensorType(F32, (it.outputs,)))
        y = b.emit(ops.Unary("relu"), b.emit(ops.Binary("add"), y, bias))
    return b.finish([y])


def data_of(it: Layer, body: Graph, seed: int = 0, ones: bool = False) -> dict[str, Array]:
    """Random operands; the first row and the first and last output are at the ends of their formats."""
    rng, d = np.random.default_rng(it.depth + seed), parse_dtype(it.weights)
    w = rng.choice([-1, 1] if it.weights == "bipolar" else np.arange(d.lo, d.hi + 1), (it.outputs, it.depth))
    w[0], w[-1] = d.lo, d.hi
    if it.pattern:
        w = masked(w, *it.pattern, rng)
    x = rng.integers(-128, 128, (it.rows, it.depth))
    x[0], x[-1, ::2] = 127, -128
    shape = body.types["s"].static_shape
    found: dict[str, Array] = {
        "x": x.astype(np.int8), "xs": rng.random((it.rows, 1)).astype(np.float32), "w": w.astype(d.numpy),
        "s": (0.001 + 0.01 * rng.random(shape)).astype(np.float32), "bias": rng.random(it.outputs).astype(np.float32),
        "z": rng.integers(d.lo, d.hi + 1, shape).astype(d.numpy),
    }  # fmt: skip
    if ones:
        found |= {"s": np.ones(shape, np.float32), "xs": np.ones((it.rows, 1), np.float32), "bias": found["bias"] * 0}
    if it.scales == "bf16":
        found["s"] = found["s"].astype(ml_dtypes.bfloat16)
    return {v.name: found[v.name] for v in body.inputs}


def masked(w: Array, keep: int, group: int, rng: np.random.Generator) -> Array:
    """``keep`` of every ``group`` at random; some groups have fewer, some none."""
    depth = w.shape[1]
    score = rng.random((w.shape[0], -(-depth // group), group))
    kept = score.argsort(-1).argsort(-1) < rng.integers(0, keep + 1, score.shape[:2])[..., None]
    kept[: w.shape[0] // 2] = (score.argsort(-1).argsort(-1) < keep)[: w.shape[0] // 2]
    return np.asarray(np.where(kept.reshape(w.shape[0], -1)[:, :depth], w, 0))


def cases(ones: bool = False) -> list[Case]:
    made = []
    for it in LAYERS:
        body = body_of(it)
        data = data_of(it, body, ones=ones)
        largest = float(np.abs(data["x"].astype(np.float64)).sum(1).max() * np.abs(data["w"]).max() * 0.011)
        made.append(Case(str(it), body, data, rtol=0 if ones else 1e-5, atol=0 if ones else 2e-7 * largest))
    return made


@dataclass(frozen=True)
class Exact:
    rows: int
    outputs: int
    depth: int
    weights: str
    x: str = "s8"
    zero: int = 0
    pattern: tuple[int, int] = ()  # type: ignore[assignment]


EXACT = (
    Exact(1, 40, 512, "s4"),
    Exact(3, 37, 77, "s2", "u8", 131),
    Exact(16, 33, 300, "ternary", "u8", 7),
    Exact(2, 40, 256, "s3", "s8", -5),
    Exact(1, 40, 256, "s8", "u8", 128, (2, 4)),
    Exact(5, 40, 300, "s4", "u8", 99, (2, 4)),
    Exact(1, 40, 512, "s8", "u8", 3, (1, 8)),
    Exact(4, 40, 530, "s4", "s8", 0, (1, 16)),
)


def exact_case(it: Exact) -> Case:
    """int_linear, bias, and back to bytes."""
    b, rng, d, kind = (
        Builder("body", "integer"),
        np.random.default_rng(it.depth),
        parse_dtype(it.weights),
        parse_dtype(it.x),
    )
    encoding: Any = {"encoding": NM(*it.pattern, 1)} if it.pattern else {}
    w = rng.integers(d.lo, d.hi + 1, (it.outputs, it.depth))
    w[0], w[-1] = d.lo, d.hi
    w = masked(w, *it.pattern, rng) if it.pattern else w
    data: dict[str, Array] = {"x": rng.integers(kind.lo, kind.hi + 1, (it.rows, it.depth)).astype(kind.numpy)}
    data["x"][0] = kind.hi
    data |= {"w": w.astype(d.numpy), "bias": rng.integers(-999, 999, it.outputs).astype(np.int32)}
    x = b.input("x", TensorType(kind, (it.rows, it.depth)))
    weight = b.input("w", TensorType(d, (it.outputs, it.depth), **encoding))
    bias = b.input("bias", TensorType(S32, (it.outputs,)))
    y = b.emit(ops.Binary("add"), b.emit(ops.IntLinear(x_zero=it.zero), x, weight), bias)
    return Case(str(it), b.finish([y]), data)


def test_exact_sums_of_few_rows() -> None:
    batch = GpuBatch(CudaLowbit(), [exact_case(it) for it in EXACT], WEIGHTS)
    assert batch.run(orders=(1, 2)) == []
    assert all(config_spec(c).warps_k > 1 for c in batch.configs[:1])
    bytes_take = [Exact(1, 40, 512, "s8"), Exact(17, 40, 512, "s4")]
    assert all("kernels of bytes" in refusal(CudaLowbit(), exact_case(it), WEIGHTS) for it in bytes_take)
    assert "unsigned" in refusal(CudaLowbit(), exact_case(Exact(1, 40, 512, "u4")), WEIGHTS)


def test_matches_interpreter() -> None:
    assert GpuBatch(CudaLowbit(), cases(), WEIGHTS).run(orders=(1, 2, 3)) == []


def test_sums_are_exact() -> None:
    """With scales of one, every sum is an integer that f32 holds."""
    assert GpuBatch(CudaLowbit(), cases(ones=True), WEIGHTS).run() == []


def test_bytes_are_those_of_codes_places_and_scales() -> None:
    for bits, sparse, share in (
        (4, False, 4.125),
        (4, True, 3.125),
        (3, False, 3.125),
        (3, True, 2.625),
        (2, False, 2.125),
    ):
        spec = LowbitSpec(1, 4096, 4096, 128, bits, False, False, sparse)
        assert spec.stored_bytes == spec.floor_bytes == 4096 * 4096 * share / 8
    for kept, share in (((1, 4), 1.5), ((2, 8), 2.0), ((1, 8), 1.0), ((1, 16), 0.5)):  # 4 bits a place, from 8 on
        spec = LowbitSpec(1, 4096, 4096, 128, 4, False, False, False, kept)
        assert spec.stored_bytes == 4096 * 4096 * (share + 0.125) / 8
        assert spec.stored_bytes <= spec.floor_bytes * 1.15
    uneven = LowbitSpec(1, 4090, 11000, 0, 4, False, False, False)
    assert uneven.stored_bytes / uneven.floor_bytes < 1.01


def test_packing_is_undone_and_changes_are_seen() -> None:
    rng = np.random.default_rng(5)
    for bits in (2, 3, 4, 8):
        for sparse in (False, True)[: 1 if bits == 2 else 2]:
            for depth, group in ((77, 0), (256, 64), (100, 32), (96, 48), (64, 16)):
                spec = LowbitSpec(1, 37, depth, group, bits, True, False, sparse)
                codes = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (37, depth))
                codes = (masked(codes, 2, 4, rng) if sparse else codes).astype(np.int8)
                packed = packing.pack(spec, codes)
                assert packed.nbytes == 4 * spec.weight_words
                assert np.array_equal(packing.unpack(spec, packed), codes)
    for n, m in ((1, 4), (1, 8), (2, 8), (1, 16), (2, 16)):
        for bits in (4, 8):
            spec = LowbitSpec(1, 37, 300, 0, bits, True, False, False, (n, m))
            codes = masked(rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (37, 300)), n, m, rng).astype(np.int8)
            assert np.array_equal(packing.unpack(spec, packing.pack(spec, codes)), codes)
    case = cases()[0]
    config = GpuBatch(CudaLowbit(), [case], WEIGHTS).configs[0]
    held = {k: v for k, v in case.inputs.items() if k in WEIGHTS}
    packed_all = CudaLowbit().pack(case.body, config, held)
    packed_all[0] = packed_all[0] ^ np.uint32(1)
    assert "do not unpack" in CudaLowbit().verify(case.body, config, held, packed_all)
    assert "differ" in CudaLowbit().verify(
        case.body, config, held, [packing.pack(config_spec(config), held["w"]), packed_all[1] ^ 1]
    )


def test_patterns_are_stored_in_the_fewest_bytes() -> None:
    def how(it: Layer) -> tuple[bool, tuple[int, int]]:
        spec = config_spec(
            GpuBatch(CudaLowbit(), [Case("", body_of(it), data_of(it, body_of(it)))], WEIGHTS).configs[0]
        )
        return spec.sparse, spec.kept

    assert how(Layer(1, 64, 512, 128, "s4", pattern=(2, 4))) == (True, (0, 0))
    assert how(Layer(1, 64, 512, 128, "s4", pattern=(2, 8))) == (False, (2, 8))
    assert how(Layer(1, 64, 512, 128, "s4", pattern=(1, 4))) == (False, (1, 4))
    assert how(Layer(1, 64, 512, 128, "s4", pattern=(1, 16))) == (False, (1, 16))
    assert how(Layer(1, 64, 512, 16, "s4", pattern=(1, 16))) == (False, (1, 4))  # lanes have four inputs of a scale
    assert how(Layer(64, 64, 512, 128, "s4", pattern=(1, 8))) == (True, (0, 0))  # tensor cores decide
    assert how(Layer(1, 64, 512, 128, "s4", pattern=(4, 8))) == (False, (0, 0))
    assert how(Layer(1, 64, 512, 128, "s4")) == (False, (0, 0))


def config_spec(config: object) -> LowbitSpec:
    assert isinstance(config, LowbitConfig)
    return config.spec


def test_activations_of_a_lane_are_consecutive() -> None:
    for piece in (64, 32, 16):
        assert sorted(place_of(piece, i, t) for i in range(4) for t in range(4)) == list(range(0, 64, 4))
        run = [place_of(piece, i, 1) for i in range(piece // 16)]
        assert run == list(range(run[0], run[0] + piece // 4, 4))


def test_refusals() -> None:
    odd = Layer(1, 16, 90, 20, "s4")
    case = Case("odd", body_of(odd), data_of(odd, body_of(odd)))
    assert "multiples of 16" in refusal(CudaLowbit(), case, WEIGHTS)
    assert "computed" in refusal(CudaLowbit(), cases()[0])
    rare = Layer(1, 16, 3000, 976, "s4")
    assert "begin together" in refusal(CudaLowbit(), Case("rare", body_of(rare), data_of(rare, body_of(rare))), WEIGHTS)


def random_layer(rng: np.random.Generator) -> Layer:
    """Any layer that the kernels take."""
    weights = str(rng.choice(["s2", "ternary", "bipolar", "s3", "u3", "s4", "u4", "s8"]))
    pattern = [(), (2, 4), (1, 4), (2, 8), (1, 8), (1, 16), (4, 8)][int(rng.integers(7))]
    if weights in ("bipolar", "u3", "u4"):
        pattern = ()
    group = int(rng.choice([0, 16, 32, 48, 64, 96, 128, 256]))
    return Layer(
        int(rng.choice([1, 2, 7, 8, 9, 16, 17, 33, 70])), int(rng.integers(1, 80)), int(rng.integers(1, 700)), group,
        weights, str(rng.choice(["bf16", "f32"])), weights[0] == "u" and bool(rng.integers(2)), bool(rng.integers(2)),
        pattern,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(12))
def test_random_layers(seed: int) -> None:
    """Some ten thousand tiles of 16 outputs, 8 rows and 64 inputs in all."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(16):
        body = body_of(it := random_layer(rng))
        made.append(Case(str(it), body, data_of(it, body, n, ones=True), rtol=0, atol=0))
    assert GpuBatch(CudaLowbit(), made, WEIGHTS).run(orders=(seed + 1,)) == []


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_machine_code(arch: str) -> None:
    big = [
        Layer(1, 256, 4096, 128, "s4"), Layer(16, 256, 4096, 128, "s4", pattern=(2, 4)), Layer(1, 256, 4096, 32, "s3"),
        Layer(1, 256, 4096, 64, "ternary"), Layer(64, 256, 4096, 128, "s4"),
        Layer(200, 256, 4096, 64, "u4", zeros=True), Layer(1, 256, 4096, 128, "s4", pattern=(1, 8)),
    ]  # fmt: skip
    batch = GpuBatch(CudaLowbit(), [Case(str(it), body_of(it), data_of(it, body_of(it))) for it in big], WEIGHTS)
    shown = sass(batch.compiled(arch).cubin)
    parts = {int(m[1]): m[2] for m in re.finditer(r"\.text\.k(\d+):(.*?)(?=\.text\.k\d+:|\Z)", shown, re.S)}
    assert sorted(parts) == list(range(len(big)))
    for i, part in parts.items():
        assert re.search(r"IMMA\.SP\.16864\.S8" if i == 1 else r"IMMA\.16832\.S8", part), i
        assert "LOP3" in part
        assert len(re.findall(r"LDGSTS\.E\.(?:BYPASS\.128|64)", part)) >= 2
        assert not re.findall(r"\b(LDL|STL)\b", part)
