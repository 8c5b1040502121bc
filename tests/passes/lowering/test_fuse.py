"""fuse: what becomes one kernel, and what stays apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings

from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.verify import verify
from bitwright.passes import Context
from bitwright.passes.lowering.fuse import Fuse
from tests.random_graphs import graphs

Read = Callable[..., Graph]


def roles(graph: Graph) -> list[tuple[str, list[str]]]:
    """(role, operators) of every region."""
    fused = Fuse().run(graph, Context())
    verify(fused)
    found = []
    for n in fused.nodes:
        if isinstance(n.op, ops.Region):
            found.append((n.op.role, [m.op.spelling for m in n.op.body.nodes if not isinstance(m.op, ops.Constant)]))
    return found


def test_a_residual_addition_rides_behind_the_later_contraction(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 8]) -> (y = %r) level=integer {
          %a.w = weight {ref="a"} : f32[8, 8]
          %b.w = weight {ref="b"} : f32[8, 8]
          %a = linear(%x, %a.w) : f32[2, 8]
          %t = tanh(%a) : f32[2, 8]
          %b = linear(%x, %b.w) : f32[2, 8]
          %s = add(%t, %b) : f32[2, 8]
          %r = relu(%s) : f32[2, 8]
        }
    """)
    assert roles(graph) == [("contraction", ["linear", "tanh"]), ("contraction", ["linear", "add", "relu"])]


def test_a_value_with_two_readers_is_computed_once(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 8]) -> (y = %y, z = %z) level=integer {
          %a = exp(%x) : f32[2, 8]
          %y = relu(%a) : f32[2, 8]
          %z = neg(%a) : f32[2, 8]
        }
    """)
    assert roles(graph) == [("pointwise", ["exp"]), ("pointwise", ["relu"]), ("pointwise", ["neg"])]


def test_a_gate_that_reads_its_input_twice_is_one_kernel(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 8]) -> (y = %y) level=integer {
          %w = weight {ref="w"} : f32[8, 8]
          %h = linear(%x, %w) : f32[2, 8]
          %s = sigmoid(%h) : f32[2, 8]
          %y = mul(%s, %h) : f32[2, 8]
        }
    """)
    assert roles(graph) == [("contraction", ["linear", "sigmoid", "mul"])]


def test_a_norm_takes_the_addition_before_it_unless_a_contraction_has_it(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 8], %z: f32[2, 8]) -> (y = %y, v = %v) level=integer {
          %w = weight {ref="w"} : f32[8, 8]
          %a = add(%x, %z) : f32[2, 8]
          %y = layer_norm(%a) : f32[2, 8]
          %h = linear(%x, %w) : f32[2, 8]
          %b = add(%h, %z) : f32[2, 8]
          %v = layer_norm(%b) : f32[2, 8]
        }
    """)
    assert roles(graph) == [
        ("rowwise", ["add", "layer_norm"]),
        ("contraction", ["linear", "add"]),
        ("rowwise", ["layer_norm"]),
    ]


def test_views_around_attention_are_part_of_it(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[1, 6, 8]) -> (y = %q) level=integer {
          %s = constant {values=[0.1]} : f32[]
          %r = reshape(%x) {shape=[1, 6, 2, 4]} : f32[1, 6, 2, 4]
          %t = transpose(%r) {perm=[0, 2, 1, 3]} : f32[1, 2, 6, 4]
          %a = attention(%t, %t, %t) {scale=0.5} : f32[1, 2, 6, 4]
          %b = transpose(%a) {perm=[0, 2, 1, 3]} : f32[1, 6, 2, 4]
          %q = quantize(%b, %s) {dtype=u8} : u8[1, 6, 2, 4]
        }
    """)
    assert roles(graph) == [("attention", ["reshape", "transpose", "attention", "transpose", "quantize"])]


def test_a_chain_is_cut_where_it_is_narrowest(read: Read) -> None:
    graph = read("""
        graph @g (%x: u8[2, 8]) -> (y = %y) level=integer {
          %a.w = weight {ref="a"} : s8[8, 8]
          %b.w = weight {ref="b"} : s8[8, 8]
          %m = weight {ref="m"} : s32[]
          %e = constant {values=[31]} : s32[]
          %a = int_linear(%x, %a.w) : s32[2, 8]
          %q = requantize(%a, %m, %e) {dtype=u8} : u8[2, 8]
          %c = cast(%q) {dtype=s32} : s32[2, 8]
          %b = int_linear(%x, %b.w) : s32[2, 8]
          %s = add(%c, %b) : s32[2, 8]
          %y = saturate(%s) {dtype=u8} : u8[2, 8]
        }
    """)
    assert roles(graph) == [
        ("contraction", ["int_linear", "requantize"]),
        ("contraction", ["cast", "int_linear", "add", "saturate"]),
    ]


def test_reshapes_stay_views_and_quantization_parameters_operands(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 8]) -> (y = %y) level=integer {
          %s = constant {values=[0.1]} : f32[]
          %q = quantize(%x, %s) {dtype=u8} : u8[2, 8]
          %y = reshape(%q) {shape=[16]} : u8[16]
        }
    """)
    fused = Fuse().run(graph, Context())
    assert [n.op.spelling for n in fused.nodes] == ["weight", "region", "reshape"]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(graphs(10))
def test_meaning_and_idempotence(case: tuple[Graph, list[np.ndarray[Any, Any]]]) -> None:
    graph, inputs = case
    fused = Fuse().run(replace(graph, level="integer"), Context())
    verify(fused)
    for a, b in zip(evaluate(graph, inputs), evaluate(fused, inputs), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert Fuse().run(fused, Context()) is fused
