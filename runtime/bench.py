"""Measuring callables against each other: interleaved rounds on one core, medians, minima and ratios.

On a shared machine the wall clock measures the neighbours too: compare by the ratio of interleaved rounds, or by
the minimum of the CPU time of the calling thread (which leaves out the work of other threads).
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bitwright.ir.errors import InvalidInput

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Series:
    """Seconds per call of one callable, one entry per round: wall clock, and CPU of the calling thread."""

    name: str
    calls: int
    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def best(self) -> float:
        """Fewest wall-clock seconds per call."""
        return min(self.wall)

    @property
    def median(self) -> float:
        """Median wall-clock seconds per call."""
        return statistics.median(self.wall)

    @property
    def cpu_best(self) -> float:
        """Fewest CPU seconds per call of the calling thread."""
        return min(self.cpu)

    @property
    def cpu_median(self) -> float:
        """Median CPU seconds per call of the calling thread."""
        return statistics.median(self.cpu)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as long one callable takes as another, from the rounds in which both ran."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Timings:
    """The series of every callable, by name."""

    series: Mapping[str, Series]
    core: int | None

    def __getitem__(self, name: str) -> Series:
        return self.series[name]

    def ratio(self, slow: str, fast: str, *, cpu: bool = False) -> Ratio:
        """Time of ``slow`` over that of ``fast``: median and quartiles of the rounds' ratios."""
        a, b = self.series[slow], self.series[fast]
        pairs = zip(a.cpu, b.cpu, strict=True) if cpu else zip(a.wall, b.wall, strict=True)
        ratios = sorted(x / y for x, y in pairs)
        return Ratio(statistics.median(ratios), ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4])


@contextlib.contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Keep the calling thread on ``core`` meanwhile (None: leave it); threads it starts inherit that."""
    if core is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    if core not in before:
        raise InvalidInput(f"core {core} is not usable here (usable: {', '.join(map(str, sorted(before)))})")
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(
    callables: Mapping[str, Call],
    *,
    rounds: int = 20,
    sample_seconds: float = 0.005,
    warmup_seconds: float = 0.05,
    core: int | None = None,
) -> Timings:
    """Time every callable in ``rounds`` interleaved rounds; each sample repeats it for ``sample_seconds``.

    The order rotates from round to round. ``core`` pins the calling thread: leave it None for callables that use
    several threads. Raises :class:`InvalidInput` for nothing to measure or no rounds.
    """
    if not callables or rounds < 1:
        raise InvalidInput("nothing to measure: give at least one callable and one round")
    names = list(callables)
    wall: dict[str, list[float]] = {n: [] for n in names}
    cpu: dict[str, list[float]] = {n: [] for n in names}
    collecting = gc.isenabled()
    with pinned(core):
        calls = {n: _warm(callables[n], warmup_seconds, sample_seconds) for n in names}
        gc.disable()
        try:
            for index in range(rounds):
                shift = index % len(names)
                for name in names[shift:] + names[:shift]:
                    seconds, own = _sample(callables[name], calls[name])
                    wall[name].append(seconds)
                    cpu[name].append(own)
        finally:
            if collecting:
                gc.enable()
    return Timings({n: Series(n, calls[n], tuple(wall[n]), tuple(cpu[n])) for n in names}, core)


def _warm(call: Call, warmup: float, sample: float) -> int:
    """Run for ``warmup`` seconds; how many calls make up one sample."""
    fastest, end = float("inf"), time.perf_counter() + warmup
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        fastest = min(fastest, now - start)
        if now >= end:
            return max(1, round(sample / max(fastest, 1e-7)))


def _sample(call: Call, calls: int) -> tuple[float, float]:
    """(wall, CPU) seconds per call over ``calls`` calls."""
    own, start = time.thread_time(), time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls, max(time.thread_time() - own, 1e-12) / calls
