"""``bitwright tune``: search for the fastest kernels of a model, show and merge what was measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli_options import Calibration, Recipe, TargetName, load
from bitwright.ir.errors import InvalidInput

if TYPE_CHECKING:
    from bitwright.codegen.tuning.records import Database, Record
    from bitwright.codegen.tuning.search import State
    from bitwright.tuning import Tuned


class Where(StrEnum):
    """Where candidates are measured."""

    local = "local"
    ray = "ray"


def tune(
    model: Annotated[
        Path | None, typer.Argument(help="A model: .onnx, .pt2 or .bw-ir (none with --show and --merge alone).")
    ] = None,
    db: Annotated[Path, typer.Option("--db", help="Tuning database; made if there is none.")] = Path("tuning.sqlite"),
    target: TargetName = "host",
    recipe: Recipe = "float",
    calibrate: Calibration = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows computed at once of a model with a symbolic batch.")] = 1,
    size: Annotated[list[str] | None, typer.Option("--size", help="Fix a symbolic size: --size seq=128.")] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="Time to spend; 0 only compares what is known.")] = 10.0,
    jobs: Annotated[int | None, typer.Option(min=1, max=256, help="Compile workers; one per core.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of inputs and random candidates; else the time.")] = None,
    workers: Annotated[Where, typer.Option(help="Measure here, or on the nodes of a Ray cluster.")] = Where.local,
    prepare: Annotated[
        Path | None, typer.Option(help="Only compile candidates for a GPU elsewhere, into this new folder.")
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="With --prepare: at most so many of each layer.")] = 32,
    show: Annotated[bool, typer.Option("--show", help="Show what the database holds.")] = False,
    merge: Annotated[Path | None, typer.Option(help="Add the records of another database.")] = None,
) -> None:
    """Measure variants of a model's kernels on this machine and remember the fastest correct ones.

    Interrupt it at any time: what was measured is kept, and the next run goes on from there.

    [dim]bitwright tune model.onnx --recipe int8 -c inputs.npz --minutes 10 --db tuning.sqlite[/]
    [dim]bitwright compile model.onnx --recipe int8 -c inputs.npz --db tuning.sqlite[/]
    """
    from bitwright import cli_show, tuning
    from bitwright.codegen.tuning.records import Database

    console = cli_show.console()
    if model is None and not show and merge is None:
        raise InvalidInput("name a model to tune, or use --show or --merge")
    if merge is not None:
        with Database(merge, write=False) as other, Database(db) as mine:
            console.print(f"{mine.merge(other)} new records from {merge}", markup=False)
    if model is not None:
        from bitwright import cli_io

        graph = load(model)
        made_up = calibrate == Path("synthetic") and not calibrate.exists()
        data = "synthetic" if made_up else cli_io.calibration(calibrate, graph)
        if prepare is not None:
            made = tuning.prepare(
                graph, prepare, target=target, recipe=recipe, calibration=data, batch=batch, sizes=cli_io.sizes(size),
                candidates=candidates, jobs=jobs, seed=seed or 0,
            )  # fmt: skip
            told = f"{made} candidates in {prepare}; where the device is: python -m bitwright.gpu_candidates {prepare}"
            console.print(told, markup=False)
            return
        try:
            with _progress(minutes) as tell:
                result = tuning.tune(
                    graph, records=db, minutes=minutes, target=target, recipe=recipe, calibration=data, batch=batch,
                    sizes=cli_io.sizes(size), jobs=jobs, seed=seed, workers=workers.value, told=tell,
                )  # fmt: skip
        except KeyboardInterrupt:
            kept = f"{db} keeps what was measured; the next run goes on from there"
            cli_show.console(stderr=True).print(kept, markup=False)
            raise
        _print(result)
    if show:
        with Database(db, write=False) as mine:
            _show(mine)


@contextlib.contextmanager
def _progress(minutes: float) -> Iterator[Callable[[State, float], None]]:
    """A line with the task at hand, its best ratio so far and the time left; silent where stderr is no terminal."""
    from rich.progress import BarColumn, Progress, TextColumn

    from bitwright import cli_show

    console = cli_show.console(stderr=True)
    columns = (TextColumn("{task.description:<30}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, counts = bar.add_task("reading the model", total=max(1e-9, minutes * 60), left=""), [0, 0]

        def tell(state: State, left: float) -> None:
            text = f"{state.task.names[0][:22]} {state.best:.2f}x"
            counts[:] = [state.measured, state.failed]
            clock = time.strftime("%M:%S", time.gmtime(left))
            more = f"{counts[0]} measured, {counts[1]} failed, {clock} left"
            bar.update(task, description=text, completed=minutes * 60 - left, left=more)

        yield tell


def _print(result: Tuned) -> None:
    from bitwright import cli_show
    from bitwright.runtime import units

    rows = [
        (
            r.name, r.template, units.percent(r.share), str(r.measured), str(r.failed), units.seconds(r.seconds),
            f"{r.ratio:.2f}x" if r.ratio < 1 else "default", r.note,
        )
        for r in result.rows
    ]  # fmt: skip
    console = cli_show.console()
    heads = ["layer", "untuned", ">share", ">measured", ">failed", ">default", ">best", "record"]
    console.print(cli_show.table(heads, rows))
    before, after, ratio = units.seconds(result.before), units.seconds(result.after), result.ratio
    console.print(f"whole model: {before} untuned, {after} tuned: {ratio} in interleaved rounds", markup=False)
    console.print(f"compile with: --db {result.database}", markup=False)


def _show(database: Database) -> None:
    """One line per workload: what was tried, what failed and why, what is best."""
    from bitwright import cli_show
    from bitwright.runtime import units

    console, known = cli_show.console(), database.workloads()
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for r in database.records():
        groups.setdefault((r.workload, r.target, r.compiler), []).append(r)
    rows = []
    for (workload, target, compiler), tried in groups.items():
        good = [r for r in tried if r.status == "ok"]
        best = next(iter(database.best(workload, target, compiler)), None)
        default = next((r.default_seconds for r in good), 0.0)
        point = " ".join(f"{k}={v}" for k, v in best.point.items()) if best else ""
        told = f"{best.label}: {best.template} {point}" if best else "the default"
        ratio = f"{best.ratio:.2f}x" if best else ""
        name = _workload_name(known.get(workload, ("", {}))[1])
        rows.append((name, str(len(good)), str(len(tried) - len(good)), units.seconds(default), ratio, told))
    console.print(cli_show.table(["workload", ">measured", ">failed", ">default", ">best", "by"], rows))
    reasons: dict[tuple[str, str], int] = {}
    for r in database.records():
        if r.status != "ok":
            reasons[r.status, r.reason] = reasons.get((r.status, r.reason), 0) + 1
    for (status, reason), count in sorted(reasons.items(), key=lambda x: -x[1]):
        console.print(f"{count} times {status}: {reason}", markup=False)
    if not rows:
        console.print("the database is empty", markup=False)


def _workload_name(features: dict[str, float]) -> str:
    """``int_linear 128x3072x768 (u8 by s8)`` out of a workload's features."""
    named = {k.split(".")[0]: k.split(".", 1)[1] for k in features if "." in k}
    sizes = "x".join(str(round(2 ** features[k])) for k in ("rows", "cols", "depth") if k in features)
    pair = f" ({named['x']} by {named['w']})" if "x" in named else ""
    return " ".join(filter(None, [named.get("op", "?"), sizes])) + pair
