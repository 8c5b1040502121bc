"""correct-bias: means by channel agree with the float model again, measured or implied by batch norms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from bitwright.driver import optimize
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.verify import verify
from bitwright.passes import Context, parse_passes, run_pipeline
from bitwright.passes._norms import Norm
from bitwright.passes.pipelines import CANONICAL
from bitwright.passes.precision._expected import clipped_normal_mean, expected_mean
from bitwright.passes.precision._sensitivity import relative_error
from bitwright.passes.precision._tune_bias import tune_biases
from bitwright.passes.precision.correct_bias import CorrectBias
from tests.digits_networks import captured, data, trained
from tests.passes.precision.test_retune_norms import coarse

Read = Callable[..., Graph]


def test_mean_of_a_clipped_normal() -> None:
    mean, std = np.array([-1.0, 0.0, 2.0, 7.0]), np.array([1.0, 0.5, 2.0, 1.0])
    x = torch.from_numpy(mean + std * np.random.default_rng(0).standard_normal((400_000, 4)))
    np.testing.assert_allclose(clipped_normal_mean(mean, std, 0.0), x.relu().mean(0), atol=0.01)
    np.testing.assert_allclose(clipped_normal_mean(mean, std, 0.0, 6.0), x.clamp(0, 6).mean(0), atol=0.01)
    np.testing.assert_allclose(clipped_normal_mean(mean, std), mean)


def test_means_through_pools_and_layout(read: Read) -> None:
    graph = read("""
        graph @g (%h: f32[2, 3, 4, 4]) -> (y = %f, m = %m) level=graph {
          %r = relu(%h) : f32[2, 3, 4, 4]
          %a = reduce_mean(%r) {axes=[2, 3], keepdim=true} : f32[2, 3, 1, 1]
          %f = reshape(%a) {shape=[2, 3]} : f32[2, 3]
          %m = max_pool(%r) {kernel=[2, 2], stride=[2, 2]} : f32[2, 3, 2, 2]
        }
    """)
    norm = Norm(np.ones(3), np.array([0.0, 1.0, 9.0]), np.zeros(3), np.ones(3), 0.0)
    found = expected_mean(graph, "f", {"h": norm})
    assert found is not None
    np.testing.assert_allclose(found, [0.39894, 1.08332, 9.0], atol=1e-4)
    assert expected_mean(graph, "m", {"h": norm}) is None
    assert expected_mean(graph, "f", {}) is None


def mean_errors(graph: Graph, reference: Graph, names: list[str]) -> list[float]:
    """RMS over channels of the difference in mean, on images that calibration has not seen."""
    means: list[dict[str, torch.Tensor]] = []
    for g in (graph, reference):
        seen: dict[str, torch.Tensor] = {}
        evaluate(g, [data().test_x], observe=seen.__setitem__)
        means.append({n: seen[n].movedim(1, 0).flatten(1).mean(1) for n in names})
    return [float((means[0][n] - means[1][n]).square().mean().sqrt()) for n in names]


@pytest.mark.parametrize("method", ["empirical", "analytic"])
def test_means_of_a_coarse_network_agree_again(method: str) -> None:
    context = Context(calibration=data().batches())
    passes = parse_passes(f"{CANONICAL}, observe-ranges, quantize-int8")
    low, _ = run_pipeline(captured(trained("plain")), passes, context)
    low, reference = coarse(low), context.facts["reference"]
    told = len(context.remarks)
    after = CorrectBias(method=method).run(low, context)  # type: ignore[arg-type]
    verify(after)
    names = [n.output for n in low.nodes if n.op.spelling in ("conv", "linear")]
    before, now = (mean_errors(g, reference, names) for g in (low, after))
    assert now[-1] < 0.9 * before[-1]
    if method == "empirical":
        assert all(b < 0.4 * a for a, b in zip(before, now, strict=True))
        (_, place, whole), *layers = context.remarks[told:]
        assert place == "model"
        assert whole["output_error_after"] < whole["output_error"]
        assert all(f["mean_error_after"] < 1e-3 * f["mean_error"] for _, _, f in layers)
    else:
        assert [r.place for r in context.refusals][-1:] == ["coarse"]  # the image: no norm tells its mean
    assert not CorrectBias(method=method).run(after, context).changed_from(after)  # type: ignore[arg-type]


def test_what_norms_imply_is_what_normal_data_gives(read: Read) -> None:
    graph = read("""
        graph @g (%h: f32[50000, 2]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[3, 2]
          %r = relu(%h) : f32[50000, 2]
          %y = linear(%r, %w) : f32[50000, 3]
        }
    """, {"fc.weight": np.array([[1, 0.0039], [1, -0.0118], [1, 0.0039]], np.float32)})  # fmt: skip
    mean, std = np.array([2.0, 100.0]), np.array([1.0, 20.0])
    data = [{"h": (mean + std * np.random.default_rng(0).standard_normal((50000, 2))).astype(np.float32)}]
    norm = Norm(std, mean, np.zeros(2), np.ones(2), 0.0)
    context = Context(calibration=data, facts={"norms": {"h": norm}})
    low, _ = run_pipeline(graph, parse_passes("observe-ranges, quantize-int8"), context)
    after = CorrectBias(method="analytic").run(low, context)
    want, before, now = (evaluate(g, data[0])[0].double().mean(0) for g in (graph, low, after))
    assert (now - want).abs().max() < 0.2 * (before - want).abs().max()


def test_a_layer_without_bias_gets_one(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[8, 2]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[3, 2]
          %y = linear(%x, %w) : f32[8, 3]
        }
    """, {"fc.weight": np.array([[1, 0.004], [1, -0.003], [1, 0.003]], np.float32)})  # fmt: skip
    batch = [{"x": np.random.default_rng(0).random((8, 2)).astype(np.float32)}]
    recipe = "observe-ranges, quantize-int8, correct-bias"
    after, report = optimize(graph, recipe, calibration=batch)
    assert len(after.producers["y"].inputs) == 3
    assert report.remarks[-1][2]["mean_error"] > 100 * report.remarks[-1][2]["mean_error_after"]
    partly, _ = optimize(graph, f"{recipe}{{except=fc}}", calibration=batch)
    assert len(partly.producers["y"].inputs) == 2


