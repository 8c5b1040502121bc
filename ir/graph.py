"""Graphs: immutable nodes in execution order, values by name, weights by key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from bitwright.ir.ops import Constant, Op, Region, Weight
from bitwright.ir.types import TensorType, symbols_of
from bitwright.ir.weights import Handle, Weights

Level = Literal["graph", "integer", "kernel"]
LEVELS: tuple[Level, ...] = ("graph", "integer", "kernel")


@dataclass(frozen=True, slots=True)
class Value:
    """A graph input: its name is what the user passes it by."""

    name: str
    type: TensorType


@dataclass(frozen=True, slots=True)
class Node:
    """One operator application. ``origin`` names the user's place: module path or ONNX node, file and line."""

    op: Op
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    types: tuple[TensorType, ...]
    origin: str = ""

    @property
    def output(self) -> str:
        """The first result."""
        return self.outputs[0]

    @property
    def type(self) -> TensorType:
        """Type of the first result."""
        return self.types[0]


@dataclass(frozen=True)
class Graph:
    """A program. Nodes are in execution order; every value is defined once, before its uses.

    ``outputs`` are value names, ``output_names`` what the user calls them. Equality compares structure and
    weight handles by identity; :meth:`same_as` compares weight contents.
    """

    name: str
    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    output_names: tuple[str, ...]
    weights: Weights = field(default_factory=Weights, compare=False)
    level: Level = "graph"

    @cached_property
    def types(self) -> Mapping[str, TensorType]:
        """Type of every value by name."""
        table = {v.name: v.type for v in self.inputs}
        for n in self.nodes:
            table.update(zip(n.outputs, n.types, strict=True))
        return table

    @cached_property
    def producers(self) -> Mapping[str, Node]:
        """The node that defines each value (graph inputs are absent)."""
        return {out: n for n in self.nodes for out in n.outputs}

    @cached_property
    def users(self) -> Mapping[str, tuple[Node, ...]]:
        """Nodes that read each value, in order; a node that reads it twice appears once."""
        table: dict[str, dict[int, Node]] = {name: {} for name in self.types}
        for i, n in enumerate(self.nodes):
            for x in n.inputs:
                table[x][i] = n
        return {k: tuple(v.values()) for k, v in table.items()}

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """Symbolic sizes of the inputs, in order of appearance."""
        return tuple(dict.fromkeys(s for v in self.inputs for d in v.type.shape for s in symbols_of(d)))

    def handle(self, value: str) -> Handle | None:
        """The weight handle behind a value, or None when it is computed, an input or a literal."""
        node = self.producers.get(value)
        return self.weights[node.op.ref] if node is not None and isinstance(node.op, Weight) else None

    def constant(self, value: str) -> object | None:
        """The NumPy array of a weight or literal, or None when the value is computed."""
        import numpy as np

        node = self.producers.get(value)
        if node is None:
            return None
        if isinstance(node.op, Weight):
            return self.weights[node.op.ref].array
        if isinstance(node.op, Constant):
            return np.array(node.op.values, dtype=node.type.dtype.numpy).reshape(node.type.static_shape)
        return None

    def is_constant(self, value: str) -> bool:
        """True for weights and literals."""
        node = self.producers.get(value)
        return node is not None and isinstance(node.op, (Weight, Constant))

    @cached_property
    def structure(self) -> str:
        """Hash of everything but weight contents."""
        from bitwright.ir.text import show

        return hashlib.blake2b(show(self).encode(), digest_size=16).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of structure and weight contents."""
        h = hashlib.blake2b(self.structure.encode(), digest_size=16)
        for key in sorted(self.used_weights()):
            h.update(key.encode() + self.weights[key].digest.encode())
        return h.hexdigest()

    def used_weights(self) -> set[str]:
        """Keys of the weights that nodes refer to (region bodies hold none)."""
        return {n.op.ref for n in self.nodes if isinstance(n.op, Weight)}

    def changed_from(self, other: Graph) -> bool:
        """True when structure or any weight handle differs (cheap: no weight bytes are read)."""
        if self.structure != other.structure:
            return True
        return any(self.weights[k] is not other.weights[k] for k in self.used_weights())

    def same_as(self, other: Graph) -> bool:
        """Equal structure and equal weight contents."""
        return self.structure == other.structure and self.fingerprint == other.fingerprint

    def drop_dead(self) -> Graph:
        """Without nodes and weights that no output needs."""
        alive, kept = set(self.outputs), []
        for n in reversed(self.nodes):
            if alive.intersection(n.outputs):
                alive.update(n.inputs)
                kept.append(n)
        if len(kept) == len(self.nodes) and len(self.used_weights()) == len(self.weights):
            return self
        g = replace(self, nodes=tuple(reversed(kept)))
        return replace(g, weights=self.weights.only(g.used_weights()))

    def walk(self) -> Iterator[Node]:
        """Every node, region bodies included."""
        for n in self.nodes:
            yield n
            if isinstance(n.op, Region):
                yield from n.op.body.walk()


def subgraph(
    graph: Graph, nodes: Iterable[Node], outputs: Iterable[str], name: str = "body"
) -> tuple[Graph, tuple[str, ...]]:
    """A body made of ``nodes`` (in order) and the outer values it reads, which become its inputs."""
    nodes = tuple(nodes)
    inner = {o for n in nodes for o in n.outputs}
    reads = tuple(dict.fromkeys(x for n in nodes for x in n.inputs if x not in inner))
    outs = tuple(outputs)
    inputs = tuple(Value(x, graph.types[x]) for x in reads)
    return Graph(name, inputs, nodes, outs, outs, Weights(), graph.level), reads
