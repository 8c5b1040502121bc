"""recognize-attention: scales, masks and layouts of the key in the spellings of exporters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bitwright.ir.graph import Graph
from bitwright.ir.ops import Attention
from bitwright.passes import Context, parse_passes, run_pipeline
from bitwright.passes.canonical.recognize_attention import RecognizeAttention

Read = Callable[..., Graph]
PRODUCT = "%s = matmul(%q, %k) {transpose_b=true} : f32[2, 3, 5, 5]\n"
REST = "\n  %p = softmax(%t) {axis=3} : f32[2, 3, 5, 5]\n  %y = matmul(%p, %v) : f32[2, 3, 5, 6]"
CAUSAL = np.where(np.tri(5) > 0, 0, np.finfo(np.float32).min).astype(np.float32)

SPELLINGS = {
    "scale after": (0.25, 3, False, PRODUCT + "%t = mul(%s, %quarter) : f32[2, 3, 5, 5]"),
    "divided after": (0.25, 3, False, PRODUCT + "%t = div(%s, %four) : f32[2, 3, 5, 5]"),
    "scale on the query": (
        0.25, 3, False,
        "%a = mul(%quarter, %q) : f32[2, 3, 5, 8]\n  %t = matmul(%a, %k) {transpose_b=true} : f32[2, 3, 5, 5]",
    ),
    "torch: root on both": (
        4.0, 3, False,
        "%a = mul(%q, %two) : f32[2, 3, 5, 8]\n  %kt = transpose(%k) {perm=[0, 1, 3, 2]} : f32[2, 3, 8, 5]\n"
        "  %b = mul(%kt, %two) : f32[2, 3, 8, 5]\n  %t = matmul(%a, %b) : f32[2, 3, 5, 5]",
    ),
    "no scale": (1.0, 3, False, PRODUCT + "%t = cast(%s) {dtype=f32} : f32[2, 3, 5, 5]"),
    "float mask": (1.0, 4, False, PRODUCT + "%t = add(%s, %mask) : f32[2, 3, 5, 5]"),
    "scale, then mask first": (
        0.25, 4, False, PRODUCT + "%u = mul(%s, %quarter) : f32[2, 3, 5, 5]\n  %t = add(%mask, %u) : f32[2, 3, 5, 5]",
    ),
    "bool mask": (1.0, 4, False, PRODUCT + "%t = where(%keep, %s, %never) : f32[2, 3, 5, 5]"),
    "constant causal mask": (1.0, 3, True, PRODUCT + "%t = add(%s, %causal) : f32[2, 3, 5, 5]"),
    "key arrives turned": (1.0, 3, False, "%t = matmul(%q, %turned) : f32[2, 3, 5, 5]"),
}  # fmt: skip


def spelled(read: Read, body: str, outputs: str = "y = %y", rest: str = REST) -> Graph:
    inputs = "%q: f32[2, 3, 5, 8], %k: f32[2, 3, 5, 8], %v: f32[2, 3, 5, 6], %turned: f32[2, 3, 8, 5]"
    return read(f"""
        graph @g ({inputs}, %keep: bool[1, 1, 5, 5], %mask: f32[2, 1, 1, 5]) -> ({outputs}) level=graph {{
          %quarter = constant {{values=[0.25]}} : f32[]
          %four = constant {{values=[4.0]}} : f32[1]
          %two = constant {{values=[2.0]}} : f32[]
          %never = constant {{values=[-inf]}} : f32[]
          %low = constant {{values=[-10000.0]}} : f32[]
          %causal = weight {{ref="causal"}} : f32[1, 1, 5, 5]
          {body}{rest}
        }}
    """, {"causal": CAUSAL[None, None]}).drop_dead()  # fmt: skip


@pytest.mark.parametrize("case", SPELLINGS)
def test_recognized(read: Read, difference: Callable[..., float], case: str) -> None:
    scale, operands, causal, body = SPELLINGS[case]
    graph = spelled(read, body)
    after, _ = run_pipeline(graph, parse_passes("simplify, recognize-attention, simplify"))
    node = after.nodes[-1]
    assert isinstance(node.op, Attention)
    assert node.op.scale == pytest.approx(scale)
    assert (len(node.inputs), node.op.causal) == (operands, causal)
    assert difference(graph, after, seed=3) < 1e-5
    assert not RecognizeAttention().run(after, Context()).changed_from(after)


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (PRODUCT + "%t = relu(%s) : f32[2, 3, 5, 5]", "y = %y", "no matmul of query and key before the softmax"),
        (PRODUCT + "%t = relu(%s) : f32[2, 3, 5, 5]", "y = %y, p = %p", "others read the attention weights"),
        (PRODUCT + "%t = where(%keep, %s, %low) : f32[2, 3, 5, 5]", "y = %y", "its mask puts a finite score"),
    ],
)
def test_refused(read: Read, body: str, outputs: str, reason: str) -> None:
    graph, context = spelled(read, body, outputs), Context()
    assert not RecognizeAttention().run(graph, context).changed_from(graph)
    assert reason in context.refusals[0].reason


def test_softmax_over_another_axis(read: Read) -> None:
    graph = spelled(read, "%t = matmul(%q, %turned) : f32[2, 3, 5, 5]", rest=REST.replace("axis=3", "axis=2"))
    assert not RecognizeAttention().run(graph, Context()).changed_from(graph)
