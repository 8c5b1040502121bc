"""Models compiled for GPUs and run by the emulator: the reference's values layer by layer, integers bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import bitwright as bw
from bitwright.cli import app
from bitwright.cli_lists import gpu_rows
from bitwright.codegen.targets import resolve
from bitwright.emulation import emulate
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.runtime.cuda import CudaProgram
from tests.digits_networks import Depthwise, Plain, data
from tests.zoo import ZOO

SPARSE = "nm-mask{pattern=2:4}, int8"


def zoo(name: str) -> tuple[Graph, list[Any]]:
    net, inputs = ZOO[name]("tiny")[:2]
    return bw.capture(net, inputs), [tuple(i.numpy() for i in inputs)]


@pytest.mark.parametrize("target", ["cuda-sm80", "cuda-sm90"])
@pytest.mark.parametrize("recipe", ["float", "int8", SPARSE])
def test_digits_cnn(target: str, recipe: str) -> None:
    """Integer results are those of the processor's program, bit for bit, and their certificates hold."""
    images = data()
    graph = bw.capture(Plain().eval(), (images.x[:4],))
    common: dict[str, Any] = {"recipe": recipe, "calibration": images.batches(2), "batch": 4}
    program, here = (bw.compile(graph, target=t, **common) for t in (target, "x86-portable"))
    assert isinstance(program, CudaProgram)
    x = images.test_x[:4].numpy()
    got, want = emulate(program)(x), here(x)
    if recipe == "float":
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(got, want)
        told = bw.verify(emulate(program), graph, [x], calibration=common["calibration"])
        assert not told.first_bad
        assert told.certificates
        assert not told.bad_certificates


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("bert_base", "int8"), ("bert_base", "f16"), ("llama", "int8"), ("llama", "weight-only"), ("llama", "bf16")],
)
def test_transformers(name: str, recipe: str) -> None:
    """Attention's probabilities in half precision move some codes by one step, and layers behind carry that on."""
    graph, batches = zoo(name)
    program = emulate(bw.compile(graph, target="cuda-sm90", recipe=recipe, calibration=batches))
    told = bw.verify(program, graph, batches[0], calibration=batches, bound=0.03)
    assert not told.first_bad
    assert not told.bad_certificates


def test_the_command_line_compiles_shows_and_emulates(tmp_path: Path) -> None:
    images = data()
    model, program, inputs, outputs = (tmp_path / n for n in ("net.onnx", "net.bw", "x.npz", "y.npz"))
    graph = bw.capture(Plain().eval(), (images.x[:4],))
    bw.to_onnx(graph, model)
    np.savez(inputs, x=images.x[:4].numpy())

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bitwright.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    options = ["--target", "cuda-sm90", "--recipe", "int8", "--calibrate", str(inputs), "-o", str(program)]
    made = run("compile", str(model), *options)
    assert made.returncode == 0, made.stderr
    shown = run("inspect", str(program))
    assert shown.returncode == 0, shown.stderr
    assert "cuda-sm90" in shown.stdout
    done = run("run", str(program), "--emulate", "--input", str(inputs), "--output", str(outputs))
    assert done.returncode == 0, done.stderr
    here = bw.compile(graph, target="x86-portable", recipe="int8", calibration=[(images.x[:4].numpy(),)])
    np.testing.assert_array_equal(next(iter(np.load(outputs).values())), here(images.x[:4].numpy()))
    plain = run("run", str(program), "--input", str(inputs), "--output", str(outputs))
    assert plain.returncode == 2
    assert "NVIDIA" in plain.stderr
    assert "Traceback" not in plain.stderr


def test_a_gpu_says_what_it_declares() -> None:
    rows = dict(gpu_rows(resolve("cuda-sm90")))
    assert rows["s8 x s8 to s32"] == "1,979 Top/s"
    assert "f16: 2:4 x1.5" in rows["sparse patterns, gain over dense"]
    done = CliRunner().invoke(app, ["targets", "show", "cuda-sm90"])
    assert done.exit_code == 0
    assert "sm_90a" in done.stdout
    assert "cuda-sm80" in CliRunner().invoke(app, ["targets"]).stdout


def test_a_gpu_program_is_no_program_of_the_processor(tmp_path: Path) -> None:
    graph = bw.capture(Depthwise().eval(), (data().x[:1],))
    program = bw.compile(graph, target="cuda-sm80")
    program.save(tmp_path / "m.bw")
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InvalidInput, match="this machine has no NVIDIA"):
        bw.load(tmp_path / "m.bw")
    assert np.isfinite(emulate(tmp_path / "m.bw")(data().test_x[:1].numpy())).all()
