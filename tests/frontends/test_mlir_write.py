"""MLIR out: what is written parses, comes back, lowers to linalg and TOSA, and the linalg runs with equal results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitwright as bw
from bitwright import driver
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.text import parse
from bitwright.ir.weights import Array
from tests import zoo

pytest.importorskip("torch_mlir", reason="torch-mlir is not installed: pip install bitwright[mlir]")

from bitwright.frontends.mlir import load_mlir, lower, to_mlir
from tests.frontends.mlir_run import run_linalg


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def zoo_model(name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A small model of the zoo and its inputs; BERT with four layers."""
    if name == "bert4":
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
        )
        model = zoo.Masked(BertModel(config, add_pooling_layer=False), "last_hidden_state").eval()
        inputs: tuple[torch.Tensor, ...] = zoo.tokens("tiny", 2, 12)
        return model, inputs
    return zoo.ZOO[name]("tiny")


def captured(name: str) -> tuple[Graph, list[Array]]:
    """A model of :func:`zoo_model` as a graph, and its inputs."""
    module, inputs = zoo_model(name)
    return bw.capture(module, inputs), [x.numpy() for x in inputs]


def same_at_each_end(graph: Graph, inputs: list[Array], tolerance: float) -> tuple[str, Graph]:
    """Write, read back, lower both ways, run the linalg: equal results everywhere; gives text and graph read."""
    text = to_mlir(graph)
    read = load_mlir(text)
    want = evaluate(graph, inputs)
    for a, b in zip(want, evaluate(read, inputs), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
    results = run_linalg(lower(text), inputs, [(tuple(t.shape), t.numpy().dtype) for t in want])
    for a, c in zip(want, results, strict=True):
        np.testing.assert_allclose(c, a.numpy(), rtol=tolerance, atol=tolerance)
    assert "tosa." in lower(text, "tosa")
    assert [v.name for v in read.inputs] == [v.name for v in graph.inputs]
    assert (read.output_names, read.name) == (graph.output_names, graph.name)
    return text, read


@pytest.mark.parametrize("name", ["resnet18", "bert4", "llama"])
def test_float_models_are_the_same_at_each_end(name: str) -> None:
    graph, inputs = captured(name)
    text, read = same_at_each_end(graph, inputs, 1e-5)
    assert set(read.weights) >= {k for k, h in graph.weights.items() if k.endswith("weight")}
    assert str(Path(__file__).parent.parent) not in text, "no path of this machine"


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["resnet18", "bert4", "llama"])
def test_from_torch_through_mlir_to_linalg(name: str) -> None:
    """torch -> MLIR (torch-mlir's importer) -> bitwright, compiled -> MLIR -> linalg: torch's results at each end."""
    module, inputs = zoo_model(name)
    with torch.no_grad():
        program = torch.export.export(module, inputs, strict=False)
        want = [t.numpy() for t in _tuple(module(*inputs))]
    arrays = [x.numpy() for x in inputs]
    graph = load_mlir(program)
    compiled = _tuple(bw.compile(graph)(*arrays))
    text = to_mlir(graph)
    shapes = [(a.shape, a.dtype) for a in want]
    for found in (
        [t.numpy() for t in evaluate(graph, arrays)],
        compiled,
        [t.numpy() for t in evaluate(load_mlir(text), arrays)],
        run_linalg(lower(text), arrays, shapes),
    ):
        for a, b in zip(want, found, strict=True):
            np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["digits", "resnet18"])
@pytest.mark.parametrize("passes", ["nm-mask{pattern=2:4}, observe-ranges, quantize-int8", "quantize-weights{bits=4}"])
def test_masks_and_formats_come_back(name: str, passes: str) -> None:
    graph, inputs = captured(name)
    done, _ = driver.optimize(graph, f"fold-batch-norm, {passes}", calibration=[tuple(inputs)])
    text, read = same_at_each_end(done, inputs, 1e-5)

    def kept(g: Graph) -> dict[str, tuple[str, str]]:
        return {
            n.op.ref: (str(n.type), g.weights[n.op.ref].digest)
            for n in g.nodes
            if isinstance(n.op, ops.Weight) and (n.type.encoding or n.type.dtype.is_integer)
        }

    assert kept(done)
    assert kept(read) == kept(done)
    if "nm-mask" in passes:
        assert 'bitwright.encoding = "nm<2:4, axis=1>"' in text
        assert "!torch.quint8" in text
        assert "torch.aten.quantize_per_tensor" in text
        formats = [[str(n.op.dtype) for n in g.nodes if isinstance(n.op, ops.Quantize)] for g in (done, read)]
        assert formats[0] == formats[1]
        pools = [sum(isinstance(n.op, ops.MaxPool) for n in g.nodes) for g in (done, read)]
        assert pools[0] == pools[1], "a pool of codes stays one"


