"""Programs for GPUs on an emulated device: where arrays lie, chunks of a batch, recorded graphs, what goes wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

import bitwright as bw
from bitwright.gpu_emulation import EmulatedDriver
from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.ir.text import parse
from bitwright.ir.weights import Array, Weights
from bitwright.runtime.artifact import Contents, read
from bitwright.runtime.cuda import CudaProgram, Recorded
from bitwright.runtime.cuda_driver import CudaDriver, runs_on
from bitwright.runtime.cuda_memory import DeviceArray
from bitwright.runtime.program import Program

TEXT = """
graph @net (%x: f32[b, 3]) -> (y = %y, z = %z) level=graph {
  %w = weight {ref="w"} : f32[5, 3]
  %h = linear(%x, %w) : f32[b, 5]
  %z = relu(%h) : f32[b, 5]
  %y = softmax(%z) {axis=1} : f32[b, 5]
}
"""
W = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program for chunks of 4 rows."""
    made = bw.compile(parse(TEXT, Weights({"w": W})), target="cuda-sm80", batch=4)
    assert isinstance(made, CudaProgram)
    where = tmp_path_factory.mktemp("gpu") / "net.bw"
    made.save(where)
    return where


@pytest.fixture
def program(path: Path) -> CudaProgram:
    return CudaProgram(read(path), EmulatedDriver())


def want(x: Array) -> tuple[Array, Array]:
    z = np.maximum(x @ W.T, 0)
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True), z


def rows(count: int) -> Array:
    return np.random.default_rng(count).standard_normal((count, 3)).astype(np.float32)


