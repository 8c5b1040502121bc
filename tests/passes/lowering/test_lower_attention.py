"""lower-attention: operands rounded to bf16 where they are made, views kept, refusals with their reason."""

from __future__ import annotations

import numpy as np
import pytest

import bitwright as bw
from bitwright.codegen.targets import BUILTIN, GPUS
from bitwright.codegen.targets.machine import cpu_flags
from bitwright.ir import ops
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.text import parse
from bitwright.ir.types import BF16, F32
from bitwright.passes import Context
from bitwright.passes.lowering.fuse import Fuse
from bitwright.passes.lowering.lower_attention import LowerAttention

ONE = """
graph @g (%x: f32[2, 19, 96], %m: f32[19, 19]) -> (y = %y) level=integer {
  %q = slice(%x) {axis=2, start=0, stop=32, step=1} : f32[2, 19, 32]
  %k = slice(%x) {axis=2, start=32, stop=64, step=1} : f32[2, 19, 32]
  %v = slice(%x) {axis=2, start=64, stop=96, step=1} : f32[2, 19, 32]
  %y = attention(%q, %k, %v, %m) {scale=0.25} : f32[2, 19, 32]
}
"""


def half(depth: int = 32, rows: int = 19) -> str:
    return f"""
        graph @g (%q: f32[2, {rows}, {depth}], %k: f32[2, 19, {depth}], %v: f32[2, 19, 16]) -> (y = %y) level=integer {{
          %y = attention(%q, %k, %v) {{scale=0.25}} : f32[2, {rows}, 16]
        }}
    """


def test_one_source_is_rounded_once() -> None:
    graph = parse(ONE)
    after = LowerAttention().run(graph, Context())
    casts = [n for n in after.nodes if isinstance(n.op, ops.Cast)]
    assert [(n.inputs, n.type.dtype) for n in casts] == [(("x",), BF16), ((casts[1].inputs[0],), F32)]
    assert LowerAttention().run(after, Context()) == after
    rng = np.random.default_rng(3)
    inputs = [rng.standard_normal(s).astype(np.float32) for s in ((2, 19, 96), (19, 19))]
    plain, rounded = (to_numpy(evaluate(g, inputs)[0]) for g in (graph, after))
    error = np.abs(plain - rounded).max()
    assert 1e-5 < error < 0.03  # bf16 has 8 bits; sums of 19 rounded values and a rounded result


@pytest.mark.parametrize(
    ("text", "target", "reason"),
    [
        (half(), "x86-avx512-vnni", "x86-avx512-vnni has no products of bf16"),
        (half(), "x86-avx2", "x86-avx2 has no products of bf16"),
        (half(depth=31), "x86-avx512-bf16", "a depth of 31 has no pairs"),
        (half(rows=8), "x86-avx512-bf16", "only 8 queries or columns"),
    ],
)
def test_refusals(text: str, target: str, reason: str) -> None:
    context, graph = Context(target=BUILTIN[target]), parse(text)
    assert LowerAttention().run(graph, context) == graph
    assert [r.reason for r in context.refusals] == [f"stays f32: {reason}"]


def test_a_gpu_takes_any_size_in_either_format() -> None:
    for kind in ("bf16", "f16"):
        context, graph = Context(target=GPUS["cuda-sm90"]), parse(half(depth=31, rows=1))
        lowered = LowerAttention(format=kind).run(graph, context)
        assert not context.refusals
        (node,) = (n for n in lowered.nodes if isinstance(n.op, ops.Attention))
        assert {str(lowered.types[x].dtype) for x in node.inputs[:3]} == {kind}


def test_other_formats_are_left_alone() -> None:
    graph = parse(half().replace("f32", "f16"))
    context = Context()
    assert LowerAttention().run(graph, context) == graph
    assert not context.refusals


def test_rounding_joins_what_makes_the_operands() -> None:
    """The cast is the last thing of the projection's kernel, the cast back and quantize that of the attention's."""
    graph = parse("""
        graph @g (%x: f32[1, 19, 32], %w: f32[32, 32], %s: f32[], %z: u8[]) -> (y = %y) level=integer {
          %p = linear(%x, %w) : f32[1, 19, 32]
          %r = reshape(%p) {shape=[1, 19, 2, 16]} : f32[1, 19, 2, 16]
          %t = transpose(%r) {perm=[0, 2, 1, 3]} : f32[1, 2, 19, 16]
          %a = attention(%t, %t, %t) {scale=0.25} : f32[1, 2, 19, 16]
          %b = quantize(%a, %s, %z) {dtype=u8} : u8[1, 2, 19, 16]
          %c = transpose(%b) {perm=[0, 2, 1, 3]} : u8[1, 19, 2, 16]
          %y = reshape(%c) {shape=[1, 19, 32]} : u8[1, 19, 32]
        }
    """)
    kernels = Fuse().run(LowerAttention().run(graph, Context()), Context())
    regions = [n.op for n in kernels.nodes if isinstance(n.op, ops.Region)]
    assert [r.role for r in regions] == ["contraction", "attention"]
    assert [[n.op.spelling for n in r.body.nodes] for r in regions] == [
        ["linear", "cast"],
        ["reshape", "transpose", "attention", "cast", "quantize", "transpose"],
    ]


@pytest.mark.skipif("avx512bf16" not in cpu_flags(), reason="this CPU has no products of bf16")
def test_program() -> None:
    """The compiled program runs the bf16 kernel and agrees with the interpreter of the lowered graph."""
    graph, target = parse(ONE), BUILTIN["x86-avx512-bf16"]
    program = bw.compile(graph, recipe="lower-attention", target=target)
    assert any("products of bf16" in layer.reason for layer in program.report.layers)
    rng = np.random.default_rng(5)
    inputs = [rng.standard_normal(s).astype(np.float32) for s in ((2, 19, 96), (19, 19))]
    want = to_numpy(evaluate(LowerAttention().run(graph, Context()), inputs)[0])
    np.testing.assert_allclose(program(*inputs), want, rtol=1.6e-2, atol=1.6e-2)
