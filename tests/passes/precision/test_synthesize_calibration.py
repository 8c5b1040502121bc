"""synthesize-calibration: the loss is right, it falls, and the ranges it leads to are those of real data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import bitwright
from bitwright.driver import optimize
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.passes import Context, parse_passes, run_pipeline
from bitwright.passes._norms import Norm
from bitwright.passes.pipelines import CANONICAL
from bitwright.passes.precision._synthesize import calibration_score, divergence, statistics_loss, synthesize
from bitwright.passes.precision.synthesize_calibration import SynthesizeCalibration
from tests.digits_networks import accuracy, captured, data, trained

Read = Callable[..., Graph]

TWO = """
graph @g (%x: f32[b, 2, 5, 5]) -> (y = %y) level=graph {
  %w1 = weight {ref="a.weight"} : f32[3, 2, 3, 3]
  %w2 = weight {ref="b.weight"} : f32[4, 3, 3, 3]
  %h = conv(%x, %w1) {padding=[1, 1, 1, 1]} : f32[b, 3, 5, 5]
  %r = silu(%h) : f32[b, 3, 5, 5]
  %y = conv(%r, %w2) : f32[b, 4, 3, 3]
}
"""


def norm(mean: np.ndarray, std: np.ndarray) -> Norm:
    """A norm whose result has this mean and deviation."""
    return Norm(std.astype(np.float64), mean.astype(np.float64), 0 * std, np.ones(len(std)), 0.0)


def statistics(graph: Graph, x: torch.Tensor, names: tuple[str, ...]) -> dict[str, Norm]:
    """Norms that remember exactly what a batch gives."""
    seen: dict[str, torch.Tensor] = {}
    evaluate(graph, [x], observe=seen.__setitem__)
    flat = {n: seen[n].double().movedim(1, 0).flatten(1) for n in names}
    return {n: norm(v.mean(1).numpy(), v.std(1, correction=0).numpy()) for n, v in flat.items()}


def test_divergence_is_zero_where_statistics_agree_and_only_there() -> None:
    mean, variance = torch.tensor([0.5, -2.0]).double(), torch.tensor([0.3, 4.0]).double()
    assert float(divergence(mean, variance, mean, variance).abs().max()) < 1e-12
    for other in ((mean + 0.1, variance), (mean, variance * 1.2), (mean, variance / 1.2)):
        assert float(divergence(*other, mean, variance).min()) > 0
    p, q = (torch.distributions.Normal(m, s) for m, s in ((0.5, 0.7), (0.2, 1.1)))
    want = torch.distributions.kl_divergence(p, q)
    got = divergence(*(torch.tensor([v]).double() for v in (0.2, 1.1**2, 0.5, 0.7**2)))
    assert float(got) == pytest.approx(float(want), rel=1e-6)


def test_loss_of_a_batch_that_matches_and_of_one_that_does_not(read: Read) -> None:
    graph, x = read(TWO), torch.randn(8, 2, 5, 5)
    norms = statistics(graph, x, ("h", "y"))
    assert calibration_score(graph, norms, {"x": x.numpy()}) < 1e-10
    assert calibration_score(graph, norms, {"x": 3 * x.numpy()}) > 0.1
    off = {"h": norm(norms["h"].beta * 0, norms["h"].std * 0), "y": norms["y"]}  # gamma 0 tells nothing
    assert calibration_score(graph, off, {"x": x.numpy()}) < 1e-10


def test_gradient_of_the_loss(read: Read) -> None:
    graph = read(TWO)
    torch.manual_seed(0)
    norms = statistics(graph, torch.randn(8, 2, 5, 5), ("h", "y"))
    x = (2 * torch.randn(4, 2, 5, 5) + 1).requires_grad_()
    loss, _ = statistics_loss(graph, {"x": x}, norms)
    (gradient,) = torch.autograd.grad(loss, x)
    for seed in range(3):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        step = 1e-2
        ahead, behind = (
            float(statistics_loss(graph, {"x": x.detach() + s * direction}, norms)[0]) for s in (step, -step)
        )
        assert (ahead - behind) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=0.02, abs=1e-4)


def test_images_of_a_trained_network_calibrate_like_real_ones() -> None:
    """64 images in seconds: the loss falls by more than 10, ranges and accuracy are those of real data."""
    passes = parse_passes(f"{CANONICAL}, synthesize-calibration{{steps=80}}, observe-ranges, quantize-int8")
    made, real = Context(), Context(calibration=data().batches())
    low, report = run_pipeline(captured(trained("plain")), passes, made)
    whole, _ = run_pipeline(captured(trained("plain")), parse_passes(f"{CANONICAL}, observe-ranges"), real)
    told = next(facts for name, _, facts in report.remarks if name == "synthesize-calibration")
    assert told["loss"] < 0.02 * told["loss_before"]
    widths = [
        (made.facts["ranges"][k][1] - made.facts["ranges"][k][0]) / (hi - lo)
        for k, (lo, hi) in real.facts["ranges"].items()
        if k in real.facts["norms"]
    ]
    assert len(widths) == 3
    assert all(0.8 < w < 1.3 for w in widths)
    assert abs(np.mean(widths) - 1) < 0.2
    assert accuracy(low) > accuracy(whole) - 1.0
    images = real.calibration[0]
    score = calibration_score(whole, real.facts["norms"], {whole.inputs[0].name: np.asarray(images[0])})  # type: ignore[index]
    noise, first, _ = synthesize(whole, real.facts["norms"], scheme="gaussian")
    assert score < 0.02 * first
    assert noise[whole.inputs[0].name].shape == (64, 1, 8, 8)


def test_same_seed_same_data(read: Read) -> None:
    graph = read(TWO)
    norms = statistics(graph, torch.ones(2, 2, 5, 5).cumsum(1).cumsum(2), ("h",))
    first, again, other = (synthesize(graph, norms, 4, "bns", 3, seed)[0]["x"] for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_logits_are_raised(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[b, 6]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[3, 6]
          %y = linear(%x, %w) : f32[b, 3]
        }
    """)
    made, before, after = synthesize(graph, {}, 9, "logit", 40)
    assert after < 0.5 * before
    (scores,) = evaluate(graph, made)
    assert (scores.argmax(1) == torch.arange(9) % 3).all()
    with pytest.raises(InvalidInput, match="class scores"):
        synthesize(read(TWO), {}, 4, "logit", 1)


