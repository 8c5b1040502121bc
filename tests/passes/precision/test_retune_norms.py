"""retune-norms: the identity while nothing changed, codes never change, coarse formats get their accuracy back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitwright.driver import optimize
from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.interpret import evaluate
from bitwright.ir.verify import verify
from bitwright.passes import Context, parse_passes, run_pipeline
from bitwright.passes._measure import relative_rms
from bitwright.passes.pipelines import CANONICAL
from bitwright.passes.precision._affine import gained
from bitwright.passes.precision._statistics import Moments
from bitwright.passes.precision.retune_norms import RetuneNorms, retuned
from tests.digits_networks import accuracy, captured, data, trained

Read = Callable[..., Graph]
Array = np.ndarray[Any, Any]

TEXT = """
graph @g (%x: f32[b, 2]) -> (y = %y) level=graph {
  %q = weight {ref="fc.weight"} : s8[3, 2]
  %s = constant {values=[0.25]} : f32[]
  %w = dequantize(%q, %s) : f32[3, 2]
  %y = linear(%x, %w) : f32[b, 3]
}
"""
CODES = np.array([[4, -8], [100, 3], [0, 0]], np.int8)


def coarse(graph: Graph, bits: int = 4) -> Graph:
    """The 8-bit graph with its weights rounded to ``bits`` bits on a scale so much coarser."""
    step = 2 ** (8 - bits)

    def visit(rw: Rewriter, node: Node) -> bool:
        if not isinstance(node.op, ops.Dequantize) or not graph.is_constant(node.inputs[0]):
            return False
        codes, scale = (np.asarray(graph.constant(x)) for x in node.inputs[:2])
        new = rw.weight("coarse", np.clip(np.round(codes / step), -7, 7).astype(np.int8))
        rw.keep_as(node, node.op, (new, rw.constant((scale * step).astype(np.float32))), node.types)
        return True

    return rewrite(graph, visit)[0]


def codes(graph: Graph) -> list[Array]:
    """The integer weights, in order."""
    backs = [n for n in graph.nodes if isinstance(n.op, ops.Dequantize) and graph.is_constant(n.inputs[0])]
    return [np.asarray(graph.constant(n.inputs[0])) for n in backs]


def test_identity_while_the_statistics_agree() -> None:
    rng = np.random.default_rng(0)
    mean, variance = rng.standard_normal(8), rng.random(8)
    gain, shift = retuned(mean, variance, mean, variance)
    np.testing.assert_allclose(gain, 1.0, atol=1e-12)
    np.testing.assert_allclose(shift, 0.0, atol=1e-12)
    gain, shift = retuned(np.array([1.0]), np.array([4.0]), np.array([3.0]), np.array([1.0]), 1e-12)
    assert (gain[0], shift[0]) == (pytest.approx(0.5), pytest.approx(2.5))
    assert retuned(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1))[0].tolist() == [1.0]


def test_moments_of_a_stream() -> None:
    import torch

    x = torch.randn(7, 3, 4, dtype=torch.float64) * 2 + 100
    m = Moments()
    for part in (x[:1], x[1:1], x[1:]):
        m.add(part, 1)
    np.testing.assert_allclose(m.mean, x.mean((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(m.variance, x.movedim(1, 0).flatten(1).var(1, correction=0), rtol=1e-9)


def test_one_scale_becomes_one_for_each_output_and_codes_stay(read: Read) -> None:
    graph = read(TEXT, {"fc.weight": CODES})
    weights = {
        "fc.weight": np.array([[2, -4], [50, 1.5], [1, 1]], np.float32),
        "fc.bias": np.arange(3, dtype=np.float32),
    }
    float_ = read("""
        graph @g (%x: f32[b, 2]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[3, 2]
          %b = weight {ref="fc.bias"} : f32[3]
          %y = linear(%x, %w, %b) : f32[b, 3]
        }
    """, weights)  # fmt: skip
    batches = [{"x": np.random.default_rng(i).standard_normal((16, 2)).astype(np.float32)} for i in range(3)]
    context = Context(calibration=batches, facts={"reference": float_})
    after = RetuneNorms(eps=1e-9).run(graph, context)
    verify(after)
    assert after.types["y"] == graph.types["y"]
    assert [c.tolist() for c in codes(after)] == [CODES.tolist()]
    (got,), (want,) = (evaluate(g, {"x": np.concatenate([b["x"] for b in batches])}) for g in (after, float_))
    np.testing.assert_allclose(got[:, :2], want[:, :2], atol=1e-4)  # those differ by a factor and a shift
    np.testing.assert_allclose(got.mean(0), want.mean(0), atol=1e-5)
    assert [place for _, place, _ in context.remarks] == ["model", "fc"]
    again = RetuneNorms(eps=1e-9).run(after, context)
    assert not again.changed_from(after)


def test_scales_of_groups_and_zero_points(read: Read) -> None:
    op, scale = gained(ops.Dequantize(axis=1, group=2), np.ones((2, 3), np.float32), np.array([2.0, 3.0]))
    assert (op, scale.tolist()) == (ops.Dequantize(axis=1, group=2), [[2.0] * 3, [3.0] * 3])
    text = TEXT.replace("dequantize(%q, %s)", "dequantize(%q, %s, %z)").replace(
        "  %w =", "  %z = constant {values=[3]} : s8[]\n  %w ="
    )
    graph = read(text, {"fc.weight": CODES})
    bent = read(text.replace("0.25", "0.5"), {"fc.weight": CODES})
    batches = [{"x": np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32)}]
    after = RetuneNorms().run(graph, Context(calibration=batches, facts={"reference": bent}))
    verify(after)
    assert relative_rms(evaluate(after, batches[0]), evaluate(bent, batches[0])) < 1e-4


def test_an_unchanged_network_stays_as_it_is(read: Read) -> None:
    graph = read(TEXT, {"fc.weight": CODES})
    batches = [{"x": np.ones((4, 2), np.float32)}]
    context = Context(calibration=batches, facts={"reference": graph})
    assert not RetuneNorms().run(graph, context).changed_from(graph)


def test_accuracy_of_coarse_weights_comes_back() -> None:
    graph, _ = optimize(captured(trained("plain")), CANONICAL)
    context = Context(calibration=data().batches())
    low, _ = run_pipeline(graph, parse_passes("observe-ranges, quantize-int8"), context)
    low = coarse(low, 3)
    after = RetuneNorms().run(low, context)
    verify(after)
    assert all((a == b).all() for a, b in zip(codes(low), codes(after), strict=True))
    x = [data().test_x]
    before, now = (relative_rms(evaluate(g, x), evaluate(graph, x)) for g in (low, after))
    assert now < 0.5 * before
    assert accuracy(low) < accuracy(graph) - 1.5
    assert accuracy(after) > accuracy(graph) - 1.0


def test_statistics_of_folded_norms_are_a_target() -> None:
    graph, _ = optimize(captured(trained("plain")), "simplify")
    context = Context(calibration=data().batches())
    low, _ = run_pipeline(graph, parse_passes(f"{CANONICAL}, observe-ranges, quantize-int8"), context)
    low = coarse(low)
    after = RetuneNorms(target="norms").run(low, context)
    verify(after)
    assert [r.reason for r in context.refusals] == ["no batch norm was folded into it"]
    x = [data().test_x]
    before, now = (relative_rms(evaluate(g, x), evaluate(graph, x)) for g in (low, after))
    assert now < before


def test_refusals_and_errors(read: Read) -> None:
    graph = read(TEXT, {"fc.weight": CODES})
    batches = [{"x": np.ones((4, 2), np.float32)}]
    with pytest.raises(InvalidInput, match="run that before quantizing"):
        RetuneNorms().run(graph, Context(calibration=batches))
    with pytest.raises(InvalidInput, match="needs calibration data"):
        RetuneNorms().run(graph, Context(facts={"reference": graph}))
    with pytest.raises(InvalidInput, match="eps"):
        RetuneNorms(eps=0.0).run(graph, Context(calibration=batches, facts={"reference": graph}))
    context = Context(calibration=batches, facts={"reference": replace(graph, nodes=(), outputs=())})
    RetuneNorms().run(graph, context)
    assert [(r.place, r.reason) for r in context.refusals] == [("fc", "the float model has no such value")]
