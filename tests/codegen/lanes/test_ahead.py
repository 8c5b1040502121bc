"""Memory asked for ahead: only of large buffers, and results stay exact."""

from __future__ import annotations

import pytest

from bitwright.codegen.tvm.lanes.template import Lanes
from bitwright.codegen.tvm.template import Refused, canonical
from tests.codegen.lanes.test_template import inputs_of, of_pattern, on, run, weights
from tests.codegen.lanes.test_words import residual

ENCODING = "nm<1:4, axis=1, shared=4, block=4>"


def prefetches(rows: int, outputs: int, inputs: int) -> int:
    """How many places of a kernel ask for memory."""
    body = canonical(residual(rows, outputs, inputs, ENCODING))
    values = inputs_of(residual(rows, outputs, inputs, ENCODING), of_pattern(outputs, inputs, 1, 4, 4, 4, True))
    made = Lanes().configure(body, {v.name: a for v, a in zip(body.inputs, values, strict=True)}, on("avx512-vnni"))
    assert not isinstance(made, Refused), made.reason
    return str(Lanes().emit(body, made, "kernel")).count("prefetch")


def test_small_buffers_are_near() -> None:
    assert prefetches(64, 64, 64) == 0


def test_large_ones_are_asked_for() -> None:
    assert prefetches(4096, 1024, 64) >= 2  # results and residual, not the small input
    assert prefetches(4096, 1024, 1024) > prefetches(4096, 1024, 64)


@pytest.mark.parametrize("shared", [1, 4])
def test_large_results_are_exact(shared: int) -> None:
    rows, outputs = 2100, 1028
    if shared == 4:
        run(residual(rows, outputs, 64, ENCODING), of_pattern(outputs, 64, 1, 4, 4, 4, True), "avx512-vnni", "wmem2e2")
    else:
        body = residual(rows, outputs, 64, "unstructured<0 per 0>")
        run(body, weights(outputs, 64, 0.2, 4, 1, True), "avx512-vnni", "wmem2e2")
