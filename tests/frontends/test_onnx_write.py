"""Graphs written as ONNX: onnxruntime agrees, reading back gives the same program, masks survive, names stay."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
import torch.nn as nn

import bitwright as bw
from bitwright import cli
from bitwright.frontends.onnx import load_onnx, to_onnx, write
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput, Unsupported
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.types import NM
from bitwright.passes.pipelines import CANONICAL
from tests import zoo
from tests.conftest import read_graph

pytestmark = pytest.mark.filterwarnings("ignore")
Array = np.ndarray[Any, Any]

INT8 = "observe-ranges, quantize-int8"
SPARSE = f"nm-mask{{pattern=2:4}}, {INT8}"


@cache
def captured(name: str) -> tuple[Graph, tuple[Array, ...]]:
    module, example = zoo.ZOO[name]("tiny")
    graph, _ = bw.optimize(bw.capture(module, example), CANONICAL)
    return graph, tuple(to_numpy(x) for x in example)


@cache
def prepared(name: str, passes: str) -> tuple[Graph, tuple[Array, ...]]:
    graph, example = captured(name)
    return bw.optimize(graph, passes, calibration=[example])[0] if passes else graph, example


def run(model: onnx.ModelProto, inputs: Sequence[Array], optimized: Path | None = None) -> list[Array]:
    """What onnxruntime makes of a model, as written or (saved into a file) as its optimizer leaves it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # sums in f32
    if optimized is None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    named = dict(zip([v.name for v in model.graph.input], inputs, strict=True))
    return list(session.run(None, {v.name: named[v.name] for v in session.get_inputs()}))


def operators(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path).graph.node)


def gap(have: Any, want: Any) -> float:
    """Largest difference, as a share of the largest value."""
    assert have.shape == want.shape
    return float(np.abs(have - want).max() / np.abs(want).max())


@pytest.mark.parametrize("passes", ["", INT8, SPARSE], ids=["float", "int8", "sparse-int8"])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_onnxruntime_agrees_and_reading_back_is_the_same_program(name: str, passes: str, tmp_path: Path) -> None:
    graph, example = prepared(name, passes)
    model = to_onnx(graph)
    onnx.checker.check_model(model, full_check=True)
    (want,) = (to_numpy(t) for t in evaluate(graph, example))
    (back,) = (to_numpy(t) for t in evaluate(load_onnx(model), example))
    (plain,) = run(model, example)
    (fused,) = run(model, example, tmp_path / "o.onnx")
    if not passes:
        assert max(gap(back, want), gap(plain, want), gap(fused, want)) < 1e-5
        return
    # The s32 bias is rounded: it moves a sum by less than a step, which may tip later steps. Beyond that the written
    # model, read by us, is what onnxruntime computes but for rounding ties that fall the other way: one step of 255.
    steps = 2 * float(np.ptp(want)) / 255 / float(np.abs(want).max())
    assert gap(plain, back) < steps
    assert gap(fused, back) < steps
    assert gap(back, want) < 0.03


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("digits", {"QLinearConv": 2, "QGemm": 2}),
        ("mobilenet_v2", {"QLinearConv": 12, "QGemm": 1}),
        ("bert_base", {"QGemm": 12}),
        ("vit_small", {"QGemm": 13}),
        ("llama", {"MatMulIntegerToFloat": 15}),
    ],
)
def test_onnxruntime_fuses_quantized_layers(name: str, kernels: dict[str, int], tmp_path: Path) -> None:
    graph, example = prepared(name, INT8)
    run(to_onnx(graph), example, tmp_path / "o.onnx")
    found = operators(tmp_path / "o.onnx")
    assert {k: found[k] for k in kernels} == kernels
    if name == "digits":
        assert found["QuantizeLinear"] == 1  # the input; all that follows stays codes
        assert found["DequantizeLinear"] == 0


def test_integer_kernels_with_an_open_batch(tmp_path: Path) -> None:
    module, example = zoo.ZOO["bert_base"]("tiny")
    graph, _ = bw.optimize(bw.capture(module, example, dynamic_batch=True), CANONICAL)
    graph, _ = bw.optimize(graph, INT8, calibration=[tuple(to_numpy(x) for x in example)])
    inputs = [to_numpy(x).repeat(3, 0) for x in example]
    (have,) = run(to_onnx(graph), inputs, tmp_path / "o.onnx")
    assert gap(have, to_numpy(evaluate(graph, inputs)[0])) < 0.01
    assert operators(tmp_path / "o.onnx")["MatMulIntegerToFloat"] == 12


