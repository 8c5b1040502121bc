"""The post-training recipes from an ONNX file to a verified program: budgets, what is told of each layer, bisection."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from typer.testing import CliRunner

import bitwright as bw
from bitwright.cli import app
from bitwright.comparison import Comparison, Row
from bitwright.errors_by_layer import measure_layers
from bitwright.ir.errors import InvalidInput
from bitwright.passes import Context, parse_passes, run_pipeline

NAMES = ("onnx::Conv_1", "onnx::Conv_2", "onnx::Conv_3", "head.weight")


def conv(x: str, weight: str, y: str) -> onnx.NodeProto:
    return helper.make_node("Conv", [x, weight], [y], pads=[1, 1, 1, 1], kernel_shape=[3, 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small residual network whose weights are called as torch's exporter calls folded ones, and real inputs."""
    to, rng = tmp_path_factory.mktemp("precision"), np.random.default_rng(0)
    shapes = ((16, 3, 3, 3), (16, 16, 3, 3), (16, 16, 3, 3), (6, 16))
    weights = [
        numpy_helper.from_array((rng.standard_normal(s) / math.sqrt(math.prod(s[1:]))).astype(np.float32), n)
        for n, s in zip(NAMES, shapes, strict=True)
    ]
    nodes = [
        conv("x", NAMES[0], "a"), helper.make_node("Relu", ["a"], ["ra"]),
        conv("ra", NAMES[1], "b"), helper.make_node("Relu", ["b"], ["rb"]),
        conv("rb", NAMES[2], "c"), helper.make_node("Add", ["ra", "c"], ["s"]),
        helper.make_node("Relu", ["s"], ["rs"]), helper.make_node("GlobalAveragePool", ["rs"], ["m"]),
        helper.make_node("Flatten", ["m"], ["f"]), helper.make_node("Gemm", ["f", NAMES[3]], ["y"], transB=1),
    ]  # fmt: skip
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 6])
    graph = helper.make_graph(nodes, "net", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), to / "net.onnx")
    np.savez(to / "data.npz", x=rng.standard_normal((16, 3, 8, 8)).astype(np.float32))
    np.savez(to / "one.npz", x=rng.standard_normal((1, 3, 8, 8)).astype(np.float32))
    return to


def cli(*arguments: Any) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    return done.exit_code, done.output


def compiled(folder: Path, recipe: str, budget: str) -> Any:
    return bw.compile(folder / "net.onnx", recipe=recipe, budget=budget, calibration=folder / "data.npz")


@pytest.mark.parametrize(
    ("recipe", "budget"),
    [
        ("ptq-light", "size=0.16"),
        ("ptq-light", "latency=0.7"),
        ("observe-ranges{method=mse}, assign-precision{rounding=adaquant choices=s8|s4}, retune-norms, correct-bias",
         "size=0.16"),
    ],
)  # fmt: skip
def test_budgets_hold_and_the_program_is_verified(folder: Path, recipe: str, budget: str) -> None:
    program = compiled(folder, recipe, budget)
    kind, share = budget.split("=")
    told = [x for x in program.report.layers if x.figure("loss_share") is not None]
    assert len(told) == 4
    assert sum(x.figures["assign-precision.cost"] for x in told) <= float(share) + 1e-9
    assert sum(x.figure("loss_share") or 0.0 for x in told) == pytest.approx(1.0)
    assert not [r for r in program.report.refusals if r.pass_name == "lower-to-integer"]
    if kind == "size":
        assert sum(x.formats.x == "u8" for x in told) >= 3  # there may be room for a small layer in f32
    with np.load(folder / "one.npz") as one:
        compared = bw.verify(program, folder / "net.onnx", dict(one), calibration=folder / "data.npz")
    assert compared.first_bad == ""
    assert compared.rows[-1].drift is not None
    assert compared.rows[-1].drift < 0.3


