"""``bitwright advise``."""

from __future__ import annotations

from typing import Annotated

import typer

from bitwright.cli_options import Calibration, Model, TargetName, load, progress


def advise(
    model: Model,
    target: TargetName = "host",
    batch: Annotated[int, typer.Option(min=1, help="Rows of a model with a symbolic batch.")] = 1,
    budget: Annotated[
        str, typer.Option(help="Plan the best formats within: size=0.16, latency=0.5, latency=2ms, loss=0.01.")
    ] = "",
    calibrate: Calibration = None,
) -> None:
    """Say what would pay on a target, layer by layer, before anything is pruned or compiled.

    [dim]bitwright advise model.onnx --budget latency=0.25 --calibrate inputs.npz[/]
    """
    from bitwright import advice_tables, cli_io, cli_show, driver

    with progress() as say:
        say(f"reading {model.name}", 0.0)
        graph = load(model)
        say("predicting", 0.1)
        found = driver.advise(
            graph, target, batch=batch, budget=budget, calibration=cli_io.calibration(calibrate, graph)
        )
    advice_tables.show(cli_show.console(), found.rows, found.plan)
