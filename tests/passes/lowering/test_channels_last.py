"""channels-last: convolutions change layout, transposes stay only at the borders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings

from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.verify import verify
from bitwright.passes import Context
from bitwright.passes.lowering.channels_last import ChannelsLast
from tests.random_graphs import graphs

Read = Callable[..., Graph]


def words(graph: Graph) -> list[str]:
    changed = ChannelsLast().run(graph, Context())
    verify(changed)
    return [n.op.spelling for n in changed.nodes if n.op.spelling not in ("weight", "constant")]


def test_a_whole_network_transposes_once_on_entry(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[1, 3, 8, 8]) -> (y = %p) level=integer {
          %w = weight {ref="w"} : f32[4, 3, 3, 3]
          %v = weight {ref="v"} : f32[4, 4, 1, 1]
          %a = conv(%x, %w) {padding=[1, 1, 1, 1]} : f32[1, 4, 8, 8]
          %r = relu(%a) : f32[1, 4, 8, 8]
          %b = conv(%r, %v) : f32[1, 4, 8, 8]
          %s = add(%b, %r) : f32[1, 4, 8, 8]
          %m = max_pool(%s) {kernel=[2, 2], stride=[2, 2]} : f32[1, 4, 4, 4]
          %c = concat(%m, %m) {axis=1} : f32[1, 8, 4, 4]
          %p = reduce_mean(%c) {axes=[2, 3]} : f32[1, 8]
        }
    """)
    assert words(graph) == ["transpose", "conv", "relu", "conv", "add", "max_pool", "concat", "reduce_mean"]


def test_per_channel_parameters_follow_their_axis(read: Read) -> None:
    graph = read("""
        graph @g (%x: u8[1, 4, 3, 3]) -> (y = %y) level=integer {
          %w = weight {ref="w"} : s8[8, 4, 1, 1]
          %m = weight {ref="m"} : s32[8]
          %e = constant {values=[31, 31, 31, 31, 31, 31, 31, 31]} : s32[8]
          %a = int_conv(%x, %w) : s32[1, 8, 3, 3]
          %y = requantize(%a, %m, %e) {dtype=u8, axis=1} : u8[1, 8, 3, 3]
        }
    """)
    changed = ChannelsLast().run(graph, Context())
    node = next(n for n in changed.nodes if n.op.spelling == "requantize")
    assert getattr(node.op, "axis", None) == 3


def test_explicit_layout_changes_cancel(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[1, 6, 6, 4]) -> (y = %y) level=integer {
          %w = weight {ref="w"} : f32[4, 4, 3, 3]
          %t = transpose(%x) {perm=[0, 3, 1, 2]} : f32[1, 4, 6, 6]
          %a = conv(%t, %w) {padding=[1, 1, 1, 1]} : f32[1, 4, 6, 6]
          %y = transpose(%a) {perm=[0, 2, 3, 1]} : f32[1, 6, 6, 4]
        }
    """)
    assert words(graph) == ["conv"]


def test_a_quantize_moves_behind_the_transpose(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[1, 4, 3, 3]) -> (y = %a) level=integer {
          %w = weight {ref="w"} : s8[8, 4, 1, 1]
          %s = constant {values=[0.1]} : f32[]
          %q = quantize(%x, %s) {dtype=u8} : u8[1, 4, 3, 3]
          %a = int_conv(%q, %w) : s32[1, 8, 3, 3]
        }
    """)
    assert words(graph) == ["transpose", "quantize", "int_conv", "transpose"]


def test_graphs_without_convolutions_stay(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[1, 4, 3, 3]) -> (y = %y) level=integer {
          %y = relu(%x) : f32[1, 4, 3, 3]
        }
    """)
    assert not ChannelsLast().run(graph, Context()).changed_from(graph)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(graphs(10))
def test_meaning_and_idempotence(case: tuple[Graph, list[np.ndarray[Any, Any]]]) -> None:
    graph, inputs = case
    changed = ChannelsLast().run(replace(graph, level="integer"), Context())
    verify(changed)
    for a, b in zip(evaluate(graph, inputs), evaluate(changed, inputs), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=1e-4)
    again = ChannelsLast().run(changed, Context())
    assert [n.op for n in again.nodes] == [n.op for n in changed.nodes]
