"""Coupling of channels: random moves keep the function, random removals equal silenced channels, the rest is pinned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bitwright.ir.graph import Graph
from bitwright.ir.verify import verify
from bitwright.passes.sparsity._channel_edit import moved
from bitwright.passes.sparsity._channel_prune import pruned
from bitwright.passes.sparsity._channels import Coupling, couple
from tests.passes.sparsity.channel_cases import BODIES, apart, case, model, moves, removal, silenced
from tests.passes.sparsity.channel_fuzz import fuzzed

Read = Callable[..., Graph]
MODELS = (
    "digits",
    "resnet18",
    "mobilenet_v2",
    "convnext_tiny",
    "unet",
    "vit_small",
    "bert_base",
    "gpt2_small",
    "llama",
)


def free(coupling: Coupling) -> list[int]:
    """Sizes of the groups in which something can happen."""
    return [len(g.channels) for g in coupling.groups if len(g.channels) > 1]


@pytest.mark.parametrize("name", [*BODIES, *MODELS])
def test_random_moves_keep_the_function_and_the_nodes(name: str) -> None:
    graph = case(name) if name in BODIES else model(name)
    coupling = couple(graph, "permute")
    assert free(coupling), "nothing to test"
    after = moved(coupling, moves(coupling))
    verify(after)
    assert after.changed_from(graph)
    assert apart(graph, after) < 1e-5
    computed = [[(n.op, n.types) for n in g.nodes if n.inputs] for g in (graph, after)]
    assert computed[0] == computed[1]


@pytest.mark.parametrize("name", [n for n in (*BODIES, *MODELS) if n != "grouped"])
def test_random_removals_equal_the_graph_that_does_not_read_them(name: str) -> None:
    graph = case(name) if name in BODIES else model(name)
    coupling = couple(graph, "prune")
    keep = removal(coupling)
    assert not keep.all()
    after = pruned(coupling, keep)
    verify(after)
    assert apart(graph, after, silenced(coupling, keep)) < 1e-5
    assert [n.op.spelling for n in after.nodes if n.inputs] == [n.op.spelling for n in graph.nodes if n.inputs]


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("flatten", [8]), ("residual", [8]), ("depthwise", [8]), ("grouped", [4, 4]), ("shuffle", [8]),
        ("norms", [4, 4, 6, 8]), ("glu", [8]), ("concat", [2, 5, 6]), ("mirror", [2, 2]),
        ("heads", [4, 4]), ("tied", [8]), ("spelled", [4, 4]),
    ],
)  # fmt: skip
def test_what_may_move(name: str, groups: list[int]) -> None:
    assert sorted(free(couple(case(name), "permute"))) == sorted(groups)


@pytest.mark.parametrize(
    ("name", "groups"),
    [("flatten", [8]), ("residual", [8]), ("depthwise", [8]), ("norms", [2]), ("glu", [8]), ("heads", [2]),
     ("spelled", [2]), ("shuffle", [2]), ("concat", [2, 5, 6]), ("mirror", [4]), ("tied", [8]), ("grouped", [])],
)  # fmt: skip
def test_what_may_go(name: str, groups: list[int]) -> None:
    assert sorted(free(couple(case(name), "prune"))) == sorted(groups)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("%y = relu(%h) : f32[2, 8]", r"reach output y \(%y\)"),
        ("%y = cumsum(%h) {axis=1} : f32[2, 8]", "are ordered by cumsum"),
        ("%y = add(%h, %u) : f32[2, 8]", "meet %u in %y, which has an order of its own"),
        ("%y = matmul(%h, %m) : f32[2, 8]", "meet %m|are summed with computed values"),
        ("%y = pad(%h) {padding=[0, 1, 0, 0]} : f32[2, 9]", "are padded"),
        ("%y = tile(%h) {repeats=[1, 2]} : f32[2, 16]", "are repeated"),
        ("%y = gather(%h, %i) {axis=1} : f32[2, 4]", "are gathered"),
        ("%y = slice(%h) {axis=1, start=3, stop=4} : f32[2, 1]", "are taken one by one"),
        ("%y = reshape(%h) {shape=[16]} : f32[16]", "reach output"),
    ],
)
@pytest.mark.parametrize("mode", ["permute", "prune"])
def test_pinned_by_name(read: Read, line: str, reason: str, mode: str) -> None:
    graph = read(f"""
        graph @g (%x: f32[2, 3], %u: f32[2, 8], %m: f32[8, 8], %i: s64[4]) -> (y = %y) level=graph {{
          %w = weight {{ref="w"}} : f32[8, 3]
          %h = linear(%x, %w) : f32[2, 8]
          {line}
        }}
    """)
    coupling = couple(graph, mode)  # type: ignore[arg-type]
    label = next(u.label for u in coupling.uses if u.role == "out")
    assert not [g for g in coupling.groups if np.isin(coupling.channels(label), g.channels).all()] or "taken" in reason
    why = set(coupling.pinned.values())
    assert any(any(r in w for r in reason.replace("\\", "").split("|")) for w in why), why


@pytest.mark.parametrize(
    ("encoding", "free_rows", "free_columns"),
    [
        ("", True, True), ("nm<2:4, axis=1>", True, False), ("nm<2:4, axis=-1>", True, False),
        ("nm<2:4, axis=1, shared=2>", False, False), ("nm<4:4, axis=1, transposable>", False, False),
        ("codebook<99>", True, True), ("unstructured<8 per 8>", False, False),
    ],
)  # fmt: skip
def test_a_mask_in_the_weight_holds_its_channels(
    read: Read, encoding: str, free_rows: bool, free_columns: bool
) -> None:
    w = np.tile(np.array([1.0, 0.0, 2.0, 0.0], np.float32), (8, 2)) * np.arange(1, 9, dtype=np.float32)[:, None]
    graph = read(
        f"""
        graph @g (%x: f32[2, 3]) -> (y = %y) level=graph {{
          %a = weight {{ref="a"}} : f32[8, 3]
          %w = weight {{ref="w"}} : f32[8, 8] {encoding}
          %c = weight {{ref="c"}} : f32[2, 8]
          %h = linear(%x, %a) : f32[2, 8]
          %i = linear(%h, %w) : f32[2, 8]
          %y = linear(%i, %c) : f32[2, 2]
        }}
        """,
        {"w": w},
    )
    for mode in ("permute", "prune"):
        coupling = couple(graph, mode)
        made = {u.const: u.label for u in coupling.uses if u.role == "out"}
        assert (not coupling.reason(made["a"])) == free_columns
        assert (not coupling.reason(made["w"])) == free_rows


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs(seed: int) -> None:
    graph = fuzzed(seed)
    verify(graph)
    for mode in ("permute", "prune"):
        coupling = couple(graph, mode)
        if not free(coupling):
            continue
        if mode == "permute":
            assert apart(graph, moved(coupling, moves(coupling, seed))) < 1e-4
        else:
            keep = removal(coupling, seed)
            assert apart(graph, pruned(coupling, keep), silenced(coupling, keep)) < 1e-4


def test_heads_can_be_kept() -> None:
    assert free(couple(case("heads"), "prune", heads=False)) == []


def test_the_same_graph_gives_the_same_groups() -> None:
    a, b = (couple(model("unet"), "permute") for _ in range(2))
    assert [g.channels.tolist() for g in a.groups] == [g.channels.tolist() for g in b.groups]
