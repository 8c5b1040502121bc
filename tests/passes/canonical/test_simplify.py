"""simplify: each identity once, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitwright.ir.graph import Graph
from bitwright.passes import Context
from bitwright.passes.canonical.simplify import Simplify

Read = Callable[..., Graph]
UNCHANGED = "unchanged"


def test_neutral_constants_and_squares(check: Any) -> None:
    check(
        Simplify(),
        before="""
            graph @g (%x: f32[2, 3]) -> (a = %c, b = %e, p = %p) level=graph {
              %zero = constant {values=[0.0]} : f32[]
              %one = constant {values=[1.0]} : f32[1]
              %two = constant {values=[2.0]} : f32[]
              %a = add(%zero, %x) : f32[2, 3]
              %b = div(%a, %one) : f32[2, 3]
              %c = mul(%b, %b) : f32[2, 3]
              %d = sub(%x, %zero) : f32[2, 3]
              %e = pow(%d, %two) : f32[2, 3]
              %n = neg(%d) : f32[2, 3]
              %o = neg(%n) : f32[2, 3]
              %p = abs(%o) : f32[2, 3]
            }
        """,
        after="""
            graph @g (%x: f32[2, 3]) -> (a = %c, b = %e, p = %p) level=graph {
              %c = square(%x) : f32[2, 3]
              %e = square(%x) : f32[2, 3]
              %p = abs(%x) : f32[2, 3]
            }
        """,
    )


def test_bounds_have_one_spelling(check: Any) -> None:
    check(
        Simplify(),
        before="""
            graph @g (%x: f32[4]) -> (a = %a, b = %c, c = %f, d = %h) level=graph {
              %zero = constant {values=[0.0]} : f32[]
              %six = constant {values=[6.0]} : f32[]
              %a = max(%x, %zero) : f32[4]
              %b = relu(%x) : f32[4]
              %c = min(%b, %six) : f32[4]
              %d = clamp(%x) {lo=-1.0, hi=3.0} : f32[4]
              %e = clamp(%d) {lo=-2.0, hi=2.0} : f32[4]
              %f = clamp(%e) {lo=-5.0} : f32[4]
              %g = clamp(%x) : f32[4]
              %h = exp(%g) : f32[4]
            }
        """,
        after="""
            graph @g (%x: f32[4]) -> (a = %a, b = %c, c = %f, d = %h) level=graph {
              %a = relu(%x) : f32[4]
              %c = clamp(%x) {lo=0.0, hi=6.0} : f32[4]
              %f = clamp(%x) {lo=-1.0, hi=2.0} : f32[4]
              %h = exp(%x) : f32[4]
            }
        """,
    )


def test_roots_and_casts(check: Any) -> None:
    check(
        Simplify(),
        before="""
            graph @g (%x: f32[4]) -> (a = %c, b = %f, c = %i) level=graph {
              %one = constant {values=[1.0]} : f32[]
              %e = exp(%x) : f32[4]
              %a = sqrt(%e) : f32[4]
              %b = reciprocal(%a) : f32[4]
              %c = cast(%b) {dtype=f32} : f32[4]
              %d = div(%one, %a) : f32[4]
              %wide = cast(%d) {dtype=f64} : f64[4]
              %f = cast(%wide) {dtype=f32} : f32[4]
              %half = cast(%x) {dtype=f16} : f16[4]
              %i = cast(%half) {dtype=f32} : f32[4]
            }
        """,
        after="""
            graph @g (%x: f32[4]) -> (a = %b, b = %d, c = %i) level=graph {
              %e = exp(%x) : f32[4]
              %b = rsqrt(%e) : f32[4]
              %d = rsqrt(%e) : f32[4]
              %half = cast(%x) {dtype=f16} : f16[4]
              %i = cast(%half) {dtype=f32} : f32[4]
            }
        """,
    )


def test_layout_operators_cancel_and_merge(check: Any) -> None:
    check(
        Simplify(),
        before="""
            graph @g (%x: f32[2, 3, 4]) -> (a = %c, b = %g, c = %m) level=graph {
              %a = transpose(%x) {perm=[1, 2, 0]} : f32[3, 4, 2]
              %b = transpose(%a) {perm=[2, 0, 1]} : f32[2, 3, 4]
              %c = relu(%b) : f32[2, 3, 4]
              %d = transpose(%x) {perm=[0, 2, 1]} : f32[2, 4, 3]
              %e = transpose(%d) {perm=[1, 0, 2]} : f32[4, 2, 3]
              %f = reshape(%e) {shape=[8, 3]} : f32[8, 3]
              %g = reshape(%f) {shape=[24]} : f32[24]
              %h = concat(%x) {axis=1} : f32[2, 3, 4]
              %i = slice(%h) {axis=1, stop=3} : f32[2, 3, 4]
              %j = pad(%i) {padding=[0, 0, 0, 0, 0, 0]} : f32[2, 3, 4]
              %k = tile(%j) {repeats=[1, 1, 1]} : f32[2, 3, 4]
              %l = expand(%k) {shape=[2, 3, 4]} : f32[2, 3, 4]
              %m = exp(%l) : f32[2, 3, 4]
            }
        """,
        after="""
            graph @g (%x: f32[2, 3, 4]) -> (a = %c, b = %g, c = %m) level=graph {
              %c = relu(%x) : f32[2, 3, 4]
              %e = transpose(%x) {perm=[2, 0, 1]} : f32[4, 2, 3]
              %g = reshape(%e) {shape=[24]} : f32[24]
              %m = exp(%x) : f32[2, 3, 4]
            }
        """,
    )


def test_matmul_with_a_constant_matrix_is_linear_and_takes_the_bias(check: Any) -> None:
    check(
        Simplify(),
        before="""
            graph @g (%x: f32[2, 3, 4]) -> (a = %b, b = %e) level=graph {
              %w = weight {ref="fc.weight"} : f32[4, 5]
              %bias = weight {ref="fc.bias"} : f32[5]
              %more = constant {values=[1.0]} : f32[1, 1, 1]
              %h = matmul(%x, %w) : f32[2, 3, 5]
              %a = add(%bias, %h) : f32[2, 3, 5]
              %b = sub(%a, %more) : f32[2, 3, 5]
              %wt = weight {ref="wt"} : f32[6, 4]
              %e = matmul(%x, %wt) {transpose_b=true} : f32[2, 3, 6]
            }
        """,
        after="""
            graph @g (%x: f32[2, 3, 4]) -> (a = %b, b = %e) level=graph {
              %fc.weight = weight {ref="fc.weight.1"} : f32[5, 4]
              %fc.bias.1 = constant {values=[-1.0, 0.0, 1.0, 2.0, 3.0]} : f32[5]
              %b = linear(%x, %fc.weight, %fc.bias.1) : f32[2, 3, 5]
              %wt = weight {ref="wt"} : f32[6, 4]
              %e = linear(%x, %wt) : f32[2, 3, 6]
            }
        """,
        weights={"fc.bias": np.arange(5, dtype=np.float32)},
    )


def test_convolutions_take_bias_and_padding(check: Any) -> None:
    check(
        Simplify(),
        before="""
            graph @g (%x: f32[1, 3, 5, 5]) -> (a = %c, b = %m, c = %v) level=graph {
              %w = weight {ref="w"} : f32[4, 3, 3, 3]
              %b = weight {ref="b"} : f32[4, 1, 1]
              %p = pad(%x) {padding=[0, 0, 1, 1, 0, 0, 1, 2]} : f32[1, 3, 7, 8]
              %h = conv(%p, %w) {padding=[1, 0, 0, 0]} : f32[1, 4, 6, 6]
              %c = add(%h, %b) : f32[1, 4, 6, 6]
              %q = pad(%x) {padding=[0, 0, 1, 1, 0, 0, 1, 1], value=-inf} : f32[1, 3, 7, 7]
              %m = max_pool(%q) {kernel=[2, 2]} : f32[1, 3, 6, 6]
              %r = pad(%x) {padding=[0, 0, 1, 0, 0, 0, 0, 0]} : f32[1, 3, 6, 5]
              %v = avg_pool(%r) {kernel=[2, 2], count_padding=false} : f32[1, 3, 5, 4]
            }
        """,
        after="""
            graph @g (%x: f32[1, 3, 5, 5]) -> (a = %c, b = %m, c = %v) level=graph {
              %w = weight {ref="w"} : f32[4, 3, 3, 3]
              %w.bias = constant {values=[0.0, 1.0, 2.0, 3.0]} : f32[4]
              %c = conv(%x, %w, %w.bias) {padding=[2, 1, 1, 2]} : f32[1, 4, 6, 6]
              %m = max_pool(%x) {kernel=[2, 2], padding=[1, 1, 1, 1]} : f32[1, 3, 6, 6]
              %v = avg_pool(%x) {kernel=[2, 2], padding=[1, 0, 0, 0]} : f32[1, 3, 5, 4]
            }
        """,
        weights={"b": np.arange(4, dtype=np.float32).reshape(4, 1, 1)},
    )


def test_quantize_undoes_dequantize(check: Any) -> None:
    check(
        Simplify(),
        before="""
            graph @g (%q: u8[2, 3]) -> (a = %a, b = %b) level=graph {
              %s = constant {values=[0.5]} : f32[]
              %s2 = constant {values=[0.5]} : f32[1]
              %z = constant {values=[7]} : u8[]
              %other = constant {values=[8]} : u8[]
              %x = dequantize(%q, %s, %z) : f32[2, 3]
              %a = quantize(%x, %s2, %z) {dtype=u8} : u8[2, 3]
              %b = quantize(%x, %s, %other) {dtype=u8} : u8[2, 3]
            }
        """,
        after="""
            graph @g (%q: u8[2, 3]) -> (a = %q, b = %b) level=graph {
              %s = constant {values=[0.5]} : f32[]
              %z = constant {values=[7]} : u8[]
              %other = constant {values=[8]} : u8[]
              %x = dequantize(%q, %s, %z) : f32[2, 3]
              %b = quantize(%x, %s, %other) {dtype=u8} : u8[2, 3]
            }
        """,
    )


def test_linear_between_views_of_its_leading_axes(check: Any) -> None:
    check(
        Simplify(),
        before="""
            graph @g (%x: f32[b, 3, 4]) -> (y = %y) level=graph {
              %w = weight {ref="w"} : f32[5, 4]
              %f = reshape(%x) {shape=["3*b", 4]} : f32[3*b, 4]
              %h = linear(%f, %w) : f32[3*b, 5]
              %y = reshape(%h) {shape=["b", 3, 5]} : f32[b, 3, 5]
            }
        """,
        after="""
            graph @g (%x: f32[b, 3, 4]) -> (y = %y) level=graph {
              %w = weight {ref="w"} : f32[5, 4]
              %y = linear(%x, %w) : f32[b, 3, 5]
            }
        """,
    )


def test_broadcasts_are_left_to_the_operator(check: Any) -> None:
    """Token types that are all zero: one row of the table, added to every token."""
    check(
        Simplify(),
        before="""
            graph @g (%x: f32[b, 3, 4]) -> (y = %y) level=graph {
              %table = weight {ref="types.weight"} : f32[2, 4]
              %zero = constant {values=[0]} : s64[1, 1]
              %ids = expand(%zero) {shape=["b", 3]} : s64[b, 3]
              %e = gather(%table, %ids) : f32[b, 3, 4]
              %y = add(%x, %e) : f32[b, 3, 4]
            }
        """,
        after="""
            graph @g (%x: f32[b, 3, 4]) -> (y = %y) level=graph {
              %table = weight {ref="types.weight"} : f32[2, 4]
              %e.row = slice(%table) {stop=1} : f32[1, 4]
              %y = add(%x, %e.row) : f32[b, 3, 4]
            }
        """,
    )


def test_repeated_key_heads_become_groups(check: Any) -> None:
    check(
        Simplify(),
        before="""
            graph @g (%q: f32[b, 4, 5, 8], %k: f32[b, 2, 5, 8], %v: f32[b, 2, 5, 8]) -> (y = %y) level=graph {
              %k1 = reshape(%k) {shape=["b", 2, 1, 5, 8]} : f32[b, 2, 1, 5, 8]
              %k2 = expand(%k1) {shape=["b", 2, 2, 5, 8]} : f32[b, 2, 2, 5, 8]
              %k3 = reshape(%k2) {shape=["b", 4, 5, 8]} : f32[b, 4, 5, 8]
              %v1 = reshape(%v) {shape=["b", 2, 1, 5, 8]} : f32[b, 2, 1, 5, 8]
              %v2 = expand(%v1) {shape=["b", 2, 2, 5, 8]} : f32[b, 2, 2, 5, 8]
              %v3 = reshape(%v2) {shape=["b", 4, 5, 8]} : f32[b, 4, 5, 8]
              %y = attention(%q, %k3, %v3) {scale=0.5} : f32[b, 4, 5, 8]
            }
        """,
        after="""
            graph @g (%q: f32[b, 4, 5, 8], %k: f32[b, 2, 5, 8], %v: f32[b, 2, 5, 8]) -> (y = %y) level=graph {
              %y = attention(%q, %k, %v) {scale=0.5, kv_groups=2} : f32[b, 4, 5, 8]
            }
        """,
    )


def test_constant_masks_of_attention(check: Any) -> None:
    check(
        Simplify(),
        before="""
            graph @g (%q: f32[2, 3, 8], %k: f32[2, 3, 8], %v: f32[2, 3, 8]) -> (a = %a, b = %b, c = %c) level=graph {
              %lower = weight {ref="lower"} : bool[2, 3, 3]
              %all = constant {values=[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]} : f32[3, 3]
              %some = constant {values=[0.0, 0.0, -inf]} : f32[1, 3]
              %a = attention(%q, %k, %v, %lower) : f32[2, 3, 8]
              %b = attention(%q, %k, %v, %all) : f32[2, 3, 8]
              %c = attention(%q, %k, %v, %some) : f32[2, 3, 8]
            }
        """,
        after="""
            graph @g (%q: f32[2, 3, 8], %k: f32[2, 3, 8], %v: f32[2, 3, 8]) -> (a = %a, b = %b, c = %c) level=graph {
              %some = constant {values=[0.0, 0.0, -inf]} : f32[1, 3]
              %a = attention(%q, %k, %v) {causal=true} : f32[2, 3, 8]
              %b = attention(%q, %k, %v) : f32[2, 3, 8]
              %c = attention(%q, %k, %v, %some) : f32[2, 3, 8]
            }
        """,
        weights={"lower": np.broadcast_to(np.tri(3, dtype=bool), (2, 3, 3)).copy()},
    )


@pytest.mark.parametrize(
    "body",
    [
        "%one = constant {values=[1.0, 1.0]} : f32[2, 1]\n  %y = mul(%v, %one) : f32[2, 3]",  # v broadcasts
        "%zero = constant {values=[0.0]} : f32[]\n  %y = sub(%zero, %x) : f32[2, 3]",
        "%i = cast(%x) {dtype=s32} : s32[2, 3]\n  %y = cast(%i) {dtype=f32} : f32[2, 3]",
        "%h = linear(%x, %w) : f32[2, 2]\n  %e = exp(%h) : f32[2, 2]\n  %y = add(%h, %e) : f32[2, 2]",
        "%h = linear(%x, %w) : f32[2, 2]\n  %b = constant {values=[1.0, 2.0]} : f32[2, 1]\n"
        "  %y = add(%h, %b) : f32[2, 2]",
        "%t = transpose(%x) {perm=[1, 0]} : f32[3, 2]\n  %r = reshape(%t) {shape=[6]} : f32[6]\n"
        "  %y = reshape(%r) {shape=[2, 3]} : f32[2, 3]",
    ],
)  # fmt: skip
def test_left_alone(read: Read, difference: Callable[..., float], body: str) -> None:
    graph = read(
        f'graph @g (%x: f32[2, 3], %v: f32[3]) -> (y = %y) level=graph {{\n  %w = weight {{ref="w"}} : f32[2, 3]\n'
        f"  {body}\n}}"
    )
    after = Simplify().run(graph, Context())
    assert difference(graph, after) == 0.0
    kinds = [n.op.name or n.op.spelling for n in graph.drop_dead().nodes if n.op.name != "reshape"]
    assert kinds == [n.op.name or n.op.spelling for n in after.nodes if n.op.name != "reshape"]


def test_transposing_a_masked_matrix_turns_its_encoding(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="w"} : f32[8, 4] nm<2:4, axis=0>
          %y = matmul(%x, %w) : f32[2, 4]
        }
    """)
    after = Simplify().run(graph, Context())
    assert str(after.nodes[0].type) == "f32[4, 8] nm<2:4, axis=1>"
    assert np.array_equal(after.weights["w~1"].array, graph.weights["w"].array.T)