def test_each_layer_says_what_was_lost_where(folder: Path) -> None:
    program = compiled(folder, "observe-ranges{also=3}, quantize-weights{bits=3}, quantize-int8{bits=3}", "")
    layer = next(x for x in program.report.layers if x.name.startswith("rb"))
    assert layer.figures["quantize-int8.low"] == 0
    assert 8 < (layer.figure("weight_snr_db") or 0) < 20  # 6 dB a bit, less the peak over the deviation
    assert 0 < (layer.figure("saturation") or 0) < 0.2
    assert layer.error is not None
    assert layer.figure("output_snr_db") == pytest.approx(-20 * math.log10(layer.error))
    out = folder / "low.bw"
    program.save(out)
    story = cli("inspect", out, "--why", layer.name)[1]
    assert "held as u3" in story
    assert "weights" in story
    assert "clipped of it" in story
    assert "clipped" in cli("inspect", out)[1]


def test_clipped_values_are_counted(folder: Path) -> None:
    graph = bw.load_onnx(folder / "net.onnx")
    x = np.zeros((2, 3, 8, 8), np.float32)
    x[0, :, :4] = 1.0
    context = Context(calibration=[(x,)])
    ranged, _ = run_pipeline(graph, parse_passes("simplify, observe-ranges"), context)
    context.facts["ranges"]["x"] = (0.0, 0.5)
    quantized, _ = run_pipeline(ranged, parse_passes("quantize-int8"), context)
    found = measure_layers(graph, quantized, [(x,)])
    assert found.clipped["a"] == pytest.approx(0.25)
    assert found.clipped["b"] == 0.0
    assert found.errors["a"] > 0.1
    assert measure_layers(graph, quantized, []).errors == {}


def test_layers_are_compared_with_what_the_passes_evaluated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright.ir.interpret import evaluate as plain

    graph, seen = bw.load_onnx(folder / "net.onnx"), []

    def counted(graph: Any, *args: Any, **more: Any) -> Any:
        seen.append(graph)
        return plain(graph, *args, **more)

    monkeypatch.setattr("bitwright.passes._measure.evaluate", counted)
    batches = [(np.random.default_rng(3).standard_normal((8, 3, 8, 8)).astype(np.float32),)]
    context = Context(calibration=batches)
    quantized, report = run_pipeline(
        graph, parse_passes("simplify, observe-ranges, quantize-int8"), context, wait=False
    )
    assert (
        report.settled().rows[-1].output_error
        == run_pipeline(graph, parse_passes("simplify, observe-ranges, quantize-int8"), Context(calibration=batches))[1]
        .rows[-1]
        .output_error
    )
    assert [g.level for g in seen] == ["graph", "graph"], "each run evaluates the quantized graph, and no other"
    found, again = measure_layers(graph, quantized, batches, context), measure_layers(graph, quantized, batches)
    assert found.errors.keys() == again.errors.keys()
    assert found.errors == pytest.approx(again.errors, rel=1e-3)
    assert found.clipped == pytest.approx(again.clipped)


def test_bisection_names_the_first_layer_too_far_from_the_model(folder: Path) -> None:
    recipe = "observe-ranges, quantize-weights{bits=2 only=onnx::Conv_2}, quantize-int8"
    out = folder / "bisected.bw"
    compiled(folder, recipe, "").save(out)
    arguments = ("verify", out, folder / "net.onnx", "--input", folder / "one.npz")
    code, text = cli(*arguments, "--drift", "0.05")
    assert code == 1
    (line,) = [t for t in text.splitlines() if t.startswith("first layer further than")]
    assert "model: rb.q" in line
    assert "s2" in line
    code, text = cli(*arguments, "--drift", "0.9")
    assert code == 0
    assert "no layer is further than 90 % from the model" in text


