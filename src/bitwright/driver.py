"""Puts the parts together: capture, passes, code generation, program. Knows everyone, contains no algorithm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.codegen.cache import Cache
from bitwright.codegen.targets import resolve
from bitwright.data import batches
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.infer import bind_graph
from bitwright.ir.target import Target
from bitwright.runtime.program import Program

if TYPE_CHECKING:
    from bitwright.advice import Advised
    from bitwright.c_program import CProgram
    from bitwright.simulation import Simulation

Progress = Callable[[str, float], None]
Recipe = str | Iterable[Any]


def capture(module: Any, example_inputs: Any = None, **options: Any) -> Graph:
    """Capture a ``torch.nn.Module`` (with example inputs) or an ``ExportedProgram``; see ``frontends.torch_export``."""
    from bitwright.frontends.torch_export import capture as torch_capture

    return torch_capture(module, example_inputs, **options)


def load_onnx(model: Any, **options: Any) -> Graph:
    """Read an ONNX model from a path or a ``ModelProto``; see ``frontends.onnx``."""
    from bitwright.frontends.onnx import load_onnx as onnx_load

    return onnx_load(model, **options)


def to_onnx(graph: Graph, path: str | Path | None = None) -> Any:
    """Write a graph-level graph as ONNX with QuantizeLinear and DequantizeLinear; see ``frontends.onnx.write``."""
    from bitwright.frontends.onnx.write import to_onnx as write

    return write(graph, path)


def load(path: str | Path, *, threads: int | None = None) -> Program:
    """Load a compiled ``.bw`` program. It holds native code: trust it as you would a program."""
    return Program.load(path, threads=threads)


def load_graph(path: str | Path, weights: str | Path | None = None) -> Graph:
    """Read a text graph; its weights from ``weights`` or from the ``.safetensors`` file of the same stem."""
    from bitwright.ir.text import parse
    from bitwright.ir.weights import Weights

    path = Path(path)
    side = Path(weights) if weights else path.with_suffix(".safetensors")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidInput(f"cannot read {path}: {e}") from e
    return parse(text, Weights.load(side) if side.exists() else None)


def to_graph(model: Any, example_inputs: Any = None) -> Graph:
    """A graph from whatever the user has: a graph, a module, an exported program, ONNX or text-graph path."""
    if isinstance(model, Graph):
        return model
    if isinstance(model, str | Path):
        path = Path(model)
        if not path.exists():
            raise InvalidInput(f"there is no file {path}")
        if path.suffix in (".bw-ir", ".bwir"):
            return load_graph(path)
        if path.suffix == ".bw":
            raise InvalidInput(f"{path} is already compiled; load it with bitwright.load")
        if path.suffix in (".mlir", ".mlirbc"):
            from bitwright.frontends.mlir import load_mlir

            return load_mlir(path)
        return load_onnx(path)
    if type(model).__name__ == "ModelProto":
        return load_onnx(model)
    return capture(model, example_inputs)


def optimize(
    graph: Graph,
    passes: Any,
    *,
    target: str | Target | None = None,
    calibration: Any = None,
    stop_after: int | str | None = None,
    dump: str | Path | None = None,
    bisect: int | None = None,
    progress: Progress | None = None,
) -> tuple[Graph, Any]:
    """Run passes (text or values) over a graph as they stand; returns the graph and the pipeline's report."""
    from bitwright.passes._instruments import Dump
    from bitwright.passes._manager import run_pipeline
    from bitwright.passes._pass import Context
    from bitwright.passes._spec import parse_passes
    from bitwright.prices import Prices

    machine = resolve(target) if target is not None else None
    context = Context(machine, batches(calibration), progress, Prices(machine) if machine is not None else None)
    listed = parse_passes(passes) if isinstance(passes, str) else tuple(passes)
    if isinstance(passes, str) and graph.level == "graph" and not any(p.gives == "integer" != p.takes for p in listed):
        for p in (p for p in listed if p.takes == "integer"):  # the end of a recipe such as int8
            context.refuse(p.name, "the passes", "it works on the integer level", "put lower-to-integer before it")
        listed = tuple(p for p in listed if p.takes != "integer")
    instruments = [Dump(Path(dump))] if dump else []
    return run_pipeline(graph, listed, context, instruments=instruments, stop_after=stop_after, bisect_limit=bisect)


