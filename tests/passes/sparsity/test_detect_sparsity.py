"""detect-sparsity: patterns that are already there are found, the tightest one; nothing is invented."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bitwright.ir.graph import Graph
from bitwright.passes import Context
from bitwright.passes.sparsity.detect_sparsity import PATTERNS, DetectSparsity, tightest
from bitwright.passes.sparsity.masks import nm_mask_array

Read = Callable[..., Graph]
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("keep", "group"), PATTERNS)
def test_every_listed_pattern_is_found(keep: int, group: int) -> None:
    weight = RNG.standard_normal((64, 64)).astype(np.float32)
    found = tightest(weight * nm_mask_array(weight, keep, group, 1), 1)
    assert found is not None
    assert (found.keep, found.group) == (keep, group)


@pytest.mark.parametrize(
    "weight",
    [
        RNG.standard_normal((8, 32)),
        np.zeros((8, 32)),
        np.tri(8, 32) * 1.0,
        RNG.standard_normal((8, 6)) * [1, 1, 0, 0, 1, 0],
    ],
)
def test_nothing_is_invented(weight: np.ndarray) -> None:
    assert tightest(weight.astype(np.float32), 1) is None


TEXT = """
graph @g (%x: f32[1, 8, 4, 4]) -> (y = %z) level=graph {
  %w = weight {ref="conv.weight"} : f32[8, 8, 3, 3]
  %q = weight {ref="q.weight"} : s8[4, 16]
  %d = weight {ref="dw.weight"} : f32[8, 1, 1, 1]
  %s = constant {values=[0.5]} : f32[]
  %h = conv(%x, %w) : f32[1, 8, 2, 2]
  %i = conv(%h, %d) {groups=8} : f32[1, 8, 2, 2]
  %r = reshape(%i) {shape=[2, 16]} : f32[2, 16]
  %l = dequantize(%q, %s) : f32[4, 16]
  %z = linear(%r, %l) : f32[2, 4]
}
"""


def sparse_weights() -> dict[str, object]:
    conv, q = RNG.standard_normal((8, 8, 3, 3)).astype(np.float32), RNG.integers(1, 100, (4, 16))
    return {
        "conv.weight": conv * nm_mask_array(conv, 2, 4, 1),
        "q.weight": (q * nm_mask_array(q.astype(np.float32), 1, 4, 1)).astype(np.int8),
        "dw.weight": np.zeros((8, 1, 1, 1), np.float32),
    }


def test_convolutions_and_quantized_weights(read: Read, difference: Callable[..., float]) -> None:
    graph, context = read(TEXT, sparse_weights()), Context()
    after = DetectSparsity().run(graph, context)
    assert {n.output: str(n.type) for n in after.nodes if n.op.name == "weight"} == {
        "w": "f32[8, 8, 3, 3] nm<2:4, axis=1>",
        "q": "s8[4, 16] nm<1:4, axis=1>",
        "d": "f32[8, 1, 1, 1]",
    }
    assert context.remarks == [
        ("detect-sparsity", "conv", {"pattern": "2:4", "axis": 1}),
        ("detect-sparsity", "q", {"pattern": "1:4", "axis": 1}),
    ]
    assert difference(graph, after) == 0.0
    assert all(after.weights[k] is graph.weights[k] for k in graph.weights)
    assert not DetectSparsity().run(after, Context()).changed_from(after)


def test_embeddings_are_left(read: Read) -> None:
    graph = read("""
        graph @g (%i: s64[2], %x: f32[2, 8]) -> (e = %e, y = %y) level=graph {
          %w = weight {ref="tied"} : f32[4, 8]
          %e = gather(%w, %i) : f32[2, 8]
          %y = linear(%x, %w) : f32[2, 4]
        }
    """, {"tied": np.eye(4, 8, dtype=np.float32)})  # fmt: skip
    assert DetectSparsity().run(graph, Context()) == graph