def test_the_first_of_several_in_execution_order() -> None:
    rows = tuple(Row(n, "", 0.0, d, 1e-2) for n, d in (("a", None), ("b", 0.04), ("c", 0.06), ("d", 0.5)))
    found = Comparison(rows).first_drifted(0.05)
    assert found is not None
    assert found.layer == "c"
    assert Comparison(rows).first_drifted(0.6) is None
    assert Comparison((Row("a", "", 0.0, float("nan"), 1e-2),)).first_drifted(0.6) is not None


def test_recipes_say_what_they_need(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="batch norm"):
        bw.compile(folder / "net.onnx", recipe="data-free")
    with pytest.raises(InvalidInput, match="calibration"):
        bw.compile(folder / "net.onnx", recipe="ptq-light", budget="size=0.16")
    with pytest.raises(InvalidInput, match="smallest"):
        compiled(folder, "ptq-light", "size=0.001")


@pytest.mark.parametrize("recipe", ["ptq-light", "ptq-advanced"])
@pytest.mark.parametrize("budget", ["size=0.16", "latency=0.7"])
def test_recipes_with_a_budget_from_the_command_line(folder: Path, recipe: str, budget: str) -> None:
    out = folder / f"{recipe}.bw"
    code, text = cli(
        "compile", folder / "net.onnx", "--recipe", recipe, "--budget", budget, "--calibrate", folder / "data.npz",
        "-o", out,
    )  # fmt: skip
    assert code == 0, text
    report = bw.load(out).report
    kind, share = budget.split("=")
    (told,) = [n for n in report.notes if n.startswith("assign-precision: ")]
    assert f"cost_of {kind}" in told
    assert "losses measured on 1 of 1 batches" in told
    assert float(told.split(" cost ")[1].split(",")[0]) <= float(share) + 1e-9
    assert "gap 0" in told
    assert sum(n.startswith("correct-bias: output_error") for n in report.notes) == (recipe == "ptq-advanced")
    assert " ".join(told.split()) in " ".join(cli("inspect", out)[1].split())


def test_weight_only_from_the_command_line(folder: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((rng.standard_normal((64, 64)) / 8).astype(np.float32), n) for n in ("a.w", "b.w")
    ]
    nodes = [
        helper.make_node("Gemm", ["x", "a.w"], ["h"], transB=1), helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "b.w"], ["y"], transB=1),
    ]  # fmt: skip
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 64]) for n in "xy")
    graph = helper.make_graph(nodes, "mlp", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "mlp.onnx")
    code, text = cli("compile", folder / "mlp.onnx", "--recipe", "weight-only", "-o", folder / "mlp.bw")
    assert code == 0, text
    assert {layer.formats.w for layer in bw.load(folder / "mlp.bw").report.layers if layer.formats.w} == {"s4"}


def test_data_free_from_the_command_line(folder: Path) -> None:
    rng = np.random.default_rng(0)
    norm = {"scale": np.full(8, 0.7), "shift": np.full(8, 0.4), "mean": np.zeros(8), "variance": np.full(8, 1.3)}
    weights = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in norm.items()]
    kernel, head = rng.standard_normal((8, 3, 3, 3)) / 5, rng.standard_normal((4, 8))
    weights += [numpy_helper.from_array(a.astype(np.float32), n) for n, a in (("k", kernel), ("h.weight", head))]
    nodes = [
        conv("x", "k", "c"), helper.make_node("BatchNormalization", ["c", *norm], ["b"]),
        helper.make_node("Relu", ["b"], ["r"]), helper.make_node("GlobalAveragePool", ["r"], ["m"]),
        helper.make_node("Flatten", ["m"], ["f"]), helper.make_node("Gemm", ["f", "h.weight"], ["y"], transB=1),
    ]  # fmt: skip
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(nodes, "normed", [x], [y], weights)
    model = folder / "normed.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), model)
    code, text = cli("compile", model, "--recipe", "data-free", "-o", folder / "normed.bw")
    assert code == 0, text
    layers = [x for x in bw.load(folder / "normed.bw").report.layers if x.formats.w]
    assert {x.formats.w for x in layers} == {"s8"}
