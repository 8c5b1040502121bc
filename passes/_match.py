"""Questions that rewrites ask about a graph: constants behind values, who produces, who alone reads."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.weights import Array

O = TypeVar("O", bound=ops.Op)  # noqa: E741
SMALL = 1 << 16
"""Constants up to this many elements are looked at when a rule asks for their values."""


def array(graph: Graph, value: str) -> Array | None:
    """The values of a constant, or None when it is computed."""
    return graph.constant(value)  # type: ignore[return-value]


def uniform(graph: Graph, value: str) -> float | None:
    """The one number a small constant holds everywhere, or None."""
    node = graph.producers.get(value)
    if node is None or not isinstance(node.op, (ops.Weight, ops.Constant)) or not 0 < node.type.size <= SMALL:
        return None
    a = np.asarray(graph.constant(value)).reshape(-1)
    return float(a[0]) if bool((a == a[0]).all()) else None


def fn(graph: Graph, value: str, name: str) -> Node | None:
    """The unary or binary node ``name`` that produces a value, or None."""
    node = graph.producers.get(value)
    return node if node is not None and isinstance(node.op, (ops.Unary, ops.Binary)) and node.op.fn == name else None


def made_by(graph: Graph, value: str, kind: type[O]) -> Node | None:
    """The producer of a value if it is an operator of a kind."""
    node = graph.producers.get(value)
    return node if node is not None and isinstance(node.op, kind) else None


def used_once(graph: Graph, value: str) -> bool:
    """True when exactly one node reads the value, and it is no output."""
    return len(graph.users[value]) == 1 and value not in graph.outputs


def scaled(graph: Graph, value: str) -> tuple[str, float]:
    """``(x, c)`` with value = x * c: one multiplication or division by a uniform constant looked through."""
    if (m := fn(graph, value, "mul")) is not None:
        for x, c in (m.inputs, m.inputs[::-1]):
            if (k := uniform(graph, c)) is not None and graph.types[x] == m.type:
                return x, k
    if (
        (d := fn(graph, value, "div")) is not None
        and (k := uniform(graph, d.inputs[1]))
        and graph.types[d.inputs[0]] == d.type
    ):
        return d.inputs[0], 1.0 / k
    return value, 1.0
