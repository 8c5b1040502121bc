"""fold-batch-norm: into each kind of contraction, spelled out elsewhere, refused with reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.passes import Context
from bitwright.passes.canonical.fold_batch_norm import FoldBatchNorm, fold_scale

Read = Callable[..., Graph]


def norm_weights(channels: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    made = {k: rng.standard_normal(channels).astype(np.float32) for k in ("bn.weight", "bn.bias", "bn.mean")}
    return {**made, "bn.var": rng.uniform(0.5, 2, channels).astype(np.float32)}


def around(body: str, channels: int, inputs: str, result: str, extra: str = "") -> str:
    parameters = "\n".join(
        f'  %{n} = weight {{ref="bn.{k}"}} : f32[{channels}]'
        for n, k in (("s", "weight"), ("b", "bias"), ("m", "mean"), ("v", "var"))
    )
    norm = f"  %y = batch_norm(%h, %s, %b, %m, %v) : {result}"
    return f"graph @g ({inputs}) -> (y = %y{extra}) level=graph {{\n{parameters}\n{body}\n{norm}\n}}"


CASES = {
    "conv with bias": (
        '  %w = weight {ref="conv.weight"} : f32[6, 4, 3, 3]\n  %c = weight {ref="conv.bias"} : f32[6]\n'
        "  %h = conv(%x, %w, %c) {stride=[2, 1], padding=[1, 1, 1, 1]} : f32[2, 6, 3, 5]",
        6, "%x: f32[2, 4, 5, 5]", "f32[2, 6, 3, 5]",
    ),
    "depthwise": (
        '  %w = weight {ref="conv.weight"} : f32[4, 1, 3, 3]\n  %h = conv(%x, %w) {groups=4} : f32[2, 4, 3, 3]',
        4, "%x: f32[2, 4, 5, 5]", "f32[2, 4, 3, 3]",
    ),
    "transposed, grouped": (
        '  %w = weight {ref="up.weight"} : f32[4, 3, 2, 2]\n'
        "  %h = conv_transpose(%x, %w) {stride=[2, 2], groups=2} : f32[2, 6, 10, 10]",
        6, "%x: f32[2, 4, 5, 5]", "f32[2, 6, 10, 10]",
    ),
    "linear": (
        '  %w = weight {ref="fc.weight"} : f32[6, 4]\n  %c = weight {ref="fc.bias"} : f32[6]\n'
        "  %h = linear(%x, %w, %c) : f32[2, 6]",
        6, "%x: f32[2, 4]", "f32[2, 6]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_folded_into_the_contraction(read: Read, difference: Callable[..., float], case: str) -> None:
    body, channels, inputs, result = CASES[case]
    graph = read(around(body, channels, inputs, result), norm_weights(channels))
    context = Context()
    after = FoldBatchNorm().run(graph, context)
    assert difference(graph, after) < 1e-5
    assert not any(isinstance(n.op, (ops.BatchNorm, ops.Binary)) for n in after.nodes)
    assert context.refusals == []
    assert context.remarks[0][2] == {"folded": "y"}


def test_masks_survive(read: Read) -> None:
    body = '  %w = weight {ref="c.weight"} : f32[6, 4, 3, 3] nm<2:4, axis=1>\n  %h = conv(%x, %w) : f32[2, 6, 3, 3]'
    graph = read(around(body, 6, "%x: f32[2, 4, 5, 5]", "f32[2, 6, 3, 3]"), norm_weights(6))
    after = FoldBatchNorm().run(graph, Context())
    assert str(after.types[after.nodes[-1].inputs[1]]) == "f32[6, 4, 3, 3] nm<2:4, axis=1>"


def test_elsewhere_it_is_mul_and_add(check: Any) -> None:
    check(
        FoldBatchNorm(),
        before="""
            graph @g (%x: f32[2, 2, 3]) -> (y = %y) level=graph {
              %one = constant {values=[1.0, 2.0]} : f32[2]
              %b = constant {values=[0.0, 1.0]} : f32[2]
              %m = constant {values=[4.0, 0.0]} : f32[2]
              %v = constant {values=[4.0, 1.0]} : f32[2]
              %r = relu(%x) : f32[2, 2, 3]
              %y = batch_norm(%r, %one, %b, %m, %v) {eps=0.0} : f32[2, 2, 3]
            }
        """,
        after="""
            graph @g (%x: f32[2, 2, 3]) -> (y = %y) level=graph {
              %r = relu(%x) : f32[2, 2, 3]
              %y.scale = constant {values=[0.5, 2.0]} : f32[2, 1]
              %y.shift = constant {values=[-2.0, 1.0]} : f32[2, 1]
              %y.scaled = mul(%r, %y.scale) : f32[2, 2, 3]
              %y = add(%y.scaled, %y.shift) : f32[2, 2, 3]
            }
        """,
    )


@pytest.mark.parametrize(
    ("body", "result", "extra", "reason"),
    [
        ("%h = linear(%x, %w) : f32[2, 6]", "f32[2, 6]", ", h = %h", "others read the value before normalization"),
        ("%h = linear(%t, %w) : f32[2, 6, 6]", "f32[2, 6, 6]", "", "the channel axis is not the axis of the outputs"),
        ("%h = linear(%x, %u) : f32[2, 6]", "f32[2, 6]", "", "its weight is computed or quantized"),
    ],
)
def test_not_folded(
    read: Read, difference: Callable[..., float], body: str, result: str, extra: str, reason: str
) -> None:
    sources = '  %w = weight {ref="w"} : f32[6, 4]\n  '
    inputs = "%x: f32[2, 4], %t: f32[2, 6, 4], %u: f32[6, 4]"
    graph = read(around(sources + body, 6, inputs, result, extra), norm_weights(6))
    context = Context()
    after = FoldBatchNorm().run(graph, context)
    assert difference(graph, after) < 1e-5
    assert reason in context.refusals[0].reason


def test_parameters_that_are_computed_or_broken(read: Read) -> None:
    text = """
        graph @g (%x: f32[2, 2], %s: f32[2]) -> (y = %y) level=graph {
          %c = constant {values=[1.0, 1.0]} : f32[2]
          %v = constant {values=[-1.0, 1.0]} : f32[2]
          %h = batch_norm(%x, %s, %c, %c, %c) : f32[2, 2]
          %y = batch_norm(%h, %c, %c, %c, %v) : f32[2, 2]
        }
    """
    context = Context()
    graph = read(text)
    with np.errstate(invalid="ignore"):
        assert not FoldBatchNorm().run(graph, context).changed_from(graph)
    assert [r.reason.split(":")[0] for r in context.refusals] == [
        "its parameters are computed, not constant",
        "its scale is not finite",
    ]


def test_range_batch_norm_stores_its_scale() -> None:
    """Range-BN divides by a scaled range: the same fold with the stored scale (algorithms.md section 7)."""
    rng = np.random.default_rng(0)
    w, b, scale, shift = (rng.standard_normal(s).astype(np.float32) for s in ((3, 4), 3, 3, 3))
    new_w, new_b = fold_scale(ops.Linear(), w, b, scale, shift)
    x = rng.standard_normal(4)
    np.testing.assert_allclose(new_w @ x + new_b, scale * (w @ x + b) + shift, rtol=1e-5, atol=1e-6)
