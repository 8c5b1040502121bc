"""lower-contractions: bf16 operands, one rounding of what is read twice, patterns kept, refusals with their reason."""

from __future__ import annotations

import numpy as np
import pytest

import bitwright as bw
from bitwright.codegen.targets import BUILTIN, GPUS
from bitwright.codegen.targets.machine import cpu_flags
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.text import parse
from bitwright.ir.types import BF16, F16, NM
from bitwright.ir.weights import Weights
from bitwright.passes import Context
from bitwright.passes.lowering.lower_contractions import LowerContractions

RNG = np.random.default_rng(9)
TWO = """
graph @g (%x: f32[3, 5, 8]) -> (y = %y) level=integer {
  %w = weight {ref="a.weight"} : f32[16, 8] nm<2:4, axis=1>
  %b = weight {ref="a.bias"} : f32[16]
  %v = weight {ref="b.weight"} : f32[16, 8]
  %p = linear(%x, %w, %b) : f32[3, 5, 16]
  %q = linear(%x, %v) : f32[3, 5, 16]
  %y = mul(%p, %q) : f32[3, 5, 16]
}
"""
CONV = """
graph @g (%x: f32[1, 4, 9, 9]) -> (y = %y) level=integer {
  %w = weight {ref="c.weight"} : f32[6, 4, 3, 3]
  %b = weight {ref="c.bias"} : f32[6]
  %c = conv(%x, %w, %b) {stride=[2, 2], padding=[1, 1, 1, 1], dilation=[1, 1]} : f32[1, 6, 5, 5]
  %y = relu(%c) : f32[1, 6, 5, 5]
}
"""


def two() -> Graph:
    w, v = (RNG.standard_normal((16, 8)).astype(np.float32) for _ in range(2))
    w.reshape(16, 2, 4)[:, :, 1:3] = 0
    return parse(TWO, Weights({"a.weight": w, "b.weight": v, "a.bias": RNG.standard_normal(16).astype(np.float32)}))


def conv() -> Graph:
    sizes = {"c.weight": (6, 4, 3, 3), "c.bias": (6,)}
    return parse(CONV, Weights({k: RNG.standard_normal(s).astype(np.float32) for k, s in sizes.items()}))


def test_an_input_is_rounded_once_and_patterns_stay() -> None:
    after = LowerContractions().run(two(), Context())
    layers = [n for n in after.nodes if isinstance(n.op, ops.Linear)]
    assert {n.inputs[0] for n in layers} == {"x.half"}
    assert [n.type.dtype for n in layers] == [BF16, BF16]
    assert after.types[layers[0].inputs[1]].encoding == NM(2, 4, axis=1)
    assert LowerContractions().run(after, Context()) == after


def test_only_and_except() -> None:
    for options, count in ((LowerContractions(only="b"), 1), (LowerContractions(except_="a|b"), 0)):
        after = options.run(two(), Context())
        assert sum(n.type.dtype == BF16 for n in after.nodes if isinstance(n.op, ops.Linear)) == count


@pytest.mark.parametrize("graph", [two(), conv()], ids=["linear", "conv"])
def test_error_is_that_of_bf16(graph: Graph) -> None:
    x = RNG.standard_normal(graph.inputs[0].type.static_shape).astype(np.float32)
    after = LowerContractions().run(graph, Context())
    plain, rounded = (to_numpy(evaluate(g, [x])[0]) for g in (graph, after))
    error = np.abs(plain - rounded).max() / np.abs(plain).max()
    assert 1e-5 < error < 0.02


REFUSED = """
graph @g (%x: f32[1, {c}, 4, 4], %k: f32[2, {i}, 1, 1]) -> (y = %y) level=integer {{
  %w = weight {{ref="c.weight"}} : f32[{o}, {i}, 1, 1]
  %y = conv(%x, {w}) {{groups={g}}} : f32[1, {o}, 4, 4]
}}
"""


@pytest.mark.parametrize(
    ("sizes", "target", "reason"),
    [
        ({"c": 4, "i": 4, "o": 2, "g": 1, "w": "%w"}, "x86-avx2", "x86-avx2 has no products of bf16"),
        ({"c": 3, "i": 3, "o": 2, "g": 1, "w": "%w"}, "x86-avx512-bf16", "3 inputs have no pairs of bf16"),
        ({"c": 4, "i": 1, "o": 4, "g": 4, "w": "%w"}, "x86-avx512-bf16", "a depthwise convolution has no bf16 kernel"),
        ({"c": 4, "i": 4, "o": 2, "g": 1, "w": "%k"}, "x86-avx512-bf16", "its weights are computed"),
    ],
)
def test_refusals(sizes: dict[str, object], target: str, reason: str) -> None:
    shape = (sizes["o"], sizes["i"], 1, 1)
    graph = parse(REFUSED.format(**sizes), Weights({"c.weight": np.ones(shape, np.float32)}))
    context = Context(target=BUILTIN[target])
    assert LowerContractions().run(graph, context) == graph.drop_dead()
    assert [r.reason for r in context.refusals] == [f"stays f32: {reason}"]


@pytest.mark.parametrize("graph", [two(), conv()], ids=["linear", "conv"])
def test_f16_where_the_target_multiplies_it(graph: Graph) -> None:
    lowered = LowerContractions(format="f16").run(graph, Context(target=GPUS["cuda-sm80"]))
    halves = [n for n in lowered.nodes if isinstance(n.op, ops.Linear | ops.Conv)]
    assert halves
    assert all(lowered.types[x].dtype == F16 for n in halves for x in n.inputs)
    x = RNG.standard_normal(graph.inputs[0].type.static_shape).astype(np.float32)
    got, want = (to_numpy(evaluate(g, [x])[0]) for g in (lowered, graph))
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=0.005 * np.abs(want).max())
    context = Context(target=BUILTIN["x86-avx512-bf16"])
    assert LowerContractions(format="f16").run(graph, context) == graph.drop_dead()
    assert {r.reason for r in context.refusals} == {"stays f32: x86-avx512-bf16 has no products of f16"}


@pytest.mark.skipif("avx512bf16" not in cpu_flags(), reason="this CPU has no products of bf16")
@pytest.mark.parametrize("graph", [two(), conv()], ids=["linear", "conv"])
def test_programs_run_tiled_kernels(graph: Graph) -> None:
    program = bw.compile(graph, recipe="bf16", target=BUILTIN["x86-avx512-bf16"])
    kernels = [layer.kernel for layer in program.report.layers if "linear" in layer.op or "conv" in layer.op]
    assert kernels
    assert set(kernels) == {"contract"}
    x = RNG.standard_normal(graph.inputs[0].type.static_shape).astype(np.float32)
    want = to_numpy(evaluate(LowerContractions().run(graph, Context()), [x])[0])
    np.testing.assert_allclose(program(x), want, rtol=2**-6, atol=0.03 * np.abs(want).max())
