"""prune-structures: smaller graphs that equal the silenced originals, rounding, ranking, refusals, whole compiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.target import Rate, Target
from bitwright.ir.types import F32, S8, S32, U8
from bitwright.ir.weights import Weights
from bitwright.passes import Context
from bitwright.passes.pipelines import CANONICAL
from bitwright.passes.sparsity.prune_structures import PruneStructures
from tests.passes.sparsity.channel_cases import apart, case, model
from tests.zoo import ZOO

Read = Callable[..., Graph]
WIDE = Target(
    "test", "cpu", "portable", "", (), 512, 32, 1 << 15, 1 << 20, 1 << 22, 1, 1e10, 1e11, 1e11, 1e-6,
    (Rate(F32, F32, F32, 1e11), Rate(U8, S8, S32, 4e11)), (), U8, "made up",
)  # fmt: skip


def shape(graph: Graph, value: str) -> tuple[object, ...]:
    return graph.types[value].shape


def test_the_weakest_channels_go_with_all_that_depends_on_them(check: Any) -> None:
    check(
        PruneStructures(ratio=0.5, multiple="2"),
        before="""
            graph @g (%x: f32[1, 1, 2, 2]) -> (y = %y) level=graph {
              %w = constant {values=[1.0, 5.0, 2.0, 6.0]} : f32[4, 1, 1, 1]
              %d = constant {values=[1.0, 2.0, 3.0, 4.0]} : f32[4, 1, 1, 1]
              %b = constant {values=[1.0, 2.0, 3.0, 4.0]} : f32[4]
              %v = constant {values=[1.0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]} : f32[1, 16]
              %h = conv(%x, %w) : f32[1, 4, 2, 2]
              %i = conv(%h, %d, %b) {groups=4} : f32[1, 4, 2, 2]
              %f = reshape(%i) {shape=[1, 16]} : f32[1, 16]
              %y = linear(%f, %v) : f32[1, 1]
            }
        """,
        after="""
            graph @g (%x: f32[1, 1, 2, 2]) -> (y = %y) level=graph {
              %w.1 = constant {values=[5.0, 6.0]} : f32[2, 1, 1, 1]
              %h = conv(%x, %w.1) : f32[1, 2, 2, 2]
              %d.1 = constant {values=[2.0, 4.0]} : f32[2, 1, 1, 1]
              %b.1 = constant {values=[2.0, 4.0]} : f32[2]
              %i = conv(%h, %d.1, %b.1) {groups=2} : f32[1, 2, 2, 2]
              %f = reshape(%i) {shape=[1, 8]} : f32[1, 8]
              %v.1 = constant {values=[2.0, 2.0, 2.0, 2.0, 4.0, 4.0, 4.0, 4.0]} : f32[1, 8]
              %y = linear(%f, %v.1) : f32[1, 1]
            }
        """,
        tolerance=None,
    )


@pytest.mark.parametrize("name", ["digits", "resnet18", "mobilenet_v2", "llama"])
def test_channels_that_do_nothing_go_without_a_trace(name: str) -> None:
    """Zero-invariant groups: where every weight that makes or reads a channel is zero, removing it is exact."""
    from bitwright.passes.sparsity._channels import couple

    graph = model(name)
    arrays = {k: np.array(h.array) for k, h in graph.weights.items()}
    coupling = couple(graph, "prune")
    key = {n.output: n.op.ref for n in graph.nodes if hasattr(n.op, "ref")}
    for group in coupling.groups:
        gone = group.channels[::4]  # a quarter, rounded up: the ratio takes at most these
        for u in group.uses:
            if u.const in key and u.role in ("out", "in"):
                at = np.isin(coupling.channels(u.label), gone)
                np.moveaxis(arrays[key[u.const]], u.axes[0], 0)[at] = 0
    zeroed = replace(graph, weights=Weights(arrays))
    context = Context()
    after = PruneStructures().run(zeroed, context)
    total = context.remarks[-1][2]
    assert total["parameters"] < 0.9 * total["parameters_before"]
    assert total["macs"] < total["macs_before"]
    assert apart(zeroed, after) < 1e-6


def test_parameters_and_work_are_counted() -> None:
    context = Context()
    after = PruneStructures(ratio=0.5).run(case("flatten"), context)
    (place, facts), (_, total) = [(p, f) for _, p, f in context.remarks]
    assert (place, facts) == ("w", {"channels": 8, "kept": 4})
    assert total == {
        "parameters_before": 8 * 27 + 8 + 5 * 32, "parameters": 4 * 27 + 4 + 5 * 16,
        "macs_before": 2 * (8 * 4 * 27 + 5 * 32), "macs": 2 * (4 * 4 * 27 + 5 * 16),
    }  # fmt: skip
    assert shape(after, "f") == (2, 16)


def test_attention_heads_go_whole() -> None:
    graph = model("bert_base")
    context = Context()
    after = PruneStructures(ratio=0.5, only="*attention*").run(graph, context)
    places = [p for _, p, _ in context.remarks[:-1]]
    assert [p.count("attention.self") for p in places] == [3, 3]
    attended = [n for n in after.nodes if n.op.spelling == "attention"]
    assert [shape(after, n.output) for n in attended] == [(2, 2, 12, 8)] * 2
    assert {n.types[0].shape[0] for n in after.nodes if "query.weight" in getattr(n.op, "ref", "")} == {16}
    kept = Context()
    assert not PruneStructures(ratio=0.5, only="*attention.self*", heads=False).run(graph, kept).changed_from(graph)
    assert "heads=false" in kept.refusals[0].reason


def test_shared_key_heads_take_all_their_queries() -> None:
    after = PruneStructures(ratio=0.5).run(case("heads"), Context())
    assert [shape(after, v) for v in ("qt", "kt", "vt", "a")] == [
        (2, 2, 5, 4),
        (2, 1, 5, 4),
        (2, 1, 5, 4),
        (2, 2, 5, 4),
    ]
    assert {shape(after, n.output) for n in after.nodes if n.output.startswith("mask")} == {(1, 2, 5, 5)}


@pytest.mark.parametrize(
    ("multiple", "target", "kept"),
    [("auto", None, 27), ("auto", WIDE, 32), ("8", None, 32), ("3", WIDE, 27), ("5", None, 30), ("64", None, 36)],
)
def test_kept_channels_are_rounded_up(read: Read, multiple: str, target: Target | None, kept: int) -> None:
    graph = read("""
        graph @g (%x: f32[2, 3]) -> (y = %y) level=graph {
          %w = weight {ref="w"} : f32[36, 3]
          %v = weight {ref="v"} : f32[2, 36]
          %h = linear(%x, %w) : f32[2, 36]
          %y = linear(%h, %v) : f32[2, 2]
        }
    """)
    context = Context(target=target)
    after = PruneStructures(multiple=multiple).run(graph, context)
    assert shape(after, "h") == (2, kept)
    if kept == 36:
        assert context.refusals[-1].reason == "a share of 0.25 of its 36 channels is 9, and 64 is the multiple to keep"


@pytest.mark.parametrize(("global_", "sizes"), [(False, (4, 4)), (True, (8, 1))])
def test_ranking_by_group_or_over_all(read: Read, global_: bool, sizes: tuple[int, int]) -> None:
    u = np.ones((8, 3), np.float32)
    v = np.zeros((8, 8), np.float32)
    v[0] = 8.0  # one good channel, seven of no use
    w = np.zeros((2, 8), np.float32)
    w[:, 0] = 1.0
    graph = read("""
        graph @g (%x: f32[2, 3]) -> (y = %y) level=graph {
          %u = weight {ref="u"} : f32[8, 3]
          %v = weight {ref="v"} : f32[8, 8]
          %w = weight {ref="w"} : f32[2, 8]
          %h = linear(%x, %u) : f32[2, 8]
          %i = linear(%h, %v) : f32[2, 8]
          %y = linear(%i, %w) : f32[2, 2]
        }
    """, {"u": u, "v": v, "w": w})  # fmt: skip
    after = PruneStructures(ratio=0.5 if not global_ else 7 / 16, global_=global_).run(graph, Context())
    assert (shape(after, "h")[1], shape(after, "i")[1]) == sizes


def test_the_score_decides(read: Read) -> None:
    w = np.array([[3, 0, 0], [1.5, 1.5, 1.5], [9, 9, 9], [9, 9, 9]], np.float32)
    graph = read("""
        graph @g (%x: f32[2, 3]) -> (y = %y) level=graph {
          %w = weight {ref="w"} : f32[4, 3]
          %v = constant {values=[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]} : f32[2, 4]
          %h = linear(%x, %w) : f32[2, 4]
          %y = linear(%h, %v) : f32[2, 2]
        }
    """, {"w": w})  # fmt: skip
    l1, l2 = (PruneStructures(score=s).run(graph, Context()).weights["w~1"].array for s in ("l1", "l2"))
    assert l1[0].tolist() == [1.5, 1.5, 1.5]
    assert l2[0].tolist() == [3.0, 0.0, 0.0]


def test_only_and_except_name_what_is_made() -> None:
    def pruned(p: PruneStructures) -> set[str]:
        context = Context()
        p.run(model("resnet18"), context)
        return {place for _, place, _ in context.remarks[:-1]}

    assert pruned(PruneStructures(only="layer3.0.conv1")) == {"layer3.0.conv1"}
    assert pruned(PruneStructures(only="layer3.0.conv*")) == {"layer3.0.conv1", "layer3.0.conv2, layer3.0.downsample.0"}
    assert pruned(PruneStructures(only="layer3*", except_="*downsample*")) == {"layer3.0.conv1"}


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("digits", "fc2", "its output channels reach output output"),
        ("bert_base", "model.encoder.layer.0.output.dense", "are normalized over by layer_norm"),
        ("llama", "model.model.layers.0.self_attn.q_proj", "a share of 0.25 of its 2 channels is none"),
        ("llama", "model.model.layers.0.mlp.down_proj", "are normalized over by rms_norm"),
    ],
)
def test_refused_in_models(name: str, layer: str, reason: str) -> None:
    context = Context()
    PruneStructures().run(model(name), context)
    assert any(layer in r.place and reason in r.reason for r in context.refusals), context.refusals


def test_refused_by_operator() -> None:
    graph, context = case("grouped"), Context()
    assert not PruneStructures(ratio=0.5).run(graph, context).changed_from(graph)
    reasons = {r.place: r.reason for r in context.refusals}
    assert reasons["w"] == "its output channels are the input of a grouped convolution (%h)"
    assert reasons["d"] == "its output channels are made by a grouped convolution"


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"ratio": -0.1}, {"multiple": "0"}, {"multiple": "some"}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="prune-structures"):
        PruneStructures(**options)


@pytest.mark.parametrize("name", ["resnet18", "bert_base"])
def test_a_pruned_model_compiles_with_masks_and_int8(name: str) -> None:
    module, inputs = ZOO[name]()
    arrays = [x.numpy() for x in inputs]
    graph = bw.capture(module, inputs)
    recipe = "prune-structures{ratio=0.5 multiple=4}, permute-channels, nm-mask"
    small, _ = bw.optimize(graph, f"{CANONICAL}, {recipe}")
    want = evaluate(small, arrays)[0].numpy()
    program = bw.compile(graph, recipe=f"{recipe}, int8", calibration=[arrays])
    assert float(np.abs(program(*arrays) - want).max()) <= 2e-2 * float(np.ptp(want))


def test_symbolic_batches_stay_symbolic() -> None:
    module, inputs = ZOO["mobilenet_v2"]()
    graph, _ = bw.optimize(bw.capture(module, inputs, dynamic_batch=True), CANONICAL)
    context = Context()
    after = PruneStructures().run(graph, context)
    assert after.inputs == graph.inputs
    assert context.remarks[-1][2]["macs"] < context.remarks[-1][2]["macs_before"]
    assert evaluate(after, [np.concatenate([inputs[0].numpy()] * 2)])[0].shape == (4, 10)
