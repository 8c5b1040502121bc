"""Every kind of wgmma against plain products, and the mistakes of its protocol that the emulator must see."""

from collections.abc import Sequence

import numpy as np
import pytest

from bitwright.codegen.cuda.emulator import run_guarded
from bitwright.codegen.cuda.instructions import known
from bitwright.codegen.cuda.instructions.wgmma import OPERANDS, Operands, high, name_of, widths
from bitwright.codegen.cuda.machine_code import compile_cuda, sass
from bitwright.codegen.tvm.cuda import wgmma_layout as layout
from bitwright.codegen.tvm.cuda.builder import CudaBuilder, launch_of
from bitwright.codegen.tvm.cuda.source import cuda_source
from bitwright.codegen.tvm.tir import const
from bitwright.ir.errors import BitwrightError
from bitwright.ir.types import F32, S32, U8, U32
from bitwright.ir.weights import Array

KINDS = {o.name: o for o in OPERANDS}


def kernel(
    o: Operands, n: int, sparse: bool, pitch: int = 128, registers: bool = False, without: Sequence[str] = ()
) -> CudaBuilder:
    """y[64, n] = a[64, 32 bytes] b[n, 32 or 64 bytes]^T, and of the bytes that follow, staged by hand."""
    b = CudaBuilder("kern", threads=128)
    acc_type = F32 if o.floating else S32
    a_pitch = min(pitch, 64) if sparse else pitch
    x, w = b.param("a", U8, 64 * a_pitch), b.param("b", U8, n * pitch)
    meta, regs = b.param("meta", U32, 256), b.param("regs", U32, 1024)
    y = b.param("y", acc_type, 64 * n)
    left = b.shared(U8, 64 * a_pitch, align=1024)
    right = b.shared(U8, n * pitch, align=1024)
    acc, four = b.local(acc_type, n // 2), b.local(U32, 4)
    for source, to, count in ((x, left, 64 * a_pitch), (w, right, n * pitch)):
        with b.loop(-(-count // 2048)) as i, b.when(i * 2048 + b.thread * 16 < count):
            at = i * 2048 + b.thread * 16
            b.call("bw_stage16", b.address(to, at), b.address(source, at))
    if "proxy" not in without:
        b.call("bw_fence_proxy")
    b.sync()
    for i in range(n // 2):
        b.store(acc, i, const(0, acc_type))
    low_a = b.value("bw_wgmma_low", U32, b.address(left))
    low_b = b.value("bw_wgmma_low", U32, b.address(right))
    if "fence" not in without:
        b.call("bw_wgmma_fence")
    for step in range(2):
        selector = step if sparse and o.size == 2 else 0
        name = name_of(o.name, n, selector if sparse else None, registers)
        a = [low_a + const(2 * step, U32), const(high(8 * a_pitch, a_pitch), U32)]
        if registers:
            for i in range(4):
                b.store(four, i, b.load(regs, (step * 128 + b.thread) * 4 + i))
            a = [b.address(four)]
        e = [b.load(meta, b.thread + (128 * step if o.size == 1 else 0))] if sparse else []
        low = low_b + const((4 if sparse else 2) * step, U32)
        b.call(name, b.address(acc), *a, low, const(high(8 * pitch, pitch), U32), *e, 1 if step else 0)
    b.call("bw_wgmma_commit")
    if "wait" not in without:
        b.call("bw_wgmma_wait0")
    b.call(f"bw_wgmma_keep_{'f32' if o.floating else 's32'}_{n // 2}", b.address(acc))
    for i in range(n // 2):
        row = b.warp * 16 + b.lane // 4 + 8 * (i // 2 % 2)
        b.store(y, row * n + (i // 4 * 8 + b.lane % 4 * 2 + i % 2), b.load(acc, i))
    return b


def numbers(o: Operands, shape: tuple[int, int], rng: np.random.Generator, right: bool) -> tuple[Array, Array]:
    """Stored elements, and their values in f64."""
    if o.name == "f16":
        half = rng.standard_normal(shape).astype(np.float16)
        return half, half.astype(np.float64)
    if o.name == "bf16":
        words = (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return words, (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if o.name == "e4m3":
        raw = rng.integers(0, 256, shape).astype(np.uint8)
        raw[(raw & 0x7F) == 0x7F] = 0
        e, m = (raw >> 3 & 15).astype(np.int64), (raw & 7).astype(np.float64)
        size = np.where(e == 0, m / 8 * 2.0**-6, (1 + m / 8) * 2.0 ** (e - 7))
        return raw, np.where(raw & 0x80, -size, size)
    unsigned = o.name[2:] == "u8" if right else o.name[:2] == "u8"
    whole = rng.integers(0, 256, shape).astype(np.uint8) if unsigned else rng.integers(-128, 128, shape).astype(np.int8)
    return whole, whole.astype(np.float64)


def prune(stored: Array, value: Array, rng: np.random.Generator, per_group: int = 2) -> None:
    """Keep at most ``per_group`` of every four, fewer here and there."""
    groups = stored.shape[1] // 4
    order = np.argsort(rng.random((stored.shape[0], groups, 4)), axis=-1)
    drop = order >= rng.integers(0, per_group + 1, (stored.shape[0], groups, 1))
    stored.reshape(-1, groups, 4)[drop] = 0
    value.reshape(-1, groups, 4)[drop] = 0


def fragments(rows: Array) -> Array:
    """Two blocks of 32 bytes of 64 rows as registers (2, 128, 4) u32, in mma's layout."""
    words = np.ascontiguousarray(rows).view(np.uint8).reshape(64, -1)[:, :64].copy().view(np.uint32)
    out = np.zeros((2, 128, 4), np.uint32)
    for step in range(2):
        for lane in range(128):
            for i in range(4):
                row = lane // 32 * 16 + lane % 32 // 4 + 8 * (i % 2)
                out[step, lane, i] = words[row, step * 8 + i // 2 * 4 + lane % 4]
    return out


def tile(
    o: Operands, n: int, sparse: bool, rng: np.random.Generator, pitch: int = 128, registers: bool = False
) -> tuple[dict[str, Array], Array]:
    """Arrays of a launch of :func:`kernel` with random numbers, and the product."""
    depth = (128 if sparse else 64) // o.size
    a, a_value = numbers(o, (64, depth), rng, right=False)
    b, b_value = numbers(o, (n, depth), rng, right=True)
    meta = np.zeros(256, np.uint32)
    stored = a
    if sparse:
        prune(a, a_value, rng)
        stored, places = layout.compressed(a)
        meta[: 256 // o.size] = layout.metadata(places[None], o.size)[0]
    arrays = {}
    for key, rows, width in (("a", stored, min(pitch, 64) if sparse else pitch), ("b", b, pitch)):
        raw = np.ascontiguousarray(rows).view(np.uint8)
        room = rng.integers(0, 256, (raw.shape[0], width)).astype(np.uint8)
        room[:, : min(raw.shape[1], width)] = raw[:, :width]
        arrays[key] = layout.swizzled(room)
    arrays |= {"meta": meta, "regs": fragments(stored) if registers else np.zeros((2, 128, 4), np.uint32)}
    arrays["y"] = np.zeros((64, n), np.float32 if o.floating else np.int32)
    return arrays, a_value @ b_value.T


def check(o: Operands, n: int, sparse: bool, seeds: range, pitch: int = 128, registers: bool = False) -> None:
    function = kernel(o, n, sparse, pitch, registers).finish()
    text = cuda_source(function)
    for seed in seeds:
        arrays, want = tile(o, n, sparse, np.random.default_rng(seed), pitch, registers)
        got = run_guarded(text, "kern", launch_of(function), arrays, seed)["y"]
        if o.floating:
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4 if o.name != "e4m3" else 0.5)
        else:
            assert (got == want).all()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_is_the_product(kind: str, sparse: bool) -> None:
    for n in (8, 48):
        check(KINDS[kind], n, sparse, range(3))


@pytest.mark.parametrize("kind", ["bf16", "s8s8"])
def test_a_from_registers(kind: str) -> None:
    check(KINDS[kind], 16, False, range(2), registers=True)
    check(KINDS[kind], 16, True, range(2), registers=True)


@pytest.mark.parametrize("pitch", [64, 128])
def test_swizzles(pitch: int) -> None:
    check(KINDS["f16"], 24, False, range(2), pitch=pitch)


@pytest.mark.nightly
def test_ten_thousand_tiles() -> None:
    for kind, o in KINDS.items():
        for sparse in (False, True):
            check(o, 16, sparse, range(1000), registers=kind == "s8s8")


@pytest.mark.parametrize("lack", ["proxy", "wait", "fence"])
def test_a_missing_fence_or_wait_is_seen(lack: str) -> None:
    function = kernel(KINDS["s8s8"], 16, False, without=[lack]).finish()
    text, seen = cuda_source(function), 0
    for seed in range(4):
        arrays, want = tile(KINDS["s8s8"], 16, False, np.random.default_rng(seed))
        try:
            seen += not np.array_equal(run_guarded(text, "kern", launch_of(function), arrays, seed)["y"], want)
        except BitwrightError as error:
            seen += "wgmma" in str(error)
    assert seen == 4


def test_machine_code_holds_the_instructions() -> None:
    for kind, o in KINDS.items():
        for sparse in (False, True):
            name = name_of(kind, 64, 0 if sparse else None)
            made = compile_cuda(cuda_source(kernel(o, 64, sparse).finish()), "sm_90a")
            shown = sass(made.cubin)
            assert any(known()[name].sass.replace("\\", "") in line for line in shown.splitlines()), name
            assert made.resources["kern"].spill_stores == 0
            assert made.resources["kern"].stack_bytes == 0


def test_widths_of_integers_skip_some() -> None:
    assert 40 in widths(True)
    assert 40 not in widths(False)
