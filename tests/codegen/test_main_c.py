"""The generated C: runs, threads, chunks, scratch, copies, profiling; and what it refuses."""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from bitwright.codegen.link import link
from bitwright.codegen.main_c import Variant, arena_bytes, main_c, scratch_bytes, step_labels
from bitwright.codegen.plan import Arg, Buffer, Plan, Step, plan
from bitwright.ir.errors import VerifyError

KERNELS = r"""
#include <stdint.h>
/* tasks are blocks of 16 floats */
void add(int32_t b, int32_t e, float* x, float* y, float* z) {
  for (int32_t i = b * 16; i < e * 16; i++) z[i] = x[i] + y[i];
}
void twice(int32_t b, int32_t e, float* x, float* z) {
  for (int32_t i = b * 16; i < e * 16; i++) z[i] = 2 * x[i];
}
/* a task is a row: z[i] = sum of x, kept in scratch on the way; x is 16 wide */
void running(int32_t b, int32_t e, float* x, float* z, uint8_t* scratch) {
  float* s = (float*)scratch;
  for (int32_t r = b; r < e; r++) {
    s[0] = 0;
    for (int i = 0; i < 16; i++) s[i + 1] = s[i] + x[r * 16 + i];
    for (int i = 0; i < 16; i++) z[r * 16 + i] = s[i + 1];
  }
}
/* reads across tasks: z[i] = x[n-1-i], n = 16 * 16 */
void reverse(int32_t b, int32_t e, float* x, float* z) {
  for (int32_t i = b * 16; i < e * 16; i++) z[i] = x[255 - i];
}
"""
Floats = np.ndarray


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "k.c").write_text(KERNELS)
    subprocess.run(["gcc", "-O2", "-fPIC", "-c", "k.c"], cwd=folder, check=True)
    return (folder / "k.o").read_bytes()


class Runner:
    """A linked program, called through ctypes on NumPy arrays."""

    def __init__(self, library: bytes, variants: Sequence[Variant], folder: Path) -> None:
        path = folder / f"p{len(list(folder.iterdir()))}.so"
        path.write_bytes(library)
        self.lib = ctypes.CDLL(str(path))
        self.variants = variants
        self.lib.bw_info.restype = ctypes.c_char_p
        self.info = json.loads(self.lib.bw_info())

    def __call__(
        self, inputs: Sequence[Floats], outputs: Sequence[Floats], weights: Floats, threads: int = 1,
        rows: int = 1, seconds: Floats | None = None,
    ) -> int:  # fmt: skip
        def pointers(arrays: Sequence[Floats]) -> object:
            return (ctypes.c_void_p * max(1, len(arrays)))(*(a.ctypes.data for a in arrays))

        arena = np.full(arena_bytes(self.variants) + 64, 170, np.uint8)
        scratch = np.full(scratch_bytes(self.variants) * threads + 64, 170, np.uint8)
        buffers = [ctypes.c_void_p(a.ctypes.data) for a in (weights, arena, scratch)]
        tail = [ctypes.c_int(threads), ctypes.c_int64(rows)]
        if seconds is None:
            return int(self.lib.bw_run(pointers(inputs), pointers(outputs), *buffers, *tail))
        extra = ctypes.c_void_p(seconds.ctypes.data)
        return int(self.lib.bw_profile(pointers(inputs), pointers(outputs), *buffers, *tail, extra))


@pytest.fixture
def build(kernels: bytes, tmp_path: Path) -> Callable[..., Runner]:
    def make(*variants: Variant, openmp: bool = True) -> Runner:
        text = main_c(variants, features=["avx2"], versions={"bitwright": '1 "x" \\ ??/'})
        return Runner(link({"k": kernels}, text, openmp=openmp), variants, tmp_path)

    return make


