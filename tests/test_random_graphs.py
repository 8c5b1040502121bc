"""Compiled equals reference on random graphs: 100 here, 2,000 in ``make nightly``."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings

import bitwright as bw
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.verify import verify
from tests.random_graphs import graphs

COUNT = int(os.environ.get("BITWRIGHT_RANDOM_GRAPHS", "100"))
SHARDS = 4
TARGETS = ("host", "x86-avx2", "x86-portable")


@pytest.mark.parametrize("shard", range(SHARDS))
def test_compiled_equals_reference(shard: int) -> None:
    @seed(shard)
    @settings(max_examples=COUNT // SHARDS, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(graphs())
    def run(case: tuple[Graph, list[np.ndarray[Any, Any]]]) -> None:
        graph, inputs = case
        verify(graph)
        (want,) = evaluate(graph, inputs)
        target = TARGETS[sum(x.size for x in inputs) % len(TARGETS)]
        got = bw.compile(graph, target=target)(*inputs)
        scale = float(want.abs().max()) or 1.0
        assert got.shape == tuple(want.shape)
        np.testing.assert_allclose(got, want.numpy(), rtol=2e-4, atol=2e-5 * scale)

    run()
