"""recognize-activations: every spelling we have met, and near misses."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bitwright.ir.graph import Graph
from bitwright.passes import Context
from bitwright.passes.canonical.recognize_activations import RecognizeActivations

Read = Callable[..., Graph]
CONSTANTS = {
    "half": 0.5, "one": 1.0, "two": 2.0, "three": 3.0, "six": 6.0, "root2": 1.4142135623730951,
    "iroot2": 0.7071067811865476, "c": 0.7978845608028654, "k": 0.044715, "quick": 1.702, "rough": 0.8,
}  # fmt: skip

SPELLINGS = {
    "gelu, onnx": ("gelu", "a = div x root2; b = erf a; c1 = add b one; d = mul x c1; y = mul d half"),
    "gelu, half first": ("gelu", "h = mul half x; a = mul x iroot2; b = erf a; c1 = add one b; y = mul h c1"),
    "gelu, half on the sum": ("gelu", "a = mul x iroot2; b = erf a; c1 = add b one; d = mul c1 half; y = mul x d"),
    "gelu, halved": ("gelu", "a = mul x iroot2; b = erf a; c1 = add b one; d = mul x c1; y = div d two"),
    "tanh, transformers": (
        "gelu_tanh",
        "p = pow x three; a = mul k p; b = add x a; e = mul c b; t = tanh e; f = add one t; "
        "h = mul half x; y = mul h f",
    ),
    "tanh, onnx": (
        "gelu_tanh",
        "s = square x; p = mul x s; a = mul p k; b = add x a; e = mul b c; t = tanh e; f = add t one; "
        "h = mul x f; y = mul h half",
    ),
    "tanh, factored": (
        "gelu_tanh",
        "s = mul x x; a = mul k s; f1 = add a one; g = mul x c; e = mul g f1; t = tanh e; f = add t one; "
        "d = mul half f; y = mul x d",
    ),
    "silu": ("silu", "s = sigmoid x; y = mul s x"),
    "silu by exp": ("silu", "n = neg x; e = exp n; d = add one e; y = div x d"),
    "mish": ("mish", "s = softplus x; t = tanh s; y = mul x t"),
    "hardswish by relu6": ("hardswish", "a = add x three; r = relu a; m = min r six; d = mul x m; y = div d six"),
    "hardswish by hardsigmoid": ("hardswish", "s = hardsigmoid x; y = mul x s"),
    "softsign": ("softsign", "a = abs x; d = add a one; y = div x d"),
}  # fmt: skip


def spelled(read: Read, text: str, outputs: str = "y = %y") -> Graph:
    lines = [f"%{n} = constant {{values=[{v}]}} : f32[]" for n, v in CONSTANTS.items()]
    for statement in text.split(";"):
        name, _, call = statement.strip().partition(" = ")
        op, *args = call.split()
        operands = ", ".join(f"%{a}" for a in args)
        lines.append(f"%{name} = {op}({operands}) : f32[2, 3]")
    inputs = "%x: f32[2, 3], %z: f32[2, 3]"
    return read(f"graph @g ({inputs}) -> ({outputs}) level=graph {{\n" + "\n".join(lines) + "\n}").drop_dead()


@pytest.mark.parametrize("case", SPELLINGS)
def test_recognized(read: Read, difference: Callable[..., float], case: str) -> None:
    fn, text = SPELLINGS[case]
    graph, context = spelled(read, text), Context()
    after = RecognizeActivations().run(graph, context)
    assert [n.op.spelling for n in after.nodes] == [fn]
    assert context.remarks == [("recognize-activations", "y", {"activation": fn})]
    assert difference(graph, after) < 1e-5
    assert not RecognizeActivations().run(after, Context()).changed_from(after)


def test_inside_a_larger_expression(read: Read) -> None:
    graph = spelled(read, "w = exp z; s = sigmoid w; m = mul w s; y = add m z")
    after = RecognizeActivations().run(graph, Context())
    assert [n.op.spelling for n in after.nodes] == ["exp", "silu", "add"]


@pytest.mark.parametrize(
    "text",
    [
        "a = mul x quick; s = sigmoid a; y = mul x s",  # quick gelu has no kernel of its own
        "a = mul x rough; b = erf a; c1 = add b one; d = mul x c1; y = mul d half",
        "s = sigmoid z; y = mul x s",
        "a = mul x iroot2; b = erf a; c1 = add b one; d = mul z c1; y = mul d half",
        "y = mul x x",
    ],
)
def test_near_misses(read: Read, text: str) -> None:
    graph = spelled(read, text)
    assert RecognizeActivations().run(graph, Context()) is graph


def test_inner_values_that_others_read(read: Read) -> None:
    graph = spelled(read, "s = sigmoid x; y = mul s x", "y = %y, s = %s")
    assert RecognizeActivations().run(graph, Context()) is graph
