"""Calibration batches that are read when somebody asks for them, again on every pass over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, Protocol


class Source(Sized, Protocol):
    """What can be iterated over again and again, with a length: a list of files, a torch DataLoader."""

    def __iter__(self) -> Iterator[Any]: ...


class LazyBatches(Sequence[Any]):
    """Each entry of ``source`` becomes the batches that ``expand`` makes of it; none of them is held.

    ``counts``: how many batches each entry gives; None: found by making all of them once, which also checks them.
    """

    def __init__(
        self, source: Source, expand: Callable[[Any], Sequence[Any]], counts: Sequence[int] | None = None
    ) -> None:
        self.source, self.expand = source, expand
        self.counts = [len(expand(entry)) for entry in source] if counts is None else list(counts)

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[Any]:
        for entry in self.source:
            yield from self.expand(entry)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        for i, count in enumerate(self.counts):
            if place < count:
                return self.expand(self._entry(i))[place]
            place -= count
        raise AssertionError

    def _entry(self, i: int) -> Any:
        return self.source[i] if isinstance(self.source, Sequence) else next(islice(iter(self.source), i, None))


__all__ = ["LazyBatches"]
