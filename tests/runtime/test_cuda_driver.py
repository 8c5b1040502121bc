"""The driver calls of the runtime, through the real cuda-bindings, against a library that stands for the driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bitwright as bw
from bitwright.codegen.cuda.emulator import Emulated, _compiled
from bitwright.ir.text import parse
from bitwright.ir.weights import Weights
from bitwright.runtime.artifact import read
from bitwright.runtime.cuda import _kernels

TEXT = """
graph @net (%x: f32[b, 3]) -> (y = %y, x2 = %x) level=graph {
  %w = weight {ref="w"} : f32[5, 3]
  %h = linear(%x, %w) : f32[b, 5]
  %y = softmax(%h) {axis=1} : f32[b, 5]
}
"""
W = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
SCRIPT = """
import sys
import numpy as np
from bitwright.runtime.program import Program
program = Program.load(sys.argv[1])
for rows in (1, 4, 7):
    x = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
    y, same = program(x)
    np.savez(f"{sys.argv[2]}/{rows}.npz", x=x, y=y, same=same)
recorded = program.record(np.zeros((4, 3), np.float32))
recorded.inputs[0].fill(x[:4])
recorded.replay()
np.savez(f"{sys.argv[2]}/replayed.npz", x=x[:4], y=recorded.outputs[0].numpy(), same=recorded.outputs[1].numpy())
print(recorded.seconds(), {round(s.seconds, 6) for s in program.profile(x[:4], repeats=2)})
print([m for m in ("torch", "tvm") if m in sys.modules])
program.close()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program, the driver's stand-in, and the kernels it runs."""
    where = tmp_path_factory.mktemp("driver")
    bw.compile(parse(TEXT, Weights({"w": W})), target="cuda-sm90", batch=4).save(where / "net.bw")
    contents = read(where / "net.bw")
    texts = {name: text for name, (_, text) in _kernels(contents).items()}
    library = _compiled("\n".join(texts.values()), tuple(texts))
    Emulated("\n".join(texts.values()), list(texts))  # the same library loads
    (where / "kernels").write_text(str(library))
    counts = {x.kernel: len(x.args) for x in contents.manifest.launches if not x.nbytes}
    (where / "arguments").write_text("".join(f"{name} {n}\n" for name, n in counts.items()))
    source = Path(__file__).with_name("fake_cuda.c")
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", str(source), "-o", str(where / "libcuda.so.1"), "-ldl"]
    subprocess.run(command, check=True)
    return where


def run(folder: Path, script: str, *words: str, capability: str = "90") -> subprocess.CompletedProcess[str]:
    path = os.environ.get("LD_LIBRARY_PATH", "")
    env = os.environ | {
        "LD_LIBRARY_PATH": f"{folder}:{path}", "FAKE_KERNELS": (folder / "kernels").read_text(),
        "FAKE_ARGUMENTS": str(folder / "arguments"), "FAKE_CAPABILITY": capability,
    }  # fmt: skip
    command = [sys.executable, "-c", script, str(folder / "net.bw"), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_programs_run_are_recorded_and_timed(folder: Path, tmp_path: Path) -> None:
    done = run(folder, SCRIPT, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0.0015 {0.0015}", "[]"]
    for name in ("1", "4", "7", "replayed"):
        stored = np.load(tmp_path / f"{name}.npz")
        h = stored["x"] @ W.T
        want = np.exp(h - h.max(1, keepdims=True))
        np.testing.assert_allclose(stored["y"], want / want.sum(1, keepdims=True), rtol=1e-5)
        np.testing.assert_array_equal(stored["same"], stored["x"])


@pytest.mark.parametrize(
    ("capability", "said"),
    [
        ("80", r"net.bw: the program is compiled for sm_90a, device 0 \(Fake\) is sm_80: compile it for that device"),
        ("100", "device 0 (Fake) is sm_100"),
    ],
)
def test_another_generation_is_refused(folder: Path, capability: str, said: str) -> None:
    done = run(
        folder,
        "import sys; from bitwright.runtime.program import Program; Program.load(sys.argv[1])",
        capability=capability,
    )
    assert done.returncode
    assert said.replace("\\", "") in done.stderr.splitlines()[-1]


def test_a_failing_kernel_names_the_drivers_error(folder: Path) -> None:
    script = """
import sys
import numpy as np
from bitwright.runtime.cuda_driver import CudaDriver
driver = CudaDriver("sm_90a")
try:
    driver.load({"k": (b"no cubin at all", "")})
except Exception as error:
    print(type(error).__name__, error)
try:
    CudaDriver("sm_90a", 3)
except Exception as error:
    print(type(error).__name__, error)
"""
    done = run(folder, script)
    assert done.stdout.splitlines() == [
        "BitwrightError the CUDA driver says CUDA_ERROR_INVALID_IMAGE: an error",
        "InvalidInput there is no device 3: this machine has 1 NVIDIA GPU",
    ], done.stderr  # fmt: skip
