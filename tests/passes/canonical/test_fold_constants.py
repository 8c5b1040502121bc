"""fold-constants: what is known is computed, within limits; decisions are kept."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bitwright.ir.graph import Graph
from bitwright.passes import Context
from bitwright.passes.canonical.fold_constants import FoldConstants

Read = Callable[..., Graph]


def folded(read: Read, body: str, result: str, **weights: object) -> tuple[Graph, Context]:
    graph = read(f"graph @g (%x: f32[1]) -> (y = %y) level=graph {{\n{body}\n}}", weights)
    context = Context()
    after = FoldConstants().run(graph, context)
    assert str(after.types["y"]).startswith(result)
    return after, context


def test_chains_fold_to_one_constant_and_keep_their_name(read: Read) -> None:
    after, _ = folded(
        read,
        '  %w = weight {ref="w"} : f32[20, 10]\n  %t = transpose(%w) {perm=[1, 0]} : f32[10, 20]\n'
        "  %h = neg(%t) : f32[10, 20]\n  %y = mul(%h, %x) : f32[10, 20]",
        "f32[10, 20]",
    )
    assert [n.op.spelling for n in after.nodes] == ["weight", "mul"]
    assert after.nodes[0].output == "h"
    assert after.nodes[0].op.ref == "h"  # type: ignore[attr-defined]


def test_quantized_weights_stay_low_bit(read: Read) -> None:
    body = """
      %w = weight {ref="w"} : f32[4, 8]
      %s = constant {values=[0.5]} : f32[]
      %q = quantize(%w, %s) {dtype=s8} : s8[4, 8]
      %y = dequantize(%q, %s) : f32[4, 8]
    """
    after, _ = folded(read, body, "f32[4, 8]")
    assert [n.op.spelling for n in after.nodes] == ["constant", "constant", "dequantize"]


def test_dequantized_biases_fold(read: Read) -> None:
    body = """
      %b = constant {values=[100, -100]} : s32[2]
      %s = constant {values=[0.5]} : f32[]
      %d = dequantize(%b, %s) : f32[2]
      %y = add(%d, %x) : f32[2]
    """
    after, _ = folded(read, body, "f32[2]")
    assert after.nodes[0].op.values == (50.0, -50.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("count", "folds"), [(3, True), (5000, False)])
def test_expansion_has_a_limit(read: Read, count: int, folds: bool) -> None:
    body = f'  %w = weight {{ref="w"}} : f32[1, 100]\n  %y = expand(%w) {{shape=[{count}, 100]}} : f32[{count}, 100]'
    after, context = folded(read, body, f"f32[{count}, 100]")
    assert (after.nodes[-1].op.spelling == "weight") == folds
    assert [r.reason for r in context.refusals] == ([] if folds else ["its constant value would take 1953 KiB"])


def test_nothing_that_is_not_a_number_is_baked_in(read: Read) -> None:
    body = "  %c = constant {values=[-1.0]} : f32[1]\n  %y = log(%c) : f32[1]"
    assert folded(read, body, "f32[1]")[0].nodes[-1].op.spelling == "log"


def test_encoded_weights_keep_their_encoding(read: Read) -> None:
    body = '  %w = weight {ref="w"} : f32[4, 8] nm<2:4, axis=1>\n  %y = neg(%w) : f32[4, 8]'
    assert folded(read, body, "f32[4, 8]")[0].nodes[-1].op.spelling == "neg"


def test_symbolic_shapes_are_left(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[b, 2]) -> (y = %y) level=graph {
          %c = constant {values=[1.0]} : f32[1]
          %e = expand(%c) {shape=["b", 2]} : f32[b, 2]
          %y = add(%x, %e) : f32[b, 2]
        }
    """)
    assert FoldConstants().run(graph, Context()) == graph


def test_second_run_changes_nothing(read: Read) -> None:
    after, _ = folded(read, '  %w = weight {ref="w"} : f32[200]\n  %y = neg(%w) : f32[200]', "f32[200]")
    assert not FoldConstants().run(after, Context()).changed_from(after)
    assert np.isfinite(after.weights["y"].array).all()
