"""``bitwright compare``: one model on many targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli_options import Calibration, Model, load, progress

if TYPE_CHECKING:
    from bitwright.compare import Row


def compare(
    model: Model,
    targets: Annotated[str, typer.Option(help="Targets and devices by comma; c:aarch64 is C by that compiler.")],
    recipe: Annotated[list[str] | None, typer.Option("--recipe", "-r", help="May be given again; int8.")] = None,
    calibrate: Calibration = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows computed at once of a model with a symbolic batch.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="Write latency against bytes as a .png or .svg.")] = None,
) -> None:
    """Compare targets: time, bytes, energy, error against the float model, and whether all give the same bits.

    [dim]bitwright compare model.onnx --targets host,c:aarch64,npu8 -r int8 -r "nm-mask{pattern=2:4}, int8" -c x.npz[/]
    """
    from bitwright import cli_io, cli_show
    from bitwright import compare as comparing

    recipes = recipe or ["int8"]
    names = [t.strip() for t in targets.split(",") if t.strip()]
    with progress() as tell:
        tell(f"reading {model.name}", 0.0)
        graph = load(model)
        rows = comparing.compare(graph, names, recipes, cli_io.calibration(calibrate, graph), batch=batch)
    for name in recipes:
        print_rows(name, [r for r in rows if r.recipe == name])
    if plot:
        comparing.plot(rows, plot)
        cli_show.console().print(f"wrote {plot}", markup=False)


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """The table of one recipe, and whether its targets agree."""
    from bitwright import cli_show
    from bitwright.compare import agreement
    from bitwright.runtime import units

    cells = [
        (
            r.target, units.seconds(r.seconds), r.how, units.size(int(r.weight_bytes)), units.size(int(r.ram)),
            "" if r.energy is None else f"{r.energy * 1e6:.3g} µJ", units.percent(r.error), r.note,
        )
        for r in rows
    ]  # fmt: skip
    heads = ["target", ">time", "", ">weights", ">RAM", ">energy", ">error", "note"]
    cli_show.console().print(cli_show.table(heads, cells, title=title))
    cli_show.console().print(agreement(rows), markup=False)
