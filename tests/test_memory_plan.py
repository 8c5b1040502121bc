"""Memory of whole models: arenas against the largest set of live values, and no layout changes inside a network."""

from __future__ import annotations

from functools import cache

import pytest

from bitwright.codegen import build
from bitwright.codegen.plan import PAD, Plan, align, plan
from bitwright.codegen.targets.x86 import AVX512_VNNI
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.pipeline import lower
from tests.zoo import ZOO, Size

RATIO = 1.15
CONVOLUTIONAL = ("resnet18", "resnet50", "mobilenet_v2", "convnext_tiny")


@cache
def planned(name: str, recipe: str, size: Size = "tiny") -> tuple[Plan, Graph]:
    """Everything of a compilation but the kernels' machine code."""
    from bitwright import capture

    module, inputs = ZOO[name](size)
    graph = lower(capture(module, inputs), recipe, AVX512_VNNI, [[x.numpy() for x in inputs]]).graph
    graph, choices = build.select(graph, AVX512_VNNI)
    steps, buffers, _ = build.program_of(graph, choices)
    return plan(steps, buffers, graph.outputs), graph


def largest_live_set(p: Plan) -> int:
    """Bytes of the values that are live at once, each with its padding; views count as what they lie in and nothing
    is computed in place."""
    life: dict[str, list[int]] = {}
    for index, step in enumerate(p.steps):
        for arg in step.args:
            if arg.buffer in p.offsets:
                life.setdefault(arg.buffer, []).append(index)
    return max(
        sum(align(p.sizes[name]) + PAD for name, used in life.items() if used[0] <= index <= used[-1])
        for index in range(len(p.steps))
    )


@pytest.mark.parametrize("recipe", ["float", "int8"])
@pytest.mark.parametrize("name", ZOO)
def test_arenas_are_near_the_largest_live_set(name: str, recipe: str) -> None:
    p, _ = planned(name, recipe)
    print(f"{name} {recipe}: {p.arena_bytes} bytes, {p.arena_bytes / largest_live_set(p):.3f} of the largest live set")
    assert p.arena_bytes <= RATIO * largest_live_set(p)
    assert p.bound_bytes <= p.arena_bytes <= RATIO * p.bound_bytes


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "unet"])
def test_arenas_of_full_size(name: str) -> None:
    p, _ = planned(name, "float", "full")
    assert p.arena_bytes <= RATIO * largest_live_set(p)


def moves(graph: Graph) -> list[tuple[str, bool]]:
    """Every transpose of a kernel-level graph: its result, and whether it stands at an edge of the model."""
    inputs, outputs = {v.name for v in graph.inputs}, set(graph.outputs)
    found = []
    for n in graph.nodes:
        inner = n.op.body.nodes if isinstance(n.op, ops.Region) else (n,)
        if any(isinstance(m.op, ops.Transpose) and m.type.rank == 4 for m in inner):
            found.append((n.output, bool(inputs & set(n.inputs)) or bool(outputs & set(n.outputs))))
    return found


@pytest.mark.parametrize("recipe", ["float", "int8"])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_residual_networks_change_layout_at_their_edges_only(name: str, recipe: str) -> None:
    _, graph = planned(name, recipe)
    assert moves(graph)
    assert all(edge for _, edge in moves(graph)), moves(graph)


@pytest.mark.parametrize("recipe", ["float", "int8"])
def test_a_u_net_changes_layout_at_its_edges_and_around_interpolation_only(recipe: str) -> None:
    _, graph = planned("unet", recipe)
    resized = [n for n in graph.nodes if isinstance(n.op, ops.Region)]
    around: set[str] = set()
    for n in resized:
        assert isinstance(n.op, ops.Region)
        if any(isinstance(m.op, ops.Resize) for m in n.op.body.nodes):
            around |= {*n.inputs, *n.outputs}
    readers = {n.output: set(n.inputs) for n in graph.nodes}
    inside = [v for v, edge in moves(graph) if not edge and v not in around and not readers[v] & around]
    assert inside == []
