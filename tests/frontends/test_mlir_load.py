"""MLIR in: programs of the torch dialect from torch, from ONNX and as text; what is malformed or unknown."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import bitwright as bw
from bitwright.ir.interpret import evaluate
from bitwright.ir.types import F32, TensorType
from tests import zoo

pytest.importorskip("torch_mlir", reason="torch-mlir is not installed: pip install bitwright[mlir]")

from bitwright.frontends.mlir import load_mlir, to_mlir
from bitwright.frontends.mlir.context import elements

T = "!torch.vtensor<[2,4],f32>"


def function(body: str, result: str = T, arguments: str = f"%x: {T}") -> str:
    """The text of a function ``main``."""
    return f"func.func @main({arguments}) -> {result} {{\n{body}\n}}\n"


@pytest.mark.parametrize("name", ["resnet18", "bert_base", "llama"])
def test_an_exported_program_is_read_with_equal_results(name: str) -> None:
    module, inputs = zoo.ZOO[name]("tiny")
    with torch.no_grad():
        program = torch.export.export(module, inputs, strict=False)
        want = module(*inputs)
    graph = load_mlir(program)
    got = evaluate(graph, [x.numpy() for x in inputs])
    assert [tuple(v.type.shape) for v in graph.inputs] == [tuple(x.shape) for x in inputs]
    torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-5)
    assert set(graph.weights) & {k for k, _ in module.named_parameters()}, "weights keep their names"


def test_onnx_through_torch_mlirs_importer(tmp_path: Path) -> None:
    import onnx
    from torch_mlir import ir
    from torch_mlir.dialects import torch as dialect
    from torch_mlir.extras import onnx_importer

    module, inputs = zoo.resnet18("tiny")
    model = bw.to_onnx(bw.capture(module, inputs))
    with ir.Context() as context:
        dialect.register_dialect(context)
        info = onnx_importer.ModelInfo(onnx.shape_inference.infer_shapes(model))
        made = info.create_module(context=context)
        onnx_importer.NodeImporter.define_function(info.main_graph, made.operation).import_all()
        text = str(made.operation.get_asm())
    assert 'torch.operator "onnx.Conv"' in text
    graph = load_mlir(text)
    with torch.no_grad():
        torch.testing.assert_close(evaluate(graph, [inputs[0].numpy()])[0], module(*inputs), rtol=1e-5, atol=1e-5)


def test_files_of_text_and_bytecode(tmp_path: Path) -> None:
    module, inputs = zoo.digits("tiny")
    graph = bw.capture(module, inputs)
    sizes = []
    for name in ("model.mlir", "model.mlirbc"):
        bw.to_mlir(graph, tmp_path / name)
        read = bw.load_mlir(tmp_path / name)
        assert read.weights.keys() == graph.weights.keys()
        assert all(np.array_equal(read.weights[k].array, graph.weights[k].array) for k in graph.weights)
        assert bw.driver.to_graph(tmp_path / name).same_as(read)
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[1] < sizes[0]


def test_every_unknown_operator_is_listed_with_its_place() -> None:
    body = f"""  %a = torch.operator "torch.aten.fancy"(%x) : ({T}) -> {T} loc("encoder.fancy")
  %b = torch.operator "torch.my.thing"(%a) : ({T}) -> {T}
  %c = torch.operator "torch.aten.special_bessel_j0"(%b) : ({T}) -> {T}
  return %c : {T}"""
    with pytest.raises(bw.errors.Unsupported) as caught:
        load_mlir(function(body))
    found = {p.operator: p.place for p in caught.value.problems}
    assert found["torch.aten.fancy"] == "encoder.fancy"
    assert found["torch.my.thing"] == "the text:3"
    assert found["aten.special_bessel_j0.default"] == "the text:4"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("module {\n  nonsense\n}\n", "line 2"),
        ("module {\n}\n", "no function with a body"),
        ("func.func @a() {\n return }\nfunc.func @b() {\n return }\n", "name one"),
        (function(f"  %r = torch.aten.mm %x, %x : {T}, {T} -> {T}\n  return %r : {T}"), "the text:2: aten.mm"),
        (b"ML\xefR\x51garbage", "no valid MLIR"),
        ("/no/such/file.mlir", "cannot read"),
        (
            function("  return %x : !torch.vtensor<[4,?],f32>", "!torch.vtensor<[4,?],f32>",
                     "%x: !torch.vtensor<[4,?],f32>"), "shapes={'arg0'",
        ),
        (
            function(f"  %w = torch.vtensor.literal(dense_resource<gone> : tensor<2x4xf32>) : {T}\n  return %w : {T}"),
            "'gone'",
        ),
    ],
)  # fmt: skip
def test_malformed_mlir_is_one_clear_error(text: str | bytes, reason: str) -> None:
    with pytest.raises(bw.errors.InvalidInput, match=re.escape(reason)):
        load_mlir(text)


def test_open_sizes_become_symbols() -> None:
    kind = "!torch.vtensor<[?,4],f32>"
    body = f"  %r = torch.aten.relu %x : {kind} -> {kind}\n  return %r : {kind}"
    graph = load_mlir(function(body, kind, f"%x: {kind}"))
    assert graph.inputs[0].type == TensorType(F32, ("b", 4))
    fixed = load_mlir(function(body, kind, f"%x: {kind}"), shapes={"arg0": (3, 4)})
    assert fixed.inputs[0].type.shape == (3, 4)
    with pytest.raises(bw.errors.InvalidInput, match="no input"):
        load_mlir(function(body, kind, f"%x: {kind}"), shapes={"y": (3, 4)})


def test_a_dynamic_batch_survives_both_ways() -> None:
    module, inputs = zoo.digits("tiny")
    graph = bw.capture(module, inputs, dynamic_batch=True)
    read = load_mlir(to_mlir(graph))
    assert read.inputs[0].type.shape[0] == "b"
    x = np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)
    assert torch.equal(evaluate(read, [x])[0], evaluate(graph, [x])[0])


def test_views_of_any_value_are_reshapes() -> None:
    turned, flat = "!torch.vtensor<[4,2],f32>", "!torch.vtensor<[8],f32>"
    body = f"""  %i0 = torch.constant.int 0
  %i1 = torch.constant.int 1
  %i8 = torch.constant.int 8
  %t = torch.aten.transpose.int %x, %i0, %i1 : {T}, !torch.int, !torch.int -> {turned}
  %s = torch.prim.ListConstruct %i8 : (!torch.int) -> !torch.list<int>
  %r = torch.aten.view %t, %s : {turned}, !torch.list<int> -> {flat}
  return %r : {flat}"""
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert np.array_equal(evaluate(load_mlir(function(body, flat)), [x])[0].numpy(), x.T.reshape(-1))


def test_literals_of_every_element_type() -> None:
    from torch_mlir import ir

    from bitwright.frontends.mlir.context import context

    with context():
        for text, want in (
            ("dense<[1.5, 2.5]> : tensor<2xbf16>", [1.5, 2.5]), ("dense<[true, false]> : tensor<2xi1>", [True, False]),
            ("dense<[1, 255]> : tensor<2xui8>", [1, 255]), ("dense<-3> : tensor<2xsi64>", [-3, -3]),
            ("dense<2.0> : tensor<f16>", 2.0),
        ):  # fmt: skip
            assert elements(ir.Attribute.parse(text), {}).tolist() == want
