"""observe-ranges: facts about every float value, from all batches; the graph stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.passes import Context, parse_passes, run_pipeline
from bitwright.passes.precision import _joined
from bitwright.passes.precision._histogram import Histogram
from bitwright.passes.precision.observe_ranges import ObserveRanges

Read = Callable[..., Graph]
TEXT = """
graph @g (%x: f32[b, 2]) -> (y = %y) level=graph {
  %n = neg(%x) : f32[b, 2]
  %y = relu(%n) : f32[b, 2]
  %i = argmax(%y) : s64[b]
}
"""


def batches(*values: list[list[float]]) -> list[list[np.ndarray]]:
    return [[np.array(v, np.float32)] for v in values]


def test_extremes_over_all_batches(read: Read) -> None:
    graph = read(TEXT)
    context = Context(calibration=batches([[1.0, -2.0]], [[3.0, 0.5], [0.0, 0.0]]))
    assert ObserveRanges().run(graph, context) is graph
    assert context.facts["ranges"] == {"x": (-2.0, 3.0), "n": (-3.0, 2.0), "y": (0.0, 2.0)}
    assert context.remarks == [("observe-ranges", "model", {"values": 3, "batches": 2})]


def test_batches_by_name(read: Read) -> None:
    context = Context(calibration=[{"x": np.array([[4.0, 5.0]], np.float32)}])
    ObserveRanges().run(read(TEXT), context)
    assert context.facts["ranges"]["x"] == (4.0, 5.0)


def test_percentile_leaves_out_the_outermost(read: Read) -> None:
    values = np.random.default_rng(0).standard_normal((5000, 2)).astype(np.float32)
    values[0, 0] = 1000.0
    context = Context(calibration=[[values[:1]], [values[1:]]])
    ObserveRanges(method="percentile", percentile=99.0).run(read(TEXT), context)
    lo, hi = context.facts["ranges"]["x"]
    assert lo == pytest.approx(np.percentile(values, 0.5), abs=1.1)
    assert hi == pytest.approx(np.percentile(values, 99.5), abs=1.1)


def test_histogram_grows_and_stays_within_the_extremes() -> None:
    h = Histogram()
    parts = [torch.linspace(-1, 1, 1001), torch.linspace(-5, 7, 1001), torch.full((3,), 0.25)]
    for p in parts:
        h.add(p)
    assert int(h.counts.sum()) == 2005
    assert float(h.reach) == 8.0
    assert tuple(map(float, h.range(100.0))) == (-5.0, 7.0)
    lo, hi = map(float, h.range(50.0))
    everything = torch.cat(parts)
    assert lo == pytest.approx(float(torch.quantile(everything, 0.25)), abs=0.02)
    assert hi == pytest.approx(float(torch.quantile(everything, 0.75)), abs=0.02)


def test_a_constant_stream_has_a_point_range() -> None:
    h = Histogram()
    h.add(torch.zeros(4))
    assert tuple(map(float, h.range(99.0))) == (0.0, 0.0)


def test_without_data_the_message_says_what_to_do(read: Read) -> None:
    with pytest.raises(InvalidInput, match=r"calibration=\.\.\. in Python or --calibrate"):
        ObserveRanges().run(read(TEXT), Context())


def test_batches_that_do_not_fit_are_named(read: Read) -> None:
    with pytest.raises(InvalidInput, match="takes 1 inputs"):
        ObserveRanges().run(read(TEXT), Context(calibration=[[np.zeros((1, 2), np.float32)] * 2]))
    with pytest.raises(InvalidInput, match="percentile"):
        ObserveRanges(percentile=3.0).run(read(TEXT), Context(calibration=batches([[1.0, 2.0]])))


def test_twice_is_once(read: Read) -> None:
    context = Context(calibration=batches([[1.0, -2.0]]))
    graph = read(TEXT)
    ObserveRanges().run(graph, context)
    first = dict(context.facts["ranges"])
    ObserveRanges().run(graph, context)
    assert context.facts["ranges"] == first


def test_rows_have_histograms_of_their_own() -> None:
    x = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.01], [1.0], [300.0]])
    together, alone = Histogram(3), [Histogram() for _ in range(3)]
    for part in torch.split(x, 500, 1):
        together.add(part)
        for h, row in zip(alone, part, strict=True):
            h.add(row)
    assert together.counts.sum(1).tolist() == [4000.0] * 3
    for i, h in enumerate(alone):
        for mine, theirs in zip(together.range(99.0), h.range(99.0), strict=True):
            assert float(mine[i]) == pytest.approx(float(theirs), rel=0.01)


def quantization_error(values: torch.Tensor, lo: float, hi: float, bits: int) -> float:
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = (hi - lo) / (2**bits - 1)
    zero = round(-lo / scale)
    back = ((values / scale).round() + zero).clamp(0, 2**bits - 1) - zero
    return float((back * scale - values).square().mean())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_ranges_have_the_smallest_error(read: Read, bits: int) -> None:
    """A coarse search over the real values finds no range that is clearly better, and extremes are much worse."""
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0)).relu()
    x[0, 0] = 40.0
    context = Context(calibration=[[x[:50].numpy()], [x[50:].numpy()]])
    ObserveRanges("mse", bits=bits).run(read(TEXT), context)
    lo, hi = context.facts["ranges"]["x"]
    assert lo == 0.0
    best = min(quantization_error(x, 0.0, 40.0 * i / 200, bits) for i in range(1, 201))
    found = quantization_error(x, lo, hi, bits)
    assert found <= best * 1.05
    assert found <= quantization_error(x, 0.0, 40.0, bits) * (1.0 if bits == 8 else 0.3)


def test_entropy_clips_a_long_tail_and_keeps_a_flat_range(read: Read) -> None:
    flat = torch.linspace(0, 1, 20_000).reshape(-1, 2)
    tail = -torch.log(1 - 0.9999 * flat)
    tail[0, 0] = 50.0
    for values, low, high in ((flat, 0.95, 1.0), (tail, 3.0, 25.0)):
        context = Context(calibration=[[values.numpy()]])
        ObserveRanges("entropy").run(read(TEXT), context)
        lo, hi = context.facts["ranges"]["x"]
        assert lo == pytest.approx(0.0, abs=1e-3)
        assert low <= hi <= high


CONV = """
graph @g (%x: f32[2, 4, 3, 3]) -> (y = %y) level=graph {
  %w = weight {ref="a.weight"} : f32[5, 4, 1, 1]
  %v = weight {ref="b.weight"} : f32[3, 3]
  %h = conv(%x, %w) : f32[2, 5, 3, 3]
  %y = linear(%h, %v) : f32[2, 5, 3, 3]
}
"""


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_channels_and_groups(read: Read, method: str) -> None:
    """Operands of contractions have a range per channel, along axis 1 where a convolution reads them."""
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).numpy()
    x[:, 2] *= 100
    by_channel, by_group = (Context(calibration=[[x], [x * 0.5]]) for _ in range(2))
    options = f"method={method} percentile=100"
    run_pipeline(read(CONV), parse_passes(f"observe-ranges{{{options} per=channel}}"), by_channel)
    run_pipeline(read(CONV), parse_passes(f"observe-ranges{{{options} per=group group=3}}"), by_group)
    parts = by_channel.facts["channel-ranges"]
    assert set(parts) == {"x", "h"}
    lo, hi = parts["x"]
    assert lo.shape == hi.shape == (4,)
    assert parts["h"][0].shape == (5,)  # the convolution makes it
    tight = x.transpose(1, 0, 2, 3).reshape(4, -1)
    assert (lo >= tight.min(1) - 1e-4).all()
    assert (hi <= tight.max(1) + 1e-4).all()
    assert (hi[[0, 1, 3]] < 5).all()
    assert hi[2] > 50
    assert by_group.facts["group-ranges"]["x"][0].shape == (2,)
    if method in ("minmax", "percentile"):
        np.testing.assert_allclose(lo, tight.min(1), rtol=1e-5)
        groups = by_group.facts["group-ranges"]["x"]
        np.testing.assert_allclose(groups[1], [tight[:3].max(), tight[3].max()], rtol=1e-5)


def test_memory_does_not_grow_with_the_stream(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that are not small are asked for one by one, none before the one before it was counted."""
    monkeypatch.setattr(_joined, "WORK", 0)
    made: list[int] = []

    class Stream:
        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[Any]:
            for i in range(5):
                made.append(i)
                yield [np.full((1, 2), float(i), np.float32)]
                assert progress[-1] == i / 5

    progress: list[float] = []
    context = Context(calibration=Stream(), progress=lambda label, done: progress.append(done))  # type: ignore[arg-type]
    ObserveRanges().run(read(TEXT), context)
    assert made == [0, 1, 2, 3, 4]
    assert progress == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert context.facts["ranges"]["x"] == (0.0, 4.0)


