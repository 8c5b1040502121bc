"""Each layer in each choice by itself: all layers are changed at once, and a layer's change is cut out of the result.

Layers measured one at a time see what the float layers before them give, so their masks, codes and scales do not depend
on each other: one run of the passes gives those of every layer, and the network is computed from the layer on alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.infer import bind_op
from bitwright.ir.interpret import bind_symbols, to_torch
from bitwright.passes._pass import Batch

if TYPE_CHECKING:
    import torch

Bodies = Mapping[str, "Body"]
"""By the output of the contraction they compute."""


@dataclass(frozen=True)
class Body:
    """The nodes of a changed graph that compute a contraction from values of the unchanged one."""

    graph: Graph
    nodes: tuple[Node, ...]


def body_of(graph: Graph, changed: Graph, output: str, through: bool = False) -> Body | None:
    """What computes ``output`` in ``changed`` from float values of ``graph``; None where another contraction is in
    between, whose change would be counted as well, unless ``through``."""
    found, left = set[str](), [output]
    while left:
        x = left.pop()
        if x in found or (x != output and _same(graph, changed, x)):
            continue
        node = changed.producers.get(x)
        if node is None or (x != output and not through and isinstance(node.op, ops.CONTRACTION)):
            return None
        found.update(node.outputs)
        left += node.inputs
    return Body(changed, tuple(n for n in changed.nodes if n.output in found))


def _same(graph: Graph, changed: Graph, x: str) -> bool:
    """True for a float value of both graphs that is computed."""
    known = graph.types.get(x)
    return known is not None and known == changed.types[x] and known.dtype.is_float and not changed.is_constant(x)


@dataclass
class Apart:
    """Runs a float graph with one layer at a time computed otherwise."""

    graph: Graph
    bodies: Sequence[Bodies]
    """Those that :meth:`outputs` will be given: what they read is held for them."""
    dead: dict[int, list[str]] = field(default_factory=dict)
    """The values that nothing reads after a node."""
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = self.graph
        ends = {x: i for i, n in enumerate(g.nodes) for x in n.inputs}
        places = {n.output: i for i, n in enumerate(g.nodes)}
        for output, body in (item for bodies in self.bodies for item in bodies.items()):
            inner = {o for n in body.nodes for o in n.outputs}
            for x in (x for n in body.nodes for x in n.inputs if x not in inner):
                ends[x] = max(ends.get(x, 0), places[output])
        for x, i in ends.items():
            if x not in g.outputs:
                self.dead.setdefault(i, []).append(x)
        self.constants = {
            n.output: to_torch(g.constant(n.output)) for n in g.nodes if isinstance(n.op, ops.Weight | ops.Constant)
        }

    def outputs(
        self, batch: Batch, changes: Callable[[str], Sequence[tuple[Any, Bodies]]]
    ) -> Iterator[tuple[Any, tuple[torch.Tensor, ...]]]:
        """(key, outputs of the model) of each of ``changes(value)``, asked for before a value is computed."""
        import torch

        names = [v.name for v in self.graph.inputs]
        given = batch if isinstance(batch, Mapping) else dict(zip(names, batch, strict=True))
        values = {n: to_torch(given[n]) for n in names}
        sizes = bind_symbols(self.graph, [tuple(values[n].shape) for n in names])
        with torch.no_grad():
            for i, node in enumerate(self.graph.nodes):
                for key, bodies in changes(node.output):
                    yield key, self._rest(dict(values), i, sizes, bodies)
                self._step(values, i, sizes, {})

    def _rest(
        self, values: dict[str, torch.Tensor], begin: int, sizes: dict[str, int], bodies: Bodies
    ) -> tuple[torch.Tensor, ...]:
        for i in range(begin, len(self.graph.nodes)):
            self._step(values, i, sizes, bodies)
        return self._results(values)

    def _results(self, values: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(self.constants[o] if o in self.constants else values[o] for o in self.graph.outputs)

    def _step(self, values: dict[str, torch.Tensor], i: int, sizes: dict[str, int], bodies: Bodies) -> None:
        """Compute node ``i`` and forget what nothing reads after it."""
        from bitwright.ir.semantics import apply

        node = self.graph.nodes[i]
        if node.output in self.constants:
            return
        if node.output in bodies:
            values[node.output] = _computed(bodies[node.output], node.output, values, sizes)
        else:
            operands = [self.constants[x] if x in self.constants else values[x] for x in node.inputs]
            values.update(zip(node.outputs, apply(bind_op(node.op, sizes), *operands), strict=True))
        for x in self.dead.get(i, ()):
            values.pop(x, None)


def _computed(body: Body, output: str, values: Mapping[str, torch.Tensor], sizes: dict[str, int]) -> torch.Tensor:
    from bitwright.ir.semantics import apply

    inner: dict[str, torch.Tensor] = {}
    for n in body.nodes:
        if isinstance(n.op, ops.Weight | ops.Constant):
            inner[n.output] = to_torch(body.graph.constant(n.output))
            continue
        operands = [inner[x] if x in inner else values[x] for x in n.inputs]
        inner.update(zip(n.outputs, apply(bind_op(n.op, sizes), *operands), strict=True))
    return inner[output]


__all__ = ["Apart", "Bodies", "Body", "body_of"]