def compile(
    model: Any,
    *,
    target: str | Target = "host",
    recipe: Recipe = "float",
    calibration: Any = None,
    example_inputs: Any = None,
    threads: int = 1,
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    dump: str | Path | None = None,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    measure: bool = False,
    budget: str = "",
    records: str | Path | None = None,
) -> Program:
    """Compile a model into a :class:`Program`.

    ``model``: ``torch.nn.Module`` (with ``example_inputs``), ``ExportedProgram``, :class:`Graph`, ONNX path or
    ``ModelProto``. ``recipe``: ``"float"``, ``"int8"`` or a pass list such as ``"nm-mask{pattern=2:4}, int8"``.
    ``calibration``: inputs for passes that need them, or ``"synthetic"`` for inputs made from the statistics of the
    model's batch norms. ``batch``: rows computed at once of a model with a symbolic
    batch (any number may be passed to the program); ``sizes`` fixes symbols. ``budget``, such as ``"size=0.16"`` or
    ``"latency=0.5"``, is that of the recipe's ``assign-precision``. ``records``: a tuning database to take
    measured kernels from. Raises :class:`Unsupported` with every problem at once, :class:`InvalidInput` for bad
    arguments.
    """
    from bitwright.assemble import assemble
    from bitwright.prices import Prices

    began = time.perf_counter()
    _whole("threads", threads, 1024)
    machine = resolve(target)
    if machine.kind == "device":
        how = "bitwright.compile_c writes sources" if machine.name == "c" else "bitwright.simulate runs models on it"
        raise InvalidInput(f"target {machine.name} loads no programs: {how}")
    graph, recipe, calibration = prepared(model, recipe, calibration, example_inputs, batch, sizes, budget)
    return assemble(
        graph, machine, recipe, batches(calibration), threads=threads, batch=batch, dump=dump,
        cache=Cache(cache_dir), workers=workers, progress=progress, measure=measure, began=began,
        price=Prices(machine), records=records,
    )  # fmt: skip


def compile_c(
    model: Any,
    *,
    target: str | Target = "c",
    recipe: Recipe = "float",
    calibration: Any = None,
    example_inputs: Any = None,
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    dump: str | Path | None = None,
    progress: Progress | None = None,
    budget: str = "",
    name: str = "",
) -> CProgram:
    """Compile a model into freestanding C99: ``compile_c(...).save(folder)``; arguments and errors as of
    :func:`compile`. The batch is fixed; ``name`` is what the C function is called after. See docs/c.md."""
    from bitwright.c_program import assemble_c

    machine = resolve(target)
    graph, recipe, calibration = prepared(model, recipe, calibration, example_inputs, batch, sizes, budget)
    return assemble_c(
        graph, machine, recipe, batches(calibration), batch=batch, dump=dump, progress=progress, name=name
    )


def simulate(
    model: Any, device: str, inputs: Any = None, *, recipe: Recipe = "int8", calibration: Any = None,
    example_inputs: Any = None, batch: int = 1, sizes: Mapping[str, int] | None = None, budget: str = "",
    faults: float = 0.0, seed: int = 0, known_faults: bool = False,
) -> Simulation:  # fmt: skip
    """Run a model on a device that exists on paper: by name, or by the path of its TOML file.

    ``inputs``: arrays in input order (None: those of the calibration data, or random ones); the rest as of
    :func:`compile`. The result holds outputs, cycles and energy by layer, and whether the reference agrees. ``faults``:
    the share of stuck cells of a device that has cells (``rram``); ``seed`` says which chip;
    with ``known_faults`` it was tested, and its healthy cells are programmed to make up for stuck ones.
    """
    from bitwright.codegen.devices.cells import Faults
    from bitwright.codegen.devices.library import find_device
    from bitwright.simulation import simulate_graph

    found = find_device(device)
    graph, recipe, calibration = prepared(model, recipe, calibration, example_inputs, batch, sizes, budget)
    return simulate_graph(graph, found, recipe, batches(calibration), inputs, batch, Faults(faults, seed, known_faults))


