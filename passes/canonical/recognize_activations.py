"""Activation functions that exporters spell out, recognized by their values instead of their spelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.passes._match import uniform
from bitwright.passes._pass import Context, Pass

if TYPE_CHECKING:
    import torch

KNOWN = ("gelu", "gelu_tanh", "silu", "mish", "hardswish", "softsign")
"""Functions that use their argument twice; every one has a vectorised kernel."""
LARGEST = 14
"""Nodes an expression may have."""
CLOSE = 2e-6
"""Largest difference, relative to 1 + |x|, at any sample. gelu and gelu_tanh are 5e-4 apart."""


@dataclass(frozen=True)
class RecognizeActivations(Pass):
    """Replace expressions of one variable by the activation they compute: gelu, silu, mish, hardswish, softsign.

    before:
        graph @g (%x: f32[2]) -> (y = %y) level=graph {
          %s = sigmoid(%x) : f32[2]
          %y = mul(%x, %s) : f32[2]
        }
    after:
        graph @g (%x: f32[2]) -> (y = %y) level=graph {
          %y = silu(%x) : f32[2]
        }
    """

    name: ClassVar[str] = "recognize-activations"

    def run(self, graph: Graph, context: Context) -> Graph:
        found: dict[str, tuple[str, str]] = {}
        for node in reversed(graph.nodes):
            if isinstance(node.op, ops.Binary) and node.op.fn in ("mul", "div") and node.type.dtype.is_float:
                match = _match(graph, node)
                if match is not None:
                    found[node.output] = match
                    context.remark(self.name, node.output, activation=match[0])

        def step(rw: Rewriter, node: Node) -> bool:
            if node.output not in found:
                return False
            fn, x = found[node.output]
            rw.keep_as(node, ops.Unary(fn), rw.of(x))
            return True

        return rewrite(graph, step)[0] if found else graph


def _match(graph: Graph, root: Node) -> tuple[str, str] | None:
    """(function, argument) that the expression at ``root`` computes, or None."""
    reads: dict[str, int] = {}
    todo, seen = [root], {root.output}
    while todo and len(seen) <= LARGEST:
        for x in todo.pop().inputs:
            reads[x] = reads.get(x, 0) + 1
            inner = graph.producers.get(x)
            if inner is not None and x not in seen and isinstance(inner.op, ops.POINTWISE):
                seen.add(x)
                todo.append(inner)
    for x, count in reads.items():
        if count > 1 and graph.types[x] == root.type and not graph.is_constant(x):
            nodes = _between(graph, x, root)
            fn = None if nodes is None else _function(graph, x, nodes)
            if fn is not None:
                return fn, x
    return None


def _between(graph: Graph, x: str, root: Node) -> list[Node] | None:
    """The pointwise nodes from ``x`` to ``root`` in order, if the root depends on ``x`` and numbers alone."""
    order: dict[str, Node] = {}

    def visit(node: Node) -> bool:
        if node.output in order:
            return True
        if not isinstance(node.op, (ops.Unary, ops.Binary, ops.Clamp)) or len(order) > LARGEST:
            return False
        for v in node.inputs:
            if v == x or uniform(graph, v) is not None:
                continue
            inner = graph.producers.get(v)
            if inner is None or not visit(inner):
                return False
        order[node.output] = node
        return True

    if not visit(root):
        return None
    inside = list(order.values())
    for node in inside[:-1]:  # others must not need what is between
        if node.output in graph.outputs or any(u.output not in order for u in graph.users[node.output]):
            return None
    return inside


def _function(graph: Graph, x: str, nodes: list[Node]) -> str | None:
    import torch

    from bitwright.ir.semantics import UNARY, apply

    points = torch.cat([torch.linspace(-12, 12, 481), torch.tensor([-100.0, -30.0, -1e-3, 1e-3, 30.0, 100.0])]).double()
    values: dict[str, torch.Tensor] = {x: points}
    for node in nodes:
        for v in node.inputs:
            if v not in values:
                values[v] = torch.tensor(uniform(graph, v), dtype=torch.float64)
        values[node.output] = apply(node.op, *(values[v] for v in node.inputs))[0]
        if not values[node.output].is_floating_point():
            return None
    got = values[nodes[-1].output]
    for fn in KNOWN:
        if bool(((got - UNARY[fn](points)).abs() <= CLOSE * (1 + points.abs())).all()):
            return fn
    return None
