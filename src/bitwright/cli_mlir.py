"""``bitwright compile --target mlir``: the quantized, masked graph as torch-dialect MLIR instead of a program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.ir.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bitwright.ir.graph import Graph


def compiled(model: Path, output: Path | None, recipe: str, calibration: Path | None, sizes: list[str] | None) -> Path:
    """Run the canonical passes and the recipe, and write the graph; returns the file written.

    What a recipe does below the graph level has no MLIR form: it is named, and left to the toolchain that reads the
    file.
    """
    from bitwright import cli_io, cli_show
    from bitwright.passes.pipelines import standard

    out = output or model.with_suffix(".out.mlir" if model.suffix == ".mlir" else ".mlir")
    if out.suffix not in (".mlir", ".mlirbc"):
        raise InvalidInput(f"--target mlir writes .mlir (text) or .mlirbc (bytecode), not {out.name}")
    if not out.parent.is_dir():
        raise InvalidInput(f"there is no folder {out.parent} to write {out.name} to")
    whole = standard(recipe).passes
    passes = [p for p in whole if p.takes == "graph" and p.gives == "graph"]
    graph, refusals = _optimized(cli_io.load_model(model), passes, calibration, cli_io.sizes(sizes))
    cli_io.save_graph(out, graph)
    errors = cli_show.console(stderr=True)
    left = ", ".join(p.name for p in whole if p not in passes)
    errors.print(f"left to the toolchain that reads {out.name}: {left}", markup=False)
    for r in refusals:
        errors.print(f"refused: {r.pass_name} at {r.place}: {r.reason}", markup=False)
    return out


def _optimized(
    graph: Graph, passes: Any, calibration: Path | None, sizes: Mapping[str, int] | None
) -> tuple[Graph, Any]:
    from bitwright import cli_io, driver
    from bitwright.ir.infer import bind_graph

    if sizes:
        graph = bind_graph(graph, dict(sizes))
    made_up = calibration == Path("synthetic") and not calibration.exists()
    if calibration and not made_up and not calibration.exists():
        raise InvalidInput(f"there is no calibration file or folder {calibration}")
    if made_up:
        raise InvalidInput("--target mlir takes real inputs to calibrate with, not made-up ones")
    done, report = driver.optimize(graph, passes, calibration=cli_io.calibration(calibration, graph))
    return done, report.refusals
