"""smooth-quant: outliers move from activations into weights; the function stays; what cannot take it says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitwright.driver import optimize
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.verify import verify
from bitwright.passes import Context
from bitwright.passes._measure import relative_rms
from bitwright.passes.precision._smooth import Seen, best_scale, int8_error, smoothing_scale
from bitwright.passes.precision.smooth_quant import SmoothQuant

Read = Callable[..., Graph]
Difference = Callable[..., float]
Array = np.ndarray[Any, Any]

BLOCK = """
graph @g (%x: f32[b, 4, 8]) -> (y = %y) level=graph {
  %g1 = weight {ref="ln1.weight"} : f32[8]
  %b1 = weight {ref="ln1.bias"} : f32[8]
  %wq = weight {ref="q.weight"} : f32[8, 8]
  %wk = weight {ref="k.weight"} : f32[8, 8]
  %wv = weight {ref="v.weight"} : f32[8, 8]
  %bv = weight {ref="v.bias"} : f32[8]
  %wo = weight {ref="o.weight"} : f32[8, 8]
  %g2 = weight {ref="ln2.weight"} : f32[8]
  %w1 = weight {ref="up.weight"} : f32[16, 8]
  %w2 = weight {ref="down.weight"} : f32[8, 16]
  %n = layer_norm(%x, %g1, %b1) : f32[b, 4, 8]
  %q = linear(%n, %wq) : f32[b, 4, 8]
  %k = linear(%n, %wk) : f32[b, 4, 8]
  %v = linear(%n, %wv, %bv) : f32[b, 4, 8]
  %a = attention(%q, %k, %v) {scale=0.01} : f32[b, 4, 8]
  %o = linear(%a, %wo) : f32[b, 4, 8]
  %r = add(%x, %o) : f32[b, 4, 8]
  %m = rms_norm(%r, %g2) : f32[b, 4, 8]
  %h = linear(%m, %w1) : f32[b, 4, 16]
  %e = gelu(%h) : f32[b, 4, 16]
  %d = linear(%e, %w2) : f32[b, 4, 8]
  %y = add(%r, %d) : f32[b, 4, 8]
}
"""


def outlying(size: int, *, at: int = 3, by: float = 80.0) -> Array:
    """Ones, with one channel far out."""
    scale = np.ones(size, np.float32)
    scale[at] = by
    return scale


def weights() -> dict[str, Array]:
    rng = np.random.default_rng(1)
    out = {"ln1.weight": outlying(8), "ln1.bias": rng.standard_normal(8).astype(np.float32)}
    for name in ("q", "k", "v"):
        out[f"{name}.weight"] = (rng.standard_normal((8, 8)) / outlying(8)).astype(np.float32)
    return out


def calibration(seed: int = 0) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((8, 4, 8)).astype(np.float32)} for _ in range(2)]


def test_scale_of_a_channel() -> None:
    s = smoothing_scale(np.array([16.0, 1.0, 0.0, 4.0]), np.array([1.0, 4.0, 1.0, 0.0]))
    assert s.tolist() == [4.0, 0.5, 1.0, 1.0]
    assert smoothing_scale(np.array([16.0]), np.array([4.0]), 0.75).tolist() == [8.0 / 4.0**0.25]


def test_search_never_loses() -> None:
    rng = np.random.default_rng(0)
    for by in (1.0, 50.0):
        seen = Seen()
        x = rng.standard_normal((64, 8)) * outlying(8, by=by)
        seen.rows, seen.lo, seen.hi = [x], x.min(0), x.max(0)
        w = rng.standard_normal((6, 8)) / outlying(8, by=by)
        s, alpha, error, plain = best_scale(seen, [w])
        assert plain == int8_error(seen, [w], np.ones(8))
        assert error == int8_error(seen, [w], s)
        assert error <= plain
        if by > 1:
            assert error < 0.1 * plain
            assert alpha > 0


def test_outliers_move_and_the_function_stays(read: Read, difference: Difference) -> None:
    graph, context = read(BLOCK, weights()), Context(calibration=calibration())
    after = SmoothQuant().run(graph, context)
    verify(after)
    assert difference(graph, after) < 1e-5
    assert [(place, facts["readers"]) for _, place, facts in context.remarks] == [("m", 1), ("v", 1), ("n", 3)]
    assert [(r.place, r.reason, r.cure) for r in context.refusals] == [
        ("down", "%h cannot absorb a scale: gelu at %e reads it", "insert=true multiplies there")
    ] or context.refusals[0].place == "down"
    gamma = np.asarray(after.constant(after.producers["n"].inputs[1]))
    assert gamma.max() / np.sort(gamma)[-2] < 20.0
    eight = "observe-ranges, quantize-int8"
    errors = []
    for recipe in (eight, f"smooth-quant, {eight}", f"smooth-quant{{search=true}}, {eight}"):
        low, _ = optimize(graph, recipe, calibration=calibration())
        fresh = calibration(7)[0]
        errors.append(relative_rms(evaluate(low, fresh), evaluate(graph, fresh)))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[0]


def test_second_run_changes_nothing(read: Read) -> None:
    context = Context(calibration=calibration())
    for p in (SmoothQuant(), SmoothQuant(alpha=0.7)):
        once = p.run(read(BLOCK, weights()), context)
        assert not p.run(once, context).changed_from(once)


POST = """
graph @g (%x: f32[b, 8]) -> (y = %y) level=graph {
  %g = weight {ref="ln.weight"} : f32[8]
  %w1 = weight {ref="up.weight"} : f32[16, 8]
  %w2 = weight {ref="down.weight"} : f32[8, 16]
  %n = layer_norm(%x, %g) : f32[b, 8]
  %h = linear(%n, %w1) : f32[b, 16]
  %e = gelu(%h) : f32[b, 16]
  %d = linear(%e, %w2) : f32[b, 8]
  %y = add(%n, %d) : f32[b, 8]
}
"""


def test_a_norm_that_a_residual_reads_refuses_or_multiplies(read: Read, difference: Difference) -> None:
    given = {"ln.weight": outlying(8), "up.weight": weights()["q.weight"].repeat(2, 0)}
    data = [{"x": np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)}]
    graph, context = read(POST, given), Context(calibration=data)
    assert not SmoothQuant().run(graph, context).changed_from(graph)
    assert {r.place: r.reason for r in context.refusals} == {
        "up": "%n cannot absorb a scale: add at %y reads it",
        "down": "no norm or linear layer makes its input %e",
    }
    context = Context(calibration=data, facts={"ranges": {}})
    after = SmoothQuant(insert=True).run(graph, context)
    verify(after)
    assert difference(graph, after) < 1e-5
    assert after.producers["h"].inputs[0] == "n.smooth"
    assert after.producers["y"].inputs[0] == "n"
    assert context.remarks[0][1] == "n"
    assert context.remarks[0][2]["error"] < 0.2 * context.remarks[0][2]["error_before"]
    assert "gains too little" in context.refusals[0].reason
    assert "ranges" not in context.facts


def test_layers_that_are_left_out_keep_their_weights(read: Read) -> None:
    graph, context = read(BLOCK, weights()), Context(calibration=calibration())
    after = SmoothQuant(except_="k").run(graph, context)
    assert [place for _, place, _ in context.remarks] == ["m", "v"]
    assert after.producers["n"].inputs == graph.producers["n"].inputs


def test_without_data_the_message_says_what_to_do(read: Read) -> None:
    with pytest.raises(InvalidInput, match=r"smooth-quant needs calibration data.*--calibrate"):
        SmoothQuant().run(read(BLOCK), Context())
    with pytest.raises(InvalidInput, match="alpha"):
        SmoothQuant(alpha=1.5).run(read(BLOCK), Context())
