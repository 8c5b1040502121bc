"""Calibration data in two parts: one that layers are fitted to, one that tells how well they do on other data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitwright.ir.graph import Graph
from bitwright.passes._pass import Batch

EVERY = 4
"""One of so many samples is not fitted to."""


@dataclass(frozen=True)
class Split:
    """``fit`` and ``judge`` have no sample in common where ``apart``; else they are the same data."""

    fit: Sequence[Batch]
    judge: Sequence[Batch]
    apart: bool

    def __str__(self) -> str:
        return "samples that no layer was fitted to" if self.apart else "the data that layers are fitted to"


def held_out(graph: Graph, calibration: Sequence[Batch]) -> Split:
    """Every :data:`EVERY`-th batch is kept to judge by; of fewer batches, every such row where the graph takes any
    number of rows, or the last batch. One batch of a fixed size cannot be divided. Batches read from files stay there.
    """
    count = len(calibration)
    if count >= EVERY:
        return Split(_Part(calibration, _rest), _Part(calibration, _taken), True)
    if _any_rows(graph) and all(_rows(b) > 1 for b in calibration):
        return Split([_cut(b, _rest) for b in calibration], [_cut(b, _taken) for b in calibration], True)
    if count > 1:
        return Split(calibration[:-1], calibration[-1:], True)
    return Split(calibration, calibration, False)


def _taken(i: int, count: int) -> bool:
    """True for what judges: the last of each group, of a short one as well if it is the only one."""
    return i % EVERY == EVERY - 1 or (count < EVERY and i == count - 1)


def _rest(i: int, count: int) -> bool:
    return not _taken(i, count)


@dataclass(frozen=True)
class _Part(Sequence[Any]):
    """Some batches of a sequence that may be read anew each time."""

    whole: Sequence[Any]
    wanted: Callable[[int, int], bool]

    def __len__(self) -> int:
        return sum(self.wanted(i, len(self.whole)) for i in range(len(self.whole)))

    def __iter__(self) -> Iterator[Any]:
        return (b for i, b in enumerate(self.whole) if self.wanted(i, len(self.whole)))

    def __getitem__(self, index: Any) -> Any:
        places = [i for i in range(len(self.whole)) if self.wanted(i, len(self.whole))]
        if isinstance(index, slice):
            return [self.whole[i] for i in places[index]]
        return self.whole[places[index]]


def _any_rows(graph: Graph) -> bool:
    """True when all inputs begin with one symbol, by itself."""
    heads = {v.type.shape[0] if v.type.shape else 0 for v in graph.inputs}
    return len(heads) == 1 and str(next(iter(heads))) in graph.symbols


def _rows(batch: Batch) -> int:
    values = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    return min(len(v) for v in values)


def _cut(batch: Batch, wanted: Callable[[int, int], bool]) -> Batch:
    rows = [i for i in range(_rows(batch)) if wanted(i, _rows(batch))]
    if isinstance(batch, Mapping):
        return {name: a[rows] for name, a in batch.items()}
    return tuple(a[rows] for a in batch)


__all__ = ["EVERY", "Split", "held_out"]
