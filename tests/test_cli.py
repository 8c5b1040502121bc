"""The command line as a user meets it: results in files, tables on stdout, one clear message and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitwright import cli, cli_io
from bitwright.ir.errors import InvalidInput
from bitwright.passes.pipelines import RECIPES
from bitwright.passes.registry import PASSES
from bitwright.runtime.report import Report

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["bitwright", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return run


def write_onnx(path: Path) -> Path:
    """x[b, 16] -> linear 32 -> relu -> linear 6."""
    rng = np.random.default_rng(0)
    shapes = {"fc1.weight": (32, 16), "fc1.bias": (32,), "fc2.weight": (6, 32), "fc2.bias": (6,)}
    weights = {k: (rng.standard_normal(s) / 4).astype(np.float32) for k, s in shapes.items()}
    nodes = [
        helper.make_node("Gemm", ["x", "fc1.weight", "fc1.bias"], ["h"], name="fc1", transB=1),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "fc2.weight", "fc2.bias"], ["y"], name="fc2", transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 6])
    stored = [numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "mlp", [x], [y], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, inputs for it, and the program compiled from them through the command line."""
    place = tmp_path_factory.mktemp("cli")
    write_onnx(place / "mlp.onnx")
    x = np.random.default_rng(1).standard_normal((64, 16)).astype(np.float32)
    np.savez(place / "x.npz", x=x)
    arguments = [
        "bitwright", "compile", str(place / "mlp.onnx"), "--recipe", "nm-mask{pattern=2:4}, int8",
        "--calibrate", str(place / "x.npz"), "-o", str(place / "mlp.bw"),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    return place


def test_compile_writes_the_program_and_nothing_else(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith("out")) == ["mlp.bw", "mlp.onnx", "x.npz"]


def test_inspect_shows_layers_and_passes(cli_run: Cli, folder: Path) -> None:
    done = cli_run("inspect", folder / "mlp.bw")
    assert done.code == 0, done.err
    for word in ("Layers", "2:4", "Passes", "nm-mask", "predicted"):
        assert word in done.out


def test_inspect_one_pass_with_its_diff(cli_run: Cli, folder: Path) -> None:
    done = cli_run("inspect", folder / "mlp.bw", "--pass", "nm-mask", "--diff")
    assert done.code == 0
    assert "fold-batch-norm" not in done.out
    assert "+  %" in done.out
    assert "nm<2:4" in done.out


def test_inspect_unknown_pass_suggests(cli_run: Cli, folder: Path) -> None:
    done = cli_run("inspect", folder / "mlp.bw", "--pass", "nm-msk")
    assert done.code == 2
    assert "did you mean 'nm-mask'" in done.err


def test_inspect_why_tells_all_about_a_layer(cli_run: Cli, folder: Path) -> None:
    names = [x.name for x in _report(folder).layers]
    done = cli_run("inspect", folder / "mlp.bw", "--why", names[0])
    assert done.code == 0
    assert names[0] in done.out
    assert "kernel" in done.out


def test_inspect_why_unknown_layer(cli_run: Cli, folder: Path) -> None:
    done = cli_run("inspect", folder / "mlp.bw", "--why", "nowhere")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "no layer is called 'nowhere'" in done.err


def test_inspect_html(cli_run: Cli, folder: Path, tmp_path: Path) -> None:
    done = cli_run("inspect", folder / "mlp.bw", "--html", tmp_path / "report.html")
    assert done.code == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_inspect_text_is_a_graph(cli_run: Cli, folder: Path) -> None:
    assert cli_run("inspect", folder / "mlp.bw", "--text").out.startswith("graph @")


def _report(folder: Path) -> Report:
    from bitwright.runtime.program import Program

    return Program.load(folder / "mlp.bw").report


def test_run_writes_outputs_by_name(cli_run: Cli, folder: Path, tmp_path: Path) -> None:
    done = cli_run("run", folder / "mlp.bw", "--input", folder / "x.npz", "--output", tmp_path / "y.npz")
    assert done.code == 0, done.err
    assert "y float32[64, 6]" in done.out
    assert [p.name for p in tmp_path.iterdir()] == ["y.npz"]
    with np.load(tmp_path / "y.npz") as made:
        assert made["y"].shape == (64, 6)


def test_run_refuses_inputs_of_another_name(cli_run: Cli, folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", xx=np.zeros(1), z=np.zeros(1))
    done = cli_run("run", folder / "mlp.bw", "-i", tmp_path / "bad.npz", "-o", tmp_path / "y.npz")
    assert done.code == 2
    assert "no array 'x'; did you mean 'xx'?" in done.err
    assert not (tmp_path / "y.npz").exists()


def test_bench_alone_and_by_layer(cli_run: Cli, folder: Path) -> None:
    done = cli_run("bench", folder / "mlp.bw", "--rounds", 2, "--layers")
    assert done.code == 0, done.err
    assert "median" in done.out
    assert "share" in done.out


def test_bench_against_onnxruntime(cli_run: Cli, folder: Path) -> None:
    done = cli_run(
        "bench", folder / "mlp.bw", "--against", "onnxruntime", "--model", folder / "mlp.onnx", "--rounds", 2
    )
    assert done.code == 0, done.err
    assert "onnxruntime" in done.out
    assert "time over bitwright's" in done.out


def test_bench_against_needs_the_model(cli_run: Cli, folder: Path) -> None:
    done = cli_run("bench", folder / "mlp.bw", "--against", "onnxruntime")
    assert done.code == 2
    assert "--model model.onnx" in done.err


def test_verify_compares_with_the_reference(cli_run: Cli, folder: Path) -> None:
    done = cli_run("verify", folder / "mlp.bw", folder / "mlp.onnx", "--input", folder / "x.npz")
    assert done.code == 0, done.out + done.err
    assert "every layer agrees with the reference" in done.out
    assert "against the model" in done.out


def test_verify_names_the_first_bad_layer(cli_run: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright import driver
    from bitwright.comparison import Comparison, Row

    rows = (Row("a", "", 1e-6, None, 1e-2), Row("b", "net.py:3", 0.5, 0.6, 1e-2), Row("c", "", 0.7, None, 1e-2))
    monkeypatch.setattr(driver, "verify", lambda *_, **__: Comparison(rows))
    done = cli_run("verify", folder / "mlp.bw", folder / "mlp.onnx", "--input", folder / "x.npz")
    assert (done.code, done.err) == (1, "")
    assert "first bad layer: b" in done.out


def test_advise_lists_layers(cli_run: Cli, folder: Path) -> None:
    done = cli_run("advise", folder / "mlp.onnx")
    assert done.code == 0, done.err
    assert "2:4" in done.out
    planned = cli_run("advise", folder / "mlp.onnx", "--budget", "size=0.3")
    assert planned.code == 0, planned.err
    assert "Plan for size=0.3" in planned.out


TEXT = """graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
  %w = weight {ref="fc.weight"} : f32[4, 8]
  %y = linear(%x, %w) : f32[2, 4]
}
"""


@pytest.fixture
def text_graph(tmp_path: Path) -> Path:
    from bitwright.ir.weights import Weights

    path = tmp_path / "g.bw-ir"
    path.write_text(TEXT)
    weight = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    Weights({"fc.weight": weight}).save(tmp_path / "g.safetensors")
    return path


def test_opt_text_in_text_out(cli_run: Cli, text_graph: Path) -> None:
    done = cli_run("opt", text_graph, "--passes", "nm-mask{pattern=2:4}")
    assert done.code == 0
    assert "nm<2:4, axis=1>" in done.out


def test_opt_output_is_input_again(cli_run: Cli, text_graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "masked.bw-ir"
    assert cli_run("opt", text_graph, "--passes", "nm-mask{pattern=2:4}", "-o", out).code == 0
    again = cli_run("opt", out, "--passes", "nm-mask{pattern=2:4}")
    assert (again.code, again.out) == (0, out.read_text())


def test_opt_prints_refusals_beside_the_graph(cli_run: Cli, text_graph: Path) -> None:
    done = cli_run("opt", text_graph, "--passes", "nm-mask{pattern=2:3}")
    assert (done.code, done.out) == (0, TEXT)
    assert "refused: nm-mask" in done.err


def test_opt_stop_after_and_dump(cli_run: Cli, text_graph: Path, tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    done = cli_run("opt", text_graph, "-p", "simplify, nm-mask", "--stop-after", 1, "--dump", dump)
    assert done.out == TEXT
    assert len(list(dump.iterdir())) == 2


def test_opt_needs_the_weights(cli_run: Cli, text_graph: Path) -> None:
    text_graph.with_suffix(".safetensors").unlink()
    done = cli_run("opt", text_graph, "-p", "nm-mask")
    assert done.code == 2
    assert "fc.weight" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "nope.onnx"), "nope.onnx"),
        (("compile", "model.txt"), "expected a model ending in"),
        (("inspect", "nope.bw"), "cannot read nope.bw"),
        (("compil",), "Did you mean 'compile'"),
        (("compile", "--tagret", "host"), "--target"),
        (("compile", "{onnx}", "--target", "hots"), "did you mean 'host'"),
        (("compile", "{onnx}", "--recipe", "int9"), "did you mean 'int8'"),
        (("compile", "{onnx}", "--recipe", "nm-mask{patern=2:4}"), "did you mean 'pattern'"),
        (("compile", "{onnx}", "--calibrate", "nope.npz"), "nope.npz"),
        (("compile", "{onnx}", "--size", "b"), "--size takes NAME=NUMBER"),
        (("compile", "{onnx}", "-o", "no/such/folder/m.bw"), "no folder"),
        (("bench", "x.bw", "--against", "onnxruntim"), "onnxruntime"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_2(
    cli_run: Cli, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = cli_run(*(a.replace("{onnx}", str(folder / "mlp.onnx")) for a in arguments))
    assert done.code == 2
    assert message in done.err


def test_damaged_files_get_one_message(cli_run: Cli, folder: Path, tmp_path: Path) -> None:
    for name in ("mlp.bw", "mlp.onnx", "x.npz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes()[:100])
    assert cli_run("inspect", tmp_path / "mlp.bw").code == 2
    assert cli_run("compile", tmp_path / "mlp.onnx").code == 2
    assert cli_run("compile", folder / "mlp.onnx", "-c", tmp_path / "x.npz", "-o", tmp_path / "y.bw").code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mlp.bw", "mlp.onnx", "x.npz"]


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bitwright", "inspect", "nope.bw", "--debug"])
    with pytest.raises(InvalidInput):
        cli.main()


def test_lists_come_from_the_code(cli_run: Cli) -> None:
    listed = cli_run("passes").out
    assert all(name in listed for name in PASSES)
    assert all(name in cli_run("recipes").out for name in RECIPES)
    assert "host" in cli_run("targets").out


def test_every_command_has_help(cli_run: Cli) -> None:
    import typer

    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {"compile", "inspect", "run", "bench", "opt", "targets", "passes", "recipes", "verify"} <= set(commands)
    for command in commands:
        assert "Usage: bitwright" in cli_run(command, "--help").out


def test_calibration_is_cut_into_batches_the_model_takes() -> None:
    from bitwright.ir.text import parse

    arrays: Arrays = {"x": np.zeros((70, 4))}
    free = parse("graph @g (%x: f32[b, 4]) -> (y = %x) level=graph {\n}\n")
    fixed = parse("graph @g (%x: f32[30, 4]) -> (y = %x) level=graph {\n}\n")
    assert [len(b["x"]) for b in cli_io.batches(arrays, free)] == [32, 32, 6]
    assert [len(b["x"]) for b in cli_io.batches(arrays, fixed)] == [30, 30]
