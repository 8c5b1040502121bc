"""Loading and calling: values, threads, batches, checks of inputs, memory, concurrency, speed."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.link import link
from bitwright.codegen.main_c import Variant, main_c
from bitwright.codegen.plan import Arg, Buffer, Step, plan
from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.runtime.artifact import Contents
from bitwright.runtime.manifest import Manifest, StepRow, TensorSpec
from bitwright.runtime.native import aligned, check_host, host_features
from bitwright.runtime.ports import input_address
from bitwright.runtime.program import Program

Make = Callable[..., Contents]
Reference = Callable[..., tuple[Any, Any]]


def rows(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((n, 8)).astype(np.float32)


@pytest.fixture
def program(make: Make) -> Program:
    return Program(make())


def check(got: tuple[Any, ...], want: tuple[Any, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_call_gives_the_outputs_in_order(program: Program, reference: Reference, threads: int) -> None:
    for seed in range(30):
        check(program(rows(4, seed), threads=threads), reference(rows(4, seed)))
    assert (program.input_names, program.output_names) == (("x",), ("y", "h"))
    check(program(x=rows(4)), reference(rows(4)))
    assert "net(x: f32[4, 8]) -> (y: f32[4, 8], h: f32[4, 8])" in repr(program)


def test_threads_are_set_once_or_per_call(program: Program) -> None:
    program.threads = 3
    assert program.threads == 3
    assert Program(program._contents, threads=2).threads == 2
    wrong: Any
    for wrong in (0, -1, 5000, 1.5, True):
        with pytest.raises(InvalidInput, match="threads must be a whole number"):
            program.threads = wrong
        with pytest.raises(InvalidInput, match="threads must be"):
            program(rows(4), threads=wrong)


@pytest.mark.parametrize("chunks", [(1,), (4,), (1, 4, 16), (6,)])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_batch_runs(make: Make, reference: Reference, chunks: tuple[int, ...], threads: int) -> None:
    program = Program(make(chunks=chunks), threads=threads)
    for n in (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 33):
        got = program(rows(n, n))
        assert got[0].shape == (n, 8)
        check(got, reference(rows(n, n)))
    assert [a.shape for a in program(rows(0))] == [(0, 8), (0, 8)]


def test_inputs_are_taken_as_they_come(program: Program, reference: Reference) -> None:
    x = rows(4)
    want = reference(x)
    raw = np.zeros(4 * 8 * 4 + 1, np.uint8)
    misaligned = raw[1:].view(np.float32).reshape(4, 8)
    misaligned[:] = x
    readonly = x.copy()
    readonly.flags.writeable = False
    wide = np.zeros((4, 16), np.float32)
    wide[:, ::2] = x
    for value in (np.asfortranarray(x), misaligned, readonly, wide[:, ::2], x[::-1][::-1], x.tolist(), aligned(128)):
        if value is not None and getattr(value, "dtype", None) == np.uint8:
            value = value.view(np.float32).reshape(4, 8)
            value[:] = x
        check(program(value), want)


def test_any_alignment_of_elements_is_used_in_place(program: Program, reference: Reference) -> None:
    x = rows(4)
    for offset in range(0, 64, 4):
        place = aligned(4096)[offset : offset + x.nbytes].view(np.float32).reshape(4, 8)
        place[:] = x
        check(program(place), reference(x))


def test_kernels_may_ask_for_more_alignment(make: Make, reference: Reference) -> None:
    program = Program(make(input_alignment=64))
    (port,) = program._inputs
    keep: list[Any] = []
    for offset in range(0, 64, 4):
        place = aligned(4096)[offset : offset + 128].view(np.float32).reshape(4, 8)
        place[:] = rows(4)
        assert input_address(port, place, 1, keep) % 64 == 0
        check(program(place), reference(rows(4)))
    assert len(keep) == 15


class Tensor:
    """What of a torch tensor the runtime uses."""

    def __init__(self, array: Any, dtype: str) -> None:
        self.array, self.dtype = array, dtype

    def detach(self) -> Tensor:
        return self

    cpu = detach

    def float(self) -> Tensor:
        return Tensor(self.array.astype(np.float32), "torch.float32")

    def numpy(self) -> Any:
        if self.dtype == "torch.bfloat16":
            raise TypeError("unsupported ScalarType BFloat16")
        return self.array


class Exporter:
    """Has DLPack and nothing else."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_tensors_of_other_libraries_are_inputs(program: Program, reference: Reference) -> None:
    x = rows(4)
    check(program(Tensor(x, "torch.float32")), reference(x))
    check(program(Exporter(x)), reference(x))


