"""Real architectures, small: captured from torch and from ONNX, compiled in float and int8, against eager torch."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.runtime.program import Program
from tests.zoo import ZOO

FLOAT, INT8 = 1e-4, 2e-2
"""Largest error over the range of the output."""
SIMILAR = ("resnet50", "bert_eager", "minilm")
"""Built like another model of the zoo: some tests take them at night only."""
FROM_ONNX = {
    "resnet18": (True, False), "mobilenet_v2": (True, False), "unet": (True, False), "convnext_tiny": (True,),
    "vit_small": (True,), "bert_base": (True,), "gpt2_small": (True,), "llama": (True,),
}  # fmt: skip
"""Which of torch's two exporters (the new one: True) write the model."""


def outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        result: Tensor = module(*inputs)
    return result.numpy()


def check(got: Any, want: np.ndarray[Any, Any], bound: float) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert float(np.abs(got - want).max()) <= bound * float(want.max() - want.min())


def contractions(program: Program) -> list[str]:
    """Activation format of every layer that multiplies by weights."""
    return [x.formats.x for x in program.report.layers if x.formats.w]


def check_both(graph: bw.Graph, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Program, Program]:
    """Float and int8 programs are within their bounds, and no layer is out of its own."""
    want, arrays = outputs(module, inputs), [x.numpy() for x in inputs]
    plain = bw.compile(graph)
    check(plain(*arrays), want, FLOAT)
    low = bw.compile(graph, recipe="int8", calibration=[arrays])
    check(low(*arrays), want, INT8)
    for program in (plain, low):
        compared = bw.verify(program, graph, arrays)
        assert not compared.first_bad, [r for r in compared.rows if not r.ok]
        assert compared.rows
    assert set(contractions(plain)) == {"f32"}
    assert contractions(low).count("u8") >= 0.6 * len(contractions(low))
    return plain, low


@pytest.mark.parametrize("name", ZOO)
def test_a_torch_model_equals_eager_in_float_and_int8(name: str, tmp_path: Path) -> None:
    module, inputs = ZOO[name]()
    graph = bw.capture(module, inputs)
    for program in check_both(graph, module, inputs):
        as_arrays = program(*(x.numpy() for x in inputs))
        np.testing.assert_array_equal(program(*inputs), as_arrays)
        program.save(tmp_path / "model.bw")
        loaded = bw.load(tmp_path / "model.bw")
        np.testing.assert_array_equal(loaded(*inputs), as_arrays)
        assert loaded.report == program.report


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.nightly if n in SIMILAR else ()) for n in ZOO])
def test_one_program_takes_any_batch(name: str) -> None:
    module, inputs = ZOO[name]()
    rows_at_once = 1 if name in ("digits", "gpt2_small") else 2
    program = bw.compile(bw.capture(module, inputs, dynamic_batch=True), batch=rows_at_once)
    assert program.manifest.chunks == (rows_at_once,)
    assert program.manifest.batch == "b", program.report.notes
    for rows in (1, 3, 7):
        x = tuple(torch.cat([v] * 4)[:rows] for v in inputs)
        check(program(*x), outputs(module, x), FLOAT)


@pytest.mark.parametrize(("name", "recipe", "batch"), [("resnet18", "int8", 4), ("bert_base", "int8", 2)])
def test_a_row_is_the_same_in_any_batch(name: str, recipe: str, batch: int) -> None:
    module, inputs = ZOO[name]()
    arrays = [x.numpy() for x in inputs]
    graph = bw.capture(module, inputs, dynamic_batch=True)
    program = bw.compile(graph, recipe=recipe, calibration=[arrays], batch=batch)
    assert program.manifest.chunks == (batch,)
    whole = program(*(np.concatenate([a] * 3) for a in arrays))
    for i in range(6):
        row = program(*(a[i % 2 : i % 2 + 1] for a in arrays))
        np.testing.assert_array_equal(row[0], whole[i])
    check(whole[:2], outputs(module, inputs), INT8)


def to_onnx(module: nn.Module, inputs: tuple[Tensor, ...], dynamo: bool, names: list[str]) -> Any:
    import onnx

    buffer: Any = io.BytesIO()
    options: dict[str, Any] = {"verbose": False} if dynamo else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, inputs, buffer, dynamo=dynamo, input_names=names, output_names=["out"], **options)
    return onnx.load_from_string(buffer.getvalue())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "dynamo"), [(n, d) for n, ways in FROM_ONNX.items() for d in ways])
def test_an_onnx_model_equals_eager_in_float_and_int8(name: str, dynamo: bool) -> None:
    module, inputs = ZOO[name]()
    names = [f"in{i}" for i in range(len(inputs))]
    graph = bw.load_onnx(to_onnx(module, inputs, dynamo, names))
    plain, _ = check_both(graph, module, inputs)
    assert plain.input_names == tuple(names)
    assert plain.output_names == ("out",)


def test_verify_names_the_layer_that_differs() -> None:
    module, inputs = ZOO["digits"]()
    graph = bw.capture(module, inputs)
    program = bw.compile(graph)
    with torch.no_grad():
        module.fc1.weight.mul_(1.5)  # type: ignore[union-attr,operator]
    compared = bw.verify(program, bw.capture(module, inputs), [x.numpy() for x in inputs])
    bad = next(r for r in compared.rows if not r.ok)
    assert compared.first_bad == bad.layer
    assert "fc1" in bad.origin or "relu" in bad.origin, bad