def diamond(rows: int) -> Plan:
    """y = reverse(2x) + running(x) + w on blocks of 16 floats; reverse needs rows == 16."""
    n = 64 * rows
    steps = [
        Step("twice", rows, (Arg("x"), Arg("a", access="w")), label="double */ it"),
        Step("reverse", rows, (Arg("a"), Arg("b", access="w")), label="reverse"),
        Step("running", rows, (Arg("x"), Arg("c", access="w")), scratch_bytes=68, label="running"),
        Step("add", rows, (Arg("b"), Arg("c"), Arg("d", access="w")), label="add", inplace=((2, 0), (2, 1))),
        Step("add", rows, (Arg("d"), Arg("w"), Arg("y", access="w")), label="bias", inplace=((2, 0),)),
    ]
    buffers = [Buffer("x", n, "input"), Buffer("w", n, "weight"), *(Buffer(v, n) for v in "abcdy")]
    return plan(steps, buffers, ["y", "x", "w"])


def rowwise(rows: int) -> Plan:
    """y = 2x + bias with one bias row for every row (bias does not depend on the batch); z = bias."""
    steps = [Step("twice", rows, (Arg("x"), Arg("h", access="w")), label="double")]
    for r in range(rows):
        args = (Arg("h", 64 * r, "r", 64), Arg("bias"), Arg("y", 64 * r, "w", 64))
        steps.append(Step("add", 1, args, label=f"row {r}"))
    buffers = [Buffer("x", 64 * rows, "input"), Buffer("bias", 64, "input")]
    return plan(steps, [*buffers, *(Buffer(v, 64 * rows) for v in "hy")], ["y", "bias"])


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7])
def test_any_number_of_threads_gives_the_same_result(build: Callable[..., Runner], threads: int) -> None:
    run = build(Variant(diamond(16)))
    rng = np.random.default_rng(0)
    w = np.zeros(diamond(16).weights_bytes, np.uint8)
    w[: 256 * 4].view(np.float32)[:] = rng.random(256, np.float32)
    for _ in range(20):
        x = rng.random(256, np.float32)
        y, x_copy, w_copy = (np.empty(256, np.float32) for _ in range(3))
        assert run([x], [y, x_copy, w_copy], w, threads) == 0
        ran = np.zeros((16, 16), np.float32)
        total = np.zeros(16, np.float32)
        for i in range(16):
            total = total + x.reshape(16, 16)[:, i]
            ran[:, i] = total
        bias = w[: 256 * 4].view(np.float32)
        np.testing.assert_array_equal(y, ((2 * x)[::-1] + ran.ravel()) + bias)
        np.testing.assert_array_equal(x_copy, x)
        np.testing.assert_array_equal(w_copy, bias)


@pytest.mark.parametrize("chunks", [(1,), (4,), (16, 1), (5, 3)])
@pytest.mark.parametrize("threads", [1, 2])
def test_batches_run_in_chunks(build: Callable[..., Runner], chunks: tuple[int, ...], threads: int) -> None:
    run = build(*(Variant(rowwise(c), c, (64, 0), (64, 0)) for c in chunks))
    assert run.info["chunks"] == sorted(chunks, reverse=True)
    bias = np.arange(16, dtype=np.float32)
    for rows in (0, min(chunks), 5, 7, 16, 17, 31, 40):
        x = np.random.default_rng(rows).random((rows, 16), np.float32)
        guard = np.full((rows + 2, 16), 7, np.float32)
        y, z = guard[1 : rows + 1], np.empty(16, np.float32)
        assert run([x, bias], [y, z], np.zeros(64, np.uint8), threads, rows) == 0
        np.testing.assert_array_equal(y, 2 * x + bias)
        assert (guard[0] == 7).all()
        assert (guard[-1] == 7).all()


def test_wrong_calls_are_refused_in_c(build: Callable[..., Runner]) -> None:
    run = build(Variant(rowwise(4), 4, (64, 0), (64, 0)))
    x = np.zeros((4, 16), np.float32)
    args = [x, x], [x, x], np.zeros(64, np.uint8)
    assert (run(*args, 0, 4), run(*args, 1, -1), run(*args, 1, 3), run(*args, 1, 4)) == (1, 1, 2, 0)