def test_what_rises_goes_before_a_maximum(check: Any) -> None:
    """So the relu joins the convolution, and the pool moves bytes; not where a window may lie in padding alone."""
    check(
        Simplify(),
        before="""
            graph @g (%x: f32[1, 3, 8, 8]) -> (a = %b, c = %d) level=graph {
              %a = max_pool(%x) {kernel=[3, 3], stride=[2, 2], padding=[1, 1, 1, 1]} : f32[1, 3, 4, 4]
              %b = relu(%a) : f32[1, 3, 4, 4]
              %c = max_pool(%x) {kernel=[2, 2], stride=[2, 2], padding=[2, 0, 0, 0]} : f32[1, 3, 5, 4]
              %d = clamp(%c) {lo=0.0, hi=6.0} : f32[1, 3, 5, 4]
            }
        """,
        after="""
            graph @g (%x: f32[1, 3, 8, 8]) -> (a = %b, c = %d) level=graph {
              %b.first = relu(%x) : f32[1, 3, 8, 8]
              %b = max_pool(%b.first) {kernel=[3, 3], stride=[2, 2], padding=[1, 1, 1, 1]} : f32[1, 3, 4, 4]
              %c = max_pool(%x) {kernel=[2, 2], stride=[2, 2], padding=[2, 0, 0, 0]} : f32[1, 3, 5, 4]
              %d = clamp(%c) {lo=0.0, hi=6.0} : f32[1, 3, 5, 4]
            }
        """,
    )
