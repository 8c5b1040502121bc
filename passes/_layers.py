"""Layers by name: which place a contraction is, whether a glob selects it, and how new weights are called."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node


def stem(key: str) -> str:
    """A weight key without the number that an earlier rewrite added: ``fc.weight.1`` -> ``fc.weight``.

    >>> stem("fc.weight.1"), stem("onnx::Conv_37~2"), stem("layers.1")
    ('fc.weight', 'onnx::Conv_37', 'layers.1')
    """
    return re.sub(r"(?:(\.(?:weight|bias|scale))\.\d+|~\d+)$", r"\1", key)


def weight_node(graph: Graph, node: Node) -> Node | None:
    """The weight node behind a contraction's second operand, through dequantize; None when it is computed."""
    source = graph.producers.get(node.inputs[1])
    while source is not None and isinstance(source.op, (ops.Dequantize, ops.Quantize, ops.Transpose)):
        source = graph.producers.get(source.inputs[0])
    return source if source is not None and isinstance(source.op, ops.Weight) else None


def name_of(ref: str, origin: str) -> str:
    """The layer's name by the key of its weight; by its node where an exporter made up the key (``onnx::Conv_71``)."""
    place = origin.partition(", ")[0].partition(" (")[0]
    made_up = ref.startswith("onnx::") and place and ".py:" not in place
    return place if made_up else stem(ref).removesuffix(".weight")


def layer_of(graph: Graph, node: Node) -> str:
    """What the report calls a contraction: its weight's key without ``.weight``, else its value's name."""
    source = weight_node(graph, node) if len(node.inputs) > 1 else None
    if source is None:
        return node.output
    assert isinstance(source.op, ops.Weight)
    return name_of(source.op.ref, node.origin)


def matches(pattern: str, graph: Graph, node: Node) -> bool:
    """True when a glob (alternatives separated by ``|``) names the layer, its weight, its value or its origin."""
    source = weight_node(graph, node) if len(node.inputs) > 1 else None
    names = {layer_of(graph, node), node.output, node.origin.split(",")[0].strip()}
    if source is not None and isinstance(source.op, ops.Weight):
        names |= {source.op.ref, stem(source.op.ref)}
    return any(fnmatchcase(name, p) for name in names if name for p in pattern.split("|"))


def selected(only: str, except_: str, graph: Graph, node: Node) -> bool:
    """True when ``only`` names the layer and ``except_`` does not."""
    return matches(only, graph, node) and not (except_ and matches(except_, graph, node))
