"""lower-accumulators: narrow where the target gains and the weights allow it, otherwise the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitwright.codegen.targets import BUILTIN
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.text import parse, show
from bitwright.ir.types import S16, S32
from bitwright.passes import Context
from bitwright.passes._spec import parse_pass
from bitwright.passes.accumulators.lower_accumulators import LowerAccumulators

Read = Callable[..., Graph]
AVX2, VNNI = BUILTIN["x86-avx2"], BUILTIN["x86-avx512-vnni"]
RNG = np.random.default_rng(0)


def four_bit(*shape: int) -> np.ndarray[Any, Any]:
    codes = RNG.integers(-7, 8, shape)
    codes.reshape(-1)[:32] = 7
    return codes.astype(np.int8)


def model(read: Read, linear: np.ndarray[Any, Any], conv: np.ndarray[Any, Any] | None = None) -> Graph:
    return read("""
        graph @g (%x: u8[3, 64], %i: u8[1, 16, 5, 5]) -> (y = %y, z = %z) level=integer {
          %fc.weight = weight {ref="fc.weight"} : s8[8, 64]
          %conv.weight = weight {ref="conv.weight"} : s8[4, 16, 3, 3]
          %y = int_linear(%x, %fc.weight) {x_zero=8} : s32[3, 8]
          %z = int_conv(%i, %conv.weight) {padding=[1, 1, 1, 1], x_zero=3} : s32[1, 4, 5, 5]
        }
    """, {"fc.weight": linear, "conv.weight": four_bit(4, 16, 3, 3) if conv is None else conv})  # fmt: skip


def run(p: LowerAccumulators, graph: Graph, target: Any = AVX2) -> tuple[dict[str, tuple[Any, int]], Context]:
    context = Context(target)
    out = p.run(graph, context)
    assert show(parse(show(out), out.weights)) == show(out)
    assert p.run(out, Context(target)) is out or show(p.run(out, Context(target))) == show(out)
    found = {n.output: (n.op.partial, n.op.every) for n in out.nodes if isinstance(n.op, ops.IntLinear | ops.IntConv)}
    return found, context


def test_small_weights_are_summed_in_16_bits(read: Read) -> None:
    found, context = run(LowerAccumulators(), model(read, four_bit(8, 64)))
    assert found == {"y": (S16, 18), "z": (S16, 18)}
    assert context.refusals == []
    assert [(place, facts["every"]) for _, place, facts in context.remarks] == [("fc", 18), ("conv", 18)]


def test_full_range_weights_stay_and_the_report_says_why(read: Read) -> None:
    weights = four_bit(8, 64)
    weights[5, 3] = weights[5, 40] = 127
    graph = model(read, weights)
    found, context = run(LowerAccumulators(), graph)
    assert found == {"y": (None, 0), "z": (S16, 18)}
    assert context.refusals == [], "auto was free to choose"
    told = {place: facts["sums"] for _, place, facts in context.remarks}
    assert told["fc"] == "in s32: a pair of products reaches 64770, more than s16 holds"
    _, asked = run(LowerAccumulators(width="16"), graph)
    assert [(r.place, r.reason.split(": ")[1]) for r in asked.refusals] == [
        ("fc", "a pair of products reaches 64770, more than s16 holds")
    ]
    weights[5, 40] = 0
    _, asked = run(LowerAccumulators(width="16"), model(read, weights))
    assert asked.refusals[0].reason.startswith("sums stay in s32: a pair of products reaches 34170")
    _, asked = run(LowerAccumulators(width="16"), model(read, np.full((8, 64), 60, np.int8)))
    assert asked.refusals[0].reason.endswith("only 2 products fit s16, too few to gain")


def test_targets_without_a_faster_form_are_left_alone(read: Read) -> None:
    graph = model(read, four_bit(8, 64))
    found, context = run(LowerAccumulators(), graph, VNNI)
    assert set(found.values()) == {(None, 0)}
    assert context.refusals == []
    assert context.remarks == []
    _, context = run(LowerAccumulators(width="16"), graph, VNNI)
    assert len(context.refusals) == 2
    assert "x86-avx512-vnni is not faster for u8 x s8 with s16" in context.refusals[0].reason
    slower = replace(AVX2, rates=tuple(replace(r, terms=20) if r.acc == S16 else r for r in AVX2.rates[:3]))
    found, context = run(LowerAccumulators(), graph, slower)
    assert set(found.values()) == {(None, 0)}
    assert "only 18 products fit s16, too few to gain" in context.remarks[0][2]["sums"]


def test_32_undoes_it_and_selections_count(read: Read) -> None:
    graph = model(read, four_bit(8, 64))
    narrow = LowerAccumulators().run(graph, Context(AVX2))
    assert show(LowerAccumulators(width="32").run(narrow, Context(AVX2))) == show(graph)
    found, _ = run(LowerAccumulators(only="fc"), graph)
    assert found == {"y": (S16, 18), "z": (None, 0)}
    found, _ = run(LowerAccumulators(except_="fc"), graph)
    assert found == {"y": (None, 0), "z": (S16, 18)}


def test_products_of_two_activations_and_depthwise_sums_stay(read: Read) -> None:
    graph = read("""
        graph @g (%x: u8[1, 8, 5, 5], %a: u8[3, 4], %b: s8[4, 5]) -> (y = %y, z = %z) level=integer {
          %w = weight {ref="w"} : s8[8, 1, 3, 3]
          %y = int_conv(%x, %w) {groups=8} : s32[1, 8, 3, 3]
          %z = int_matmul(%a, %b) : s32[3, 5]
        }
    """, {"w": np.ones((8, 1, 3, 3), np.int8)})  # fmt: skip
    context = Context(AVX2)
    assert show(LowerAccumulators(width="16").run(graph, context)) == show(graph)
    assert ["depthwise" in r.reason for r in context.refusals] == [True, False]
    assert "run time" in context.refusals[1].reason


def test_before_and_after_as_text(check: Callable[..., None]) -> None:
    check(
        LowerAccumulators(),
        before="""
            graph @g (%x: u8[1, 4]) -> (y = %y) level=integer {
              %w = constant {values=[1, 2, -3, 4]} : s8[1, 4]
              %y = int_linear(%x, %w) {x_zero=8} : s32[1, 1]
            }
        """,
        after="""
            graph @g (%x: u8[1, 4]) -> (y = %y) level=integer {
              %w = constant {values=[1, 2, -3, 4]} : s8[1, 4]
              %y = int_linear(%x, %w) {x_zero=8, partial=s16, every=4} : s32[1, 1]
            }
        """,
    )


@pytest.mark.parametrize("width", ["0", "65", "8", "narrow"])
def test_other_widths_are_errors(width: str, read: Read) -> None:
    with pytest.raises(InvalidInput, match="one of auto, 16, 32"):
        parse_pass(f"lower-accumulators{{width={width}}}")
    with pytest.raises(InvalidInput, match="one of auto, 16, 32"):
        LowerAccumulators(width=width).run(model(read, four_bit(8, 64)), Context(AVX2))  # type: ignore[arg-type]


def test_the_declared_rates_grow_with_the_terms() -> None:
    narrow = [r for r in AVX2.rates if r.acc == S16]
    assert [r.terms for r in narrow] == sorted(r.terms for r in narrow)
    assert [r.ops_per_second for r in narrow] == sorted(r.ops_per_second for r in narrow)
    x, w = narrow[0].x, narrow[0].w
    full = next(r for r in AVX2.rates if r.acc == S32).ops_per_second
    assert AVX2.rate(x, w) == AVX2.rate(x, w, S16, 3) == full
    assert AVX2.rate(x, w, S16, 9) == narrow[2].ops_per_second > full