def test_what_cannot_be_synthesized_says_what_to_do(read: Read) -> None:
    with pytest.raises(InvalidInput, match=r"no batch norm.*give real inputs as calibration data.*weight-only"):
        SynthesizeCalibration().run(read(TWO), Context())
    tokens = read("""
        graph @g (%i: s64[b, 4]) -> (y = %y) level=graph {
          %w = weight {ref="embedding"} : f32[9, 6]
          %y = gather(%w, %i) : f32[b, 4, 6]
        }
    """)
    with pytest.raises(InvalidInput, match="'i' is s64: only float inputs"):
        SynthesizeCalibration(scheme="gaussian").run(tokens, Context())
    with pytest.raises(InvalidInput, match="count is at least 1"):
        synthesize(read(TWO), {}, 0)


def test_given_data_is_kept_and_scored(read: Read) -> None:
    graph, x = read(TWO), torch.randn(8, 2, 5, 5).numpy()
    context = Context(calibration=[[x]], facts={"norms": statistics(graph, torch.from_numpy(x), ("h",))})
    assert SynthesizeCalibration().run(graph, context) is graph
    assert context.remarks[0][2]["score"] < 1e-10
    assert context.calibration == [[x]]


def test_recipe_without_data(read: Read) -> None:
    _, report = optimize(read(TWO), "synthesize-calibration{scheme=gaussian count=4}, observe-ranges, quantize-int8")
    assert [r.name for r in report.rows if r.changed] == ["quantize-int8"]


def test_compile_makes_its_own_data() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    program = bitwright.compile(net, example_inputs=torch.zeros(1, 1, 6, 6), recipe="int8", calibration="synthetic")
    x = np.random.default_rng(0).standard_normal((1, 1, 6, 6)).astype(np.float32)
    want = net(torch.from_numpy(x)).detach().numpy()
    got = np.asarray(program(x))
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)
