"""Random graphs mean the same before and after every canonical pass; the second run changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.verify import verify
from bitwright.passes import Context
from bitwright.passes._pass import Pass
from bitwright.passes.pipelines import CANONICAL
from bitwright.passes.registry import load
from tests.random_graphs import graphs

NAMES = sorted(set(CANONICAL.split(", ")))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=graphs())
def test_meaning_and_idempotence(name: str, case: tuple[Graph, list[np.ndarray[Any, Any]]]) -> None:
    graph, inputs = case
    p: Pass = load(name)()
    after = p.run(graph, Context())
    verify(after)
    (want,), (got,) = evaluate(graph, inputs), evaluate(after, inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * max(1.0, float(want.abs().max())))
    assert not p.run(after, Context()).changed_from(after)
