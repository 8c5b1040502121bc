"""What bad input gets: one clear error before any work, nothing half-written, no traceback from the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import bitwright as bw
from bitwright.ir.errors import BitwrightError, InvalidInput, Unsupported
from bitwright.runtime.program import Program

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def onnx_model(nodes: list[Any] | None = None, weights: dict[str, Any] | None = None) -> bytes:
    """x[b, 16] -> y, by default a Gemm and a Relu."""
    rng = np.random.default_rng(0)
    weights = weights if weights is not None else {"w": rng.standard_normal((8, 16)).astype(np.float32)}
    nodes = nodes or [
        helper.make_node("Gemm", ["x", "w"], ["h"], "fc", transB=1),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", d]) for n, d in (("x", 16), ("y", 8))]
    graph = helper.make_graph(
        nodes, "g", ports[:1], ports[1:], [numpy_helper.from_array(v, k) for k, v in weights.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def program() -> Program:
    return bw.compile(mlp(), example_inputs=X)


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx_model())
    return path


def at_once(call: Callable[[], Any]) -> str:
    """The message of the error that ``call`` raises before any kernel is compiled."""
    with pytest.MonkeyPatch.context() as patch:

        def never(*_: Any, **__: Any) -> Any:
            raise AssertionError("kernels were compiled")

        patch.setattr("bitwright.assemble.build", never)
        with pytest.raises(BitwrightError) as caught:
            call()
    return str(caught.value)


# --- ONNX files --------------------------------------------------------------------------------------------------


def test_truncated_onnx(tmp_path: Path) -> None:
    data, path = onnx_model(), tmp_path / "m.onnx"
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        try:
            graph = bw.load_onnx(path)  # protobuf cannot see a cut between two fields
        except BitwrightError as error:
            assert str(error)  # noqa: PT017
        else:
            assert graph.nodes is not None
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidInput, match=r"m\.onnx"):
        bw.compile(path)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_flipped_bits_in_onnx_compile_or_are_refused(data: st.DataObject) -> None:
    raw = bytearray(onnx_model())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        path.write_bytes(raw)
        try:
            bw.compile(path, recipe="float")
        except BitwrightError:
            pass


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"PK\x03\x04 this is no model", b"hello\n" * 50], ids=range(4))
def test_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"m\.onnx|ONNX"):
        bw.compile(path)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"there is no file .*nope\.onnx"):
        bw.compile(tmp_path / "nope.onnx")
    with pytest.raises(InvalidInput):
        bw.compile(tmp_path)
    with pytest.raises(InvalidInput, match="cannot read"):
        bw.load(tmp_path / "nope.bw")
    (tmp_path / "m.bw").write_bytes(b"x")
    with pytest.raises(InvalidInput, match="already compiled; load it with"):
        bw.compile(tmp_path / "m.bw")


@pytest.mark.parametrize(
    "model", [None, 3, {"a": 1}, np.zeros(3), mlp], ids=["none", "number", "dict", "array", "function"]
)
def test_things_that_are_no_models(model: Any) -> None:
    with pytest.raises(InvalidInput, match=r"model|Module|module"):
        bw.compile(model, example_inputs=X)


def test_a_module_needs_example_inputs() -> None:
    with pytest.raises(InvalidInput, match="example_inputs"):
        bw.compile(mlp())


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights_are_named(bad: float) -> None:
    module = mlp()
    module.get_parameter("2.weight").data[3, 4] = bad
    message = at_once(lambda: bw.compile(module, example_inputs=X))
    assert "2.weight" in message
    assert ("NaN" if bad != bad else "infinit") in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_onnx_weights_are_named(bad: float, tmp_path: Path) -> None:
    w = np.ones((8, 16), np.float32)
    w[1, 2] = bad
    (tmp_path / "m.onnx").write_bytes(onnx_model(weights={"w": w}))
    message = at_once(lambda: bw.compile(tmp_path / "m.onnx"))
    assert "'w'" in message or "w:" in message or " w " in message
    assert ("NaN" if bad != bad else "infinit") in message


class Masked(nn.Module):
    """Adds minus infinity where a constant mask says so."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.triu(torch.full((4, 4), -torch.inf), 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x + self.mask, -1)


def test_infinities_in_masks_are_fine() -> None:
    x = torch.randn(4, 4)
    np.testing.assert_allclose(bw.compile(Masked(), example_inputs=x)(x), Masked()(x).numpy(), atol=1e-6)


class Empty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 16:] * 2


def test_empty_tensors_are_refused() -> None:
    with pytest.raises(Unsupported, match="has no elements"):
        bw.compile(Empty(), example_inputs=X)
    with pytest.raises(BitwrightError, match=r"no elements|empty"):
        bw.compile(mlp(), example_inputs=torch.zeros(0, 16))


