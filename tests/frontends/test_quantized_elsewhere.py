"""Models that other tools quantized: compiled, they agree with onnxruntime (or eager torch), in integer kernels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
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

import bitwright as bw
from bitwright.frontends.onnx import load_onnx, to_onnx
from bitwright.ir.interpret import evaluate, to_numpy

pytestmark = pytest.mark.filterwarnings("ignore")
Array = np.ndarray[Any, Any]


class Cnn(nn.Module):
    """A convolution, a residual block, a depthwise convolution, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.depth, self.fc1, self.fc2 = nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.Linear(16, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.max_pool2d(F.relu(x + self.left(x)), 2)
        x = F.relu(self.depth(x)).mean((2, 3))
        y: torch.Tensor = self.fc2(F.relu(self.fc1(x)))
        return y


class Mlp(nn.Module):
    """What a transformer's layer is made of, without the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(F.gelu(self.norm(self.up(x))))
        return y


SHAPES = {"cnn": (2, 3, 12, 12), "mlp": (2, 5, 64)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float models as ONNX files."""
    folder = tmp_path_factory.mktemp("float")
    for name, module in (("cnn", Cnn), ("mlp", Mlp)):
        torch.manual_seed(0)
        buffer: Any = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            example = (torch.randn(SHAPES[name]),)
            torch.onnx.export(module().eval(), example, buffer, dynamo=False, input_names=["x"])
        (folder / f"{name}.onnx").write_bytes(buffer.getvalue())
    return folder


class Feed:
    """Calibration data for onnxruntime."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self.items = iter([{"x": a} for a in arrays])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.items, None)


def data(name: str, count: int = 1) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(SHAPES[name]).astype(np.float32) for _ in range(count)]


def onnxruntime(model: bytes, *inputs: Array) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return np.asarray(session.run(None, dict(zip(names, inputs, strict=True)))[0])


def gap(have: Any, want: Array) -> float:
    have = np.asarray(have)
    assert have.shape == want.shape
    return float(np.abs(have - want).max() / np.abs(want).max())


def layers(program: Any) -> list[tuple[str, str, str, str]]:
    """Formats and kernel of every layer that has weights."""
    kinds = ("conv", "linear", "matmul")
    found = [x for x in program.report.layers if any(k in x.op for k in kinds)]
    return [(x.formats.x, x.formats.w, x.formats.acc, x.kernel) for x in found]


def agreed(model: Path | onnx.ModelProto, x: Array, folder: Path, bound: float) -> Any:
    """The compiled model, which agrees with onnxruntime, as its interpretation and what is written back do."""
    raw = model.read_bytes() if isinstance(model, Path) else model.SerializeToString()
    want, graph = onnxruntime(raw, x), load_onnx(model)
    assert gap(to_numpy(evaluate(graph, [x])[0]), want) < bound
    assert gap(onnxruntime(to_onnx(graph).SerializeToString(), x), want) < bound
    program = bw.compile(graph, target="x86-avx2", cache_dir=folder)
    assert gap(program(x), want) < bound
    return program


INTEGER = ("u8", "s8", "s32")


@pytest.mark.parametrize(("form", "activations"), [("QDQ", "QUInt8"), ("QDQ", "QInt8"), ("QOperator", "QUInt8")])
@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_quantized_statically(models: Path, tmp_path: Path, name: str, form: str, activations: str) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # type: ignore[import-untyped]

    quantize_static(
        models / f"{name}.onnx", tmp_path / "q.onnx", Feed(data(name, 4)), quant_format=QuantFormat[form],
        per_channel=True, activation_type=QuantType[activations], weight_type=QuantType.QInt8,
    )  # fmt: skip
    program = agreed(tmp_path / "q.onnx", data(name)[0], tmp_path, 0.02)  # a tie rounds the other way: a step or two
    found = layers(program)
    assert [x[:3] for x in found] == [INTEGER] * len(found)
    assert len(found) >= (5 if name == "cnn" else 2)
    assert "generic" not in [x[3] for x in found]


def test_quantized_dynamically(models: Path, tmp_path: Path) -> None:
    """DynamicQuantizeLinear and MatMulInteger: the zero point is known at run time only, the kernels are integer."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(models / "mlp.onnx", tmp_path / "q.onnx", weight_type=QuantType.QInt8)
    program = agreed(tmp_path / "q.onnx", data("mlp")[0], tmp_path, 1e-5)
    assert [x[:3] for x in layers(program)] == [INTEGER] * 2
    assert "generic" not in [x[3] for x in layers(program)]


def test_asymmetric_dynamic_weights_compute_in_s32_and_say_so(models: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(models / "cnn.onnx", tmp_path / "q.onnx", weight_type=QuantType.QUInt8)
    program = agreed(tmp_path / "q.onnx", data("cnn")[0], tmp_path, 1e-5)
    wide = [x for x in layers(program) if x[1] == "s32"]
    refused = [r for r in program.report.refusals if "that fit s8" in r.reason]
    assert len(wide) == len(refused) > 0


@pytest.mark.parametrize("pads", [0, 1])
def test_a_dynamic_convolution(pads: int, tmp_path: Path) -> None:
    """ConvInteger with padding: the sums of weights that the zero point multiplies differ at the border."""
    rng = np.random.default_rng(0)
    w = rng.integers(0, 256, (8, 4, 3, 3)).astype(np.uint8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("ConvInteger", ["q", "w", "z", "wz"], ["c"], name="conv", pads=[pads] * 4, strides=[2, 1]),
        helper.make_node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "s"], ["y"]),
    ]
    stored = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.array(128, np.uint8), "wz")]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 4, 9, 8]), ("y", None)))
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    program = agreed(model, rng.standard_normal((2, 4, 9, 8)).astype(np.float32), tmp_path, 1e-5)
    assert [x[:3] for x in layers(program)] == [INTEGER]
    assert "generic" not in [x[3] for x in layers(program)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
def test_weights_in_four_bits(models: Path, tmp_path: Path, form: str, symmetric: bool) -> None:
    """MatMulNBits, and INT4 in blocks: weight-only."""
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import (  # type: ignore[import-untyped]
        MatMulNBitsQuantizer,
    )

    quantizer = MatMulNBitsQuantizer(
        onnx.load(models / "mlp.onnx"), block_size=32, is_symmetric=symmetric, quant_format=QuantFormat[form]
    )
    quantizer.process()
    onnx.save(quantizer.model.model, tmp_path / "q.onnx")
    graph = load_onnx(tmp_path / "q.onnx")
    assert sum(n.type.dtype.bits == 4 and n.op.spelling == "weight" and n.type.rank == 2 for n in graph.nodes) >= 2
    agreed(tmp_path / "q.onnx", data("mlp")[0], tmp_path, 1e-5)


# --- torch ------------------------------------------------------------------------------------------------------------


class Converted(nn.Module):
    """What PT2E's conversion with an x86 quantizer leaves: a residual network with q/dq around every operator."""

    def __init__(self) -> None:
        super().__init__()
        import torch.ao.quantization.fx._decomposed

        generator = torch.Generator().manual_seed(0)

        def codes(*shape: int) -> torch.Tensor:
            return torch.randint(-127, 128, shape, generator=generator).to(torch.int8)

        for name, shape in (("w1", (16, 3, 3, 3)), ("w2", (16, 16, 3, 3)), ("w3", (10, 16))):
            self.register_buffer(name, codes(*shape))
            self.register_buffer(f"{name}_scale", torch.full((shape[0],), 0.002))
            self.register_buffer(f"{name}_zero", torch.zeros(shape[0], dtype=torch.int64))
        self.bias = nn.Parameter(torch.linspace(-0.5, 0.5, 16))

    def weight(self, name: str) -> torch.Tensor:
        q, parts = torch.ops.quantized_decomposed, [getattr(self, name + end) for end in ("", "_scale", "_zero")]
        w: torch.Tensor = q.dequantize_per_channel(*parts, 0, -127, 127, torch.int8)
        return w

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = torch.ops.quantized_decomposed

        def rounded(t: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
            y: torch.Tensor = q.quantize_per_tensor(t, scale, zero, 0, 255, torch.uint8)
            y = q.dequantize_per_tensor(y, scale, zero, 0, 255, torch.uint8)
            return y

        x = rounded(x, 0.03, 120)
        a = rounded(F.relu(F.conv2d(x, self.weight("w1"), self.bias, padding=1)), 0.02, 0)
        b = rounded(F.conv2d(a, self.weight("w2"), padding=1), 0.04, 128)
        c = rounded(F.relu(a + b), 0.03, 0)
        d = rounded(F.adaptive_avg_pool2d(c, 1), 0.03, 0)
        y: torch.Tensor = F.linear(d.flatten(1), self.weight("w3"))
        return y


def test_a_network_converted_by_pt2e(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Converted().eval(), torch.randn(2, 3, 8, 8)
    want = module(x).detach().numpy()
    program = bw.compile(module, example_inputs=(x,), target="x86-avx2", cache_dir=tmp_path)
    assert gap(program(x.numpy()), want) < 0.02
    found = layers(program)
    assert [layer[:3] for layer in found] == [INTEGER] * 3
    assert "generic" not in [x[3] for x in found]
    written = to_onnx(bw.capture(module, (x,)))
    assert gap(onnxruntime(written.SerializeToString(), x.numpy()), want) < 0.02


class Dynamic(nn.Module):
    """A linear layer as PT2E's dynamic quantization writes it: the input's scale is found at run time."""

    def __init__(self, choose: str) -> None:
        super().__init__()
        import torch.ao.quantization.fx._decomposed

        generator = torch.Generator().manual_seed(0)
        self.choose = choose
        self.register_buffer("w", torch.randint(-127, 128, (16, 32), generator=generator).to(torch.int8))
        self.register_buffer("scale", torch.full((16,), 0.002))
        self.register_buffer("zero", torch.zeros(16, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = torch.ops.quantized_decomposed
        s, z = getattr(q, self.choose).tensor(x, -128, 127, 1e-7, torch.int8)
        x = q.dequantize_per_tensor(q.quantize_per_tensor(x, s, z, -128, 127, torch.int8), s, z, -128, 127, torch.int8)
        w = q.dequantize_per_channel(self.w, self.scale, self.zero, 0, -127, 127, torch.int8)
        return F.linear(x, w)


@pytest.mark.parametrize("choose", ["choose_qparams", "choose_qparams_symmetric"])
@pytest.mark.parametrize("shift", [0.0, 2.0, -3.0])
def test_scales_that_pt2e_finds_at_run_time(choose: str, shift: float) -> None:
    module = Dynamic(choose).eval()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) + shift
    graph = bw.capture(module, (x,))
    for y in (x, x * 3, -x, torch.zeros(5, 32), x.abs()):
        torch.testing.assert_close(evaluate(graph, [y])[0], module(y))
