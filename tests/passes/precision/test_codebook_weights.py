"""codebook-weights: the codebooks are the best there are, groups help, masks survive, programs have the bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitwright as bw
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.patterns import violation
from bitwright.ir.types import NM
from bitwright.passes import Context
from bitwright.passes.precision.codebook_weights import CodebookWeights, codebook, with_codebooks
from tests.conftest import read_graph

NETWORK = """
graph @g (%x: f32[2, 8, 6, 6]) -> (y = %y) level=graph {
  %w1 = weight {ref="c1.weight"} : f32[12, 8, 3, 3]
  %b1 = weight {ref="c1.bias"} : f32[12]
  %w2 = weight {ref="fc.weight"} : f32[5, 12]
  %h = conv(%x, %w1, %b1) {padding=[1, 1, 1, 1]} : f32[2, 12, 6, 6]
  %r = relu(%h) : f32[2, 12, 6, 6]
  %p = reduce_mean(%r) {axes=[2, 3], keepdim=false} : f32[2, 12]
  %y = linear(%p, %w2) : f32[2, 5]
}
"""


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=3, max_size=9), st.integers(2, 4))
def test_no_codebook_is_better(mass: list[int], entries: int) -> None:
    m = np.array(mass, float)
    at = np.arange(len(m))
    found = codebook(m, entries)
    assert len(np.unique(found[m > 0])) <= entries
    sets = itertools.combinations(at, min(entries, len(m)))
    best = min((m * np.min(np.abs(at[:, None] - np.array(s)), 1) ** 2).sum() for s in sets)
    assert (m * (at - found) ** 2).sum() == pytest.approx(best)


@pytest.mark.parametrize("entries", [2, 16, 64])
def test_values_are_few_and_groups_help(entries: int) -> None:
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((24, 90)) * rng.gamma(1.0, 1.0, (24, 90))).astype(np.float32)
    errors = []
    for groups in (1, 3, 24, 1000):
        codes, scale = with_codebooks(w, entries, groups)
        assert codes.dtype == np.int8
        assert max(len(np.unique(row)) for row in codes) <= entries
        assert len(np.unique(codes)) <= entries * min(groups, 24)
        errors.append(float(np.square(codes * scale[:, None] - w).sum()))
    assert errors[0] >= errors[1] >= errors[2] == errors[3]  # a group's best book is at least as good as all groups'


@pytest.mark.parametrize("entries", [2, 16])
def test_masks_survive(read: Callable[..., Graph], entries: int) -> None:
    graph = read(NETWORK.replace("f32[12, 8, 3, 3]", "f32[12, 8, 3, 3] nm<2:4, axis=1>"))
    after = CodebookWeights(entries=entries).run(graph, Context())
    (t,) = (n.type for n in after.nodes if isinstance(n.op, ops.Weight) and n.type.shape == (12, 8, 3, 3))
    (w,) = (after.constant(n.output) for n in after.nodes if isinstance(n.op, ops.Weight) and n.type == t)

    assert w is not None
    assert isinstance(t.encoding, NM)
    assert not violation(np.asarray(w), t.encoding)
    assert len(np.unique(np.asarray(w))) <= entries


def test_programs_take_them_as_8_bit_weights() -> None:
    graph = read_graph(NETWORK)
    data: tuple[Any, ...] = (np.random.default_rng(0).standard_normal((2, 8, 6, 6)).astype(np.float32),)
    recipe = "codebook-weights{groups=3}, observe-ranges, quantize-int8"
    program = bw.compile(graph, target="x86-portable", recipe=recipe, calibration=[data])
    done = bw.simulate(graph, "lut", list(data), recipe=recipe, calibration=[data])
    assert done.identical
    assert np.asarray(program(*data)).tobytes() == done.outputs[0].tobytes()
    exact = to_numpy(evaluate(graph, list(data))[0])
    assert np.square(done.outputs[0] - exact).sum() < 0.05 * np.square(exact).sum()


def test_what_is_told() -> None:
    context = Context()
    CodebookWeights(groups=4).run(read_graph(NETWORK), context)
    told = {place: facts for _, place, facts in context.remarks}
    assert told["c1"]["groups"] == 4
    assert told["fc"]["weight_snr_db"] > 15
    again = CodebookWeights().run(CodebookWeights().run(read_graph(NETWORK), Context()), context)
    assert {r.reason for r in context.refusals} == {"quantized already"}
    assert again.level == "graph"
    for bad in (CodebookWeights(entries=1), CodebookWeights(entries=300), CodebookWeights(groups=0)):
        with pytest.raises(InvalidInput, match="entries is 2 to 256 and groups at least 1"):
            bad.run(read_graph(NETWORK), Context())