def identity(dtype: str, nbytes: int, shape: tuple[int, ...], kernels: bytes, **fields: Any) -> Program:
    p = plan([], [Buffer("x", nbytes, "input")], ["x"])
    spec: dict[str, Any] = {"dtype": dtype, "shape": shape}
    manifest = Manifest(
        inputs=(TensorSpec(name="x", **spec),), outputs=(TensorSpec(name="y", **spec),),
        weights_bytes=p.weights_bytes, steps=(StepRow(label="copy", kernel="bw_copy"),), **fields,
    )  # fmt: skip
    library = link({"k": kernels}, main_c([Variant(p)]), openmp=False)
    return Program(Contents(manifest, "", library, np.zeros(p.weights_bytes, np.uint8)))


def test_every_number_format_passes(kernels: bytes) -> None:
    for dtype in ("f32", "f64", "f16", "bf16", "s8", "u8", "s32", "s64", "bool", "s4", "ternary", "f4m3"):
        spec = TensorSpec(name="x", dtype=dtype, shape=(3, 5))
        program = identity(dtype, 15 * spec.itemsize, (3, 5), kernels)
        x = np.arange(15).reshape(3, 5).astype(program._inputs[0].dtype)
        y = program(x)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(x, y)
    program = identity("bf16", 8, (4,), kernels)
    x = np.array([1, 2.5, -3, 4], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(program(Tensor(x, "torch.bfloat16")), x)


def test_scalars_and_empty_arrays_pass(kernels: bytes) -> None:
    assert identity("f32", 4, (), kernels)(2.5) == np.float32(2.5)
    assert identity("f32", 0, (0, 3), kernels)(np.zeros((0, 3), np.float32)).shape == (0, 3)


def test_outputs_are_aligned_and_belong_to_the_caller(program: Program) -> None:
    first, second = program(rows(4))[0], program(rows(4, 1))[0]
    assert not np.array_equal(first, second)
    assert first.ctypes.data % 64 == 0
    assert first.flags.writeable
    assert first.flags.c_contiguous


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"input 'x' is missing; expected 1 input \(x: f32\[4, 8\]\)"),
        ((rows(4), rows(4)), {}, "got 2 inputs"),
        ((rows(4),), {"x": rows(4)}, "given twice"),
        ((), {"X": rows(4)}, "no input is called 'X'"),
        ((rows(4).astype(np.float64),), {}, r"'x': expected f32\[4, 8\], got float64\[4, 8\]; convert .*'float32'"),
        ((rows(4).astype(">f4"),), {}, "got >f4"),
        ((rows(5),), {}, r"'x': expected f32\[4, 8\], got float32\[5, 8\]$"),
        ((rows(4).ravel(),), {}, r"got float32\[32\]"),
        (([[1, 2], [3]],), {}, "cannot be read as an array"),
        ((None,), {}, "got object"),
        (("text",), {}, "expected f32"),
    ],
)
def test_wrong_inputs_are_named(program: Program, args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        program(*args, **kwargs)


def test_batches_must_fit(make: Make) -> None:
    program = Program(make(chunks=(4,)))
    with pytest.raises(InvalidInput, match=r"expected f32\[b, 8\], got float32\[4, 9\]"):
        program(np.zeros((4, 9), np.float32))
    contents = make(chunks=(4,))
    two = contents.manifest.model_copy(
        update={"inputs": (*contents.manifest.inputs, TensorSpec(name="k", dtype="f32", shape=("2*b",)))}
    )
    program = Program(Contents(two, "", contents.library, contents.weights))
    program(rows(4), np.zeros(8, np.float32))
    with pytest.raises(InvalidInput, match="input 'k' has batch b = 3, an input before it has 4"):
        program(rows(4), np.zeros(6, np.float32))
    with pytest.raises(InvalidInput, match=r"'k': expected f32\[2\*b\], got float32\[5\]"):
        program(rows(4), np.zeros(5, np.float32))


def test_many_python_threads_may_call_at_once(make: Make, reference: Reference) -> None:
    program = Program(make(chunks=(16,), depth=20))

    def work(seed: int) -> None:
        x = rows(40 + seed, seed)
        want = reference(x, 20)
        for i in range(20):
            check(program(x, threads=1 + (seed + i) % 2), want)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(program._pool) <= 8


def test_closing_waits_for_calls_in_flight(make: Make, reference: Reference) -> None:
    program = Program(make(chunks=(16,), depth=20))
    x = rows(4000)
    want = reference(x, 20)
    results: list[Any] = []
    started = threading.Event()

    def work() -> None:
        started.set()
        results.append(program(x))

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    time.sleep(0.002)
    program.close()
    thread.join()
    gc.collect()
    check(results[0], want)
    for use in (lambda: program(x), lambda: program.save("x.bw"), lambda: program.profile(x)):
        with pytest.raises(BitwrightError, match="'net' is closed"):
            use()
    program.close()


def mapped(word: str) -> int:
    return Path("/proc/self/maps").read_text().count(word)


def test_closing_unmaps_code_and_weights(make: Make, tmp_path: Path) -> None:
    Program(make()).save(tmp_path / "unmapped.bw")
    before = mapped("bitwright-program")
    for _ in range(5):
        with Program.load(tmp_path / "unmapped.bw", threads=2) as program:
            program(rows(4))
            assert mapped("unmapped.bw") == 1
            assert mapped("bitwright-program") > before
    del program
    gc.collect()
    assert mapped("unmapped.bw") == 0
    assert mapped("bitwright-program") == before
    descriptors = len(os.listdir("/proc/self/fd"))
    programs = [Program.load(tmp_path / "unmapped.bw") for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 5  # each map keeps its file
    del programs


def test_programs_that_differ_do_not_get_each_others_code(make: Make, reference: Reference) -> None:
    programs = {depth: Program(make(depth=depth)) for depth in (1, 2, 3)}
    for depth, program in programs.items():
        check(program(rows(4)), reference(rows(4), depth))


def test_saving_and_loading_keep_everything(make: Make, reference: Reference, tmp_path: Path) -> None:
    Program(make(chunks=(1, 4))).save(tmp_path / "a.bw")
    program = Program.load(tmp_path / "a.bw")
    check(program(rows(9)), reference(rows(9)))
    assert program.graph == "graph @net"
    assert [row.name for row in program.report.layers] == ["fc0", "fc1", "fc2"]
    program.save(tmp_path / "b.bw")
    assert (tmp_path / "a.bw").read_bytes() == (tmp_path / "b.bw").read_bytes()
    program.save(tmp_path / "a.bw")  # over the file it is mapped from
    check(program(rows(9)), reference(rows(9)))
    check(Program.load(tmp_path / "a.bw")(rows(9)), reference(rows(9)))


def test_programs_can_be_pickled_and_copied(make: Make, reference: Reference, tmp_path: Path) -> None:
    Program(make(), threads=2).save(tmp_path / "p.bw")
    program = Program.load(tmp_path / "p.bw", threads=2)
    for other in (pickle.loads(pickle.dumps(program)), copy.deepcopy(program), Program(program.contents)):
        check(other(rows(4)), reference(rows(4)))
    assert pickle.loads(pickle.dumps(program)).threads == 2


def test_profile_names_every_step(make: Make) -> None:
    program = Program(make(chunks=(4,)))
    times = program.profile(rows(8), repeats=3, threads=2)
    assert [t.label for t in times] == ["fc0", "fc1", "fc2", "residual", "output 1: copy of h2"][: len(times)]
    assert all(0 < t.best <= t.seconds < 0.1 for t in times)
    with pytest.raises(InvalidInput, match="repeats"):
        program.profile(rows(8), repeats=0)


def test_reading_past_the_end_of_an_input_never_leaves_its_page(kernels: bytes) -> None:
    import mmap

    p = plan(
        [Step("overread", 16, (Arg("x"), Arg("y", access="w")))], [Buffer("x", 512, "input"), Buffer("y", 512)], ["y"]
    )
    spec: dict[str, Any] = {"dtype": "f32", "shape": (16, 8)}
    manifest = Manifest(
        inputs=(TensorSpec(name="x", **spec),), outputs=(TensorSpec(name="y", **spec),),
        weights_bytes=p.weights_bytes, steps=(StepRow(label="o", kernel="overread"),),
    )  # fmt: skip
    library = link({"k": kernels}, main_c([Variant(p)]), openmp=False)
    program = Program(Contents(manifest, "", library, np.zeros(p.weights_bytes, np.uint8)))
    import ctypes

    area = mmap.mmap(-1, 8192)
    base = np.frombuffer(area, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(base.ctypes.data + 4096), 4096, 0) == 0
    x = base[4096 - 512 : 4096].view(np.float32).reshape(16, 8)
    x[:] = rows(16)
    np.testing.assert_array_equal(program(x), rows(16))
    assert libc.mprotect(ctypes.c_void_p(base.ctypes.data + 4096), 4096, 3) == 0


def test_a_processor_that_lacks_features_is_refused(make: Make) -> None:
    with pytest.raises(InvalidInput, match=r"features that this machine lacks: amx-imaginary;"):
        Program(make(features=("avx", "amx-imaginary")))
    library = make(features=("sse9",))
    quiet = library.manifest.model_copy(update={"features": ()})
    with pytest.raises(InvalidInput, match="lacks: sse9"):
        Program(Contents(quiet, "", library.library, library.weights))
    with pytest.raises(InvalidInput, match=r"the program is for riscv64, this machine is"):
        check_host((), "riscv64")
    have = host_features()
    if have is not None and "avx512vnni" in have:
        check_host(["avx512vnni", "sse4.2", "avx2", "fma", "bmi", "lzcnt"])


def test_libraries_that_do_not_fit_are_refused(make: Make, tmp_path: Path) -> None:
    good = make()
    other = make(depth=2)
    for library, message in (
        (b"not elf", "not an ELF library"),
        (b"\x7fELF" + bytes(500), "cannot be loaded here"),
        (b"\x7fELF\x02\x01", "is truncated"),
        (good.library[:3000], "is truncated"),
        (other.library, "program.so has steps 3, the manifest says 4"),
    ):
        with pytest.raises(InvalidInput, match=message):
            Program(Contents(good.manifest, "", library, good.weights))
    (tmp_path / "n.c").write_text("int nothing(void) { return 0; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "n.c", "-o", "n.so"], cwd=tmp_path, check=True)
    with pytest.raises(InvalidInput, match="not a bitwright program"):
        Program(Contents(good.manifest, "", (tmp_path / "n.so").read_bytes(), good.weights))
    (tmp_path / "v.c").write_text("int bw_abi_version = 9; int bw_info, bw_run, bw_profile;\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "v.c", "-o", "v.so"], cwd=tmp_path, check=True)
    with pytest.raises(InvalidInput, match="has ABI 9, this bitwright calls 1"):
        Program(Contents(good.manifest, "", (tmp_path / "v.so").read_bytes(), good.weights))


def test_without_memfd_a_temporary_file_does(make: Make, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    check(Program(make())(rows(4)), reference(rows(4)))


def test_a_call_costs_little(make: Make) -> None:
    program = Program(make(depth=1))
    x = rows(4)
    best = min(timeit.repeat(lambda: program(x), number=500, repeat=20)) / 500
    assert best < 20e-6, f"{best * 1e6:.1f} us"


SCRIPT = """
import os, sys, time
start = time.process_time()
from bitwright.runtime.program import Program
import numpy as np
ready = time.process_time()
program = Program.load(sys.argv[1])
loaded = time.process_time()
x = np.ones((4, 8), np.float32)
want = [a.tobytes() for a in program(x, threads=2)]
heavy = [m for m in ("torch", "onnx", "tvm", "tvm_ffi", "matplotlib", "rich") if m in sys.modules]
assert not heavy, heavy
assert "GOMP_SPINCOUNT" not in os.environ
own = time.process_time(); time.sleep(0.05); own = time.process_time() - own
child = os.fork()
if child == 0:
    same = [a.tobytes() for a in program(x, threads=2)] == want   # would hang if it used the lost threads
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
print(ready - start, loaded - ready, own)
"""


def test_loading_needs_no_compiler_and_idle_threads_sleep_and_forks_work(make: Make, tmp_path: Path) -> None:
    Program(make()).save(tmp_path / "p.bw")
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path / "p.bw")],
        capture_output=True, text=True, env=env, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    _, loading, idle = map(float, run.stdout.split())
    assert loading < 0.1
    assert idle < 0.02