@pytest.mark.parametrize(
    "bits",
    ["8", "7", "5", "4", "3", "2", "ternary", "bipolar", "4, symmetric=false", "4, group=32", "8, group=64",
     "4, group=32, symmetric=false", "2, group=32"],
)  # fmt: skip
def test_weights_of_any_width(bits: str, tmp_path: Path) -> None:
    graph, example = prepared("bert_base", f"quantize-weights{{bits={bits}}}")
    model = to_onnx(graph)
    (want,) = (to_numpy(t) for t in evaluate(graph, example))
    assert gap(run(model, example)[0], want) < 1e-5
    assert gap(run(model, example, tmp_path / "o.onnx")[0], want) < 1e-4
    assert gap(to_numpy(evaluate(load_onnx(model), example)[0]), want) < 1e-6
    narrow = bits[0] not in "875"
    kind = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4} if narrow else {onnx.TensorProto.INT8}
    stored = [t for t in model.graph.initializer if t.name.endswith("dense.weight")]
    assert len(stored) == 6
    assert {t.data_type for t in stored} <= kind
    if narrow:  # onnxruntime takes them as they are
        assert operators(tmp_path / "o.onnx")["MatMulNBits"] == 12


@pytest.mark.parametrize("name", ["digits", "bert_base"])
def test_masks_survive_and_are_found_again(name: str) -> None:
    graph, _ = prepared(name, SPARSE)
    masked = [n.type for n in graph.nodes if isinstance(n.type.encoding, NM)]
    assert masked
    again, _ = bw.optimize(load_onnx(to_onnx(graph)), CANONICAL)
    found = [n.type for n in again.nodes if isinstance(n.type.encoding, NM)]
    assert sorted(t.shape for t in found if isinstance(t.encoding, NM) and t.encoding.density <= 0.5) == sorted(
        t.shape for t in masked
    )
    zeros = {t.name: onnx.numpy_helper.to_array(t) == 0 for t in to_onnx(graph).graph.initializer}
    for n in graph.nodes:
        if isinstance(n.op, ops.Weight) and isinstance(n.type.encoding, NM):
            mask = graph.weights[n.op.ref].array == 0
            have = zeros[re.sub(r"[.~]1$", "", n.op.ref)]
            assert np.array_equal(have, mask) or np.array_equal(have, mask.T)


def test_names_stay_and_the_bytes_are_the_same() -> None:
    graph, _ = prepared("digits", INT8)
    model = to_onnx(graph)
    names = {t.name for t in model.graph.initializer}
    assert {f"{layer}.{part}" for layer in ("conv1", "conv2", "fc1", "fc2") for part in ("weight", "bias")} <= names
    assert [v.name for v in model.graph.input] == ["x"]
    assert [v.name for v in model.graph.output] == ["output"]
    assert {"conv1", "conv2", "fc1", "fc2"} <= {n.name for n in model.graph.node}
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)
    fresh, _ = bw.optimize(captured("digits")[0], INT8, calibration=[captured("digits")[1]])
    assert to_onnx(fresh).SerializeToString() == model.SerializeToString()


def test_a_program_compiled_from_what_was_written_agrees_with_onnxruntime(tmp_path: Path) -> None:
    graph, (x,) = prepared("digits", INT8)
    bw.to_onnx(graph, tmp_path / "q.onnx")
    program = bw.compile(tmp_path / "q.onnx", target="host", cache_dir=tmp_path)
    layers = [x for x in program.report.layers if x.formats.w]
    assert [(x.formats.x, x.formats.w, x.formats.acc) for x in layers] == [("u8", "s8", "s32")] * 4
    (want,) = run(onnx.load(tmp_path / "q.onnx"), [x])
    assert gap(np.asarray(program(x)), want) < 0.01


