"""The adapter: C-ABI objects without libtvm, and the aliasing miscompile that keeps kernels in own objects."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from bitwright.codegen.tvm.adapter import MACHINES, assembly, build_object, machine, tir_text
from bitwright.codegen.tvm.contract import ContractSpec, Conv, Matrix, StoreAcc, emit, knobs
from bitwright.codegen.tvm.memory import copy, fill
from bitwright.codegen.tvm.tir import Builder, Vec, concat, const, constants, shuffle
from bitwright.codegen.tvm.values import both, choose, either, maximum, minimum, scalar
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import F32, NM, S8, S32, S64, U8


def add_kernel(name: str = "add_one") -> Builder:
    b = Builder(name)
    x, y = b.param("x", F32, 64), b.param("y", F32, 64)
    with b.loop(b.end, b.begin) as i:
        b.store(y, i * 16, b.load(x, i * 16, 16) + 1.0)
    return b


def link(tmp_path: Path, *objects: bytes, main: str | None = None) -> Path:
    """Objects (and a C file) to one shared library."""
    files = []
    for n, code in enumerate(objects):
        files.append(tmp_path / f"k{n}.o")
        files[-1].write_bytes(code)
    if main:
        files.append(tmp_path / "main.c")
        files[-1].write_text(main)
    out = tmp_path / "lib.so"
    command = ["gcc", "-O2", "-fPIC", "-shared", "-Wl,-z,defs", "-o", str(out), *map(str, files)]
    subprocess.run(command, check=True)
    return out


def address(a: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


@pytest.mark.parametrize("isa", MACHINES)
def test_object_exports_the_kernel_and_needs_nothing(tmp_path: Path, isa: str) -> None:
    specs = [
        ContractSpec("u8s8", Matrix(5, 40, 30), NM(2, 4, axis=1)),
        ContractSpec("f32", Conv(1, 5, 5, 3, 20, (3, 3), padding=(1, 1, 1, 1))),
        ContractSpec("f32", Matrix(9, 20, 30), right="nk"),
    ]
    funcs = []
    for n, spec in enumerate(specs):
        k = knobs(spec, isa)  # type: ignore[arg-type]
        funcs.append(emit(spec, k, StoreAcc(spec.rows, spec.cols, spec.acc_dtype), f"kernel{n}").primfunc)
    path = tmp_path / "k.o"
    path.write_bytes(build_object(funcs, isa))
    symbols = subprocess.run(["nm", path], check=True, capture_output=True, text=True).stdout.split("\n")
    kinds = [line.split()[-2:] for line in symbols if line]
    assert not [name for kind, name in kinds if kind in "Uwv"]
    assert sorted(name for kind, name in kinds if kind == "T") == ["kernel0", "kernel1", "kernel2"]
    link(tmp_path, path.read_bytes())


def test_range_of_tasks_is_respected(tmp_path: Path) -> None:
    lib = ctypes.CDLL(str(link(tmp_path, build_object([add_kernel().finish()], "avx2"))))
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    lib.add_one(1, 3, address(x), address(y))
    expected = np.where((np.arange(64) >= 16) & (np.arange(64) < 48), x + 1, 0)
    np.testing.assert_array_equal(y, expected)


def test_kernels_in_own_objects_survive_reused_memory(tmp_path: Path) -> None:
    """TVM's alias tags drop the second fill when these are inlined into one main: expected 7, got 0."""
    fill_ = Builder("k_fill")
    x, out = fill_.param("x", F32, 4), fill_.param("out", F32, 64)
    fill_.store(out, 0, fill_.load(x, 0))
    read = Builder("k_read")
    index, a, y = read.param("index", S32, 4), read.param("a", F32, 64), read.param("y", F32, 4)
    with read.loop(4) as i:
        read.store(y, i, read.load(a, read.load(index, i).expr))
    main = """
    #include <stdint.h>
    void k_fill(int32_t, int32_t, float*, float*);
    void k_read(int32_t, int32_t, int32_t*, float*, float*);
    void model_run(float* x, float* x2, int32_t* idx, float* ws, float* y) {
      k_fill(0, 1, x, ws); k_read(0, 1, idx, ws, y); k_fill(0, 1, x2, ws);
    }"""
    objects = [build_object([k.finish()], "avx2") for k in (fill_, read)]
    lib = ctypes.CDLL(str(link(tmp_path, *objects, main=main)))
    arrays = [np.full(4, 7, np.float32), np.full(4, 9, np.float32), np.zeros(4, np.int32)]
    ws, result = np.zeros(64, np.float32), np.zeros(4, np.float32)
    lib.model_run(*map(address, [*arrays, ws, result]))
    assert result.tolist() == [7, 7, 7, 7]
    assert ws[0] == 9


