"""Loss attribution: counts agree with sums done by hand, and with the small-float dot product bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.numerics import small_float_dot
from bitwright.passes.accumulators._losses import float_sums
from bitwright.passes.accumulators.attribution import Losses, attribute_accumulator

Read = Callable[..., Graph]
RNG = np.random.default_rng(2)
ONE = """
    graph @g (%x: u8[1, 4]) -> (y = %y) level=integer {
      %w = weight {ref="fc.weight"} : s8[2, 4]
      %y = int_linear(%x, %w) {x_zero=10} : s32[1, 2]
    }
"""
WEIGHTS = {"fc.weight": np.array([[100, 100, -100, -100], [1, 1, 1, 1]], np.int8)}


def test_wrap_looks_at_the_end_saturate_at_every_step(read: Read) -> None:
    graph = read(ONE, WEIGHTS)
    batch = [(np.array([[255, 255, 255, 255]], np.uint8),)]
    wraps = attribute_accumulator(graph, batch, 16)["fc"]
    assert (wraps.sums, wraps.terms, wraps.overflow, wraps.error) == (2, 8, 0, 0.0)
    saturates = attribute_accumulator(graph, batch, 16, register="saturate")["fc"]
    assert saturates.overflow == 1  # 51000 on the way to 0
    assert saturates.missed == (32767 - 51000) ** 2
    narrow = attribute_accumulator(graph, batch, "s10")["fc"]
    assert narrow.overflow == 1  # 980 - 1024
    assert narrow.missed == 1024**2
    assert attribute_accumulator(graph, batch, 11)["fc"].overflow == 0


def test_quantized_graphs_are_lowered_and_wide_registers_lose_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Linear(8 * 25, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(self.conv(x)).flatten(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    x = torch.randn(8, 4, 5, 5)
    graph, _ = bw.optimize(bw.capture(Net(), x), "observe-ranges, quantize-int8", calibration=[x])
    batch = [(x.numpy(),)]
    wide = attribute_accumulator(graph, batch, 32, register="saturate")
    assert list(wide) == ["conv", "fc"]
    assert all(v.overflow == 0 and v.error == 0.0 and v.sums for v in wide.values())
    lost = [sum(v.overflow for v in attribute_accumulator(graph, batch, b).values()) for b in (18, 14, 12, 10)]
    assert lost == sorted(lost)
    assert lost[-1] > 100
    for r in ("saturate", "wrap"):
        some: Any = attribute_accumulator(graph, batch, 12, register=r, sample=3)
        assert some["fc"].sums == 9


@pytest.mark.parametrize("rounding", ["floor", "nearest"])
@pytest.mark.parametrize("chunk", [16, 7])
def test_small_floats_sum_as_the_reference_does(rounding: Any, chunk: int) -> None:
    x, w = RNG.normal(size=(20, 50)).astype(np.float32), RNG.normal(size=(9, 50)).astype(np.float32)
    formats = ((4, 3, 8), (4, 5, 7))
    losses = Losses("l")
    float_sums(losses, x.astype(float), w.astype(float), formats, chunk, rounding)
    want = small_float_dot(x[:, None].astype(float), w.astype(float), *formats, chunk, rounding)
    exact = x.astype(float) @ w.T.astype(float)
    assert losses.missed == pytest.approx(float(np.square(want - exact).sum()), rel=1e-12)
    assert losses.sums == 180
    assert losses.terms == 9000


def test_each_kind_of_loss_is_counted(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[1, 3]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[1, 3]
          %y = linear(%x, %w) : f32[1, 1]
        }
    """, {"fc.weight": np.ones((1, 3), np.float32)})  # fmt: skip

    def of(*values: float) -> Losses:
        return attribute_accumulator(graph, [(np.array([values], np.float32),)], "f4m3b7")["fc"]

    fine, tiny, small, big = of(1, 2, 4), of(1, 0.001, 0), of(64, 1, 1), of(480, 480, 1)
    assert (fine.overflow, fine.underflow, fine.swamped, fine.error) == (0, 0, 0, 0.0)
    assert (tiny.overflow, tiny.underflow) == (0, 1)
    assert (small.swamped, small.underflow, small.overflow) == (2, 0, 0)
    assert big.overflow == 1
    assert big.error > 0.4


def test_finer_floats_lose_less() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 300)
    graph = bw.capture(nn.Linear(300, 20), x)
    batch, formats = [(x.numpy(),)], ("f6m5b31", "f4m7b10", "f5m10b15")
    errors = [next(iter(attribute_accumulator(graph, batch, f).values())).error for f in formats]
    assert errors[0] > errors[1] > errors[2] > 0


def test_bad_requests(read: Read) -> None:
    graph = read(ONE, WEIGHTS)
    batch = [(np.zeros((1, 4), np.uint8),)]
    with pytest.raises(InvalidInput, match="calibration data"):
        attribute_accumulator(graph, [], 16)
    for bad in (0, 65, "u8", "bf", "f64"):
        with pytest.raises(InvalidInput):
            attribute_accumulator(graph, batch, bad)
    with pytest.raises(InvalidInput, match="sample"):
        attribute_accumulator(graph, batch, 16, sample=0)
