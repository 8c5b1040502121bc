"""Building and rewriting graphs: fresh names, inferred types, and the map from old values to new."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from bitwright.ir.graph import Graph, Level, Node, Value
from bitwright.ir.infer import infer
from bitwright.ir.ops import Constant, Op, Region, Weight
from bitwright.ir.types import TensorType, dtype_of
from bitwright.ir.weights import Handle, Weights


class Builder:
    """Grows a graph node by node."""

    def __init__(self, name: str = "main", level: Level = "graph", weights: Weights | None = None) -> None:
        self.name, self.level = name, level
        self.inputs: list[Value] = []
        self.nodes: list[Node] = []
        self.types: dict[str, TensorType] = {}
        self.weights = weights or Weights()
        self.new_weights: dict[str, Handle] = {}
        self.defined_by: dict[str, Node] = {}
        self._numbered: dict[str, int] = {}  # where the search for a free number of a stem goes on
        self._keys: dict[str, int] = {}

    def fresh(self, stem: str) -> str:
        """A value name not used yet that starts with ``stem``."""
        stem = stem or "v"
        if stem not in self.types:
            return stem
        n = self._numbered.get(stem, 1)
        while f"{stem}.{n}" in self.types:
            n += 1
        self._numbered[stem] = n
        return f"{stem}.{n}"

    def input(self, name: str, type: TensorType) -> str:
        """Declare a graph input."""
        self.inputs.append(Value(name, type))
        self.types[name] = type
        return name

    def emit(self, op: Op, *inputs: str, name: str = "", origin: str = "") -> str:
        """Append a node and return its (first) value; types are inferred."""
        return self.emit_all(op, *inputs, names=(name,) * op.results, origin=origin)[0]

    def emit_all(self, op: Op, *inputs: str, names: tuple[str, ...] = (), origin: str = "") -> tuple[str, ...]:
        """Append a node and return all its values."""
        types = infer(op, [self.types[x] for x in inputs])
        names = names if len(names) == len(types) else tuple(names[:1] or ("",)) * len(types)
        return self.append(op, inputs, names, types, origin)

    def append(
        self, op: Op, inputs: Iterable[str], names: Iterable[str], types: tuple[TensorType, ...], origin: str = ""
    ) -> tuple[str, ...]:
        """Append a node whose types the caller knows."""
        outputs = []
        for name, t in zip(names, types, strict=True):
            out = self.fresh(name or op.spelling)
            self.types[out] = t
            outputs.append(out)
        node = Node(op, tuple(inputs), tuple(outputs), types, origin)
        self.nodes.append(node)
        self.defined_by.update(dict.fromkeys(outputs, node))
        return node.outputs

    def weight(
        self,
        key: str,
        source: Handle | np.ndarray[Any, Any],
        type: TensorType | None = None,
        *,
        name: str = "",
        origin: str = "",
    ) -> str:
        """Add a tensor to the store (under a fresh key) and a node that reads it."""
        handle = source if isinstance(source, Handle) else Handle(source)
        type = type or TensorType(dtype_of(handle.array.dtype), handle.array.shape)
        if self.new_weights.get(key) is not handle and self.weights.get(key) is not handle:
            key = self._fresh_key(key)
            self.new_weights[key] = handle
        return self.append(Weight(key), (), (name or key,), (type,), origin)[0]

    def _fresh_key(self, stem: str) -> str:
        """``fc.weight.1`` for a further ``fc.weight``; ``~1`` behind keys whose own end may be a dot and a number."""
        key, n = stem, self._keys.get(stem, 0)
        mark = "." if stem.endswith((".weight", ".bias", ".scale")) else "~"
        while key in self.weights or key in self.new_weights:
            n += 1
            key = f"{stem}{mark}{n}"
        self._keys[stem] = n
        return key

    def constant(self, values: Any, type: TensorType | None = None, *, name: str = "", origin: str = "") -> str:
        """A small literal (up to 64 elements); larger ones become weights."""
        array = np.asarray(values) if type is None else np.asarray(values).astype(type.dtype.numpy)
        type = type or TensorType(dtype_of(array.dtype), array.shape)
        if array.size > 64:
            return self.weight(name or "literal", array, type, name=name, origin=origin)
        return self.append(Constant(tuple(array.reshape(-1).tolist())), (), (name or "c",), (type,), origin)[0]

    def value_of(self, name: str) -> np.ndarray[Any, Any] | None:
        """The array behind a weight or literal built or kept so far; None when computed."""
        node = self.defined_by.get(name)
        if node is None:
            return None
        if isinstance(node.op, Weight):
            return (self.new_weights.get(node.op.ref) or self.weights[node.op.ref]).array
        if isinstance(node.op, Constant):
            return np.array(node.op.values, dtype=node.type.dtype.numpy).reshape(node.type.static_shape)
        return None

    def finish(self, outputs: Iterable[str], output_names: Iterable[str] | None = None) -> Graph:
        """The graph; dead nodes are dropped."""
        outs = tuple(outputs)
        names = tuple(output_names) if output_names is not None else outs
        weights = self.weights.with_items(self.new_weights) if self.new_weights else self.weights
        g = Graph(self.name, tuple(self.inputs), tuple(self.nodes), outs, names, weights, self.level)
        return g.drop_dead()


class Rewriter(Builder):
    """A builder that copies ``graph`` node by node; ``moved`` maps every old value to its new name."""

    def __init__(self, graph: Graph, level: Level | None = None) -> None:
        super().__init__(graph.name, level or graph.level, graph.weights)
        self.graph = graph
        self.moved: dict[str, str] = {}
        self.types.update(dict.fromkeys(graph.types, None))  # type: ignore[arg-type]
        for v in graph.inputs:
            del self.types[v.name]
            self.moved[v.name] = self.input(v.name, v.type)

    def of(self, *names: str) -> tuple[str, ...]:
        """New names of old values."""
        return tuple(self.moved[n] for n in names)

    def keep(self, node: Node) -> tuple[str, ...]:
        """Copy a node under its old names; types are inferred again only if an operand's type changed."""
        inputs = self.of(*node.inputs)
        if all(self.types[n] == self.graph.types[o] for n, o in zip(inputs, node.inputs, strict=True)):
            types = node.types
        else:
            types = tuple(
                t.with_encoding(old.encoding) if t.with_encoding(old.encoding) == old else t
                for t, old in zip(infer(node.op, [self.types[x] for x in inputs]), node.types, strict=True)
            )
        return self.keep_as(node, node.op, inputs, types)

    def keep_as(
        self, node: Node, op: Op, inputs: Iterable[str], types: tuple[TensorType, ...] | None = None
    ) -> tuple[str, ...]:
        """Put another operator in the place of ``node`` under its old names, and record the move."""
        inputs = tuple(inputs)
        types = types or infer(op, [self.types[x] for x in inputs])
        self.free(node)
        outs = self.append(op, inputs, node.outputs, types, node.origin)
        self.moved.update(zip(node.outputs, outs, strict=True))
        return outs

    def free(self, node: Node) -> None:
        """Let new values take the names of a node that is being replaced."""
        for out in node.outputs:
            if self.types.get(out, ...) is None:
                del self.types[out]

    def replace(self, node: Node, *values: str) -> None:
        """Let new values stand for the results of an old node."""
        self.moved.update(zip(node.outputs, values, strict=True))

    def done(self) -> Graph:
        """The rewritten graph, with the same input and output names."""
        return self.finish(self.of(*self.graph.outputs), self.graph.output_names)


Step = Callable[[Rewriter, Node], "bool | None"]
"""Handles a node (True, having called ``keep_as`` or ``replace``) or leaves it to be kept (None or False)."""


def rewrite(graph: Graph, step: Step, level: Level | None = None) -> tuple[Graph, Mapping[str, str]]:
    """Copy the graph through ``step``; returns the new graph and the map from old values to new."""
    rw = Rewriter(graph, level)
    for node in graph.nodes:
        if not step(rw, node):
            rw.keep(node)
    return rw.done(), rw.moved


def inline(builder: Builder, body: Graph, inputs: Iterable[str]) -> tuple[str, ...]:
    """Emit a body's nodes into ``builder``; returns its outputs there."""
    moved = dict(zip((v.name for v in body.inputs), inputs, strict=True))
    for n in body.nodes:
        assert not isinstance(n.op, Region)
        outs = builder.append(n.op, [moved[x] for x in n.inputs], n.outputs, n.types, n.origin)
        moved.update(zip(n.outputs, outs, strict=True))
    return tuple(moved[o] for o in body.outputs)


__all__ = ["Builder", "Rewriter", "Step", "inline", "rewrite"]