def close(got: Any, x: Array) -> None:
    for g, w in zip(got, want(x), strict=True):
        np.testing.assert_allclose(np.asarray(g), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_any_number_of_rows_is_computed_in_chunks(program: CudaProgram, count: int) -> None:
    got = program(rows(count))
    assert all(isinstance(g, np.ndarray) for g in got)
    close(got, rows(count))


def test_no_rows_give_empty_results(program: CudaProgram) -> None:
    assert [g.shape for g in program(np.zeros((0, 3), np.float32))] == [(0, 5), (0, 5)]


def test_tensors_of_the_device_are_used_where_they_lie(program: CudaProgram) -> None:
    x = torch.from_numpy(rows(8))
    got = program.run(x)
    assert all(isinstance(g, DeviceArray) for g in got)
    shared = [from_dlpack(g) for g in got]
    assert [t.data_ptr() for t in shared] == [g.address for g in got]
    close(shared, rows(8))


def test_results_go_where_the_caller_wants_them(program: CudaProgram) -> None:
    x, out = torch.from_numpy(rows(8)), (torch.full((8, 5), 7.0), torch.full((8, 5), 7.0))
    program.run(x, out=out)
    close(out, rows(8))


def test_arrays_at_odd_addresses_are_copied_to_even_ones(program: CudaProgram) -> None:
    for count in (4, 6):
        x = torch.from_numpy(np.concatenate([[0], rows(count).reshape(-1)]).astype(np.float32))[1:].view(count, 3)
        out = [torch.zeros(5 * count + 1)[1:].view(count, 5) for _ in range(2)]
        assert x.data_ptr() % 16
        program.run(x, out=out)
        close(out, rows(count))


@pytest.mark.parametrize("count", [3, 4, 9])
def test_a_recorded_run_reads_its_arrays_anew(program: CudaProgram, count: int) -> None:
    x = torch.zeros(count, 3)
    recorded = program.record(x)
    y = [from_dlpack(o) for o in recorded.outputs]
    for seed in range(2):
        values = rows(count) + seed
        x.copy_(torch.from_numpy(values))
        recorded.replay()
        close(y, values)


def test_recording_copies_arrays_of_numpy_once(program: CudaProgram) -> None:
    recorded = program.record(np.zeros((4, 3), np.float32))
    recorded.inputs[0].fill(rows(4))
    recorded.replay()
    close([o.numpy() for o in recorded.outputs], rows(4))
    with pytest.raises(InvalidInput, match=r"expected float32\[4, 3\], got float64\[4, 3\]"):
        recorded.inputs[0].fill(np.zeros((4, 3)))


def test_every_step_can_be_looked_at(program: CudaProgram) -> None:
    traced = program.trace(rows(4))
    np.testing.assert_allclose(traced["z"], want(rows(4))[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(InvalidInput, match="trace needs a batch of 4, got 5"):
        program.trace(rows(5))


def test_an_emulated_program_has_no_times(program: CudaProgram) -> None:
    with pytest.raises(InvalidInput, match="cannot be timed"):
        program.profile(rows(4))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros((4, 3)), r"input 'x': expected f32\[b, 3\], got float64\[4, 3\]; convert it"),
        (torch.zeros(4, 2), r"input 'x': expected f32\[b, 3\], got float32\[4, 2\]"),
        (torch.zeros(3, 4).t(), r"input 'x' has gaps between its elements"),
        (torch.zeros(4, 3, requires_grad=True), "this array cannot be shared"),
    ],
)
def test_wrong_inputs_are_named(program: CudaProgram, value: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        program.run(value)


def test_wrong_outputs_and_streams_are_named(program: CudaProgram) -> None:
    x = torch.from_numpy(rows(4))
    with pytest.raises(InvalidInput, match="out has 1 arrays, the program 2 outputs"):
        program.run(x, out=[torch.zeros(4, 5)])
    with pytest.raises(InvalidInput, match="must be an array on the device"):
        program.run(x, out=[np.zeros((4, 5), np.float32)] * 2)
    with pytest.raises(InvalidInput, match="has 3 rows of the batch, the inputs have 4"):
        program.run(x, out=[torch.zeros(3, 5)] * 2)
    with pytest.raises(BitwrightError, match="a stream is a number or an object"):
        program.run(x, stream="first")


def test_a_closed_program_says_so(program: CudaProgram) -> None:
    program.close()
    with pytest.raises(BitwrightError, match="is closed"):
        program(rows(4))


def test_a_program_without_its_kernels_is_refused(path: Path) -> None:
    contents = read(path)
    with pytest.raises(InvalidInput, match="the program's kernels cannot be read"):
        CudaProgram(replace(contents, library=b"no zip"), EmulatedDriver()).opened()
    first = contents.manifest.launches[0].model_copy(update={"kernel": "k_lost"})
    manifest = contents.manifest.model_copy(update={"launches": (first, *contents.manifest.launches[1:])})
    with pytest.raises(InvalidInput, match="launches 'k_lost', which it does not contain"):
        CudaProgram(Contents(manifest, contents.graph, contents.library, contents.weights), EmulatedDriver()).opened()


def test_machines_without_a_gpu_are_told_what_is_missing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InvalidInput, match=r"net.bw: this machine has no NVIDIA (driver|GPU)"):
        Program.load(path)
    compiled = Program.compiled(read(path))  # can be looked at, saved and emulated
    assert compiled.report.target == "cuda-sm80"
    monkeypatch.setattr("bitwright.runtime.cuda_driver.find_spec", lambda name: None)
    import bitwright.runtime.cuda_driver as module

    module._bindings.cache_clear()
    with pytest.raises(InvalidInput, match=r'needs cuda-bindings: pip install "bitwright\[cuda\]"'):
        CudaDriver("sm_80")
    module._bindings.cache_clear()


def test_machine_code_runs_on_its_own_generation_only() -> None:
    assert runs_on("sm_80", (8, 0))
    assert runs_on("sm_80", (8, 9))
    assert not runs_on("sm_86", (8, 0))
    assert not runs_on("sm_80", (9, 0))
    assert runs_on("sm_90a", (9, 0))
    assert not runs_on("sm_90a", (10, 0))
    assert not runs_on("", (9, 0))


def test_running_needs_neither_torch_nor_tvm(path: Path) -> None:
    code = (
        "import sys; from bitwright.runtime.program import Program; from bitwright.runtime.artifact import read;"
        f"p = Program.compiled(read({str(path)!r})); print(p);"
        "print([m for m in ('torch', 'tvm', 'onnx', 'bitwright.codegen') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_recorded_runs_become_one_graph(program: CudaProgram) -> None:
    inputs = [torch.zeros(4, 3), torch.zeros(7, 3)]
    runs = [program.record(x) for x in inputs]
    both = Recorded.chained([*runs, runs[0]])
    for x in inputs:
        x.copy_(torch.from_numpy(rows(len(x))))
    both.replay()
    for i, x in enumerate(inputs):
        close([from_dlpack(o) for o in both.outputs[2 * i : 2 * i + 2]], rows(len(x)))