def test_narrow_codes_keep_their_format_and_range() -> None:
    graph = parse("""graph @g (%x: f32[3, 5]) -> (y = %y) level=graph {
  %s = constant {values=[0.25]} : f32[]
  %z = constant {values=[3]} : s4[]
  %q = quantize(%x, %s, %z) {dtype=s4} : s4[3, 5]
  %y = dequantize(%q, %s, %z) : f32[3, 5]
}
""")
    x = np.linspace(-9, 9, 15, dtype=np.float32).reshape(3, 5)
    text, read = same_at_each_end(graph, [x], 0.0)
    assert 'bitwright.dtype = "s4"' in text
    assert [str(n.type.dtype) for n in read.nodes if isinstance(n.op, ops.Quantize)] == ["s4"]


@pytest.mark.parametrize(
    "body",
    [
        "%y = max_pool(%x) {kernel=[2, 2], stride=[1, 1], padding=[1, 0, 0, 1], dilation=[1, 1]} : f32[2, 4, 6, 6]",
        "%y = avg_pool(%x) {kernel=[2, 2], stride=[2, 2], padding=[1, 1, 1, 1], count_padding=false} : f32[2, 4, 4, 4]",
        "%y = layer_norm(%x) {axes=2} : f32[2, 4, 6, 6]",
        "%y = group_norm(%x) {groups=2} : f32[2, 4, 6, 6]",
        "%y = softmax(%x) {axis=1} : f32[2, 4, 6, 6]",
        "%y = gelu(%x) : f32[2, 4, 6, 6]",
        "%y = reduce_mean(%x) {axes=[2, 3]} : f32[2, 4]",
        "%y = transpose(%x) {perm=[0, 2, 3, 1]} : f32[2, 6, 6, 4]",
        "%y = slice(%x) {axis=2, start=1, stop=5, step=2} : f32[2, 4, 2, 6]",
        "%y = pad(%x) {padding=[0, 0, 1, 2, 0, 0, 0, 1], value=2.0} : f32[2, 4, 7, 9]",
        "%y = attention(%x, %x, %x) {scale=0.5, causal=true} : f32[2, 4, 6, 6]",
    ],
)
def test_operators_are_the_same_at_each_end(body: str) -> None:
    graph = parse(f"graph @g (%x: f32[2, 4, 6, 6]) -> (y = %y) level=graph {{\n  {body}\n}}\n")
    x = np.random.default_rng(1).standard_normal((2, 4, 6, 6)).astype(np.float32)
    same_at_each_end(graph, [x], 1e-5)


def test_only_the_graph_level_is_written(tmp_path: Path) -> None:
    graph, inputs = captured("digits")
    passes = "fold-batch-norm, observe-ranges, quantize-int8, lower-to-integer"
    done, _ = driver.optimize(graph, passes, calibration=[tuple(inputs)])
    with pytest.raises(bw.errors.InvalidInput, match="integer level"):
        to_mlir(done, tmp_path / "x.mlir")
    assert not list(tmp_path.iterdir())


def test_lowering_names_what_it_cannot_convert() -> None:
    kind = "!torch.vtensor<[2],f32>"
    body = f'%r = torch.operator "torch.aten.fancy"(%x) : ({kind}) -> {kind} loc("here")'
    text = f"func.func @main(%x: {kind}) -> {kind} {{\n  {body}\n  return %r : {kind}\n}}\n"
    with pytest.raises(bw.errors.Unsupported, match=r"torch\.aten\.fancy"):
        lower(text)
    with pytest.raises(bw.errors.InvalidInput, match="linalg or tosa"):
        lower(text, "stablehlo")


def test_the_command_line_writes_reads_and_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from bitwright import cli

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bitwright", *words])
        try:
            cli.main()
        except SystemExit as e:
            return int(e.code or 0)
        return 0

    module, inputs = zoo.digits("tiny")
    bw.to_onnx(bw.capture(module, inputs), tmp_path / "d.onnx")
    np.savez(tmp_path / "x.npz", x=inputs[0].numpy())
    monkeypatch.chdir(tmp_path)
    recipe = ("-r", "nm-mask{pattern=2:4}, int8", "-c", "x.npz")
    assert run("compile", "d.onnx", "--target", "mlir", *recipe, "-o", "d.mlirbc") == 0
    assert "left to the toolchain that reads d.mlirbc" in capsys.readouterr().err
    assert run("opt", "d.mlirbc", "-p", "fold-constants", "-o", "again.mlir") == 0
    assert run("compile", "d.onnx", *recipe, "-o", "want.bw") == 0
    assert run("compile", "again.mlir", "-o", "got.bw") == 0
    want, got = (bw.load(tmp_path / f)(inputs[0].numpy()) for f in ("want.bw", "got.bw"))
    assert np.array_equal(got, want)
    assert bw.load("got.bw").graph.count("nm<2:4") == bw.load("want.bw").graph.count("nm<2:4") > 0
    (tmp_path / "bad.mlir").write_text("module {\n  nonsense\n}\n")
    capsys.readouterr()
    assert run("compile", "bad.mlir") == 2
    message = capsys.readouterr().err.strip()
    assert "bad.mlir is no valid MLIR: line 2" in message
    assert "\n" not in message
    assert run("compile", "d.onnx", "--target", "mlir", "-o", "d.txt") == 2
