"""Codes found at run time: which layers get them, what is shared, what is left alone and why, what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.types import BF16, F32, TensorType, parse_dtype, parse_type
from bitwright.passes._pass import Context
from bitwright.passes.precision.dynamic_quantize import DynamicQuantize
from bitwright.passes.precision.quantize_weights import QuantizeWeights
from tests.codegen.harness import target


def twins(group: int = 32) -> Graph:
    """Two layers of one input (their weights in groups), a third behind the first."""
    rng, b = np.random.default_rng(0), Builder()
    x = b.input("x", parse_type("f32[5, 64]"))
    made: list[str] = []
    for name, source, size in (("a", x, 48), ("b", x, 48), ("c", "", 16)):
        source = source or made[0]
        w = b.weight(f"{name}.weight", rng.standard_normal((size, b.types[source].static_shape[1])).astype(np.float32))
        made.append(b.emit(ops.Linear(), source, w))
    return QuantizeWeights(group=group, bits="4").run(b.finish(made[1:]), Context())


def test_layers_of_one_input_share_its_codes() -> None:
    graph, context = twins(), Context()
    after = DynamicQuantize().run(graph, context)
    assert sum(isinstance(n.op, ops.DynamicQuantize) for n in after.nodes) == 2
    assert [r[1] for r in context.remarks] == ["a", "b", "c"]
    assert all(r[2]["activations"] == "s8 per row" and 0 < r[2]["scale_change"] <= 2**-8 for r in context.remarks)
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    for got, want in zip(evaluate(after, [x]), evaluate(graph, [x]), strict=True):
        g, w = to_numpy(got), to_numpy(want)
        assert np.abs(g - w).max() < 0.03 * np.abs(w).max()
    again = DynamicQuantize().run(after, context)
    assert len(again.nodes) == len(after.nodes)


def scales_of(graph: Graph) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(graph.constant(n.inputs[1])) for n in graph.nodes if isinstance(n.op, ops.Dequantize)]


def test_scales_of_groups_are_rounded_once_and_those_of_outputs_never() -> None:
    exact = scales_of(DynamicQuantize(scales="f32").run(twins(), Context()))
    rounded = scales_of(DynamicQuantize().run(twins(), Context()))
    for a, b in zip(exact, rounded, strict=True):
        np.testing.assert_array_equal(b, a.astype(BF16.numpy).astype(np.float32))
    assert any((a != b).any() for a, b in zip(exact, rounded, strict=True))
    by_output = twins(group=0)
    for a, b in zip(scales_of(by_output), scales_of(DynamicQuantize().run(by_output, Context())), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_done_when_activations_shall_stay() -> None:
    graph = twins()
    assert DynamicQuantize(activations="f32").run(graph, Context()) is graph
    only = DynamicQuantize(only="c", except_="a").run(graph, Context())
    assert [n.inputs[0] for n in only.nodes if isinstance(n.op, ops.DynamicQuantize)] == [
        n.output for n in graph.nodes if isinstance(n.op, ops.Linear)
    ][:1]


@pytest.mark.parametrize(
    ("kind", "coded", "why"),
    [("f32", False, "no integer codes"), ("bf16", True, "activation is bf16"), ("open", True, "inputs is open")],
)
def test_refusals(kind: str, coded: bool, why: str) -> None:
    b = Builder()
    dtype, width = parse_dtype("f32" if kind == "open" else kind), 8
    x = b.input("x", TensorType(dtype, (2, width)))
    w = b.weight("fc.weight", np.ones((4, 8), np.int8 if coded else np.float32))
    if coded:
        scale = b.constant(np.ones(4, dtype.numpy), TensorType(dtype, (4,)))
        w = b.emit(ops.Dequantize(0), w, scale)
    y = b.append(ops.Linear(), (x, w), ("y",), (TensorType(dtype, (2, 4)),))[0]
    graph = b.finish([y])
    if kind == "open":
        graph = Graph(
            graph.name, (type(graph.inputs[0])("x", TensorType(F32, (2, "k"))),), graph.nodes, graph.outputs,
            graph.output_names, graph.weights, graph.level,
        )  # fmt: skip
    context = Context()
    assert DynamicQuantize().run(graph, context) is graph
    assert why in str(context.refusals[0])
    assert context.refusals[0].place == "fc"


def test_targets_without_kernels_keep_their_activations() -> None:
    graph, context = twins(), Context(replace(target(), kind="device", name="chip"))
    assert DynamicQuantize().run(graph, context) is graph
    assert {str(r.reason) for r in context.refusals} == {"target chip has no kernels for codes found at run time"}
