"""Whole models: what torch exports and onnxruntime quantizes; symbolic sizes; quantized weights stay integers."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from bitwright.frontends.onnx import load_onnx
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.text import parse, show
from bitwright.ir.types import parse_type
from bitwright.ir.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Convolutions with the usual trimmings."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.depth, self.point = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 32, 1)
        self.squeeze, self.excite, self.head = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.hardswish(self.point(F.silu(self.depth(x))))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
        y: torch.Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return y


class Block(nn.Module):
    """A transformer block with its shapes computed the way people write them."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.place = nn.Embedding(50, width), nn.Embedding(64, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        b, s = ids.shape
        x = self.embed(ids) + self.place(torch.arange(s, device=ids.device))
        q, k, v = self.qkv(self.n1(x)).reshape(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.ones(s, s, dtype=torch.bool).tril()
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, -1))
        y: torch.Tensor = x + self.down(F.gelu(self.up(self.n2(x))))
        return y


def export(module: nn.Module, example: tuple[torch.Tensor, ...], dynamo: bool, dynamic: Mapping[int, str]) -> bytes:
    buffer: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            shapes: Any = ({axis: torch.export.Dim(name, min=2, max=60) for axis, name in dynamic.items()},)
            torch.onnx.export(
                module, example, buffer, dynamo=True, dynamic_shapes=shapes, input_names=["x"], verbose=False
            )
        else:
            axes = {"x": dict(dynamic)}
            torch.onnx.export(module, example, buffer, dynamo=False, dynamic_axes=axes, input_names=["x"])
    return bytes(buffer.getvalue())


def checked(source: Any, **kwargs: Any) -> Graph:
    """Imported, verified, and the same after a trip through the text."""
    graph = load_onnx(source, **kwargs)
    verify(graph)
    assert parse(show(graph), graph.weights).same_as(graph)
    assert all(n.origin for n in graph.nodes)
    return graph


def close(graph: Graph, inputs: Sequence[torch.Tensor], want: torch.Tensor, tolerance: float = 1e-5) -> None:
    (have,) = evaluate(graph, list(inputs))
    assert have.shape == want.shape
    assert float((have - want).abs().max()) < tolerance * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("dynamo", [False, True])
def test_an_exported_cnn_equals_eager_for_any_batch(dynamo: bool) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    graph = checked(export(net, (torch.randn(2, 3, 32, 32),), dynamo, {0: "batch"}))
    assert graph.inputs[0].type.shape[0] == graph.symbols[0]
    for batch in (1, 3):
        x = torch.randn(batch, 3, 32, 32)
        close(graph, [x], net(x).detach())


@pytest.mark.parametrize("dynamo", [False, True])
def test_an_exported_transformer_equals_eager_for_any_batch_and_length(dynamo: bool) -> None:
    torch.manual_seed(0)
    block = Block().eval()
    graph = checked(export(block, (torch.randint(0, 50, (2, 7)),), dynamo, {0: "batch", 1: "seq"}))
    assert len(graph.symbols) == 2
    assert sum(isinstance(n.op, ops.Linear) for n in graph.nodes) == 4
    for shape in ((1, 5), (3, 11)):
        ids = torch.randint(0, 50, shape)
        close(graph, [ids], block(ids).detach())


def test_sizes_bind_symbols() -> None:
    data = export(Net().eval(), (torch.randn(2, 3, 32, 32),), False, {0: "batch"})
    graph = checked(data, sizes={"batch": 4})
    assert graph.symbols == ()
    assert graph.inputs[0].type.shape == (4, 3, 32, 32)
    with pytest.raises(InvalidInput, match="did you mean 'batch'"):
        load_onnx(data, sizes={"bathc": 4})


