"""The command line: compile, inspect, run, bench, opt, verify, advise, and lists of what exists."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright import cli_advise, cli_compare, cli_explore, cli_targets, cli_tune
from bitwright.cli_options import Calibration, Compiled, Input, Model, Recipe, TargetName, Threads
from bitwright.cli_options import load as _load
from bitwright.cli_options import progress as _progress
from bitwright.ir.errors import BitwrightError, InvalidInput

if TYPE_CHECKING:
    from bitwright.runtime.program import Program

app = typer.Typer(
    name="bitwright",
    help="Compile neural networks to sparse, low-bit kernels, and see what each pass did.",
    epilog="Errors are one message and exit code 2; --debug, anywhere on the line, shows the traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Peer(StrEnum):
    """What ``bench --against`` knows."""

    onnxruntime = "onnxruntime"


def _version(show: bool) -> None:
    if show:
        from bitwright import __version__

        print(f"bitwright {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


# --- compile and look ----------------------------------------------------------------------------------------


@app.command("compile")
def compile_command(
    model: Model,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to; the model's name with .bw.")] = None,
    target: TargetName = "host",
    recipe: Recipe = "float",
    calibrate: Calibration = None,
    threads: Threads = 1,
    batch: Annotated[int, typer.Option(min=1, help="Rows computed at once of a model with a symbolic batch.")] = 1,
    size: Annotated[list[str] | None, typer.Option("--size", help="Fix a symbolic size: --size seq=128.")] = None,
    budget: Annotated[
        str, typer.Option(help="Of a recipe that assigns precision: size=0.16, latency=0.5, latency=2ms, loss=0.01.")
    ] = "",
    dump: Annotated[Path | None, typer.Option(help="Write the graph after every pass into this folder.")] = None,
    measure: Annotated[bool, typer.Option(help="Time every layer once compiled.")] = True,
    db: Annotated[Path | None, typer.Option("--db", help="Tuning database to take measured kernels from.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
    flash: Annotated[str, typer.Option(help="Of --target c: bytes of code and constants there are, as 256K.")] = "",
    ram: Annotated[str, typer.Option(help="Of --target c: bytes of static memory there are, as 64K.")] = "",
    cc: Annotated[
        str, typer.Option(help="Of --target c: compiler the sizes are of; host, cortex-m4, ...")
    ] = "cortex-m4",
) -> None:
    """Compile a model into a program (.bw), --target c: a folder of C, --target mlir: MLIR; show each layer's part.

    [dim]bitwright compile model.onnx --recipe "nm-mask{pattern=2:4}, int8" --calibrate inputs.npz -o model.bw[/]
    """
    from bitwright import cli_c, cli_io, cli_mlir, cli_show, driver

    if target == "mlir":
        out = cli_mlir.compiled(model, output, recipe, calibrate, size)
        return cli_show.console().print(f"wrote {out}", markup=False)
    sources = cli_c.wanted(target, flash, ram, cc)
    out = output or (model.with_name(f"{model.stem}_c") if sources else model.with_suffix(".bw"))
    if not out.parent.is_dir():
        raise InvalidInput(f"there is no folder {out.parent} to write {out.name} to")
    made_up = calibrate == Path("synthetic") and not calibrate.exists()
    if calibrate and not made_up and not calibrate.exists():
        raise InvalidInput(f"there is no calibration file or folder {calibrate}")
    with _progress() as progress:
        progress(f"reading {model.name}", 0.0)
        graph = _load(model)
        data = "synthetic" if made_up else cli_io.calibration(calibrate, graph)
        common: dict[str, Any] = {"target": target, "recipe": recipe, "calibration": data, "batch": batch}
        common |= {"sizes": cli_io.sizes(size), "dump": dump, "budget": budget, "progress": progress}
        program = sources(graph, model.stem, common) if sources else driver.compile(
            graph, threads=threads, measure=measure, records=db, **common
        )  # fmt: skip
        program.save(out)
    cli_show.print_report(program.report, with_passes=False)
    if html:
        program.report.to_html(html)
    cli_show.console().print(f"wrote {out}" + (f" and {html}" if html else ""))


@app.command()
def inspect(
    program: Compiled,
    pass_name: Annotated[str | None, typer.Option("--pass", help="What one pass did, and refused.")] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="How each pass (or the one of --pass) changed the graph.")
    ] = False,
    why: Annotated[str | None, typer.Option("--why", metavar="LAYER", help="All that is known about a layer.")] = None,
    text: Annotated[bool, typer.Option("--text", help="The compiled graph as text.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
) -> None:
    """Show a program: layers, formats, masks, times, what was refused and why."""
    from bitwright import cli_show
    from bitwright.runtime.artifact import read
    from bitwright.runtime.program import Program

    loaded = Program.compiled(read(program))  # one for another machine, too
    report, console = loaded.report, cli_show.console()
    if html:
        report.to_html(html)
        console.print(f"wrote {html}")
    elif why:
        console.print(cli_show.layer_story(report, cli_show.find_layer(report, why)))
    elif text:
        print(loaded.graph)
    elif pass_name or diff:
        cli_show.pass_story(report, pass_name, diff)
    else:
        console.print(cli_show.program(loaded))
        cli_show.print_report(report)


# --- run and measure -----------------------------------------------------------------------------------------


@app.command()
def run(
    program: Compiled,
    input: Annotated[Path, typer.Option("--input", "-i", help=".npz with the inputs by name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help=".npz to write, outputs by name.")],
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; else as compiled.")] = None,
    emulate: Annotated[bool, typer.Option("--emulate", help="A program for another architecture, by QEMU.")] = False,
) -> None:
    """Run a program on inputs from a file."""
    from bitwright import cli_io, cli_show
    from bitwright.emulation import emulate as emulated

    loaded = emulated(program) if emulate else _program(program)
    arrays = cli_io.named(cli_io.load_arrays(input), loaded.input_names, str(input))
    result = loaded(*arrays.values(), threads=threads)
    results = result if isinstance(result, tuple) else (result,)
    named = dict(zip(loaded.output_names, results, strict=True))
    cli_io.save_arrays(output, named)
    shapes = ", ".join(f"{n} {a.dtype}{list(a.shape)}" for n, a in named.items())
    cli_show.console().print(f"wrote {output}: {shapes}", markup=False)


@app.command()
def bench(
    program: Compiled,
    against: Annotated[Peer | None, typer.Option(help="Measure a peer in the same interleaved rounds.")] = None,
    model: Annotated[Path | None, typer.Option(help="The .onnx file that the peer runs.")] = None,
    input: Input = None,
    threads: Threads = 1,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the inputs made up where --input is not given.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 30,
    layers: Annotated[bool, typer.Option("--layers", help="Time per layer, too.")] = False,
) -> None:
    """Measure a program, alone or side by side with onnxruntime."""
    from bitwright import cli_bench, cli_io

    loaded = _program(program)
    if against and model is None:
        raise InvalidInput(f"--against {against} needs the model it runs: --model model.onnx")
    if input:
        arrays = cli_io.named(cli_io.load_arrays(input), loaded.input_names, str(input))
    else:
        arrays = dict(zip(loaded.input_names, cli_io.random_inputs(loaded.inputs, batch), strict=True))
    cli_bench.bench(loaded, arrays, model if against else None, threads=threads, rounds=rounds)
    if layers:
        cli_bench.profile(loaded, arrays, threads=threads)


@app.command()
def verify(
    program: Compiled,
    model: Model,
    input: Annotated[Path, typer.Option("--input", "-i", help=".npz with real inputs by name.")],
    bound: Annotated[float | None, typer.Option(min=0.0, help="Relative error a layer may have.")] = None,
    drift: Annotated[
        float | None, typer.Option(min=0.0, help="Find the first layer further than this from the model: 0.05 is 5 %.")
    ] = None,
    calibrate: Calibration = None,
) -> None:
    """Compare a program with the reference, layer by layer; names the first bad one and exits with 1.

    The reference is the same compilation run by the interpreter; the table also shows how far each layer is from the
    model before anything was pruned or rounded. A program whose passes computed weights from calibration data needs
    that data again.
    """
    from bitwright import cli_io, cli_show, driver
    from bitwright.comparison import BOUND

    loaded, graph = _program(program), _load(model)
    arrays = cli_io.named(cli_io.load_arrays(input), [v.name for v in graph.inputs], str(input))
    chunk = cli_io.first_chunk(arrays, loaded)
    data = cli_io.calibration(calibrate, graph)
    result = driver.verify(loaded, graph, chunk, bound=BOUND if bound is None else bound, calibration=data)
    cli_show.console().print(cli_show.comparison(result))
    if result.certificates:
        cli_show.console().print(cli_show.certificates(result))
    cli_show.console().print(
        f"first bad layer: {result.first_bad}" if result.first_bad else "every layer agrees with the reference",
        markup=False,
    )
    if result.bad_certificates:
        named = ", ".join(x.certificate.value for x in result.bad_certificates)
        cli_show.console().print(f"accumulator certificates that do not hold: {named}", markup=False)
    drifted = None if drift is None else result.first_drifted(drift)
    if drift is not None:
        cli_show.console().print(cli_show.drift(drifted, drift, loaded.report), markup=False)
    if result.first_bad or result.bad_certificates or drifted:
        raise typer.Exit(1)


app.command()(cli_advise.advise)


# --- graphs as text ------------------------------------------------------------------------------------------


@app.command()
def opt(
    graph: Model,
    passes: Annotated[
        str, typer.Option("--passes", "-p", help='Passes, as in "fold-batch-norm, nm-mask{pattern=2:4}".')
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Text graph to write, weights beside it; or .onnx, .mlir.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help=".safetensors; else the file beside the text.")] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="Target the passes may ask about.")] = None,
    calibrate: Calibration = None,
    stop_after: Annotated[
        str | None, typer.Option(metavar="N|PASS", help="Stop after so many passes, or after one.")
    ] = None,
    bisect: Annotated[
        int | None, typer.Option(min=0, help="Skip passes from this number on that keep the level.")
    ] = None,
    dump: Annotated[Path | None, typer.Option(help="Write the graph after every pass into this folder.")] = None,
) -> None:
    """Run passes over a graph as they stand: text in, text (or ONNX) out."""
    from bitwright import cli_io, cli_show, driver
    from bitwright.ir.text import show

    loaded = cli_io.load_model(graph, weights)
    stop = int(stop_after) if stop_after and stop_after.isdigit() else stop_after
    done, report = driver.optimize(
        loaded, passes, target=target, calibration=cli_io.calibration(calibrate, loaded), stop_after=stop, dump=dump,
        bisect=bisect,
    )  # fmt: skip
    if output:
        cli_io.save_graph(output, done)
    else:
        print(show(done), end="")
    errors = cli_show.console(stderr=True)
    for r in report.refusals:
        errors.print(f"refused: {r.pass_name} at {r.place}: {r.reason}", markup=False)


@app.command()
def mask(
    model: Model,
    layer: Annotated[str, typer.Argument(help="A layer as reports call it, such as encoder.fc1.")],
    output: Annotated[Path, typer.Option("--output", "-o", help=".png to write.")],
    passes: Annotated[str, typer.Option("--passes", "-p", help="Passes to run first.")] = "detect-sparsity",
    calibrate: Calibration = None,
) -> None:
    """Draw which weights of a layer are kept, as a PNG.

    [dim]bitwright mask model.onnx fc1 --passes "nm-mask{pattern=2:4}" -o fc1.png[/]
    """
    from bitwright import cli_io, cli_show, driver
    from bitwright.mask_picture import draw_mask

    graph = _load(model)
    done, _ = driver.optimize(graph, passes, calibration=cli_io.calibration(calibrate, graph))
    cli_show.console().print(f"{draw_mask(done, layer, output)}; wrote {output}", markup=False)


# --- what exists ---------------------------------------------------------------------------------------------


app.add_typer(cli_targets.app)
app.command()(cli_targets.simulate)
app.command()(cli_compare.compare)
app.command()(cli_explore.explore)
app.command()(cli_tune.tune)


@app.command()
def passes() -> None:
    """List the passes and their options."""
    from bitwright import cli_lists

    cli_lists.passes()


@app.command()
def recipes() -> None:
    """List the recipes: names for lists of passes."""
    from bitwright import cli_lists

    cli_lists.recipes()


# --- shared --------------------------------------------------------------------------------------------------


def _program(path: Path) -> Program:
    from bitwright.runtime.program import Program

    return Program.load(path)


def main() -> None:
    """Entry point: one clear message on stderr and exit code 2 for every error the user can mend."""
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        app(prog_name="bitwright")
    except BitwrightError as error:
        if debug:
            raise
        print(f"bitwright: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("bitwright: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        print(f"bitwright: internal error, a bug of bitwright: {type(error).__name__}: {error}", file=sys.stderr)
        print("bitwright: --debug shows where", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