def test_nan_and_wrong_shapes_name_the_place(read: Read) -> None:
    good, bad = np.ones((1, 2), np.float32), np.array([[1.0, np.nan]], np.float32)
    with pytest.raises(InvalidInput, match="%x has NaN in calibration batch 1"):
        ObserveRanges().run(read(TEXT), Context(calibration=[[good], [bad]]))
    text = TEXT.replace("neg", "log")
    with pytest.raises(InvalidInput, match="%n has NaN in calibration batch 0"):
        ObserveRanges().run(read(text), Context(calibration=[[-good]]))
    with pytest.raises(InvalidInput, match="given shape"):
        ObserveRanges().run(read(TEXT), Context(calibration=[[np.ones((1, 3), np.float32)]]))
    with pytest.raises(InvalidInput, match="batches are empty"):
        ObserveRanges().run(read(TEXT), Context(calibration=[[np.ones((0, 2), np.float32)]]))
    with pytest.raises(InvalidInput, match="bits is 2 to 8"):
        ObserveRanges(bits=12).run(read(TEXT), Context(calibration=[[good]]))
    infinite = Context(calibration=[[np.array([[1.0, -np.inf]], np.float32)]])
    ObserveRanges("mse").run(read(TEXT), infinite)
    assert infinite.facts["ranges"]["x"] == (-np.inf, 1.0)


