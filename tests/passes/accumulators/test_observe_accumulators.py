"""observe-accumulators: remarks per layer from calibration data, no change of the graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.passes import Context
from bitwright.passes.accumulators.observe_accumulators import ObserveAccumulators


def test_layers_are_told_in_a_recipe() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(32, 64)
    recipe = "int8, observe-accumulators{accumulator=s12 register=saturate}"
    program = bw.compile(net, example_inputs=x, recipe=recipe, calibration=[x])
    told = [r.figure("overflow") for r in program.report.layers if r.figure("overflow") is not None]
    assert len(told) == 2
    assert all(0 < t <= 1 for t in told if t is not None)
    plain = bw.compile(net, example_inputs=x, recipe="int8", calibration=[x])
    np.testing.assert_array_equal(plain(x.numpy()), program(x.numpy()))


def test_what_is_not_there_is_refused(read: Callable[..., Graph]) -> None:
    graph = read("graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {\n  %y = relu(%x) : f32[1, 2]\n}")
    context = Context(calibration=[(np.zeros((1, 2), np.float32),)])
    assert ObserveAccumulators().run(graph, context) is graph
    assert ObserveAccumulators(accumulator="f4m3b8").run(graph, context) is graph
    assert [r.reason for r in context.refusals] == [
        "no integer layer to sum in s16", "no floating-point layer to sum in f4m3b8",
    ]  # fmt: skip
    with pytest.raises(InvalidInput, match="calibration data"):
        ObserveAccumulators().run(graph, Context())
