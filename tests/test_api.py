"""The Python interface as the README shows it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.runtime.report import Report

Array = np.ndarray[Any, np.dtype[Any]]


class TwoHeads(nn.Module):
    """A small perceptron with two results."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.left, self.right = nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.body(x))
        return self.left(h), self.right(h)


class Sum(nn.Module):
    """One result of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y: Tensor = self.fc(x) * scale
        return y


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def close(got: Any, want: Tensor) -> None:
    assert isinstance(got, np.ndarray)
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-5)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x[b, 16] -> Gemm -> Relu -> y[b, 8], written with the onnx package."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((8, 16)).astype(np.float32), "c": rng.standard_normal(8).astype(np.float32)}
    nodes = [
        helper.make_node("Gemm", ["x", "w", "c"], ["h"], "fc", transB=1), helper.make_node("Relu", ["h"], ["y"], "act"),
    ]  # fmt: skip
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", d]) for n, d in (("x", 16), ("y", 8))]
    stored = [numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "mlp", ports[:1], ports[1:], stored)
    path = tmp_path_factory.mktemp("api") / "mlp.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def reference(path: Path, x: Array) -> Array:
    import onnx
    from onnx import numpy_helper

    w, c = (numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer)
    result: Array = np.maximum(x @ w.T + c, 0)
    return result


# --- models ------------------------------------------------------------------------------------------------------


def test_a_module_with_example_inputs() -> None:
    module = Sum()
    program = bw.compile(module, example_inputs=(X, torch.ones(8)))
    close(program(X, torch.full((8,), 2.0)), module(X, torch.full((8,), 2.0)))


def test_one_example_input_need_not_be_a_tuple() -> None:
    module = nn.Linear(16, 3)
    close(bw.compile(module, example_inputs=X)(X), module(X))


def test_an_exported_program() -> None:
    module = TwoHeads().eval()
    left, right = bw.compile(torch.export.export(module, (X,)))(X)
    close(left, module(X)[0])
    close(right, module(X)[1])


def test_a_captured_graph_stays_as_it_is() -> None:
    graph = bw.capture(Sum(), (X, torch.ones(8)))
    assert isinstance(graph, bw.Graph)
    before = graph.fingerprint
    bw.compile(graph, recipe="nm-mask{pattern=2:4}, int8", calibration=[(X.numpy(), np.ones(8, np.float32))])
    assert graph.fingerprint == before


@pytest.mark.parametrize("kind", ["path", "text", "proto", "graph"])
def test_onnx_as_path_or_proto(onnx_file: Path, kind: str) -> None:
    import onnx

    model: Any = {"path": onnx_file, "text": str(onnx_file)}.get(kind)
    if model is None:
        model = onnx.load(onnx_file) if kind == "proto" else bw.load_onnx(onnx_file)
    program = bw.compile(model)
    assert (program.input_names, program.output_names) == (("x",), ("y",))
    np.testing.assert_allclose(program(X.numpy()), reference(onnx_file, X.numpy()), atol=1e-5)


def test_a_text_graph_and_its_weights(tmp_path: Path) -> None:
    from bitwright.ir.text import show

    module = nn.Linear(16, 8)
    graph = bw.capture(module, X)
    (tmp_path / "g.bw-ir").write_text(show(graph))
    graph.weights.save(tmp_path / "g.safetensors")
    close(bw.compile(tmp_path / "g.bw-ir")(X), module(X))


def test_an_array_file_calibrates(onnx_file: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    want = reference(onnx_file, x)
    for data in (tmp_path / "x.npz", {"x": x}, x, [x[:32], x[32:]], [(x,)], [{"x": x}], torch.from_numpy(x)):
        got = bw.compile(onnx_file, recipe="int8", calibration=data)(x)
        assert np.abs(got - want).max() < 0.02 * np.ptp(want)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(x)), batch_size=16)
    assert np.abs(bw.compile(onnx_file, recipe="int8", calibration=loader)(x) - want).max() < 0.02 * np.ptp(want)


def test_symbolic_sizes_are_fixed_by_name(onnx_file: Path) -> None:
    program = bw.compile(onnx_file, sizes={"b": 4})
    assert program.inputs[0].shape == (4, 16)
    np.testing.assert_allclose(program(X.numpy()), reference(onnx_file, X.numpy()), atol=1e-5)


# --- programs ----------------------------------------------------------------------------------------------------


def test_several_outputs_are_a_tuple_in_graph_order() -> None:
    module = TwoHeads()
    program = bw.compile(module, example_inputs=X)
    made = program(X)
    assert isinstance(made, tuple)
    assert len(program.output_names) == 2
    for got, want in zip(made, module(X), strict=True):
        close(got, want)


def test_inputs_by_order_and_by_name() -> None:
    module, scale = Sum(), torch.linspace(0, 1, 8)
    program = bw.compile(module, example_inputs=(X, scale))
    assert program.input_names == ("x", "scale")
    want = module(X, scale)
    for got in (
        program(X, scale),
        program(x=X, scale=scale),
        program(X, scale=scale.numpy()),
        program(X.numpy(), scale),
    ):
        close(got, want)
    assert [(t.name, t.dtype, t.shape) for t in program.inputs] == [("x", "f32", (4, 16)), ("scale", "f32", (8,))]


def test_save_and_load(tmp_path: Path) -> None:
    module = TwoHeads()
    program = bw.compile(module, example_inputs=X, recipe="int8", calibration=[X])
    program.save(tmp_path / "m.bw")
    assert [p.name for p in tmp_path.iterdir()] == ["m.bw"]
    loaded = bw.load(tmp_path / "m.bw")
    assert isinstance(loaded, bw.Program)
    for a, b in zip(loaded(X), program(X), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (loaded.input_names, loaded.output_names) == (program.input_names, program.output_names)
    assert loaded.report.to_dict() == program.report.to_dict()
    assert loaded.graph == program.graph


def test_the_report(tmp_path: Path) -> None:
    program = bw.compile(
        TwoHeads(), example_inputs=X, recipe="nm-mask{pattern=2:4 only=body}, int8", calibration=[X], measure=True
    )
    report = program.report
    assert {x.op.split("+")[0] for x in report.layers} >= {"int-linear"} or report.layers
    assert all(x.kernel and x.reason is not None for x in report.layers)
    assert all(x.measured_seconds is not None for x in report.layers)
    names = [p.name for p in report.passes]
    assert names.index("nm-mask") < names.index("quantize-int8") < names.index("lower-to-integer")
    assert all(p.seconds >= 0 for p in report.passes)
    assert report.refusals == [] or all(r.reason for r in report.refusals)
    data = report.to_dict()
    assert Report.from_dict(json.loads(json.dumps(data))) == report
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "nm-mask" in page


def test_torch_compile() -> None:
    torch._dynamo.reset()
    module = TwoHeads().eval()
    with torch.no_grad():
        left, right = torch.compile(module, backend="bitwright")(X)
        torch.testing.assert_close((left, right), module(X), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_progress_and_dumps(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    bw.compile(
        Sum(), example_inputs=(X, torch.ones(8)), dump=tmp_path / "dump", cache_dir=tmp_path / "cache",
        progress=lambda text, share: seen.append((text, share)),
    )  # fmt: skip
    assert seen
    assert all(0 <= share <= 1 for _, share in seen)
    assert any(text.startswith("compile ") for text, _ in seen)
    numbered = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert numbered
    assert all(n[0].isdigit() for n in numbered)


def test_the_same_model_gives_the_same_file(tmp_path: Path) -> None:
    """Apart from what was measured while compiling."""
    first, again = (bw.compile(TwoHeads(), example_inputs=X).contents for _ in range(2))
    assert first.graph == again.graph
    assert first.library == again.library
    assert first.manifest == again.manifest
    np.testing.assert_array_equal(first.weights, again.weights)


def test_advise_and_optimize_and_verify() -> None:
    rows = bw.advise(TwoHeads(), "x86-avx512-vnni", example_inputs=X)
    assert [r.origin.split()[0] for r in rows] == ["body", "left", "right"] or len(rows) == 3
    assert sum(r.share for r in rows) == pytest.approx(1)
    graph, report = bw.optimize(bw.capture(TwoHeads(), X), "nm-mask{pattern=2:4}")
    assert [r.name for r in report.rows] == ["nm-mask"]
    assert sum(t.encoding is not None for t in graph.types.values()) == 3
    program = bw.compile(TwoHeads(), example_inputs=X)
    assert bw.verify(program, TwoHeads(), {"x": X.numpy()}, example_inputs=X).first_bad == ""


def test_errors_have_one_base() -> None:
    assert issubclass(bw.errors.Unsupported, bw.errors.BitwrightError)
    assert issubclass(bw.errors.InvalidInput, bw.errors.BitwrightError)


LIGHT = """
import sys
import bitwright as bw
heavy = {"torch", "onnx", "tvm"} & set(sys.modules)
assert not heavy, heavy
program = bw.load(sys.argv[1])
import numpy as np
y = program(np.zeros((4, 16), np.float32))
report = program.report
report.to_dict()
heavy = {"torch", "onnx", "tvm", "tvm_ffi", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_saved_program_runs_without_torch_onnx_and_tvm(tmp_path: Path) -> None:
    bw.compile(nn.Linear(16, 8), example_inputs=X).save(tmp_path / "m.bw")
    command = [sys.executable, "-c", LIGHT, str(tmp_path / "m.bw")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_exist() -> None:
    for name in bw.__all__:
        assert getattr(bw, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        _ = bw.compil