def test_without_the_float_model_or_data(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[8, 2]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[3, 2]
          %y = linear(%x, %w) : f32[8, 3]
        }
    """)
    with pytest.raises(InvalidInput, match="observe-ranges keeps"):
        CorrectBias().run(graph, Context())
    with pytest.raises(InvalidInput, match="needs calibration data"):
        CorrectBias().run(graph, Context(facts={"reference": graph}))


def few_bits(tail: str = "") -> tuple[Graph, Context]:
    """The network with 3-bit weights, whose nearest codes move the means, and what a recipe makes of it."""
    context = Context(calibration=data().batches())
    recipe = f"{CANONICAL}, observe-ranges, quantize-weights{{bits=3}}, quantize-int8{tail}"
    return run_pipeline(captured(trained("plain")), parse_passes(recipe), context)[0], context


def output_error(graph: Graph, context: Context) -> float:
    """Relative squared error on images that calibration has not seen."""
    x = [data().test_x]
    return relative_error(evaluate(graph, x), evaluate(context.facts["reference"], x))


def test_after_the_norms_only_learnt_biases_find_something() -> None:
    low, context = few_bits(", retune-norms")
    assert CorrectBias().run(low, context) is low
    told = len(context.remarks)
    after = CorrectBias(method="tuned").run(low, context)
    verify(after)
    ((name, place, facts),) = context.remarks[told:]
    assert (name, place) == ("correct-bias", "model")
    assert facts["output_error_after"] < 0.95 * facts["output_error"]
    assert output_error(after, context) < output_error(low, context)


def test_learnt_biases_start_at_the_quantized_model() -> None:
    low, context = few_bits()
    reference, batches = context.facts["reference"], list(context.calibration)[:2]
    layer = next(n.output for n in low.nodes if n.op.spelling == "conv")
    tuned = tune_biases(low, reference, batches, {layer: np.ones(low.types[layer].shape[1])}, epochs=1)
    got, want = ([evaluate(g, b)[0] for b in batches] for g in (low, reference))
    square = sum(float((a - b).square().sum()) for a, b in zip(got, want, strict=True))
    assert tuned.before == pytest.approx(square / sum(float(b.square().sum()) for b in want), rel=1e-3)
    assert tuned.after <= tuned.before


def test_biases_are_learnt_where_constants_are_spread_over_a_batch_of_any_size(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[b, 4]) -> (y = %y) level=graph {
          %c = constant {values=[0.5]} : f32[1]
          %e = expand(%c) {shape=["b", 4]} : f32[b, 4]
          %a = add(%x, %e) : f32[b, 4]
          %w = weight {ref="fc.weight"} : f32[3, 4]
          %y = linear(%a, %w) : f32[b, 3]
        }
    """)
    context = Context(calibration=[(np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32),)])
    recipe = "observe-ranges, quantize-weights{bits=2}, quantize-int8, correct-bias{method=tuned}"
    run_pipeline(graph, parse_passes(recipe), context)
    told = next(facts for name, _, facts in context.remarks if name == "correct-bias")
    assert told["output_error_after"] <= told["output_error"]


@pytest.mark.parametrize("made", ["correct-bias", "retune-norms"])
def test_a_correction_that_takes_the_outputs_further_away_is_not_made(read: Read, made: str) -> None:
    """The mean of channel 0 is that of many rows of 1, which the outputs do not read; the others are rounded down."""
    graph = read("""
        graph @g (%x: f32[64, 2], %m: f32[64, 1]) -> (z = %z) level=graph {
          %w = weight {ref="fc.weight"} : f32[2, 2]
          %y = linear(%x, %w) : f32[64, 2]
          %z = mul(%y, %m) : f32[64, 2]
        }
    """, {"fc.weight": np.array([[1, 0.001], [1, -0.001]], np.float32)})  # fmt: skip
    x, m = np.ones((64, 2), np.float32), np.zeros((64, 1), np.float32)
    x[:, 1] = 200.0
    x[:8, 1], m[:8] = np.linspace(-1, 1, 8), 1.0
    batch = [{"x": x, "m": m}]
    after, report = optimize(graph, f"observe-ranges, quantize-weights{{bits=4}}, {made}", calibration=batch)
    assert len(after.producers["y"].inputs) == 2
    (refused,) = [r for r in report.refusals if r.pass_name == made]
    assert "all layers stay as they are" in refused.reason
    assert not [r for r in report.remarks if r[0] == made and r[1] != "model"]
