"""``bitwright.tune``: measure variants of a model's kernels, remember the fastest, and say what the model gained."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bitwright.assemble import assemble, batch_symbol, fit_batches
from bitwright.assemble import example_inputs as made_up_inputs
from bitwright.codegen.cache import Cache
from bitwright.codegen.targets import resolve
from bitwright.codegen.targets.machine import cpu_name
from bitwright.codegen.tuning.bench import LocalBench
from bitwright.codegen.tuning.records import Database
from bitwright.codegen.tuning.search import Goal, Search, State
from bitwright.codegen.tuning.tasks import tasks_of
from bitwright.codegen.tuning.workload import target_key
from bitwright.driver import Recipe, batches, prepared
from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.infer import bind_graph
from bitwright.ir.target import Target
from bitwright.pipeline import lower
from bitwright.runtime.bench import Ratio, measure
from bitwright.runtime.native import check_host

ROUNDS = 25
Told = Callable[[State, float], None]


@dataclass(frozen=True, slots=True)
class TunedLayer:
    """One workload: its first layer's name, the default template, share of the predicted run time, candidates that
    were measured and that failed, the default's seconds a call, the best ratio and the record it comes from."""

    name: str
    template: str
    share: float
    measured: int
    failed: int
    seconds: float
    ratio: float
    note: str


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning found: a row per workload, and the whole model's seconds a call untuned and tuned, measured in the
    same interleaved rounds; ``ratio`` is tuned over untuned."""

    database: Path
    rows: tuple[TunedLayer, ...]
    before: float
    after: float
    ratio: Ratio
    tried: int


def tune(
    model: Any,
    *,
    records: str | Path = "tuning.sqlite",
    minutes: float = 10.0,
    target: str | Target = "host",
    recipe: Recipe = "float",
    calibration: Any = None,
    example_inputs: Any = None,
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    budget: str = "",
    jobs: int | None = None,
    seed: int | None = None,
    workers: str = "local",
    told: Told | None = None,
) -> Tuned:
    """Tune the kernels of ``model`` for ``minutes`` into the database ``records``; arguments as of ``compile``.

    ``jobs``: compile workers (one per core); ``workers``: ``"local"`` or ``"ray"``; ``seed`` draws inputs and
    candidates (default: the time). Interrupt it at any time: every measurement is kept at once and not made again.
    Then compile with ``records=``. Raises :class:`BitwrightError` with the reasons when nothing could be measured,
    :class:`InvalidInput` for a target that this machine cannot run.
    """
    if not minutes >= 0:
        raise InvalidInput(f"minutes must be 0 or more, not {minutes}")
    machine = resolve(target)
    measured_on = _measured_on(machine, workers)
    bound = _bound(model, machine, recipe, calibration, example_inputs, batch, sizes, budget)
    goal = _goal(machine, measured_on, seed)
    with Database(Path(records)) as database:
        tasks = tasks_of(bound, machine)
        if not tasks:
            raise InvalidInput("the model has no kernels to tune")
        if minutes > 0:
            with bench_of(workers, machine, jobs) as bench:
                search = Search(database, bench, goal, tasks, told)
                search.run(minutes * 60)
            states, tried = search.states, search.ran
        else:
            states, tried = Search(database, _Nothing(), goal, tasks).states, 0
        rows = _rows(database, goal, states)
    return Tuned(Path(records), rows, *_compared(bound, machine, Path(records)), tried)


def prepare(
    model: Any,
    folder: str | Path,
    *,
    target: str | Target = "cuda-sm90",
    recipe: Recipe = "float",
    calibration: Any = None,
    example_inputs: Any = None,
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    budget: str = "",
    candidates: int = 32,
    jobs: int | None = None,
    seed: int = 0,
) -> int:
    """Compile at most ``candidates`` kernels of each layer for a GPU that is elsewhere, into a new ``folder``.

    Other arguments as of :func:`tune`. ``python -m bitwright.gpu_candidates FOLDER`` measures them on that machine.
    Returns how many there are. Raises :class:`InvalidInput` for a target that is no GPU.
    """
    from bitwright import gpu_candidates

    machine = resolve(target)
    if machine.kind != "gpu":
        raise InvalidInput(f"candidates are prepared for GPUs, and target {machine.name} is none: leave --prepare out")
    bound = _bound(model, machine, recipe, calibration, example_inputs, batch, sizes, budget)
    tasks = tasks_of(bound, machine)
    return gpu_candidates.prepare(tasks, machine, folder, most=candidates, seed=seed, jobs=jobs)


def _bound(
    model: Any,
    machine: Target,
    recipe: Recipe,
    calibration: Any,
    example_inputs: Any,
    batch: int,
    sizes: Mapping[str, int] | None,
    budget: str,
) -> Graph:
    """The model at kernel level with all sizes fixed."""
    graph, recipe, calibration = prepared(model, recipe, calibration, example_inputs, batch, sizes, budget)
    data = fit_batches(graph, batches(calibration))
    symbol, _ = batch_symbol(graph, batch)
    lowered = lower(graph, recipe, machine, data)
    return bind_graph(lowered.graph, dict.fromkeys(graph.symbols, batch)) if symbol else lowered.graph


def bench_of(workers: str, machine: Target, jobs: int | None) -> Any:
    """The bench that ``workers`` names, a context manager."""
    if workers == "local" and machine.kind == "gpu":
        from bitwright.gpu_tuning import DeviceBench, open_device

        return DeviceBench(partial(open_device, machine.mcpu), jobs)
    if workers == "local":
        return LocalBench(jobs)
    if workers == "ray" and machine.kind == "gpu":
        raise InvalidInput("the kernels of a GPU are measured on the device of this machine: leave --workers out")
    if workers == "ray":
        from bitwright.cluster import RayBench

        return RayBench(machine, jobs)
    raise InvalidInput(f"workers are 'local' or 'ray', not {workers!r}")


class _Nothing:
    """A bench for runs that only look up what is known."""

    batch = 1

    def _refuse(self, *_: Any) -> Any:
        raise BitwrightError("nothing is measured in a run of 0 minutes")

    compile = measure = run = _refuse


def _measured_on(machine: Target, workers: str) -> str:
    """The name of the processor or device that is measured; measurements need one that runs the target."""
    if machine.kind == "device":
        raise InvalidInput(f"target {machine.name} loads no programs, so its kernels cannot be measured here")
    if machine.kind == "gpu":
        from bitwright.gpu_tuning import device_name

        return device_name(machine.mcpu)
    if workers == "local":
        check_host(machine.features)
    return cpu_name()


def _goal(machine: Target, measured_on: str, seed: int | None) -> Goal:
    from bitwright.codegen.tvm.select import version

    drawn = int(time.time()) % (1 << 31) if seed is None else seed
    return Goal(machine, target_key(machine, measured_on), version(), measured_on, drawn)


def _rows(database: Database, goal: Goal, states: list[State]) -> tuple[TunedLayer, ...]:
    total = sum((s.default_seconds or s.task.predicted) * s.task.count for s in states) or 1.0
    rows = []
    for s in states:
        best = next(iter(database.best(s.task.key, goal.target_key, goal.compiler)), None)
        seconds = s.default_seconds or s.task.predicted
        row = TunedLayer(
            s.task.name, s.task.template, seconds * s.task.count / total, s.measured, s.failed, seconds,
            best.ratio if best else 1.0, s.broken or (best.label if best else ""),
        )  # fmt: skip
        rows.append(row)
    return tuple(sorted(rows, key=lambda r: -r.share))


def _compared(graph: Graph, machine: Target, records: Path) -> tuple[float, float, Ratio]:
    """Seconds of the whole program untuned and tuned, and their ratio, on one core (of a GPU: by the wall clock) in
    interleaved rounds."""
    cache = Cache()
    plain = assemble(graph, machine, (), [], cache=cache)
    tuned = assemble(graph, machine, (), [], cache=cache, records=records)
    inputs = made_up_inputs(plain)
    timings = measure(
        {"untuned": lambda: plain(*inputs), "tuned": lambda: tuned(*inputs)}, rounds=ROUNDS, sample_seconds=0.02
    )
    ratio = timings.ratio("tuned", "untuned", cpu=machine.kind == "cpu")
    before, after = timings["untuned"], timings["tuned"]
    if machine.kind == "gpu":
        return before.median, after.median, ratio
    return before.cpu_median, after.cpu_median, ratio