@pytest.mark.parametrize("threads", [1, 2])
def test_profile_gives_seconds_per_step(build: Callable[..., Runner], threads: int) -> None:
    variants = [Variant(diamond(16))]
    run = build(*variants)
    seconds = np.zeros(len(step_labels(variants)))
    x, w = np.zeros(256, np.float32), np.zeros(diamond(16).weights_bytes, np.uint8)
    outputs = [np.empty(256, np.float32) for _ in range(3)]
    assert run([x], outputs, w, threads, seconds=seconds) == 0
    assert (seconds > 0).all()
    assert seconds.sum() < 0.5
    once = seconds.copy()
    run([x], outputs, w, threads, seconds=seconds)
    assert (seconds > once).all()
    assert [label for label, *_ in step_labels(variants)][:2] == ["double */ it", "reverse"]


def test_the_library_describes_itself(build: Callable[..., Runner]) -> None:
    run = build(Variant(diamond(16)))
    assert run.info == {
        "openmp": True, "abi": 1, "chunks": [1], "features": ["avx2"], "steps": 7,
        "versions": {"bitwright": '1 "x" \\ ??/'},
    }  # fmt: skip
    assert ctypes.c_int32.in_dll(run.lib, "bw_abi_version").value == 1


def test_without_openmp_threads_are_ignored(build: Callable[..., Runner]) -> None:
    run = build(Variant(diamond(16)), openmp=False)
    assert run.info["openmp"] is False
    x, w = np.ones(256, np.float32), np.zeros(diamond(16).weights_bytes, np.uint8)
    outputs = [np.empty(256, np.float32) for _ in range(3)]
    assert run([x], outputs, w, 4) == 0
    assert outputs[0][0] == 3


@pytest.mark.parametrize("flags", [[], ["-fopenmp"]])
def test_the_text_is_clean_c99(tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "main.c").write_text(main_c([Variant(diamond(16)), Variant(diamond(32), 2)]))
    line = ["gcc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", *flags, "-c", "main.c"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_program_without_steps_is_a_program(build: Callable[..., Runner]) -> None:
    p = plan([], [Buffer("x", 64, "input")], ["x"])
    run = build(Variant(p))
    x, y = np.ones(16, np.float32), np.empty(16, np.float32)
    assert run([x], [y], np.zeros(64, np.uint8)) == 0
    assert y.sum() == 16
    assert build(Variant(plan([], [], []))).info["steps"] == 0


def test_long_programs_compile_in_linear_time(kernels: bytes) -> None:
    import resource

    def seconds(steps: int) -> float:
        names = [f"v{i}" for i in range(steps)]
        calls = [Step("twice", 1, (Arg(a), Arg(b, access="w"))) for a, b in zip(["x", *names], names, strict=False)]
        p = plan(calls, [Buffer("x", 64, "input"), *(Buffer(n, 64) for n in names)], names[-1:])
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        link({"k": kernels}, main_c([Variant(p)]), openmp=True)
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    seconds(1)
    assert seconds(800) < 8  # one long function takes gcc a minute


def test_large_copies_are_shared_between_threads(build: Callable[..., Runner]) -> None:
    n = 300_000
    run = build(Variant(plan([], [Buffer("x", n, "input")], ["x"])))
    x = np.random.default_rng(0).integers(0, 256, n, np.uint8)
    for threads in (1, 3):
        y = np.zeros(n, np.uint8)
        run([x], [y], np.zeros(64, np.uint8), threads)
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([], "no variant"),
        ([Variant(rowwise(1)), Variant(rowwise(1))], "same number of rows"),
        ([Variant(rowwise(1), 0)], "0 rows"),
        ([Variant(rowwise(1), 1, (64,), ())], "1 row sizes for 2 buffers"),
        ([Variant(rowwise(2), 2), Variant(diamond(1), 1)], "differ in their inputs"),
        ([Variant(plan([Step("bw_run", 1, ())], []))], "cannot be the name of a kernel"),
        ([Variant(plan([Step("a-b", 1, ())], []))], "cannot be the name of a kernel"),
        ([Variant(plan([Step("k", 1, ()), Step("k", 1, (), scratch_bytes=4)], []))], "is called with"),
    ],
)
def test_what_does_not_fit_is_refused(variants: list[Variant], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        main_c(variants)
