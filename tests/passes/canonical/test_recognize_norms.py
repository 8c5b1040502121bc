"""recognize-norms: layer norm and RMS norm in the spellings of torch, ONNX and TensorFlow exporters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bitwright.ir.graph import Graph
from bitwright.passes import Context, parse_passes, run_pipeline
from bitwright.passes.canonical.recognize_norms import RecognizeNorms

Read = Callable[..., Graph]

MEAN = "  %m = reduce_mean(%x) {axes=[-1], keepdim=true} : f32[2, 3, 4]\n".replace("4]\n", "1]\n")
VARIANCE = (
    "  %d = sub(%x, %m) : f32[2, 3, 4]\n  %s = square(%d) : f32[2, 3, 4]\n"
    "  %v = reduce_mean(%s) {axes=[2], keepdim=true} : f32[2, 3, 1]\n  %e = add(%v, %eps) : f32[2, 3, 1]\n"
)
MEAN_SQUARE = (
    "  %s = square(%x) : f32[2, 3, 4]\n  %v = reduce_mean(%s) {axes=[-1], keepdim=true} : f32[2, 3, 1]\n"
    "  %e = add(%eps, %v) : f32[2, 3, 1]\n"
)
SPELLINGS = {
    "rsqrt, affine": ("layer_norm", 3, MEAN + VARIANCE + """
        %r = rsqrt(%e) : f32[2, 3, 1]
        %n = mul(%d, %r) : f32[2, 3, 4]
        %a = mul(%n, %w) : f32[2, 3, 4]
        %y = add(%a, %b) : f32[2, 3, 4]
    """),
    "onnx: divided by sqrt": ("layer_norm", 3, MEAN + VARIANCE + """
        %r = sqrt(%e) : f32[2, 3, 1]
        %n = div(%d, %r) : f32[2, 3, 4]
        %a = mul(%n, %w) : f32[2, 3, 4]
        %y = add(%b, %a) : f32[2, 3, 4]
    """),
    "tensorflow: scale on the root": ("layer_norm", 3, MEAN + VARIANCE + """
        %r = rsqrt(%e) : f32[2, 3, 1]
        %a = mul(%r, %w) : f32[2, 3, 4]
        %n = mul(%d, %a) : f32[2, 3, 4]
        %y = add(%n, %b) : f32[2, 3, 4]
    """),
    "power and reciprocal": ("layer_norm", 1, (MEAN + VARIANCE).replace("square(%d)", "pow(%d, %two)") + """
        %q = pow(%e, %half) : f32[2, 3, 1]
        %r = reciprocal(%q) : f32[2, 3, 1]
        %y = mul(%r, %d) : f32[2, 3, 4]
    """),
    "bias without scale": ("layer_norm", 3, MEAN + VARIANCE + """
        %r = rsqrt(%e) : f32[2, 3, 1]
        %n = mul(%d, %r) : f32[2, 3, 4]
        %y = add(%n, %b) : f32[2, 3, 4]
    """),
    "rms, llama": ("rms_norm", 2, MEAN_SQUARE + """
        %r = rsqrt(%e) : f32[2, 3, 1]
        %n = mul(%x, %r) : f32[2, 3, 4]
        %y = mul(%w, %n) : f32[2, 3, 4]
    """),
    "rms, divided, no scale": ("rms_norm", 1, MEAN_SQUARE + """
        %r = sqrt(%e) : f32[2, 3, 1]
        %y = div(%x, %r) : f32[2, 3, 4]
    """),
    "rms, uniform scale": ("rms_norm", 2, MEAN_SQUARE + """
        %r = rsqrt(%e) : f32[2, 3, 1]
        %n = mul(%x, %r) : f32[2, 3, 4]
        %y = mul(%n, %two) : f32[2, 3, 4]
    """),
}  # fmt: skip


def spelled(read: Read, body: str) -> Graph:
    return read(f"""
        graph @g (%x: f32[2, 3, 4], %z: f32[2, 3, 4]) -> (y = %y) level=graph {{
          %eps = constant {{values=[0.00001]}} : f32[]
          %two = constant {{values=[2.0]}} : f32[]
          %half = constant {{values=[0.5]}} : f32[]
          %w = weight {{ref="norm.weight"}} : f32[4]
          %b = weight {{ref="norm.bias"}} : f32[1, 1, 4]
          {body.strip()}
        }}
    """).drop_dead()


@pytest.mark.parametrize("case", SPELLINGS)
def test_recognized(read: Read, difference: Callable[..., float], case: str) -> None:
    op, operands, body = SPELLINGS[case]
    graph = spelled(read, body)
    after, _ = run_pipeline(graph, parse_passes("simplify, recognize-norms"))
    (node,) = (n for n in after.nodes if n.op.arity != (0, 0))
    assert (node.op.spelling, len(node.inputs)) == (op, operands)
    assert node.op.eps == pytest.approx(1e-5)  # type: ignore[attr-defined]
    assert difference(graph, after) < 1e-5
    assert not RecognizeNorms().run(after, Context()).changed_from(after)


NEAR: dict[str, Any] = {
    "another operand": MEAN_SQUARE + "  %r = rsqrt(%e) : f32[2, 3, 1]\n  %y = mul(%z, %r) : f32[2, 3, 4]",
    "another axis": MEAN_SQUARE.replace("axes=[-1]", "axes=[1]").replace("3, 1]", "1, 4]")
    + "  %r = rsqrt(%e) : f32[2, 1, 4]\n  %y = mul(%x, %r) : f32[2, 3, 4]",
    "not a mean": MEAN_SQUARE.replace("reduce_mean", "reduce_sum")
    + "  %r = rsqrt(%e) : f32[2, 3, 1]\n  %y = mul(%x, %r) : f32[2, 3, 4]",
}


@pytest.mark.parametrize("case", NEAR)
def test_near_misses(read: Read, case: str) -> None:
    graph = spelled(read, NEAR[case])
    assert not RecognizeNorms().run(graph, Context()).changed_from(graph)


def test_a_computed_scale_stays_outside(read: Read, difference: Callable[..., float]) -> None:
    body = (
        MEAN_SQUARE
        + "  %r = rsqrt(%e) : f32[2, 3, 1]\n  %n = mul(%x, %r) : f32[2, 3, 4]\n  %y = mul(%n, %z) : f32[2, 3, 4]"
    )
    graph = spelled(read, body)
    after = RecognizeNorms().run(graph, Context())
    assert [n.op.spelling for n in after.nodes] == ["rms_norm", "mul"]
    assert difference(graph, after) < 1e-5
