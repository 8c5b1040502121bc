"""``bitwright targets [show|check]`` and ``bitwright simulate``: machines, and devices that exist on paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli_options import Calibration, Model, Recipe, load, progress
from bitwright.ir.errors import InvalidInput

if TYPE_CHECKING:
    from bitwright.codegen.devices.schema import Device
    from bitwright.simulation import Simulation

app = typer.Typer(name="targets", help="List the targets, show one, or check a file.", rich_markup_mode="rich")
Name = Annotated[str, typer.Argument(help="A target, or a file (*.toml).")]


@app.callback(invoke_without_command=True)
def _list(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        from bitwright import cli_lists

        cli_lists.targets()
        _list_devices()


@app.command()
def show(name: Name) -> None:
    """Show what a target declares: formats, instructions with their meaning, memories, costs."""
    from bitwright import cli_lists, cli_show
    from bitwright.codegen.devices import library
    from bitwright.codegen.targets import resolve

    if library.is_device(name):
        _show_device(library.find_device(name))
        return
    known = resolve(name)
    if known.kind == "gpu":
        cli_show.console().print(cli_show.table(["", "declared"], [("target", known.name), *cli_lists.gpu_rows(known)]))
        return
    rows = list(zip(("target", "vector", "peak", "sparse patterns", "from"), cli_lists.target_row(known), strict=True))
    cli_show.console().print(cli_show.table(["", "declared"], rows))


@app.command()
def check(file: Annotated[Path, typer.Argument(help="The file of a device or a processor.")]) -> None:
    """Check the file of a device or a processor: every problem with its line."""
    from bitwright import cli_show
    from bitwright.codegen.devices.library import is_processor
    from bitwright.codegen.devices.schema import load_device
    from bitwright.codegen.targets import resolve

    if is_processor(str(file)):
        made = resolve(str(file))
        told = f"{file}: {made.name} is consistent, {made.isa} kernels for {made.mcpu}"
        cli_show.console().print(told, markup=False)
        return
    device = load_device(file)
    cli_show.console().print(
        f"{file}: {device.name} is consistent, {len(device.instruction)} instructions", markup=False
    )


def _list_devices() -> None:
    """A row per device that comes along."""
    from bitwright import cli_show
    from bitwright.codegen.devices import library

    devices = [library.find_device(name) for name in library.names()]
    rows = [
        (d.name, d.title, ", ".join(dict.fromkeys(f"{i.parsed.x}x{i.parsed.w}" for i in d.instruction)), d.source)
        for d in devices
    ]
    cli_show.console().print(cli_show.table(["device on paper", "what", "formats", "where from"], rows))


def _show_device(device: Device) -> None:
    from bitwright import cli_show
    from bitwright.codegen.devices.check import operand_bits, steps_that_fit
    from bitwright.runtime import units

    console = cli_show.console()
    console.print(f"{device.name}: {device.title}\nfrom {device.source}", markup=False)
    console.print(
        f"clock {device.clock / 1e6:g} MHz; weights {units.size(device.weights.size)} at "
        f"{device.weights.bandwidth:g} B/cycle; activations {units.size(device.activations.size)} at "
        f"{device.activations.bandwidth:g} B/cycle; registers {device.registers.size:g} bits; multiplier area "
        f"{device.area:g} bit products"
    )
    rows = []
    for i in device.instruction:
        m, steps = i.parsed, steps_that_fit(i)
        mask = f" {m.pattern.keep}:{m.pattern.group}" if m.pattern else ""
        sums = "its own" if m.acc is None else f"{m.acc}{' saturating' if m.saturates else ''}"
        safe = "any number of" if steps is None else str(steps)
        rate = f"{units.rate(2 * i.macs / i.cycles * device.clock)}"
        bits = f"{sum(operand_bits(i)):g}"
        rows.append((i.name, f"{m.x} x {m.w}{mask}", sums, f"{i.lanes} x {i.depth}", safe, bits, rate))
    heads = ["instruction", "formats", "sums", ">outputs x terms", ">steps that fit", ">bits held", ">peak"]
    console.print(cli_show.table(heads, rows))
    for name, table in device.options.items():
        told = ", ".join(f"{k} {v}" for k, v in table.items() if not isinstance(v, dict | list))
        console.print(f"{name}: {told}", markup=False)
    if device.words is not None:
        patterns = [
            (p.name, ", ".join(f"{n} {k}" for k, n in p.lanes.items()), "yes" if p.name in device.words.active else "")
            for p in device.words.pattern
        ]
        console.print(cli_show.table(["pattern", "lanes of a word", "active"], patterns))
    for i in device.instruction:
        console.print(f"{i.name} means {i.meaning.strip()}", markup=False, highlight=False)


def simulate(
    model: Model,
    target: Annotated[str, typer.Option("--target", "-t", help="A device by name, or its file (*.toml).")],
    recipe: Recipe = "int8",
    calibrate: Calibration = None,
    input: Annotated[Path | None, typer.Option("--input", "-i", help=".npz with the inputs by name.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help=".npz to write, outputs by name.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows computed at once of a model with a symbolic batch.")] = 1,
    budget: Annotated[str, typer.Option(help="Of a recipe that assigns precision: size=0.16.")] = "",
    faults: Annotated[float, typer.Option(min=0, max=1, help="Share of stuck cells, of a device with cells.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Which cells are stuck: another seed is another chip.")] = 0,
    known_faults: Annotated[
        bool, typer.Option(help="The chip was tested: healthy cells make up for stuck ones where they can.")
    ] = False,
) -> None:
    """Run a model on a device that exists on paper: its bits, and cycles and energy by layer.

    [dim]bitwright simulate model.onnx --target npu8 --recipe "nm-mask{pattern=2:4}, int8" --calibrate inputs.npz[/]
    """
    from bitwright import cli_io, cli_show, driver

    with progress() as tell:
        tell(f"reading {model.name}", 0.0)
        graph = load(model)
        data = cli_io.calibration(calibrate, graph)
        names = [v.name for v in graph.inputs]
        given = list(cli_io.named(cli_io.load_arrays(input), names, str(input)).values()) if input else None
        done = driver.simulate(
            graph, target, given, recipe=recipe, calibration=data, batch=batch, budget=budget, faults=faults, seed=seed,
            known_faults=known_faults,
        )  # fmt: skip
    _print(done)
    if output:
        arrays = dict(zip(done.schedule.graph.output_names, done.outputs, strict=True))
        cli_io.save_arrays(output, arrays)
        cli_show.console().print(f"wrote {output}", markup=False)
    if not done.identical and not faults:
        raise InvalidInput(
            "the device's outputs are not the reference's: an instruction's meaning loses what was proved"
        )


def _print(done: Simulation) -> None:
    from bitwright import cli_show
    from bitwright.runtime import units

    made = done.schedule
    rows = [
        (
            x.origin.split(" (")[0] or x.name, x.instruction, f"{x.steps:,}" if x.steps else "", f"{x.cycles:,.0f}",
            units.percent(x.cycles / made.cycles), x.limit, units.size(int(x.weight_bytes)),
            f"{x.energy * 1e9:,.1f} nJ",
        )
        for x in made.layers
    ]  # fmt: skip
    heads = ["layer", "instruction", ">steps", ">cycles", ">share", "bound by", ">weights", ">energy"]
    console = cli_show.console()
    console.print(cli_show.table(heads, rows, title=f"On {made.device.name}"))
    reasons = {x.reason: x.instruction for x in made.layers if x.reason}
    if reasons:
        console.print(cli_show.table(["reason"], [(r,) for r in reasons], title="Why"))
    if made.device.gates is not None:
        counted = done.activity.active, done.activity.resting
        console.print(f"{counted[0]:,} gates active, {counted[1]:,} at rest (one factor is zero)")
    same = "identical to the reference" if done.identical else "NOT the reference's"
    if done.faults.rate:
        stuck = f"{units.percent(done.faults.rate)} of the cells stuck (seed {done.faults.seed})"
        same = f"{units.percent(done.error)} from the reference with {stuck}"
    console.print(
        f"{made.cycles:,.0f} cycles, {units.seconds(made.seconds)}, {done.energy * 1e6:.3g} µJ, weights "
        f"{units.size(int(made.weight_bytes))}; outputs {same}"
    )
