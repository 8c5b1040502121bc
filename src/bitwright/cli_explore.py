"""``bitwright explore``: hardware and model designed together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitwright.cli_options import Calibration, Model, load, progress


def explore(
    model: Model,
    family: Annotated[str, typer.Option("--family", help="A device with patterns by name, or its file (*.toml).")],
    calibrate: Calibration = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows computed at once of a model with a symbolic batch.")] = 1,
    designs: Annotated[int, typer.Option(min=2, max=200, help="Designs that are simulated and measured.")] = 16,
    plot: Annotated[Path | None, typer.Option(help="Write error against cycles as a .png or .svg.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for each design's device and recipe.")
    ] = None,
) -> None:
    """Search a family of devices: which patterns its words should have, and which outputs of the model get which bits.

    [dim]bitwright explore --family simd124.toml model.onnx --calibrate inputs.npz --plot front.png[/]
    """
    from bitwright import cli_io, cli_show
    from bitwright import explore as exploring
    from bitwright.codegen.devices.library import find_device, text_of
    from bitwright.driver import batches
    from bitwright.runtime import units

    device = find_device(family)
    with progress() as tell:
        tell(f"reading {model.name}", 0.0)
        graph = load(model)
        data = batches(cli_io.calibration(calibrate, graph))
        found = exploring.explore(graph, device, data, batch=batch, designs=designs, progress=tell)
    rows = [
        (
            str(n), ", ".join(d.patterns), units.percent(d.error), f"{d.cycles:,.0f}", f"{d.area:g}",
            units.size(int(d.weight_bytes)), f"{d.energy * 1e6:.3g} µJ",
        )
        for n, d in enumerate(found, 1)
    ]  # fmt: skip
    console = cli_show.console()
    heads = [">design", "patterns", ">error", ">cycles", ">area", ">weights", ">energy"]
    console.print(cli_show.table(heads, rows, title=f"Designs of {device.name} that no other beats"))
    if plot:
        exploring.plot(found, plot)
        console.print(f"wrote {plot}", markup=False)
    if output:
        written = exploring.save(found, text_of(family), output)
        console.print(f"wrote {len(written)} devices and recipes to {output}", markup=False)