def test_views_of_one_pointer_alias(tmp_path: Path) -> None:
    b = Builder("views")
    out, scratch = b.param("out", S32, 16), b.scratch(1024)
    floats, ints = b.view(scratch, F32, 64), b.view(scratch, S32, 64)
    b.store(floats, 0, const(1.0, F32, 16))
    b.store(out, 0, b.load(ints, 0, 16))
    lib = ctypes.CDLL(str(link(tmp_path, build_object([b.finish()], "avx2"))))
    result, memory = np.zeros(16, np.int32), np.zeros(1024, np.uint8)
    lib.views(0, 1, address(result), address(memory))
    assert set(result.tolist()) == {0x3F800000}


@pytest.mark.parametrize("isa", ["avx512-vnni", "avx2", "portable"])
def test_vector_values(tmp_path: Path, isa: str) -> None:
    b = Builder("values")
    x, out = b.param("x", S32, 16), b.param("out", S32, 16 * 12)
    v = b.let(b.load(x, 0, 16))
    results: list[Vec] = [
        v + 1, v - v, v * 3, (v & 7) | 8, v ^ -1, v >> 1, v << 2, v.clip(-3, 5),
        v.gt(2).select(v, const(0, S32, 16)), shuffle([v, v + 100], range(15, 31)),
        concat([v.part(8, 8), v.part(0, 8)]), v.cast(F32).cast(S64).cast(S32) + constants(range(16), S32),
    ]  # fmt: skip
    for n, value in enumerate(results):
        b.store(out, n * 16, value)
    lib = ctypes.CDLL(str(link(tmp_path, build_object([b.finish()], isa))))
    a = np.arange(-8, 8, dtype=np.int32)
    got = np.zeros((12, 16), np.int32)
    lib.values(0, 1, address(a), address(got))
    expected = [
        a + 1, a - a, a * 3, (a & 7) | 8, a ^ -1, a >> 1, a << 2, a.clip(-3, 5), np.where(a > 2, a, 0),
        np.concatenate([a[15:], a[:15] + 100]), np.roll(a, 8), a + np.arange(16),
    ]  # fmt: skip
    for n, want in enumerate(expected):
        np.testing.assert_array_equal(got[n], want, err_msg=str(n))


@pytest.mark.parametrize("valid", range(1, 17))
def test_partial_store_writes_exactly(tmp_path: Path, valid: int) -> None:
    b = Builder("partial")
    out = b.param("out", S8, 32)
    b.store(out, 3, const(5, S8, 16), valid=valid)
    lib = ctypes.CDLL(str(link(tmp_path, build_object([b.finish()], "avx2"))))
    got = np.zeros(32, np.int8)
    lib.partial(0, 1, address(got))
    assert np.flatnonzero(got).tolist() == list(range(3, 3 + valid))


def test_copy_and_fill_are_exact(tmp_path: Path) -> None:
    b = Builder("moves")
    x, out = b.param("x", U8, 512), b.param("out", U8, 512)
    copy(b, x, 1, out, 5, 293)
    fill(b, out, 300, 71, 9)
    lib = ctypes.CDLL(str(link(tmp_path, build_object([b.finish()], "avx2"))))
    source = np.random.default_rng(0).integers(0, 256, 512).astype(np.uint8)
    got, want = np.zeros(512, np.uint8), np.zeros(512, np.uint8)
    lib.moves(0, 1, address(source), address(got))
    want[5:298], want[300:371] = source[1:294], 9
    np.testing.assert_array_equal(got, want)


def test_index_helpers() -> None:
    assert (minimum(2, 3), maximum(2, 3), choose(True, 1, 2)) == (2, 3, 1)
    b = Builder("k")
    assert both(b.begin > 0, b.end > 1) is not None
    assert either(b.begin > 0, b.end > 1) is not None
    assert scalar(3, F32).dtype == F32


def test_misuse_is_an_error() -> None:
    b = Builder("k")
    out = b.param("out", F32, 4)
    with pytest.raises(TypeError, match="storing s32"):
        b.store(out, 0, const(1, S32))
    with pytest.raises(ValueError, match="stack buffer"):
        b.stack(F32, 1024)
    with pytest.raises(ValueError, match="whole lanes"):
        const(1, U8, 3).bits(S32)
    with pytest.raises(InvalidInput, match="same name"):
        build_object([add_kernel().finish(), add_kernel().finish()], "avx2")


def test_inspection() -> None:
    func = add_kernel().finish()
    assert "vaddps" in assembly(func, machine("avx2"))
    assert "define" in assembly(func, "avx2", "ll")
    assert "add_one" in tir_text(func)
