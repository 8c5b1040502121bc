"""What the benchmark scripts share: timing with a noise-proof statistic, the environment, Markdown and JSON results.

A time is the median over interleaved rounds of min(wall, CPU of the calling thread): on a shared machine the wall
clock measures the neighbours too. Every contender runs on one thread inside its caller, pinned to one core.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.codegen.targets.machine import cpu_name
from bitwright.runtime.bench import measure

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Times:
    """Seconds per call by round, min(wall, CPU) of each, with the best wall clock beside."""

    rounds: Mapping[str, tuple[float, ...]]
    wall: Mapping[str, float]

    def median(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def best(self, name: str) -> float:
        return min(self.rounds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """Median over the rounds of the time of ``slow`` over that of ``fast``."""
        pairs = zip(self.rounds[slow], self.rounds[fast], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def fastest(self, names: Sequence[str]) -> str | None:
        return min(names, key=self.median, default=None)


def race(calls: Mapping[str, Callable[[], object]], *, rounds: int, sample: float, core: int) -> Times:
    """Time every call in interleaved rounds on one core."""
    timings = measure(calls, rounds=rounds, sample_seconds=sample, warmup_seconds=min(0.5, 2 * sample), core=core)
    own = {n: tuple(min(p) for p in zip(timings[n].wall, timings[n].cpu, strict=True)) for n in calls}
    return Times(own, {n: timings[n].best for n in calls})


def last_core() -> int:
    """The core to measure on unless told."""
    return max(os.sched_getaffinity(0))


def environment(versions: Mapping[str, str]) -> dict[str, Any]:
    """Everything a reader needs to judge a figure."""
    return {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_name() or platform.processor(),
        "cores": os.cpu_count(),
        "load": [round(x, 1) for x in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": dict(versions),
    }


RACED = "One thread, one core; interleaved rounds; a time is the median over the rounds of min(wall, CPU)."


def heading(title: str, env: Mapping[str, Any], method: str = RACED) -> str:
    """The first lines of a results file."""
    packages = ", ".join(f"{k} {v}" for k, v in env["versions"].items())
    load = " ".join(map(str, env["load"]))
    return (
        f"# {title}\n\n`{env['command']}`, {env['date']}; {env['cpu']}, {env['cores']} cores, load {load}; "
        f"{env['system']}, Python {env['python']}; {packages}.\n\n"
        f"{method}\n"
    )


def markdown(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right."""
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    lines += ["| " + " | ".join("" if c is None else str(c) for c in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def verdict(ok: bool) -> str:
    return "met" if ok else "MISSED"


def save(stem: str, text: str, data: Any) -> None:
    """Write results/<stem>.md and .json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}.md").write_text(text)
    (RESULTS / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n")
    print(f"written to {RESULTS / stem}.md and .json")
