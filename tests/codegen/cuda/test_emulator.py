"""The emulator against the instructions' definitions, and the mistakes it must see."""

import numpy as np
import pytest

from bitwright.codegen.cuda.emulator import run_guarded
from bitwright.codegen.cuda.machine_code import compile_cuda, sass
from bitwright.codegen.tvm.cuda.builder import CudaBuilder, launch_of
from bitwright.codegen.tvm.cuda.source import cuda_source
from bitwright.codegen.tvm.tir import const
from bitwright.ir.errors import BitwrightError
from bitwright.ir.types import F32, S8, S32, U32
from bitwright.ir.weights import Array


def tile(wait: bool = True, sync: bool = True) -> CudaBuilder:
    """c[16, 8] = a[16, 32] b[8, 32]^T through shared memory, in one warp of a block of two."""
    b = CudaBuilder("kern", threads=64)
    x, w, y = b.param("a", S8, 512), b.param("b", S8, 256), b.param("c", S32, 128)
    s = b.shared(S8, 768)
    with b.when(b.warp < 1):
        b.call("bw_cp_async16", b.address(s, b.lane * 16), b.address(x, b.lane * 16), 16)
        with b.when(b.lane < 16):
            b.call("bw_cp_async16", b.address(s, 512 + b.lane * 16), b.address(w, b.lane * 16), 16)
    b.call("bw_cp_async_commit")
    if wait:
        b.call("bw_cp_async_wait0")
    if sync:
        b.sync()
    with b.when(b.warp >= 1):
        acc, left, right = b.local(S32, 4), b.local(U32, 4), b.local(U32, 2)
        for i in range(4):
            b.store(acc, i, const(0, S32))
        b.call("bw_ldmatrix4", b.address(left), b.address(s, (b.lane % 16) * 32 + b.lane // 16 * 16))
        b.call("bw_ldmatrix2", b.address(right), b.address(s, 512 + (b.lane % 8) * 32 + b.lane // 8 % 2 * 16))
        b.call("bw_mma_s8", b.address(acc), b.address(left), b.address(right))
        for i in range(4):
            b.store(y, (b.lane // 4 + 8 * (i // 2)) * 8 + b.lane % 4 * 2 + i % 2, b.load(acc, i))
    return b


def product(b: CudaBuilder, order: int, rng: np.random.Generator) -> tuple[Array, Array]:
    function = b.finish()
    x, w = rng.integers(-128, 128, (16, 32)).astype(np.int8), rng.integers(-128, 128, (8, 32)).astype(np.int8)
    arrays: dict[str, Array] = {"a": x, "b": w, "c": np.zeros((16, 8), np.int32)}
    out = run_guarded(cuda_source(function), "kern", launch_of(function), arrays, order)
    return out["c"], x.astype(np.int32) @ w.T.astype(np.int32)


def test_a_tile_is_the_product_in_any_order_of_threads() -> None:
    rng = np.random.default_rng(0)
    for order in range(8):
        got, want = product(tile(), order, rng)
        assert (got == want).all()


def test_a_missing_wait_or_barrier_is_seen() -> None:
    rng = np.random.default_rng(1)
    for wait, sync in ((False, True), (True, False)):
        wrong = [not np.array_equal(*product(tile(wait, sync), order, rng)) for order in range(8)]
        assert any(wrong)


def test_machine_code_holds_the_instructions() -> None:
    text = cuda_source(tile().finish())
    for arch in ("sm_80", "sm_90a"):
        made = compile_cuda(text, arch)
        assert made.resources["kern"].spill_stores == 0
        assert made.resources["kern"].registers > 8
        shown = sass(made.cubin)
        assert all(word in shown for word in ("IMMA.16832.S8.S8", "LDSM", "LDGSTS"))


def test_reading_past_an_array_names_the_thread() -> None:
    b = CudaBuilder("kern", threads=32)
    x, y = b.param("x", F32, 1 << 20), b.param("y", F32, 32)
    b.store(y, b.thread, b.load(x, b.thread + 5))
    function = b.finish()
    arrays = {"x": np.zeros(32, np.float32), "y": np.zeros(32, np.float32)}
    with pytest.raises(BitwrightError, match=r"kernel kern: block \(0, 0, 0\), thread \d+: access outside"):
        run_guarded(cuda_source(function), "kern", launch_of(function), arrays)


def test_a_barrier_that_not_all_reach_is_named() -> None:
    b = CudaBuilder("kern", threads=64)
    y = b.param("y", F32, 64)
    with b.when(b.warp < 1):
        b.sync()
    b.store(y, b.thread, const(0.0, F32))
    function = b.finish()
    with pytest.raises(BitwrightError, match="32 of 64 threads wait for ever, this one in a barrier"):
        run_guarded(cuda_source(function), "kern", launch_of(function), {"y": np.zeros(64, np.float32)})
