"""Running a graph over all calibration batches side by side, one node after the other, with a stop at chosen nodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.infer import bind_op
from bitwright.ir.interpret import bind_symbols, to_torch
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

    Of each batch only the values that are still to be read are held. ``given`` replaces weights by value name.
    With ``twin`` every batch is computed a second time beside, with these weights and nothing of what visits return.
    Raises :class:`InvalidInput` for a batch that does not fit the graph's inputs.
    """
    import torch

    from bitwright.ir.semantics import apply

    ends = [i for i, n in enumerate(graph.nodes) if n.output in stops]
    nodes = graph.nodes[: ends[-1] + 1] if ends else ()
    last = {x: i for i, n in enumerate(nodes) for x in n.inputs}
    live = [_inputs(graph, batch, number) for number, batch in enumerate(batches)]
    sizes = [bind_symbols(graph, [tuple(values[v.name].shape) for v in graph.inputs]) for values in live]
    sides = [(live, dict(given or {}))] + ([] if twin is None else [([dict(v) for v in live], dict(twin))])
    with torch.no_grad():
        for i, n in enumerate(nodes):
            if isinstance(n.op, (ops.Weight, ops.Constant)):
                for _, constants in sides:
                    if n.output not in constants:
                        constants[n.output] = to_torch(graph.constant(n.output))
                continue
            instead: Mapping[int, torch.Tensor] = {}
            if n.output in stops:
                x = n.inputs[0]
                first = [[constants[x] if x in constants else v[x] for v in side] for side, constants in sides]
                instead = visit(n, first[0], first[1] if twin is not None else []) or {}
            for side, constants in sides:
                for values, bound in zip(side, sizes, strict=True):
                    operands = [constants[x] if x in constants else values[x] for x in n.inputs]
                    results = apply(bind_op(n.op, bound), *(instead.get(k, x) for k, x in enumerate(operands)))
                    values.update((o, r) for o, r in zip(n.outputs, results, strict=True) if o in last)
                    for x in n.inputs:
                        if last[x] == i:
                            values.pop(x, None)
                for x in n.inputs:
                    if last[x] == i:
                        constants.pop(x, None)
                instead = {}


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
