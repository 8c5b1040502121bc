"""The measuring helper: interleaving, ratios, pinning."""

from __future__ import annotations

import gc
import os
import time

import pytest

from bitwright.ir.errors import InvalidInput
from bitwright.runtime.bench import Ratio, Series, Timings, measure, pinned


def busy(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_slower_callable_has_the_larger_figures() -> None:
    calls = {"slow": lambda: busy(3e-4), "fast": lambda: busy(1e-4)}
    timings = measure(calls, rounds=9, sample_seconds=0.001, warmup_seconds=0.01)
    assert 2 < timings.ratio("slow", "fast", cpu=True).median < 4.5
    slow = timings["slow"]
    assert len(slow.wall) == len(slow.cpu) == 9
    assert slow.best <= slow.median
    assert 2.5e-4 < slow.cpu_best <= slow.cpu_median
    assert slow.calls < timings["fast"].calls
    assert gc.isenabled()


def test_rounds_are_interleaved_and_rotate() -> None:
    order: list[str] = []
    calls = {n: (lambda n=n: order.append(n)) for n in "abc"}
    measure(calls, rounds=3, sample_seconds=0, warmup_seconds=0)
    assert "".join(order[-9:]) == "abcbcacab"


def test_ratios_come_from_pairs_of_one_round() -> None:
    a, b = Series("a", 1, (2.0, 20.0, 200.0), (1.0,) * 3), Series("b", 1, (1.0, 10.0, 100.0), (1.0,) * 3)
    timings = Timings({"a": a, "b": b}, None)
    assert timings.ratio("a", "b") == Ratio(2.0, 2.0, 2.0)
    assert str(timings.ratio("a", "b")) == "2.00x (2.00 to 2.00)"


def test_the_thread_is_pinned_meanwhile_only() -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    with pinned(core):
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(InvalidInput, match="core 99999 is not usable"), pinned(99999):
        pass
    seen: list[set[int]] = []
    measure(
        {"a": lambda: seen.append(os.sched_getaffinity(0))}, rounds=1, warmup_seconds=0, sample_seconds=0, core=core
    )
    assert seen[-1] == {core}


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="nothing to measure"):
        measure({})
    with pytest.raises(InvalidInput):
        measure({"a": lambda: None}, rounds=0)