def prepared(
    model: Any, recipe: Recipe, calibration: Any, example: Any, batch: int, sizes: Mapping[str, int] | None, budget: str
) -> tuple[Graph, Recipe, Any]:
    """The graph, recipe and calibration data of a compilation, checked."""
    _whole("batch", batch)
    recipe = _recipe(recipe, budget)
    if isinstance(calibration, str) and calibration == "synthetic":
        recipe, calibration = _synthesized(recipe), None
    graph = to_graph(model, example)
    if sizes:
        unknown = set(sizes) - set(graph.symbols)
        if unknown:
            raise InvalidInput(f"the model has no symbolic size {sorted(unknown)}; it has {list(graph.symbols)}")
        for name, size in sizes.items():
            _whole(f"size {name!r}", size)
        graph = bind_graph(graph, dict(sizes))
    return graph, recipe, calibration


def _whole(name: str, value: object, most: int = 1 << 31) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InvalidInput(f"{name} must be a whole number, at least 1, not {value!r}")
    if not 1 <= value <= most:
        raise InvalidInput(f"{name} must be at least 1{f' and at most {most}' if value > 1 else ''}, not {value}")


def _recipe(recipe: Recipe, budget: str) -> Recipe:
    """The recipe, checked; with a budget its ``assign-precision`` passes get it."""
    from dataclasses import replace

    from bitwright.passes._pass import Pass
    from bitwright.passes._spec import parse_passes
    from bitwright.passes.precision.assign_precision import AssignPrecision

    if isinstance(recipe, str):
        listed: tuple[Any, ...] = parse_passes(recipe)
    else:
        listed = tuple(recipe) if isinstance(recipe, Iterable) else (recipe,)
    for p in listed:
        if not isinstance(p, Pass):
            raise InvalidInput(f"a recipe is text such as 'nm-mask, int8' or a list of passes; {p!r} is neither")
    if not budget:
        return recipe
    if not any(isinstance(p, AssignPrecision) for p in listed):
        raise InvalidInput(f"budget {budget!r} needs a recipe that assigns precision, such as ptq-light")
    return tuple(replace(p, budget=budget) if isinstance(p, AssignPrecision) else p for p in listed)


def _synthesized(recipe: Recipe) -> Recipe:
    """The recipe with a pass before it that makes calibration data from batch-norm statistics."""
    from bitwright.passes._spec import parse_passes
    from bitwright.passes.precision.synthesize_calibration import SynthesizeCalibration

    return (SynthesizeCalibration(), *(parse_passes(recipe) if isinstance(recipe, str) else recipe))


def onnx_executor(graph: Graph) -> Callable[[Sequence[Any]], list[Any]]:
    """Compile a graph for the ONNX backend interface: arrays in input order to arrays in output order."""
    program = compile(graph)

    def run(values: Sequence[Any]) -> list[Any]:
        result = program(*values)
        return list(result) if isinstance(result, tuple) else [result]

    return run


def verify(
    program: Program | str | Path,
    model: Any,
    inputs: Any,
    *,
    bound: float | None = None,
    example_inputs: Any = None,
    calibration: Any = None,
) -> Any:
    """Compare a program with the model it was made from, layer by layer; see :mod:`bitwright.comparison`.

    ``calibration``: the data the program was compiled with; needed when a pass computed weights from it.
    """
    from bitwright.assemble import fit_batches
    from bitwright.comparison import BOUND, verify_program

    loaded = program if isinstance(program, Program) else load(program)
    graph = to_graph(model, example_inputs)
    data = fit_batches(graph, batches(calibration))
    return verify_program(loaded, graph, inputs, BOUND if bound is None else bound, data)


def advise(
    model: Any, target: str | Target = "host", *, batch: int = 1, example_inputs: Any = None, budget: str = "",
    calibration: Any = None,
) -> Advised:  # fmt: skip
    """What each number format and pattern would gain per layer, before anything is pruned.

    ``budget`` (as for ``compile``) adds the best plan within it: with ``calibration`` from measured losses, else from
    what rounding and pruning take from the weights. Raises :class:`InvalidInput` for a budget nothing can meet.
    """
    from bitwright.advice import Advised
    from bitwright.advice import advise as advise_graph
    from bitwright.advice_plan import plan

    graph, _ = optimize(to_graph(model, example_inputs), "simplify, fold-batch-norm")
    machine = resolve(target)
    found = plan(graph, machine, budget, calibration, batch) if budget else None
    return Advised(advise_graph(graph, machine, batch), found)


__all__ = [
    "batches", "capture", "compile", "compile_c", "load", "load_graph", "load_onnx", "optimize", "simulate", "to_graph",
    "to_onnx",
]  # fmt: skip
