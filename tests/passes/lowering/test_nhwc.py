"""Channels-last spellings of group norm and transposed convolution: the meaning, and when they are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.verify import verify
from bitwright.passes import Context
from bitwright.passes.lowering.channels_last import ChannelsLast

Read = Callable[..., Graph]
HEAD = """
graph @g (%x: f32[2, 6, 5, 4]) -> (y = %y) level=integer {
  %w = weight {ref="w"} : f32[6, 6, 1, 1]
  %a = conv(%x, %w) : f32[2, 6, 5, 4]
"""


def changed(read: Read, tail: str, weights: dict[str, Any] | None = None) -> tuple[Graph, Graph]:
    graph = read(HEAD + tail + "\n}", weights=weights)
    after = ChannelsLast().run(graph, Context())
    verify(after)
    return graph, after


def check(graph: Graph, after: Graph, x: np.ndarray[Any, Any], rtol: float = 1e-5) -> None:
    want, got = (evaluate(g, [x])[0].numpy() for g in (graph, after))
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * float(np.abs(want).max()))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("affine", ["", ", %s", ", %s, %b"])
def test_group_norm_is_means_and_a_product(read: Read, groups: int, affine: str) -> None:
    graph, after = changed(
        read,
        f"""
  %s = weight {{ref="s"}} : f32[6]
  %b = weight {{ref="b"}} : f32[6]
  %y = group_norm(%a{affine}) {{groups={groups}, eps=0.01}} : f32[2, 6, 5, 4]""",
    )
    assert not any(n.op.spelling == "group_norm" for n in after.nodes)
    assert sum(n.op.spelling == "transpose" for n in after.nodes) == 2  # in and out
    rng = np.random.default_rng(groups)
    check(graph, after, rng.standard_normal((2, 6, 5, 4)).astype(np.float32))
    far = (1000 + rng.standard_normal((2, 6, 5, 4))).astype(np.float32)  # no difference of large squares
    check(graph, after, far, 2e-3)


@pytest.mark.parametrize(("kernel", "bias"), [((2, 2), True), ((3, 2), False), ((1, 4), True)])
def test_windows_that_do_not_overlap_are_a_1x1_convolution(read: Read, kernel: tuple[int, int], bias: bool) -> None:
    (high, wide), tail = kernel, ", %b" if bias else ""
    graph, after = changed(
        read,
        f"""
  %v = weight {{ref="v"}} : f32[6, 3, {high}, {wide}]
  %b = weight {{ref="b"}} : f32[3]
  %y = conv_transpose(%a, %v{tail}) {{stride=[{high}, {wide}]}} : f32[2, 3, {5 * high}, {4 * wide}]""",
    )
    assert [n.op.spelling for n in after.nodes if "conv" in n.op.spelling] == ["conv", "conv"]
    check(graph, after, np.random.default_rng(1).standard_normal((2, 6, 5, 4)).astype(np.float32))


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ("stride=[1, 1]", "2, 3, 6, 5"),
        ("stride=[2, 2], padding=[1, 1, 1, 1]", "2, 3, 8, 6"),
        ("stride=[2, 2], output_padding=[1, 0]", "2, 3, 11, 8"),
        ("stride=[2, 2], dilation=[2, 2]", "2, 3, 11, 9"),
    ],
)
def test_other_transposed_convolutions_stay(read: Read, attributes: str, shape: str) -> None:
    graph, after = changed(
        read,
        f"""
  %v = weight {{ref="v"}} : f32[6, 3, 2, 2]
  %y = conv_transpose(%a, %v) {{{attributes}}} : f32[{shape}]""",
    )
    assert any(n.op.spelling == "conv_transpose" for n in after.nodes)
    check(graph, after, np.ones((2, 6, 5, 4), np.float32))


def test_what_is_computed_in_channels_first_stays(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 6, 5, 4]) -> (y = %y) level=integer {
          %y = group_norm(%x) {groups=2} : f32[2, 6, 5, 4]
        }
    """)
    assert not ChannelsLast().run(graph, Context()).changed_from(graph)
