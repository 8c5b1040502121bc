"""Every kind of wgmma against plain products, and the mistakes of its protocol that the emulator must see."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from bitwright.codegen.cuda.emulator import Emulated, run_guarded
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
    o: Operands,
    n: int,
    sparse: bool,
    pitch: int = 128,
    registers: bool = False,
    without: Sequence[str] = (),
    name: str = "kern",
) -> CudaBuilder:
    """y[64, n] = a[64, 32 bytes] b[n, 32 or 64 bytes]^T, and of the bytes that follow, staged by hand."""
    b = CudaBuilder(name, threads=128)
    acc_type = F32 if o.floating else S32
    a_pitch = min(pitch, 64) if sparse else pitch
    x, w = b.param("a", U8, 64 * a_pitch), b.param("b", U8, n * pitch)
    meta, regs = b.param("meta", U32, 256), b.param("regs", U32, 1024)
    y = b.param("y", acc_type, 64 * n)
    left = b.shared(U8, 64 * a_pitch, align=1024)
    right = b.shared(U8, n * pitch, align=1024)
    acc, fours = b.local(acc_type, n // 2), b.local(U32, 8)
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
    words = [b.let(b.load(meta, b.thread + (128 * step if o.size == 1 else 0))) for step in range(2 * sparse)]
    for i in range(8 * registers):
        b.store(fours, i, b.load(regs, (i // 4 * 128 + b.thread) * 4 + i % 4))
    if "fence" not in without:
        b.call("bw_wgmma_fence")
    for step in range(2):
        selector = step if sparse and o.size == 2 else 0
        product = name_of(o.name, n, selector if sparse else None, registers)
        a = [low_a + const(2 * step, U32), const(high(8 * a_pitch, a_pitch), U32)]
        if registers:
            a = [b.address(fours, 4 * step)]
        e = [words[step]] if sparse else []
        low = low_b + const((4 if sparse else 2) * step, U32)
        b.call(product, b.address(acc), *a, low, const(high(8 * pitch, pitch), U32), *e, 1 if step else 0)
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


@dataclass(frozen=True)
class Tile:
    """One kernel: formats, columns, and how its operands lie."""

    kind: str
    n: int
    sparse: bool
    pitch: int = 128
    registers: bool = False


def check(tiles: Sequence[Tile], seeds: range) -> None:
    """All kernels in one text equal the product, each seed with other numbers and another order of threads."""
    functions = [
        kernel(KINDS[t.kind], t.n, t.sparse, t.pitch, t.registers, name=f"k{i}").finish() for i, t in enumerate(tiles)
    ]
    library = Emulated("\n".join(map(cuda_source, functions)), [f"k{i}" for i in range(len(tiles))])
    for i, t in enumerate(tiles):
        o = KINDS[t.kind]
        for seed in seeds:
            arrays, want = tile(o, t.n, t.sparse, np.random.default_rng(seed), t.pitch, t.registers)
            got = library.run_guarded(f"k{i}", launch_of(functions[i]), arrays, seed)["y"]
            if o.floating:
                near = 1e-4 if t.kind != "e4m3" else 0.5
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=near, err_msg=str(t))
            else:
                assert (got == want).all(), t


def test_tiles_are_the_product() -> None:
    check([Tile(kind, n, sparse) for kind in KINDS for sparse in (False, True) for n in (8, 48)], range(3))


def test_a_from_registers() -> None:
    check([Tile(kind, 16, sparse, registers=True) for kind in ("bf16", "s8s8") for sparse in (False, True)], range(2))


def test_swizzles() -> None:
    check([Tile("f16", 24, False, pitch) for pitch in (64, 128)], range(2))


@pytest.mark.nightly
def test_ten_thousand_tiles() -> None:
    check([Tile(k, 16, sparse, registers=k == "s8s8") for k in KINDS for sparse in (False, True)], range(1000))


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
    made = [(kind, sparse) for kind in KINDS for sparse in (False, True)]
    functions = [kernel(KINDS[kind], 64, sparse, name=f"k{i}").finish() for i, (kind, sparse) in enumerate(made)]
    compiled = compile_cuda("\n".join(map(cuda_source, functions)), "sm_90a")
    shown = sass(compiled.cubin)
    for kind, sparse in made:
        word = known()[name_of(kind, 64, 0 if sparse else None)].sass.replace("\\", "")
        assert word in shown
    assert compiled.warnings == ()
    assert all(r.spill_stores == r.stack_bytes == 0 for r in compiled.resources.values())


def test_widths_of_integers_skip_some() -> None:
    assert 40 in widths(True)
    assert 40 not in widths(False)
