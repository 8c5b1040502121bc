"""equalize-layers: ranges meet, the function and every zero stay, and 8 bits per tensor suffice again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitwright.driver import optimize
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.types import NM
from bitwright.ir.verify import verify
from bitwright.passes import Context
from bitwright.passes._measure import relative_rms
from bitwright.passes._norms import Norm
from bitwright.passes.pipelines import CANONICAL
from bitwright.passes.precision._equalize import equalize_pair, equalizing_scale
from bitwright.passes.precision._rescale import input_channels
from bitwright.passes.precision.equalize_layers import EqualizeLayers
from tests.digits_networks import accuracy, captured, data, trained, unbalanced

Read = Callable[..., Graph]
Difference = Callable[..., float]
rng = np.random.default_rng(0)


def uneven(*shape: int) -> np.ndarray[Any, Any]:
    """Weights whose output channels differ in size by orders of magnitude."""
    factor = np.exp(2 * rng.standard_normal((shape[0], *[1] * (len(shape) - 1))))
    return (rng.standard_normal(shape) * factor).astype(np.float32)


NETWORK = """
graph @g (%x: f32[b, 3, 8, 8]) -> (y = %y) level=graph {
  %w1 = weight {ref="stem.weight"} : f32[8, 3, 3, 3]
  %b1 = weight {ref="stem.bias"} : f32[8]
  %w2 = weight {ref="dw.weight"} : f32[16, 1, 3, 3]
  %w3 = weight {ref="grouped.weight"} : f32[8, 8, 1, 1] nm<2:4, axis=1>
  %b3 = weight {ref="grouped.bias"} : f32[8]
  %w4 = weight {ref="fc.weight"} : f32[5, 128]
  %h1 = conv(%x, %w1, %b1) {padding=[1, 1, 1, 1]} : f32[b, 8, 8, 8]
  %r1 = relu(%h1) : f32[b, 8, 8, 8]
  %h2 = conv(%r1, %w2) {padding=[1, 1, 1, 1], groups=8} : f32[b, 16, 8, 8]
  %c2 = clamp(%h2) {lo=0.0, hi=6.0} : f32[b, 16, 8, 8]
  %h3 = conv(%c2, %w3, %b3) {groups=2} : f32[b, 8, 8, 8]
  %l3 = leaky_relu(%h3) : f32[b, 8, 8, 8]
  %m = max_pool(%l3) {kernel=[2, 2], stride=[2, 2]} : f32[b, 8, 4, 4]
  %f = reshape(%m) {shape=["b", 128]} : f32[b, 128]
  %y = linear(%f, %w4) : f32[b, 5]
}
"""


def masked(*shape: int) -> np.ndarray[Any, Any]:
    w = uneven(*shape)
    w.reshape(shape[0], -1, 4)[:, :, 2:] = 0.0
    return w


WEIGHTS = {
    "stem.weight": uneven(8, 3, 3, 3), "dw.weight": uneven(16, 1, 3, 3), "grouped.weight": masked(8, 8, 1, 1),
}  # fmt: skip


def test_a_pair_meets_in_the_middle() -> None:
    first, bias, second = uneven(6, 4), rng.standard_normal(6).astype(np.float32), uneven(3, 6)
    x = rng.standard_normal((5, 4))
    a, b, c, s = equalize_pair(first, bias, second)
    assert b is not None
    np.testing.assert_allclose(np.abs(a).max(1), np.abs(c).max(0), rtol=1e-5)
    np.testing.assert_allclose(s, np.sqrt(np.abs(first).max(1) / np.abs(second).max(0)), rtol=1e-6)
    want = np.maximum(x @ first.T + bias, 0) @ second.T
    np.testing.assert_allclose(np.maximum(x @ a.T + b, 0) @ c.T, want, rtol=1e-4, atol=1e-4)
    assert equalizing_scale(np.array([0.0, 4.0]), np.array([1.0, 0.0])).tolist() == [1.0, 1.0]


def test_input_channels_of_grouped_weights() -> None:
    from bitwright.ir import ops

    assert input_channels(ops.Conv(groups=2), (4, 3, 1, 1))[:, 0].tolist() == [0, 0, 3, 3]
    assert input_channels(ops.Conv(groups=2), (4, 1, 3, 3))[:, 0].tolist() == [0, 0, 1, 1]
    assert input_channels(ops.Linear(), (2, 3)).tolist() == [[0, 1, 2]] * 2


def test_a_network_keeps_its_function_and_its_masks(read: Read, difference: Difference) -> None:
    graph, context = read(NETWORK, WEIGHTS), Context(facts={"ranges": {"x": (0.0, 1.0)}})
    after = EqualizeLayers().run(graph, context)
    verify(after)
    assert difference(graph, after) < 1e-5
    assert [place for _, place, _ in context.remarks] == ["stem", "dw", "grouped"]
    assert {r.place: r.reason for r in context.refusals} == {"fc": "%y is an output of the model"}
    for _, _, facts in context.remarks:
        assert facts["spread_after"] < facts["spread"]
    sparse = next(n for n in after.nodes if isinstance(n.type.encoding, NM))
    new = after.constant(sparse.output)
    assert ((np.asarray(new) == 0) == (WEIGHTS["grouped.weight"] == 0)).all()
    assert "ranges" not in context.facts  # observed before: no longer true
    again = EqualizeLayers().run(after, Context())
    assert not again.changed_from(after)


def test_ranges_of_neighbours_agree_when_converged(read: Read) -> None:
    text = """
        graph @g (%x: f32[2, 4]) -> (y = %y) level=graph {
          %a = weight {ref="a.weight"} : f32[6, 4]
          %b = weight {ref="b.weight"} : f32[5, 6]
          %c = weight {ref="c.weight"} : f32[6, 5]
          %h = linear(%x, %a) : f32[2, 6]
          %r = relu(%h) : f32[2, 6]
          %k = linear(%r, %b) : f32[2, 5]
          %y = linear(%k, %c) : f32[2, 6]
        }
    """
    after = EqualizeLayers().run(read(text, {"a.weight": uneven(6, 4), "b.weight": uneven(5, 6)}), Context())
    a, b, c = (np.abs(np.asarray(after.constant(after.producers[n].inputs[1]))) for n in ("h", "k", "y"))
    np.testing.assert_allclose(a.max(1), b.max(0), rtol=1e-4)
    np.testing.assert_allclose(b.max(1), c.max(0), rtol=1e-4)


def test_values_of_attention_and_gated_products_are_followed(read: Read, difference: Difference) -> None:
    graph = read(
        """
        graph @g (%x: f32[b, 3, 8]) -> (y = %y) level=graph {
          %wq = weight {ref="q.weight"} : f32[8, 8]
          %wv = weight {ref="v.weight"} : f32[8, 8]
          %wo = weight {ref="o.weight"} : f32[8, 8]
          %wd = weight {ref="down.weight"} : f32[8, 8]
          %q = linear(%x, %wq) : f32[b, 3, 8]
          %qs = reshape(%q) {shape=["b", 3, 2, 4]} : f32[b, 3, 2, 4]
          %qh = transpose(%qs) {perm=[0, 2, 1, 3]} : f32[b, 2, 3, 4]
          %v = linear(%x, %wv) : f32[b, 3, 8]
          %vs = reshape(%v) {shape=["b", 3, 2, 4]} : f32[b, 3, 2, 4]
          %vh = transpose(%vs) {perm=[0, 2, 1, 3]} : f32[b, 2, 3, 4]
          %a = attention(%qh, %qh, %vh) : f32[b, 2, 3, 4]
          %at = transpose(%a) {perm=[0, 2, 1, 3]} : f32[b, 3, 2, 4]
          %ar = reshape(%at) {shape=["b", 3, 8]} : f32[b, 3, 8]
          %o = linear(%ar, %wo) : f32[b, 3, 8]
          %g = silu(%q) : f32[b, 3, 8]
          %p = mul(%o, %g) : f32[b, 3, 8]
          %y = linear(%p, %wd) : f32[b, 3, 8]
        }
    """,
        {"v.weight": uneven(8, 8), "o.weight": uneven(8, 8)},
    )
    context = Context()
    after = EqualizeLayers().run(graph, context)
    verify(after)
    assert difference(graph, after) < 1e-5
    assert [place for _, place, _ in context.remarks] == ["v", "o"]
    assert {r.place: r.reason for r in context.refusals} == {
        "q": "attention at %a reads it", "down": "%y is an output of the model",
    }  # fmt: skip


def test_what_cannot_be_scaled_says_why(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 4], %u: f32[4, 4]) -> (y = %y) level=graph {
          %w1 = weight {ref="a.weight"} : f32[4, 4]
          %w2 = weight {ref="shared.weight"} : f32[4, 4]
          %h = linear(%x, %w1) : f32[2, 4]
          %s = add(%h, %x) : f32[2, 4]
          %k = linear(%s, %w2) : f32[2, 4]
          %g = gelu(%k) : f32[2, 4]
          %m = linear(%g, %w2) : f32[2, 4]
          %y = linear(%m, %u) : f32[2, 4]
        }
    """)
    context = Context()
    assert EqualizeLayers().run(graph, context) is not None
    assert [(r.place, r.reason) for r in context.refusals] == [
        ("a", "add at %s reads it"),
        ("shared", "others share its weight"),
        ("shared", "others share its weight"),
        ("y", "its weight is computed, not constant"),
    ]
    clamped = Context()
    EqualizeLayers(clamps=False, only="dw").run(read(NETWORK), clamped)
    assert [(r.place, r.cure == "" and "clamps=true" in r.reason) for r in clamped.refusals] == [("dw", True)]
    with pytest.raises(InvalidInput, match="sweeps"):
        EqualizeLayers(sweeps=0).run(graph, Context())