def test_an_lstm_equals_eager() -> None:
    torch.manual_seed(0)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(8, 16, 2, batch_first=True, bidirectional=True), nn.Linear(32, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(self.rnn(x)[0][:, -1])
            return y

    net, x = Last().eval(), torch.randn(2, 6, 8)
    graph = checked(export(net, (x,), False, {}))
    close(graph, [x], net(x).detach())


# --- quantized models -----------------------------------------------------------------------------------------------


class Feed:
    """Calibration data for onnxruntime."""

    def __init__(self, name: str, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
        self.items = iter([{name: a} for a in arrays])

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self.items, None)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_a_model_quantized_by_onnxruntime_agrees_with_it(tmp_path: Path, form: str, per_channel: bool) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # type: ignore[import-untyped]

    torch.manual_seed(0)
    net, rng = Net().eval(), np.random.default_rng(0)
    (tmp_path / "f.onnx").write_bytes(export(net, (torch.randn(2, 3, 32, 32),), False, {0: "batch"}))
    data = [rng.standard_normal((2, 3, 32, 32)).astype(np.float32) for _ in range(4)]
    quantize_static(
        tmp_path / "f.onnx", tmp_path / "q.onnx", Feed("x", data), quant_format=QuantFormat[form],
        per_channel=per_channel, weight_type=QuantType.QInt8,
    )  # fmt: skip
    graph = checked(tmp_path / "q.onnx")
    kept = [n for n in graph.nodes if isinstance(n.op, ops.Weight) and n.type.dtype.bits == 8 and n.type.rank >= 2]
    assert len(kept) >= 5  # the weights stay integers
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession((tmp_path / "q.onnx").read_bytes(), options, providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"x": data[0]})
    (have,) = evaluate(graph, [data[0]])
    assert np.abs(have.numpy() - want).max() < 0.05 * np.abs(want).max()  # one rounding tie moves one step


def test_a_dequantized_matmul_weight_is_transposed_as_integers() -> None:
    rng = np.random.default_rng(0)
    q, scale = rng.integers(-128, 127, (8, 4)).astype(np.int8), np.linspace(0.01, 0.04, 4, dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1),
            helper.make_node("MatMul", ["x", "w"], ["y"], name="fc"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(q, "q"), numpy_helper.from_array(scale, "s")],
    )
    loaded = checked(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    assert [n.op.spelling for n in loaded.nodes] == ["weight", "weight", "dequantize", "linear"]
    assert loaded.types[loaded.nodes[2].inputs[0]] == parse_type("s8[4, 8]")
    assert loaded.nodes[2].op == ops.Dequantize(axis=0)
    assert loaded.nodes[3].origin == "fc (MatMul)"
    x = rng.standard_normal((3, 8)).astype(np.float32)
    np.testing.assert_allclose(evaluate(loaded, [x])[0].numpy(), x @ (q * scale), rtol=1e-5, atol=1e-5)


# --- small matters --------------------------------------------------------------------------------------------------


def small(
    nodes: Sequence[onnx.NodeProto], shape: Sequence[Any], weights: Sequence[TensorProto] = ()
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], list(weights),
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def test_symbols_are_spelled_for_the_ir_and_stay_apart() -> None:
    graph = checked(small([helper.make_node("Neg", ["x"], ["y"])], ["batch size", "batch-size", None, "2n"]))
    assert graph.inputs[0].type.shape == ("batch_size", "batch_size_1", "x_2", "n_2n")


def test_names_with_control_characters_and_quotes_survive_the_text() -> None:
    node = helper.make_node("Add", ["x", 'a "b"\n\x0bc'], ["y"], name="odd\nname # 1")
    graph = checked(small([node], [2], [numpy_helper.from_array(np.ones(2, np.float32), 'a "b"\n\x0bc')]))
    assert graph.nodes[-1].origin == "odd_name # 1 (Add)"


def test_one_weight_used_twice_is_stored_once() -> None:
    w = numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    graph = checked(small(nodes, ["b", 3], [w]))
    assert set(graph.weights) == {"w"}
    assert sum(isinstance(n.op, ops.Weight) for n in graph.nodes) == 1


def test_a_size_used_as_data_is_computed_from_the_input() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], start=0, end=1),
        helper.make_node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["x", "f"], ["y"]),
    ]
    graph = checked(small(nodes, ["b", 3]))
    x = torch.randn(5, 3)
    close(graph, [x], x / 5)


def test_an_output_that_is_an_input_or_a_constant() -> None:
    graph = checked(small([helper.make_node("Identity", ["x"], ["y"])], [2]))
    assert graph.outputs == ("x",)
    assert graph.output_names == ("y",)
    fixed = checked(small([helper.make_node("Shape", ["x"], ["y"])], [2, 3]))
    assert evaluate(fixed, [torch.zeros(2, 3)])[0].tolist() == [2, 3]
