"""Running a graph over all calibration batches side by side, from one chosen node to the next, with a stop at each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.infer import bind_op
from bitwright.ir.interpret import bind_symbols, to_torch
from bitwright.passes._memory import give_back
from bitwright.passes._pass import Batch

if TYPE_CHECKING:
    import torch

Visit = Callable[[Node, "list[torch.Tensor]", "list[torch.Tensor]"], "Mapping[int, torch.Tensor] | None"]
"""Gets a node and its first operand in every batch, and in every twin; may return operands to use instead, by place."""


def walk(
    graph: Graph,
    batches: Sequence[Batch],
    stops: Collection[str],
    visit: Visit,
    given: Mapping[str, torch.Tensor] | None = None,
    twin: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Compute every batch up to the last of the nodes ``stops`` (by output), calling ``visit`` on these.

    From one stop to the next the batches run one after the other; of each only the values that are still to be read at
    a stop are held. ``given`` replaces weights by value name. With ``twin`` every batch is computed a second time
    beside, with these weights and nothing of what visits return. Raises :class:`InvalidInput` for a batch that does not
    fit the graph's inputs.
    """
    import torch

    ends = [i for i, n in enumerate(graph.nodes) if n.output in stops]
    if not ends:
        return
    last = {x: i for i, n in enumerate(graph.nodes[: ends[-1] + 1]) for x in n.inputs}
    live = [_inputs(graph, batch, number) for number, batch in enumerate(batches)]
    sizes = [bind_symbols(graph, [tuple(values[v.name].shape) for v in graph.inputs]) for values in live]
    sides = [_Side(graph, last, live, dict(given or {}))]
    if twin is not None:
        sides.append(_Side(graph, last, [dict(v) for v in live], dict(twin)))
    begin, instead = 0, dict[int, "torch.Tensor"]()
    with torch.no_grad():
        for end in ends:
            for number, side in enumerate(sides):
                side.run(begin, end, sizes, instead if number == 0 else {})
            node = graph.nodes[end]
            first = [side.operands(end) for side in sides]
            instead = dict(visit(node, first[0], first[1] if twin is not None else []) or {})
            begin = end


@dataclass
class _Side:
    """The batches computed with one set of weights: of each, the values still to be read."""

    graph: Graph
    last: Mapping[str, int]
    """The last node that reads a value, of those that are computed at all."""
    batches: list[dict[str, torch.Tensor]]
    constants: dict[str, torch.Tensor]

    def run(
        self, begin: int, end: int, sizes: Sequence[Mapping[str, int]], instead: Mapping[int, torch.Tensor]
    ) -> None:
        """Compute nodes ``begin`` to ``end``, batch by batch; ``instead`` are operands of the first one, by place."""
        from bitwright.ir.semantics import apply

        g, last = self.graph, self.last
        nodes = [(i, n) for i, n in enumerate(g.nodes[begin:end], begin)]
        for x in dict.fromkeys(x for _, n in nodes for x in n.inputs if g.is_constant(x)):
            if x not in self.constants:
                self.constants[x] = to_torch(g.constant(x))
        nodes = [(i, n) for i, n in nodes if not isinstance(n.op, (ops.Weight, ops.Constant))]
        for values, bound in zip(self.batches, sizes, strict=True):
            for i, n in nodes:
                operands = [self.constants[x] if x in self.constants else values[x] for x in n.inputs]
                if i == begin:
                    operands = [instead.get(k, x) for k, x in enumerate(operands)]
                results = apply(bind_op(n.op, dict(bound)), *operands)
                values.update((o, r) for o, r in zip(n.outputs, results, strict=True) if o in last)
                del operands, results  # nothing holds what the next line frees
                for x in n.inputs:
                    if last[x] == i:
                        values.pop(x, None)
            give_back()
        for x in [x for x in self.constants if x in last and last[x] < end]:
            del self.constants[x]

    def operands(self, at: int) -> list[torch.Tensor]:
        """The first operand of a node in every batch."""
        x = self.graph.nodes[at].inputs[0]
        if self.graph.is_constant(x) and x not in self.constants:
            self.constants[x] = to_torch(self.graph.constant(x))
        return [self.constants[x] if x in self.constants else values[x] for values in self.batches]


def _inputs(graph: Graph, batch: Batch, number: int) -> dict[str, torch.Tensor]:
    from bitwright.ir.semantics import torch_dtype

    names = [v.name for v in graph.inputs]
    if not isinstance(batch, Mapping) and len(batch) != len(names):
        raise InvalidInput(f"calibration batch {number} has {len(batch)} arrays, {graph.name} takes {len(names)}")
    arrays = batch if isinstance(batch, Mapping) else dict(zip(names, batch, strict=True))
    if set(arrays) != set(names):
        raise InvalidInput(f"calibration batch {number} has inputs {list(arrays)}, {graph.name} takes {names}")
    values = {name: to_torch(arrays[name]) for name in names}
    for v in graph.inputs:
        if values[v.name].dtype != torch_dtype(v.type.dtype):
            got = values[v.name].dtype
            raise InvalidInput(f"calibration batch {number}: input {v.name!r} has type {v.type}, given dtype {got}")
    return values
