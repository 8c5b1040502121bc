"""Small calibration batches put together: what layers of little work cost is calls, not values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from bitwright.ir.batch import why_not_separable
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.infer import bind_graph
from bitwright.ir.interpret import bind_symbols
from bitwright.ir.weights import Array
from bitwright.ir.work import macs
from bitwright.passes._pass import Batch

WORK = 1 << 26
"""Multiply-accumulates up to which batches are joined, a value that is computed counting as :data:`VALUE` of them:
about a millisecond of one core and some megabytes."""
VALUE = 16
Named = dict[str, Array]


def joined(graph: Graph, batches: Iterable[Batch]) -> Iterator[tuple[Named, list[Named]]]:
    """Batches one after the other, small ones along the rows as one, each with those it is made of; where the graph
    treats rows one by one, and its inputs begin with them. At most :data:`WORK` is held."""
    names, able, known = [v.name for v in graph.inputs], _by_rows(graph), dict[object, int]()
    parts, work = list[Named](), 0
    for batch in batches:
        given = dict(batch) if isinstance(batch, Mapping) else dict(zip(names, batch, strict=False))
        form = _form(given)
        if form not in known:
            known[form] = _work(graph, given) if able and set(given) == set(names) else WORK
        if parts and (work + known[form] > WORK or _tails(given) != _tails(parts[0])):
            yield _one(parts), parts
            parts, work = [], 0
        parts.append(given)
        work += known[form]
        if work >= WORK:  # before the next one is read
            yield _one(parts), parts
            parts, work = [], 0
    if parts:
        yield _one(parts), parts


def _by_rows(graph: Graph) -> bool:
    heads = {v.type.shape[0] if v.type.shape else 0 for v in graph.inputs}
    symbol = str(next(iter(heads))) if len(heads) == 1 else ""
    return symbol in graph.symbols and not why_not_separable(graph, symbol)


def _form(batch: Named) -> tuple[object, ...]:
    return tuple((n, np.shape(a)) for n, a in batch.items())


def _tails(batch: Named) -> list[object]:
    return [(n, np.shape(a)[1:], np.asarray(a).dtype) for n, a in batch.items()]


def _work(graph: Graph, batch: Named) -> int:
    """That of a batch; of one that does not fit, so much that it stays alone and the interpreter names it."""
    try:
        bound = bind_graph(graph, bind_symbols(graph, [np.shape(batch[v.name]) for v in graph.inputs]))
        return sum(macs(n, bound) + VALUE * sum(bound.types[o].size for o in n.outputs) for n in bound.nodes)
    except (InvalidInput, KeyError, ValueError, TypeError):
        return WORK


def _one(parts: list[Named]) -> Named:
    if len(parts) == 1:
        return parts[0]
    return {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}


__all__ = ["WORK", "joined"]
