"""What commands share: their common arguments, reading a model, the progress line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bitwright.ir.graph import Graph

Model = Annotated[
    Path, typer.Argument(help="A model: .onnx, .pt2 (torch.export.save), .mlir (torch dialect) or .bw-ir (text).")
]
Compiled = Annotated[Path, typer.Argument(metavar="MODEL.BW", help="A compiled program. It is native code: trust it.")]
TargetName = Annotated[str, typer.Option("--target", "-t", help="Machine to compile for; see `bitwright targets`.")]
Recipe = Annotated[str, typer.Option("--recipe", "-r", help='Passes and recipes, as in "nm-mask{pattern=2:4}, int8".')]
Calibration = Annotated[
    Path | None,
    typer.Option("--calibrate", "-c", help=".npz of real inputs, or a folder; `synthetic`: made from batch norms."),
]
Input = Annotated[Path | None, typer.Option("--input", "-i", help=".npz with the inputs by name.")]
Threads = Annotated[int, typer.Option("--threads", min=1, max=1024, help="Threads one call uses.")]


def load(path: Path) -> Graph:
    """A model from a file."""
    from bitwright import cli_io

    return cli_io.load_model(path)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A progress line on a terminal's stderr; silent elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from bitwright import cli_show

    console = cli_show.console(stderr=True)
    columns = (TextColumn("{task.description:<32}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda label, fraction: bar.update(task, description=label[:32], completed=min(fraction, 1.0))
