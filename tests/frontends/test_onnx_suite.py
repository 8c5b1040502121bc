"""The ONNX backend test suite on the reference interpreter: nothing wrong, nothing broken, a floor for the passes."""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from bitwright.frontends.onnx.backend import Backend, interpreter
from bitwright.ir.errors import InvalidInput, Unsupported

PARTS = 4


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "onnx_suite.py"
    spec = importlib.util.spec_from_file_location("onnx_suite", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("part", range(PARTS))
def test_every_case_passes_or_is_refused(suite: ModuleType, part: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {c.name: suite.timed(c, interpreter) for c in list(suite.cases())[part::PARTS]}
    bad = {name: detail for name, (category, detail) in found.items() if category in ("wrong", "error")}
    assert not bad
    assert Counter(category for category, _ in found.values())["pass"] >= 440


def model(node: NodeProto, inputs: dict[str, tuple[int, list[int]]]) -> ModelProto:
    infos = [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()]
    graph = helper.make_graph([node], "g", infos, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def test_a_shape_that_comes_at_run_time_is_compiled_in_once_for_each_value() -> None:
    prepared = Backend.prepare(model(helper.make_node("Reshape", ["x", "s"], ["y"]), {"x": (1, [2, 6]), "s": (7, [2])}))
    assert prepared.binds == ("s",)
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    for shape in ([3, 4], [4, 3], [3, 4]):
        (y,) = prepared.run([x, np.array(shape)])
        np.testing.assert_array_equal(y, x.reshape(shape))
    assert len(prepared.compiled) == 2


def test_large_inputs_are_never_compiled_in() -> None:
    prepared = Backend.prepare(model(helper.make_node("Gather", ["x", "s"], ["y"]), {"x": (1, [3]), "s": (7, [2])}))
    assert prepared.binds == ()
    with pytest.raises(Unsupported):
        Backend.run_model(
            model(helper.make_node("Reshape", ["x", "s"], ["y"]), {"x": (1, [1]), "s": (7, [2000])}),
            [np.ones(1, np.float32), np.ones(2000, np.int64)],
        )


def test_only_the_cpu_is_offered() -> None:
    assert Backend.supports_device("CPU:0")
    assert not Backend.supports_device("CUDA")
    with pytest.raises(InvalidInput, match="CUDA"):
        Backend.prepare(model(helper.make_node("Neg", ["x"], ["y"]), {"x": (1, [2])}), "CUDA")
