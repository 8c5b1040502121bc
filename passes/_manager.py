"""Runs pipelines: levels and facts checked when built, the verifier after every change, a row per pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bitwright.ir.errors import BitwrightError, InvalidInput, VerifyError
from bitwright.ir.graph import Graph, Level
from bitwright.ir.verify import verify
from bitwright.passes._instruments import Instrument, write_crash
from bitwright.passes._measure import OutputError
from bitwright.passes._pass import Context, Pass, Refusal


class PassFailed(BitwrightError):
    """A pass raised or broke a rule of its level: a bug of that pass. The message says how to replay it."""


@dataclass(frozen=True)
class Pipeline:
    """Passes whose levels and facts fit together; one that does not fit fails when built."""

    passes: tuple[Pass, ...]
    takes: Level | None = None
    """Level of the graph that comes in; None: what the first pass takes."""
    given: tuple[str, ...] = ()
    """Facts known before the first pass."""

    def __post_init__(self) -> None:
        level, before = self.takes, "the input"
        facts = set(self.given)
        for p in self.passes:
            if level is not None and p.takes != level:
                raise InvalidInput(f"{p.name} takes a graph of level {p.takes}, but {before} gives level {level}")
            for fact in p.needs:
                if fact not in facts:
                    raise InvalidInput(f"{p.name} needs {fact}, which nothing before it gives{_who_gives(fact)}")
            level, before = p.gives, p.name
            facts.update(p.establishes)

    @property
    def gives(self) -> Level | None:
        """Level of the graph that comes out; None for an empty pipeline of any level."""
        return self.passes[-1].gives if self.passes else self.takes

    def __add__(self, more: Pipeline | Iterable[Pass]) -> Pipeline:
        extra = more.passes if isinstance(more, Pipeline) else tuple(more)
        return Pipeline((*self.passes, *extra), self.takes, self.given)

    def __str__(self) -> str:
        return ", ".join(map(str, self.passes))


def _who_gives(fact: str) -> str:
    from bitwright.passes.registry import PASSES, load

    names = [n for n in PASSES if fact in load(n).establishes]
    return f" ({' or '.join(names)} does)" if names else ""


@dataclass(frozen=True, slots=True)
class PassRow:
    """What one pass did. ``output_error``: relative RMS change of the outputs against the pipeline's input graph
    on the first calibration batch, for lossy passes that changed something; None where it was not measured."""

    index: int
    name: str
    options: str
    seconds: float
    nodes_before: int
    nodes_after: int
    changed: bool
    skipped: bool = False
    notes: tuple[str, ...] = ()
    output_error: float | None = None


@dataclass(frozen=True)
class PipelineReport:
    """Plain data about a run: a row per pass, what was refused and why, what was remarked."""

    pipeline: str
    rows: tuple[PassRow, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    remarks: tuple[tuple[str, str, dict[str, Any]], ...] = ()
    seconds: float = 0.0
    finish: Callable[[], tuple[PassRow, ...]] | None = field(default=None, repr=False, compare=False)
    """Set while output errors are still being measured."""

    def settled(self) -> PipelineReport:
        """With all output errors, once they are measured."""
        return self if self.finish is None else replace(self, rows=self.finish(), finish=None)

    def as_dict(self) -> dict[str, Any]:
        """The report as dictionaries and lists."""
        return {k: v for k, v in asdict(self.settled()).items() if k != "finish"}

    def why(self, pass_name: str) -> tuple[Refusal, ...]:
        """What a pass refused."""
        return tuple(r for r in self.refusals if r.pass_name == pass_name)


@dataclass
class _Run:
    """State of one run of a pipeline."""

    passes: tuple[Pass, ...]
    context: Context
    instruments: Sequence[Instrument]
    crash_dir: Path | None
    error: OutputError
    later: ThreadPoolExecutor | None = None
    rows: list[PassRow] = field(default_factory=list)
    waiting: dict[int, Future[float]] = field(default_factory=dict)
    """Output errors by position among the rows."""

    def finish(self) -> tuple[PassRow, ...]:
        """The rows with their output errors, and what was found about layers for the driver."""
        for place, error in self.waiting.items():
            self.rows[place] = replace(self.rows[place], output_error=error.result())
        if self.later is not None:
            self.later.shutdown()
        self.context.layers = self.error.layers
        return tuple(self.rows)

    def step(self, index: int, p: Pass, graph: Graph) -> Graph:
        refused, remarked = len(self.context.refusals), len(self.context.remarks)
        for i in self.instruments:
            i.before(index, p, graph)
        start = time.perf_counter()
        try:
            after = p.run(graph, self.context)
            changed = after.changed_from(graph)
            if changed:
                verify(after, p.gives)
                after = after.drop_dead()
        except BitwrightError as e:
            if isinstance(e, VerifyError):
                raise self.failed(index, p, graph, e) from e
            raise
        except Exception as e:
            raise self.failed(index, p, graph, e) from e
        seconds = time.perf_counter() - start
        after = after if changed else graph
        if self.context.trace is not None:
            self.error.adopt(self.context.trace, self.context.calibration)
            self.context.trace = None
        notes: list[str] = []
        if changed and p.lossy:
            error, why_not = self.error.of(after, self.context.calibration, self.later)
            notes += [why_not] if why_not else []
            self.waiting |= {} if error is None else {len(self.rows): error}
        told, kept = len(self.context.remarks) - remarked, len(self.context.refusals) - refused
        notes += [f"{told} remark{'s' if told > 1 else ''}"] if told else []
        notes += [f"{kept} refused"] if kept else []
        sizes = len(graph.nodes), len(after.nodes)
        self.rows.append(PassRow(index, p.name, p.options, seconds, *sizes, changed, False, tuple(notes)))
        for i in self.instruments:
            i.after(index, p, graph, after, changed, seconds)
        return after

    def failed(self, index: int, p: Pass, graph: Graph, e: Exception) -> PassFailed:
        what = f"pass {p.name} (number {index + 1} of {len(self.passes)}) failed: {type(e).__name__}: {e}"
        if self.crash_dir is None:
            return PassFailed(what)
        return PassFailed(f"{what}\n{write_crash(self.crash_dir, graph, self.passes[index:], self.context)}")


def run_pipeline(
    graph: Graph,
    passes: Pipeline | Iterable[Pass],
    context: Context | None = None,
    *,
    instruments: Sequence[Instrument] = (),
    stop_after: int | str | None = None,
    bisect_limit: int | None = None,
    crash_dir: str | Path | None = ".",
    wait: bool = True,
) -> tuple[Graph, PipelineReport]:
    """Run passes over a graph; returns the graph and the report.

    ``stop_after``: a number of passes, or the name of the last pass to run (its first occurrence).
    ``bisect_limit``: from this number of passes on, those that keep the level are skipped. ``crash_dir``: where
    a failing pass leaves its reproducer (None: nowhere). Without ``wait`` output errors are measured in a thread of
    their own, and the report has them when it is ``settled()``. Raises :class:`InvalidInput` when the passes do not fit
    together or the input is at fault, :class:`PassFailed` when a pass is.
    """
    context = context or Context()
    pipeline = passes if isinstance(passes, Pipeline) else Pipeline(tuple(passes), graph.level, tuple(context.facts))
    if pipeline.passes and pipeline.passes[0].takes != graph.level:
        raise InvalidInput(
            f"{pipeline.passes[0].name} takes level {pipeline.passes[0].takes}, the graph is {graph.level}"
        )
    start = time.perf_counter()
    crash = Path(crash_dir) if crash_dir is not None else None
    later = None if wait else ThreadPoolExecutor(1, "output-errors")
    run = _Run(pipeline.passes, context, instruments, crash, OutputError(graph, context.calibration), later)
    refused, remarked = len(context.refusals), len(context.remarks)
    for i in instruments:
        i.begin(graph)
    for index, p in enumerate(pipeline.passes[: _stop(pipeline, stop_after)]):
        if bisect_limit is not None and index >= bisect_limit and p.takes == p.gives:
            run.rows.append(PassRow(index, p.name, p.options, 0.0, len(graph.nodes), len(graph.nodes), False, True))
            continue
        if context.progress is not None:
            context.progress(p.name, index / len(pipeline.passes))
        graph = run.step(index, p, graph)
    report = PipelineReport(
        str(pipeline), (), tuple(context.refusals[refused:]), tuple(context.remarks[remarked:]),
        time.perf_counter() - start, run.finish,
    )  # fmt: skip
    return graph, report.settled() if wait else report


def _stop(pipeline: Pipeline, stop_after: int | str | None) -> int | None:
    if not isinstance(stop_after, str):
        return stop_after
    for i, p in enumerate(pipeline.passes):
        if p.name == stop_after:
            return i + 1
    raise InvalidInput(f"cannot stop after {stop_after!r}: the pipeline is {pipeline}")


__all__ = ["PassFailed", "PassRow", "Pipeline", "PipelineReport", "run_pipeline"]