# --- arguments ---------------------------------------------------------------------------------------------------


def _short(value: Any) -> str:
    return str(value) if isinstance(value, str | int | float) else type(value).__name__


CAPTURED = bw.capture(mlp(), X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "hots"}, "did you mean 'host'"),
        ({"target": "x86-avx5"}, "did you mean 'x86-avx2'"),
        ({"target": "zzz"}, "unknown target 'zzz'.*bitwright targets"),
        ({"recipe": "int9"}, "did you mean 'int8'"),
        ({"recipe": "nm-msk"}, "did you mean 'nm-mask'"),
        ({"recipe": "nm-mask{patern=2:4}"}, "no option 'patern'; did you mean 'pattern'"),
        ({"recipe": "nm-mask{pattern=4:2}"}, "4:2"),
        ({"recipe": "nm-mask{pattern=abc}"}, "abc"),
        ({"recipe": "nm-mask{pattern=2:4"}, "cannot read the pass list"),
        ({"recipe": "int8{x=1}"}, "no pass of int8 has an option"),
        ({"recipe": 3}, "recipe"),
        ({"recipe": [3]}, "recipe|pass"),
        ({"threads": 0}, "threads must be .*1.*, not 0"),
        ({"threads": -2}, "threads must be .*1.*, not -2"),
        ({"threads": 1.5}, "threads must be .*1.*, not 1.5"),
        ({"threads": 10**6}, "threads must be .*1.*, not 1000000"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"batch": -1}, "batch must be at least 1, not -1"),
        ({"sizes": {"seq": 4}}, "no symbolic size .*seq"),
        ({"recipe": "int8"}, "calibration"),
        ({"recipe": "int8", "calibration": []}, "calibration"),
        ({"recipe": "int8", "calibration": [{"y": X.numpy()}]}, "needs inputs .*'(x|input)'.* got .*y"),
        ({"recipe": "int8", "calibration": [(X, X)]}, "needs inputs .* got 2 arrays"),
        ({"recipe": "int8", "calibration": [X[:, :7]]}, r"calibration .* is 4x7; the model takes f32\[4, 16\]"),
        ({"recipe": "int8", "calibration": [X[0]]}, r"calibration .* is 16; the model takes f32\[4, 16\]"),
        ({"recipe": "int8", "calibration": [X[:3]]}, r"calibration .* is 3x16; the model takes f32\[4, 16\]"),
        ({"recipe": "int8", "calibration": [X * float("nan")]}, "calibration data for input .* contains NaN"),
        ({"recipe": "int8", "calibration": [X / 0]}, "calibration data for input .* contains NaN or infinity"),
        ({"recipe": "int8", "calibration": "nope.npz"}, "no calibration file or folder nope.npz"),
        ({"recipe": "int8", "calibration": 7}, "calibration"),
        ({"recipe": "int8", "calibration": [np.array([["a"] * 16] * 4)]}, "calibration"),
        ({"recipe": "int8", "calibration": [X[:0]]}, "calibration"),
    ],
    ids=lambda v: " ".join(f"{k}={_short(x)}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_mistakes_in_arguments(options: dict[str, Any], message: str) -> None:
    got = at_once(lambda: bw.compile(CAPTURED, **options))
    assert re.search(message, got, re.DOTALL), got


def test_symbolic_sizes_must_be_fixed() -> None:
    graph = bw.capture(mlp(), torch.randn(2, 5, 16), dynamic_shapes=({0: "b", 1: "seq"},))
    message = at_once(lambda: bw.compile(graph))
    assert "symbolic size 'seq' must be fixed to compile: pass sizes={'seq': ...}" in message
    assert "at least 1" in at_once(lambda: bw.compile(graph, sizes={"seq": 0}))
    assert "seq" in at_once(lambda: bw.compile(graph, sizes={"sq": 3}))
    assert bw.compile(graph, sizes={"seq": 3})(torch.randn(2, 3, 16)).shape == (2, 3, 8)


class Strange(nn.Module):
    """Two operators that nobody compiles."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.svdvals(x), torch.linalg.det(x @ x.transpose(0, 1))


def test_every_unsupported_operator_is_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as caught:
        bw.compile(Strange(), example_inputs=X)
    assert len(caught.value.problems) >= 2
    assert all(p.operator and p.place and p.why for p in caught.value.problems)
    nodes = [helper.make_node("Foo", ["x"], ["h"], "one"), helper.make_node("Bar", ["h"], ["y"], "two")]
    (tmp_path / "m.onnx").write_bytes(onnx_model(nodes, {}))
    with pytest.raises(BitwrightError) as both:
        bw.compile(tmp_path / "m.onnx")
    assert "Foo" in str(both.value)
    assert "Bar" in str(both.value)


# --- calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), r"is missing; expected 1 input \(.*f32\[4, 16\]\)"),
        ((X, X), r"got 2 inputs"),
        ((X[:3],), r"expected f32\[4, 16\], got float32\[3, 16\]"),
        ((X[0],), r"expected f32\[4, 16\], got float32\[16\]"),
        ((X.double(),), r"got float64\[4, 16\]; convert it with \.astype"),
        ((X.int(),), r"got int32\[4, 16\]; convert it with \.astype"),
        (("text",), "input"),
        ((None,), "input"),
        (([[1, 2], [3]],), "cannot be read as an array"),
    ],
    ids=range(9),
)
def test_wrong_inputs_of_a_call(program: Program, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        program(*args)


def test_wrong_names_and_threads_of_a_call(program: Program) -> None:
    name = program.input_names[0]
    with pytest.raises(InvalidInput, match=f"did you mean '{name}'"):
        program(**{name + "s": X})  # type: ignore[arg-type]
    for threads in (0, -1, True, "2"):
        with pytest.raises(InvalidInput, match="threads must be a whole number"):
            program(X, threads=threads)  # type: ignore[arg-type]


def test_nan_in_the_input_is_no_error(program: Program) -> None:
    x = X.clone()
    x[0, 0] = float("nan")
    y = program(x)
    assert np.isnan(y[0]).any()
    np.testing.assert_array_equal(y[1:], program(X)[1:])


# --- surroundings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["CC", "BITWRIGHT_CC"])
def test_a_missing_c_compiler_is_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITWRIGHT_CC", raising=False)
    monkeypatch.setenv(variable, "/no/such/compiler")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("kernels were compiled")

    monkeypatch.setattr("bitwright.codegen.build.compile_all", never)
    with pytest.raises(BitwrightError, match=r"no C compiler found \(tried /no/such/compiler\).*install gcc"):
        bw.compile(mlp(), example_inputs=X)


def test_a_c_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_CC", "false")
    with pytest.raises(BitwrightError, match="failed \\(false, exit 1\\)"):
        bw.compile(mlp(), example_inputs=X)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    made = bw.compile(mlp(), example_inputs=X, cache_dir=tmp_path / "file")
    assert made(X).shape == (4, 8)


def test_nothing_is_half_written(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BitwrightError, match="cannot write"):
        program.save(tmp_path / "no" / "such" / "folder.bw")
    with pytest.raises(BitwrightError, match="cannot write"):
        program.save(tmp_path)
    program.save(tmp_path / "m.bw")
    before = (tmp_path / "m.bw").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BitwrightError, match="No space left on device"):
        program.save(tmp_path / "m.bw")
    assert [p.name for p in tmp_path.iterdir()] == ["m.bw"]
    assert (tmp_path / "m.bw").read_bytes() == before


# --- command line ------------------------------------------------------------------------------------------------


def cli(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as a user starts it."""
    code = "from bitwright.cli import main; main()"
    env = os.environ | {"COLUMNS": "200"} | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert message in done.stderr, done.stderr


def test_the_command_line_gives_one_message_and_code_2(onnx_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.bw"
    calls = [
        cli("compile", onnx_file, "-o", out, "--recipe", "int8"),
        cli("compile", onnx_file, "-t", "hots", "-o", out),
    ]
    refused(calls[0], "calibration")
    refused(calls[1], "did you mean 'host'")
    refused(cli("compile", onnx_file, "-o", out, BITWRIGHT_CC="/no/such/cc"), "no C compiler found")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


def test_the_command_line_reads_no_broken_files(onnx_file: Path, tmp_path: Path) -> None:
    onnx_file.write_bytes(onnx_file.read_bytes()[:80])
    refused(cli("compile", onnx_file), "m.onnx")
    refused(cli("run", tmp_path / "nope.bw", "-i", tmp_path / "x.npz", "-o", tmp_path / "y.npz"), "cannot read")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


def test_unsupported_models_list_every_problem(tmp_path: Path) -> None:
    nodes = [helper.make_node("Foo", ["x"], ["h"], "one"), helper.make_node("Bar", ["h"], ["y"], "two")]
    (tmp_path / "m.onnx").write_bytes(onnx_model(nodes, {}))
    assert onnx.load_model_from_string(onnx_model(nodes, {})).graph.node[0].op_type == "Foo"
    done = cli("compile", tmp_path / "m.onnx")
    refused(done, "Foo")
    assert "Bar" in done.stderr