def test_sizes_that_stay_open(tmp_path: Path) -> None:
    """Batch and length are symbols: reshapes, grouped heads and the causal mask follow the input."""
    graph = read_graph(
        """
        graph @g (%q: f32[b, s, 32], %k: f32[b, s, 16]) -> (y = %y, flat = %flat, e = %e) level=graph {
          %q4 = reshape(%q) {shape=["b", "s", 4, 8]} : f32[b, s, 4, 8]
          %qt = transpose(%q4) {perm=[0, 2, 1, 3]} : f32[b, 4, s, 8]
          %k4 = reshape(%k) {shape=["b", "s", 2, 8]} : f32[b, s, 2, 8]
          %kt = transpose(%k4) {perm=[0, 2, 1, 3]} : f32[b, 2, s, 8]
          %a = attention(%qt, %kt, %kt) {scale=0.3, causal=true, kv_groups=2} : f32[b, 4, s, 8]
          %at = transpose(%a) {perm=[0, 2, 1, 3]} : f32[b, s, 4, 8]
          %y = reshape(%at) {shape=["b", "s", 32]} : f32[b, s, 32]
          %flat = reshape(%y) {shape=["b*s", 32]} : f32[b*s, 32]
          %one = constant {values=[1.0, 2.0]} : f32[1, 2]
          %e = expand(%one) {shape=["s", 2]} : f32[s, 2]
        }"""
    )
    model = to_onnx(graph)
    onnx.checker.check_model(model, full_check=True)
    assert [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim] == ["b", "s", ""]
    rng = np.random.default_rng(0)
    for b, s in ((1, 3), (4, 5)):
        inputs = [rng.standard_normal((b, s, c)).astype(np.float32) for c in (32, 16)]
        want = [to_numpy(t) for t in evaluate(graph, inputs)]
        for have in (run(model, inputs), run(model, inputs, tmp_path / "o.onnx")):
            for h, w in zip(have, want, strict=True):
                np.testing.assert_allclose(h, w, rtol=1e-4, atol=1e-5)


def test_outputs_that_are_inputs_constants_or_given_twice() -> None:
    graph = read_graph("""
        graph @g (%x: f32[2]) -> (x = %x, y = %y, z = %y, c = %c) level=graph {
          %c = constant {values=[1.0, 2.0]} : f32[2]
          %y = add(%x, %c) : f32[2]
        }""")
    x = np.array([3.0, 4.0], np.float32)
    have = run(to_onnx(graph), [x])
    assert [h.tolist() for h in have] == [[3, 4], [4, 6], [4, 6], [1, 2]]
    assert [v.name for v in to_onnx(graph).graph.output] == ["x.1", "y", "z", "c"]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_every_operator_without_a_form_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    graph = read_graph("""
        graph @g (%x: f32[2, 4], %d: s64[]) -> (y = %y) level=graph {
          %m = unbiased_mask(%x, %d) : f32[2, 4]
          %t = atan2(%m, %x) : f32[2, 4]
          %u = relu(%t) : f32[2, 4]
          %y = elu(%u) {alpha=2.0, gamma=3.0, beta=4.0} : f32[2, 4]
        }""")
    with pytest.raises(Unsupported) as error:
        to_onnx(graph, tmp_path / "no.onnx")
    assert [(p.operator, p.place) for p in error.value.problems] == [
        ("unbiased_mask", "m"),
        ("atan2", "t"),
        ("elu", "y"),
    ]
    assert list(tmp_path.iterdir()) == []


def test_lower_levels_and_great_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = prepared("digits", INT8)
    lowered, _ = bw.optimize(graph, "lower-to-integer", target="x86-avx2")
    with pytest.raises(InvalidInput, match="integer level"):
        to_onnx(lowered)
    monkeypatch.setattr(write, "LARGEST_BYTES", 10_000)
    with pytest.raises(InvalidInput, match="do not fit"):
        to_onnx(graph)


def test_the_command_line_writes_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.onnx.export(nn.Linear(8, 4), (torch.randn(2, 8),), tmp_path / "m.onnx", dynamo=False, input_names=["x"])
    out = tmp_path / "o.onnx"
    monkeypatch.setattr(sys, "argv", ["bitwright", "opt", str(tmp_path / "m.onnx"), "-p", "nm-mask", "-o", str(out)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    (weight,) = (onnx.numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer if t.name.endswith("weight"))
    assert ((weight.reshape(4, 2, 4) != 0).sum(-1) == 2).all()
