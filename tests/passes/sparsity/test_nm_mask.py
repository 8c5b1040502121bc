"""nm-mask: rewrites, refusals with their reasons, meaning, idempotence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.patterns import violation
from bitwright.ir.target import Rate, SparseRate, Target
from bitwright.ir.types import F32, S8, S32, U8
from bitwright.passes import Context
from bitwright.passes.sparsity._masking import kept_unstructured
from bitwright.passes.sparsity.masks import Pattern
from bitwright.passes.sparsity.nm_mask import NMMask

Read = Callable[..., Graph]


def test_conv_weight_is_pruned_along_input_channels(check: Any) -> None:
    after = check(
        NMMask(Pattern(1, 4)),
        before="""
            graph @g (%x: f32[1, 8, 5, 5]) -> (y = %y) level=graph {
              %w = weight {ref="conv1.weight"} : f32[6, 8, 3, 3]
              %y = conv(%x, %w) : f32[1, 6, 3, 3]
            }
        """,
        after="""
            graph @g (%x: f32[1, 8, 5, 5]) -> (y = %y) level=graph {
              %conv1.weight = weight {ref="conv1.weight.1"} : f32[6, 8, 3, 3] nm<1:4, axis=1>
              %y = conv(%x, %conv1.weight) : f32[1, 6, 3, 3]
            }
        """,
        tolerance=None,
    )
    (weight,) = (h.array for h in after.weights.values())
    assert (np.count_nonzero(weight.reshape(6, 2, 4, 9), axis=2) == 1).all()


def test_shared_weights_are_masked_once_and_embeddings_stay(check: Any) -> None:
    check(
        NMMask(),
        before="""
            graph @g (%x: f32[2, 8], %i: s64[2]) -> (a = %a, b = %b, c = %e) level=graph {
              %w = weight {ref="tied.weight"} : f32[8, 8]
              %a = linear(%x, %w) : f32[2, 8]
              %b = linear(%a, %w) : f32[2, 8]
              %e = gather(%w, %i) : f32[2, 8]
            }
        """,
        after="""
            graph @g (%x: f32[2, 8], %i: s64[2]) -> (a = %a, b = %b, c = %e) level=graph {
              %w = weight {ref="tied.weight"} : f32[8, 8]
              %tied.weight = weight {ref="tied.weight.1"} : f32[8, 8] nm<2:4, axis=1>
              %a = linear(%x, %tied.weight) : f32[2, 8]
              %b = linear(%a, %tied.weight) : f32[2, 8]
              %e = gather(%w, %i) : f32[2, 8]
            }
        """,
        tolerance=None,
    )


def test_only_and_except_select_layers(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 8]) -> (y = %c) level=graph {
          %w1 = weight {ref="encoder.0.weight"} : f32[8, 8]
          %w2 = weight {ref="encoder.1.weight"} : f32[8, 8]
          %w3 = weight {ref="head.weight.1"} : f32[8, 8]
          %a = linear(%x, %w1) : f32[2, 8]
          %b = linear(%a, %w2) : f32[2, 8]  # encoder.1, model.py:3
          %c = linear(%b, %w3) : f32[2, 8]
        }
    """)

    def masked(p: NMMask) -> list[str]:
        context = Context()
        p.run(graph, context)
        return [place for _, place, _ in context.remarks]

    assert masked(NMMask()) == ["encoder.0", "encoder.1", "head"]
    assert masked(NMMask(only="encoder.*")) == ["encoder.0", "encoder.1"]
    assert masked(NMMask(only="encoder.*", except_="*.1")) == ["encoder.0"]
    assert masked(NMMask(except_="head|encoder.1.weight")) == ["encoder.0"]
    assert masked(NMMask(skip_first=True)) == ["encoder.1", "head"]
    context = Context()
    NMMask(only="decoder.*").run(graph, context)
    assert context.refusals[0].reason == "only=decoder.* except= selects no contraction"


