"""Operator by operator against onnxruntime, with fixed and with symbolic sizes."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest

from bitwright.frontends.onnx import load_onnx
from bitwright.ir.errors import Unsupported
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.text import parse, show
from bitwright.ir.verify import verify
from tests.frontends.onnx_cases import CASES, Array, Case

FIXED_SIZE_ONLY = {"EyeLike", "Shape", "ReverseSequence", "Mod", "BitShift"}
"""Cases whose result or indices depend on the size itself."""


def reference(case: Case) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(case.model().SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, case.inputs))


def compare(case: Case, have: list[Array], want: list[Array]) -> None:
    for h, w in zip(have, want, strict=True):
        assert h.shape == w.shape
        assert h.dtype == w.dtype
        if w.dtype.kind in "iu" and w.dtype.itemsize == 1:  # a rounding tie may fall either way
            assert np.abs(h.astype(int) - w.astype(int)).max() <= (1 if case.op.startswith("QLinear") else 0)
        else:
            np.testing.assert_allclose(h, w, rtol=case.rtol, atol=case.atol)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_operator_equals_onnxruntime(case: Case) -> None:
    want = reference(case)
    graph = load_onnx(case.model())
    verify(graph)
    assert parse(show(graph), graph.weights).same_as(graph)
    compare(case, [to_numpy(t) for t in evaluate(graph, case.inputs)], want)


@pytest.mark.parametrize("case", [c for c in CASES if c.inputs and c.op not in FIXED_SIZE_ONLY], ids=lambda c: c.name)
def test_symbolic_size_gives_the_same_or_is_refused(case: Case) -> None:
    try:
        graph = load_onnx(case.model(symbolic=True))
    except Unsupported:
        return
    verify(graph)
    compare(case, [to_numpy(t) for t in evaluate(graph, case.inputs)], reference(case))


def test_most_operators_take_a_symbolic_batch() -> None:
    refused = []
    for case in CASES:
        try:
            load_onnx(case.model(symbolic=True))
        except Unsupported:
            refused.append(case.name)
    assert len(refused) < len(CASES) / 4, refused


def test_table_is_large_enough() -> None:
    assert len(CASES) >= 150
    assert len({c.name for c in CASES}) == len(CASES)