def test_values_counted_by_the_stride_give_the_range_of_all(read: Read) -> None:
    """A long stream: most of it is sampled, and counts as often as it was thinned out."""
    rng = np.random.default_rng(0)
    stream = [[rng.standard_normal((20_000, 2)).astype(np.float32)] for _ in range(12)]
    context = Context(calibration=stream)
    ObserveRanges(method="percentile", percentile=98.0).run(read(TEXT), context)
    lo, hi = context.facts["ranges"]["x"]
    everything = np.concatenate([x for (x,) in stream])
    assert lo == pytest.approx(np.percentile(everything, 1.0), abs=0.1)
    assert hi == pytest.approx(np.percentile(everything, 99.0), abs=0.1)


def test_moved_values_share_their_range(read: Read) -> None:
    graph = read(
        """
        graph @g (%x: f32[2, 3]) -> (y = %y) level=graph {
          %t = transpose(%x) {perm=[1, 0]} : f32[3, 2]
          %r = reshape(%t) {shape=[6]} : f32[6]
          %y = neg(%r) : f32[6]
        }
        """
    )
    context = Context(calibration=batches([[1.0, 2.0, 3.0], [-4.0, 0.0, 1.0]]))
    ObserveRanges().run(graph, context)
    assert context.facts["ranges"] == {"x": (-4.0, 3.0), "t": (-4.0, 3.0), "r": (-4.0, 3.0), "y": (-3.0, 4.0)}
