"""Weights of few bits from files and recipes to programs: on the command line, stored packed, checked, told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bitwright as bw
from bitwright import cli

WIDTH, HIDDEN, BLOCK = 128, 256, 32


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and what was printed."""
    monkeypatch.setattr(sys, "argv", ["bitwright", *map(str, arguments)])
    capsys.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def two_layers(path: Path, *, zeros: bool, level: int = 4) -> Path:
    """x[3, 128] -> MatMulNBits 256 -> Relu -> MatMulNBits 128, with zero points or without."""
    rng = np.random.default_rng(0)
    nodes, tensors, name = [], [], "x"
    for i, (k, n) in enumerate(((WIDTH, HIDDEN), (HIDDEN, WIDTH))):
        blocks = k // BLOCK
        parts: dict[str, np.ndarray[Any, Any]] = {
            f"w{i}": rng.integers(0, 256, (n, blocks, BLOCK // 2)).astype(np.uint8),
            f"s{i}": (0.002 + 0.02 * rng.random(n * blocks)).astype(np.float32),
        }
        if zeros:
            parts[f"z{i}"] = rng.integers(0, 256, n * blocks // 2).astype(np.uint8)
        tensors += [numpy_helper.from_array(a, key) for key, a in parts.items()]
        nodes.append(
            helper.make_node(
                "MatMulNBits", [name, *parts], [f"h{i}"], name=f"layer{i}", domain="com.microsoft", K=k, N=n, bits=4,
                block_size=BLOCK, accuracy_level=level,
            )
        )  # fmt: skip
        name = f"h{i}"
        if not i:
            nodes.append(helper.make_node("Relu", ["h0"], ["r"]))
            name = "r"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, WIDTH])
    y = helper.make_tensor_value_info("h1", TensorProto.FLOAT, [3, WIDTH])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "two", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


@pytest.mark.parametrize("zeros", [False, True])
def test_a_file_of_four_bit_layers_compiles_and_agrees_with_onnxruntime(
    zeros: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime as ort  # type: ignore[import-untyped]

    model, made, data = two_layers(tmp_path / "m.onnx", zeros=zeros), tmp_path / "m.bw", tmp_path / "x.npz"
    x = np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)
    np.savez(data, x=x)
    code, text = command(monkeypatch, capsys, "compile", model, "--recipe", "weight-only", "-o", made)
    assert code == 0, text
    program = bw.load(made)
    reasons = [r.reason for r in program.report.layers if r.weight]
    kind = "u4" if zeros else "s4"
    assert all(f"{kind} group 32, bf16 scales, activations s8 per row" in r for r in reasons)
    assert len(reasons) == 2
    (want,) = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert np.abs(program(x) - want).max() < 0.02 * np.abs(want).max()
    code, text = command(monkeypatch, capsys, "inspect", made)
    assert code == 0
    assert "grouped" in text
    code, text = command(monkeypatch, capsys, "verify", made, model, "--input", data, "--drift", "0.05")
    assert code == 0, text


def test_activations_may_stay_floats(tmp_path: Path) -> None:
    """With the option the program computes what the file says, to rounding."""
    import onnxruntime as ort

    model = two_layers(tmp_path / "m.onnx", zeros=False, level=1)
    x = np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)
    (want,) = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    program = bw.compile(model, recipe="weight-only{activations=f32}")
    assert np.abs(program(x) - want).max() < 1e-4 * np.abs(want).max()
    assert {r.formats.w for r in program.report.layers if r.weight} == {"f32"}


def test_few_bits_are_few_bytes_on_disk(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256))
    sizes = {}
    for name, recipe in (
        ("float", "float"), ("4", "weight-only{group=128}"), ("2", "weight-only{bits=2 group=128}"),
        ("ternary", "weight-only{bits=ternary group=0}"),
    ):  # fmt: skip
        path = tmp_path / f"{name}.bw"
        bw.compile(net, example_inputs=(torch.zeros(1, 512),), recipe=recipe).save(path)
        sizes[name] = bw.load(path).manifest.weights_bytes
    count = 512 * 1024 + 1024 * 256
    assert sizes["float"] >= 4 * count
    assert sizes["4"] <= count * (4 + 16 / 128) / 8 + 4 * 1280 + 1024
    assert sizes["2"] <= count * (2 + 16 / 128) / 8 + 4 * 1280 + 1024
    assert sizes["ternary"] <= count * 2 / 8 + 8 * 1280 + 1024
    assert (tmp_path / "2.bw").stat().st_size < (tmp_path / "4.bw").stat().st_size < count