def test_remark_tells_what_was_kept(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 4]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[1, 4]
          %y = linear(%x, %w) : f32[2, 1]
        }
    """, {"w": np.zeros(0), "fc.weight": np.array([[1.0, -4.0, 3.0, 2.0]], np.float32)})  # fmt: skip
    context = Context()
    after = NMMask().run(graph, context)
    told = {"pattern": "2:4", "kept_magnitude": 0.7, "kept_unstructured": 0.7, "axis": 1}
    assert context.remarks == [("nm-mask", "fc", told)]
    assert after.weights["fc.weight.1"].array.tolist() == [[0.0, -4.0, 3.0, 0.0]]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('%w = weight {ref="w"} : f32[4, 8, 3, 3]\n  %y = conv(%x, %w) {groups=2} : f32[1, 4, 4, 4]', "grouped"),
        ('%w = weight {ref="w"} : f32[16, 1, 3, 3]\n  %y = conv(%x, %w) {groups=16} : f32[1, 16, 4, 4]', "depthwise"),
        ('%w = weight {ref="w"} : f32[16, 4, 3, 3]\n  %y = conv_transpose(%x, %w) : f32[1, 4, 8, 8]', "no sparse"),
        ("%y = linear(%x, %u) : f32[1, 16, 6, 5]", "weight is computed, not constant"),
        ('%w = weight {ref="w"} : f32[5, 6]\n  %y = linear(%x, %w) : f32[1, 16, 6, 5]', "6 inputs are not a"),
        (
            '%s = slice(%x) {axis=1, stop=3} : f32[1, 3, 6, 6]\n  %w = weight {ref="w"} : f32[4, 3, 1, 1]\n'
            "  %y = conv(%s, %w) : f32[1, 4, 6, 6]",
            "3 input channels are not a multiple of 4",
        ),
        (
            '%w = weight {ref="w"} : s8[5, 6]\n  %s = constant {values=[1.0]} : f32[]\n'
            "  %d = dequantize(%w, %s) : f32[5, 6]\n  %y = linear(%x, %d) : f32[1, 16, 6, 5]",
            "mask before quantizing",
        ),
    ],
)  # fmt: skip
def test_refused(read: Read, body: str, reason: str) -> None:
    graph = read(f"graph @g (%x: f32[1, 16, 6, 6], %u: f32[5, 6]) -> (y = %y) level=graph {{\n  {body}\n}}")
    context = Context()
    assert not NMMask().run(graph, context).changed_from(graph)
    assert reason in context.refusals[0].reason


def test_shared_needs_a_multiple_of_rows(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[6, 8]
          %y = linear(%x, %w) : f32[2, 6]
        }
    """)
    context = Context()
    NMMask(shared=4).run(graph, context)
    assert context.refusals[0].reason == "6 outputs are not a multiple of shared=4"
    assert "shared=2, block=2" in str(NMMask(shared=2, block=2).run(graph, Context()).nodes[0].type)


def test_nan_is_named(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 4]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[1, 4]
          %y = linear(%x, %w) : f32[2, 1]
        }
    """, {"fc.weight": np.array([[1.0, np.inf, 3.0, 2.0]], np.float32)})  # fmt: skip
    with pytest.raises(InvalidInput, match=r"fc\.weight contains an infinity"):
        NMMask().run(graph, Context())


def target(gain: float) -> Target:
    return Target(
        "test", "cpu", "portable", "", (), 256, 16, 1 << 15, 1 << 20, 1 << 22, 1, 1e10, 1e11, 1e11, 1e-6,
        (Rate(F32, F32, F32, 1e11), Rate(U8, S8, S32, 4e11)), (SparseRate(F32, 2, 4, gain),), U8, "made up",
    )  # fmt: skip


@pytest.mark.parametrize(("gain", "refused"), [(1.4, 0), (0.9, 1)])
def test_a_pattern_that_does_not_pay_is_applied_and_said(read: Read, gain: float, refused: int) -> None:
    graph = read("""
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[4, 8]
          %y = linear(%x, %w) : f32[2, 4]
        }
    """)
    context = Context(target=target(gain))
    after = NMMask().run(graph, context)
    assert after.nodes[0].type.encoding is not None
    assert len(context.refusals) == refused
    if refused:
        assert "2:4 does not pay on this target (0.90x for f32, no kernel for u8)" in context.refusals[0].reason


def test_meaning_zeros_are_where_the_mask_is_and_the_rest_is_untouched(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 32]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[16, 32]
          %y = linear(%x, %w) : f32[2, 16]
        }
    """)
    before = graph.weights["fc.weight"].array
    p = NMMask(Pattern(4, 8))
    after = p.run(graph, Context())
    weight = after.weights["fc.weight.1"].array
    assert np.array_equal(weight[weight != 0], before[weight != 0])
    assert violation(weight, p.pattern.along(1)) == ""


def test_the_dense_values_stay_known_through_a_second_mask(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 16]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[8, 16]
          %y = linear(%x, %w) : f32[2, 8]
        }
    """)
    context = Context()
    once = NMMask(Pattern(2, 4)).run(graph, context)
    (first,) = once.used_weights()
    assert context.facts["dense"] == {first: graph.weights["fc.weight"]}
    twice = NMMask(Pattern(1, 8)).run(once.drop_dead(), context)
    (second,) = twice.used_weights()
    assert context.facts["dense"][second] is graph.weights["fc.weight"]
    NMMask(only="nothing").run(graph, none := Context())
    assert none.facts["dense"] == {}


def test_the_unstructured_optimum_is_an_upper_bound_by_sorting(read: Read) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    largest = np.sort(np.abs(weight).astype(np.float64).ravel())[::-1]
    for kept in (0, 1, 100, 256):
        assert kept_unstructured(weight, kept) == pytest.approx(largest[:kept].sum() / largest.sum())
    assert kept_unstructured(np.zeros((2, 4)), 3) == 1.0
