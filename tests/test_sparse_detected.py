"""Models that were pruned elsewhere get sparse kernels without a word from the user: quantized ONNX, convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import bitwright as bw
from bitwright.passes.sparsity.masks import nm_mask, nm_mask_array

Array = np.ndarray[Any, Any]


def quantized_onnx(operator: str, path: Path, zero_points: bool) -> tuple[Array, Array]:
    """A model whose weights are 2:4 and then 8 bits; the float weights [out, in], and inputs."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((48, 64)).astype(np.float32)
    weight = weight * nm_mask_array(weight, 2, 4, 1)
    scale = (np.abs(weight).max(1) / 127).astype(np.float32)
    q = np.clip(np.round(weight / scale[:, None]), -127, 127).astype(np.int8)
    turned, axis = (q.T.copy(), 1) if operator == "MatMul" else (q, 0)
    attributes: dict[str, Any] = {"transB": 1} if operator == "Gemm" else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["q", "s", *(["z"] if zero_points else [])], ["wd"], axis=axis),
        helper.make_node(operator, ["xd", "wd"], ["y"], **attributes),
    ]
    constants = {"q": turned, "s": scale, "xs": np.float32(0.03), "xz": np.uint8(128)}
    constants |= {"z": np.zeros(48, np.int8)} if zero_points else {}
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 48])],
        [numpy_helper.from_array(np.asarray(a), k) for k, a in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return weight, rng.standard_normal((8, 64)).astype(np.float32)


@pytest.mark.parametrize("operator", ["Gemm", "MatMul"])
@pytest.mark.parametrize("zero_points", [False, True])
def test_a_pruned_then_quantized_onnx_model(operator: str, zero_points: bool, tmp_path: Path) -> None:
    weight, x = quantized_onnx(operator, tmp_path / "m.onnx", zero_points)
    program = bw.compile(tmp_path / "m.onnx", recipe="float")
    (row,) = (r for r in program.report.layers if r.formats.w)
    assert (row.formats.w, row.pattern) == ("s8", "nm<2:4, axis=1>")
    assert row.reason.startswith(("2:4 kernel", "runs dense: 2:4 would gain"))
    assert any(n.startswith("detect-sparsity: pattern 2:4") for n in row.notes)
    got, want = np.asarray(program(x)), x @ weight.T
    assert np.abs(got - want).max() < 0.02 * np.ptp(want)


@pytest.mark.parametrize(("channels", "keep", "group"), [(18, 1, 3), (22, 2, 4), (24, 3, 7), (32, 3, 16)])
@pytest.mark.parametrize("recipe", ["float", "int8"])
def test_convolutions_of_any_pattern_and_channels(channels: int, keep: int, group: int, recipe: str) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(channels, 24, 3, padding=1)
    first.weight.data = torch.where(nm_mask(first.weight.data, keep, group, 1), first.weight.data, 0.0)
    module = nn.Sequential(first, nn.ReLU(), nn.Conv2d(24, 8, 1)).eval()
    x = torch.randn(2, channels, 7, 7)
    program = bw.compile(module, example_inputs=(x,), recipe=recipe, calibration=[(x,)])
    row = next(r for r in program.report.layers if r.formats.w)
    assert row.pattern == f"nm<{keep}:{group}, axis=1>"
    assert row.reason.startswith((f"{keep}:{group} kernel", "runs dense: ")) or "which obey both" in row.reason
    want = module(x).detach().numpy()
    assert np.abs(np.asarray(program(x)) - want).max() < (1e-5 if recipe == "float" else 0.03) * np.ptp(want)


def test_zeros_without_a_pattern_are_in_the_report() -> None:
    """Half of the zeros of a large layer are in no order: it runs dense, the report names the share and the cure."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 128)
    layer.weight.data[torch.rand(128, 256) < 0.4] = 0.0
    x = torch.randn(4, 256)
    report = bw.compile(layer.eval(), example_inputs=(x,), recipe="float").report
    (row,) = (r for r in report.layers if r.formats.w)
    assert (row.pattern, row.reason) == ("", "dense weights")
    (note,) = (n for n in row.notes if n.startswith("detect-sparsity"))
    assert "unstructured" in note
    assert "convert-unstructured" in note