def test_high_biases_are_absorbed(read: Read) -> None:
    graph = read(
        """
        graph @g (%x: f32[64, 4]) -> (y = %y) level=graph {
          %w1 = weight {ref="a.weight"} : f32[4, 4]
          %b1 = weight {ref="a.bias"} : f32[4]
          %w2 = weight {ref="b.weight"} : f32[3, 4]
          %h = linear(%x, %w1, %b1) : f32[64, 4]
          %r = relu(%h) : f32[64, 4]
          %y = linear(%r, %w2) : f32[64, 3]
        }
    """,
        {"a.weight": 0.5 * np.eye(4, dtype=np.float32), "a.bias": np.array([5, 0, 9, -1], np.float32)},
    )
    one = np.ones(4)
    norms = {"h": Norm(0.5 * one, np.array([5.0, 0.0, 9.0, -1.0]), 0 * one, one, 0.0)}
    context = Context(facts={"norms": norms})
    after = EqualizeLayers(absorb=True).run(graph, context)
    verify(after)
    x = {"x": np.random.default_rng(1).standard_normal((64, 4)).astype(np.float32)}
    assert relative_rms(evaluate(after, x), evaluate(graph, x)) < 0.01
    seen: dict[str, float] = {}
    evaluate(after, x, observe=lambda name, value: seen.update({name: float(value.max())}))
    before: dict[str, float] = {}
    evaluate(graph, x, observe=lambda name, value: before.update({name: float(value.max())}))
    assert seen["r"] < 0.75 * before["r"]
    left = context.facts["norms"]["h"]
    assert (left.beta <= 3 * left.std + 1e-9).all()


def test_depthwise_network_in_8_bits_per_tensor() -> None:
    """Plain per-tensor weights lose at least 5 points; equalized they are within half a point of float."""
    graph, _ = optimize(captured(unbalanced(trained("depthwise"))), CANONICAL)
    whole = accuracy(graph)
    eight = "observe-ranges, quantize-int8{granularity=tensor}"
    plain, _ = optimize(graph, eight, calibration=data().batches())
    even, report = optimize(graph, f"equalize-layers, {eight}", calibration=data().batches())
    assert whole > 95.0
    assert accuracy(plain) < whole - 5.0
    assert accuracy(even) > whole - 0.5
    assert report.rows[0].output_error < 1e-5
    scales = [even.types[n.inputs[1]].shape for n in even.nodes if n.op.spelling == "dequantize"]
    assert set(scales) == {()}


def test_relu6_network_keeps_its_function() -> None:
    graph, _ = optimize(captured(trained("relu6")), CANONICAL)
    after, report = optimize(graph, "equalize-layers", calibration=data().batches(1))
    assert report.rows[0].output_error < 1e-5
    assert sum(n.op.spelling == "min" for n in after.nodes) == 7
