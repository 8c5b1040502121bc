"""permute-channels: more magnitude for the masks, the same function, refusals with reasons, whole compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.passes import Context
from bitwright.passes._spec import parse_passes
from bitwright.passes.pipelines import CANONICAL
from bitwright.passes.sparsity.masks import Pattern, nm_mask_array
from bitwright.passes.sparsity.permute_channels import PermuteChannels
from tests.passes.sparsity.channel_cases import apart, case, model
from tests.zoo import ZOO

Read = Callable[..., Graph]


def test_residual_channels_move_together(check: Any) -> None:
    w = np.arange(1, 17, dtype=np.float32).reshape(8, 2)
    v = np.diag(np.arange(1, 9)).astype(np.float32)
    f = np.array([[8, 7, 6, 5, 1, 1, 1, 1]], np.float32)
    after = check(
        PermuteChannels(),
        before="""
            graph @g (%x: f32[2, 2]) -> (y = %y) level=graph {
              %w = weight {ref="w.weight"} : f32[8, 2]
              %v = weight {ref="v.weight"} : f32[8, 8]
              %f = weight {ref="f.weight"} : f32[1, 8]
              %a = linear(%x, %w) : f32[2, 8]
              %b = linear(%a, %v) : f32[2, 8]
              %s = add(%a, %b) : f32[2, 8]
              %y = linear(%s, %f) : f32[2, 1]
            }
        """,
        after="""
            graph @g (%x: f32[2, 2]) -> (y = %y) level=graph {
              %w.weight = weight {ref="w.weight.1"} : f32[8, 2]
              %a = linear(%x, %w.weight) : f32[2, 8]
              %v.weight = weight {ref="v.weight.1"} : f32[8, 8]
              %b = linear(%a, %v.weight) : f32[2, 8]
              %s = add(%a, %b) : f32[2, 8]
              %f.weight = weight {ref="f.weight.1"} : f32[1, 8]
              %y = linear(%s, %f.weight) : f32[2, 1]
            }
        """,
        weights={"w.weight": w, "v.weight": v, "f.weight": f},
    )
    new = after.weights["f.weight.1"].array
    order = [int(i) for i in np.argsort(-after.weights["v.weight.1"].array.diagonal(), kind="stable")]
    assert sorted(order) == list(range(8))
    assert float(np.where(nm_mask_array(new, 2, 4), new, 0).sum()) == 26.0 + 0.0
    assert np.array_equal(np.sort(after.weights["v.weight.1"].array.diagonal()), np.arange(1, 9))


@pytest.mark.parametrize("name", ["digits", "resnet18", "mobilenet_v2", "unet", "bert_base", "llama", "convnext_tiny"])
def test_models_keep_their_function_and_gain(name: str) -> None:
    graph, context = model(name), Context()
    after = PermuteChannels().run(graph, context)
    assert apart(graph, after) < 1e-5
    assert [n.op for n in after.nodes if n.inputs] == [n.op for n in graph.nodes if n.inputs]
    before, now = (sum(r[2][k] for r in context.remarks) for k in ("before", "after"))
    assert now > before
    assert any(r[2]["efficacy"] > 0.1 for r in context.remarks)
    again = Context()
    PermuteChannels().run(after, again)
    assert sum(r[2]["before"] for r in again.remarks) == pytest.approx(now, abs=1e-3)


@pytest.mark.parametrize("search", ["swap", "triples"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_concat_with_stripes_across_groups(search: str, pattern: str) -> None:
    graph, context = case("concat"), Context()
    p = parse_passes(f"permute-channels{{pattern={pattern} search={search}}}")[0]
    after = p.run(graph, context)
    assert apart(graph, after) < 1e-5
    facts = {place: f for _, place, f in context.remarks}
    assert facts["u"]["after"] > facts["u"]["before"]
    assert {r.place: r.reason for r in context.refusals}["z"] == "10 input channels are not a multiple of 4"


def test_values_move_inside_their_head() -> None:
    graph, context = case("heads"), Context()
    after = PermuteChannels(Pattern(1, 2)).run(graph, context)
    assert apart(graph, after) < 1e-5
    (facts,) = [f for _, place, f in context.remarks]
    assert facts["after"] > facts["before"]
    assert {r.reason.split(":")[0] for r in context.refusals} >= {"3 input channels are not a multiple of 2"}


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ('%y = linear(%x, %w) : f32[2, 4]', "its input channels are made by no weight: they are input %x"),
        (
            '%a = weight {ref="a"} : f32[8, 8]\n  %h = linear(%x, %a) : f32[2, 8]\n'
            "  %s = cumsum(%h) {axis=1} : f32[2, 8]\n  %y = linear(%s, %w) : f32[2, 4]",
            "made by no weight: they come from cumsum",
        ),
        (
            '%a = weight {ref="a"} : f32[8, 8]\n  %h = linear(%x, %a) : f32[2, 8]\n  %s = add(%h, %x) : f32[2, 8]\n'
            "  %y = linear(%s, %w) : f32[2, 4]",
            "its input channels meet %x in %s, which has an order of its own",
        ),
        (
            '%a = weight {ref="a"} : f32[2, 8]\n  %h = linear(%x, %a) : f32[2, 2]\n  %r = reshape(%z) {shape=[2, 8]} : '
            "f32[2, 8]\n  %y = linear(%r, %w) : f32[2, 4]",
            "its input channels are made by no weight: they come from reshape",
        ),
        ('%y = linear(%x, %u) : f32[2, 4]', "weight is computed, not constant"),
    ],
)  # fmt: skip
def test_refused(read: Read, lines: str, reason: str) -> None:
    graph = read(f"""
        graph @g (%x: f32[2, 8], %u: f32[4, 8], %z: f32[2, 2, 4]) -> (y = %y) level=graph {{
          %w = weight {{ref="w"}} : f32[4, 8]
          {lines}
        }}
    """)
    context = Context()
    assert not PermuteChannels().run(graph, context).changed_from(graph)
    assert reason in context.refusals[-1].reason


def test_flattened_blocks_are_said() -> None:
    graph, context = case("flatten"), Context()
    assert not PermuteChannels().run(graph, context).changed_from(graph)
    assert "its columns come in blocks of 4 for each channel" in context.refusals[-1].reason


def test_only_selects_the_readers_that_count() -> None:
    graph, context = model("resnet18"), Context()
    after = PermuteChannels(only="layer2.0.downsample.0").run(graph, context)
    (facts,) = [f for _, _, f in context.remarks]
    assert facts["after"] > facts["before"]
    assert apart(graph, after) < 1e-5
    context = Context()
    PermuteChannels(only="nothing").run(graph, context)
    assert "selects no contraction" in context.refusals[0].reason


def test_quantized_weights_are_left_alone(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 3]) -> (y = %y) level=graph {
          %a = weight {ref="a"} : f32[8, 3]
          %w = weight {ref="w"} : s8[4, 8]
          %s = constant {values=[0.1]} : f32[]
          %d = dequantize(%w, %s) : f32[4, 8]
          %h = linear(%x, %a) : f32[2, 8]
          %y = linear(%h, %d) : f32[2, 4]
        }
    """)
    context = Context()
    assert not PermuteChannels().run(graph, context).changed_from(graph)
    assert [r.reason for r in context.refusals][-1] == "weight is computed, not constant"


@pytest.mark.parametrize("name", ["resnet18", "bert_base"])
def test_the_whole_recipe_compiles_and_its_masks_keep_more(name: str) -> None:
    module, inputs = ZOO[name]()
    arrays = [x.numpy() for x in inputs]
    graph = bw.capture(module, inputs)
    kept = []
    for first in ("", "permute-channels{pattern=2:4}, "):
        recipe = f"{first}nm-mask{{pattern=2:4}}"
        masked, report = bw.optimize(graph, f"{CANONICAL}, {recipe}")
        kept.append(sum(f["kept_magnitude"] for who, _, f in report.remarks if who == "nm-mask"))
        program = bw.compile(graph, recipe=f"{recipe}, int8", calibration=[arrays])
        want = evaluate(masked, arrays)[0].numpy()
        assert float(np.abs(program(*arrays) - want).max()) <= 2e-2 * float(np.ptp(want))
        assert sum(x.pattern == "nm<2:4, axis=1>" for x in program.report.layers) >= 4
    assert kept[1] > kept[0]
