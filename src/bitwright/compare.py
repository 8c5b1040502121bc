"""One model on many targets: time, bytes, energy, error, and whether all give the same bits."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.assemble import example_inputs
from bitwright.codegen.devices import library
from bitwright.codegen.targets import resolve
from bitwright.codegen.targets.machine import cpu_flags
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.infer import bind_graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.runtime.program import Program

Array = np.ndarray[Any, Any]
ROUNDING = 1e-6
"""Outputs in f32 may differ by this share: compilers may or may not contract the last multiplication and addition."""


@dataclass(frozen=True)
class Row:
    """What one target makes of a model under one recipe.

    ``how``: measured on this machine, predicted by the cost model (C: for a small core at 80 MHz), or simulated.
    ``ram``: bytes of values between layers.
    ``error``: root mean square of the difference from the float model over that of its output. ``outputs``: of the
    compared inputs; None where nothing ran. ``note``: what ran, or why nothing could.
    """

    target: str
    recipe: str
    seconds: float | None
    how: str
    weight_bytes: float
    ram: float
    energy: float | None
    error: float | None
    outputs: tuple[Array, ...] | None
    note: str


def compare(
    graph: Graph, targets: Sequence[str], recipes: Sequence[str], calibration: Any, *, batch: int = 1
) -> list[Row]:
    """A row for every target and recipe, on the same inputs; raises :class:`InvalidInput` for unknown targets.

    Targets: machines and devices as `bitwright targets` lists them, ``*.toml``, and ``c:CHAIN`` for C compiled by one
    of the toolchains (``c:aarch64`` runs emulated, ``c:cortex-m4`` gives sizes).
    """
    if not targets or not recipes:
        raise InvalidInput("name at least one target and one recipe")
    bound = bind_graph(graph, dict.fromkeys(graph.symbols, batch)) if graph.symbols else graph
    inputs = _inputs(bound, calibration)
    plain = tuple(to_numpy(t) for t in evaluate(bound, inputs))
    return [_row(graph, t, r, calibration, batch, inputs, plain) for r in recipes for t in targets]


def agreement(rows: Sequence[Row]) -> str:
    """Whether the outputs of rows of one recipe are the same bits; otherwise how far apart they are."""
    ran = [r for r in rows if r.outputs is not None]
    if len(ran) < 2:
        return "nothing to compare"
    first = ran[0].outputs
    assert first is not None
    apart = {r.target: _distance(r.outputs, first) for r in ran[1:] if r.outputs is not None}
    names = ", ".join(r.target for r in ran)
    worst = max(apart, key=lambda t: apart[t])
    if apart[worst] == 0:
        return f"the same bits on {names}"
    if apart[worst] < ROUNDING:
        return f"the same but for the rounding of the last float operations ({apart[worst]:.2g}) on {names}"
    return f"{worst} differs from {ran[0].target} by {apart[worst]:.2g} of the output's root mean square"


def _inputs(bound: Graph, calibration: Any) -> list[Array]:
    from bitwright.simulation import example

    return example(bound, calibration[0] if calibration is not None and len(calibration) else None)


def _distance(outputs: Sequence[Array], plain: Sequence[Array]) -> float:
    """Root mean square of the difference over that of ``plain``, of all outputs together."""
    top = sum(
        float(np.square(a.astype(np.float64) - b.astype(np.float64)).sum()) for a, b in zip(outputs, plain, strict=True)
    )
    size = sum(float(np.square(b.astype(np.float64)).sum()) for b in plain)
    return float(np.sqrt(top / size)) if size else float(top > 0)


def _row(
    graph: Graph, target: str, recipe: str, data: Any, batch: int, inputs: list[Array], plain: tuple[Array, ...]
) -> Row:
    if target == "c" or target.startswith("c:"):
        return _c_row(graph, target, recipe, data, batch, plain)
    if library.is_device(target):
        return _device_row(graph, target, recipe, data, batch, inputs, plain)
    return _machine_row(graph, target, recipe, data, batch, inputs, plain)


def _machine_row(
    graph: Graph, target: str, recipe: str, data: Any, batch: int, inputs: list[Array], plain: tuple[Array, ...]
) -> Row:
    from bitwright import driver
    from bitwright.codegen.cuda.emulator import missing as gpu_missing
    from bitwright.emulation import emulator_of

    machine = resolve(target)
    elsewhere = machine.kind == "gpu" or machine.arch != platform.machine()
    if why := gpu_missing() if machine.kind == "gpu" else emulator_of(machine.arch).missing() if elsewhere else "":
        return Row(target, recipe, None, "", 0.0, 0.0, None, None, None, why)
    able = {f.replace("avxvnni", "avx_vnni") for f in machine.features} <= cpu_flags()
    program = driver.compile(graph, target=machine, recipe=recipe, calibration=data, batch=batch)
    figures = program.report.figures
    common = (figures["weight_bytes"] or 0.0, figures["arena_bytes"] or 0.0, None)
    if elsewhere:
        outputs, note = _emulated(program, inputs)
        seconds, error = figures["predicted_seconds"], _distance(outputs, plain)
        return Row(target, recipe, seconds, "predicted", *common, error, outputs, note)
    if not able:
        return Row(
            target, recipe, figures["predicted_seconds"], "predicted", *common, None, None, "this CPU cannot run it"
        )
    result = program(*inputs)
    outputs = tuple(np.asarray(a) for a in (result if isinstance(result, tuple) else (result,)))
    given = example_inputs(program, [tuple(inputs)])
    seconds = sum(s.seconds for s in program.profile(*given, repeats=20))
    return Row(target, recipe, seconds, "measured", *common, _distance(outputs, plain), outputs, "one thread")


def _emulated(program: Program, inputs: list[Array]) -> tuple[tuple[Array, ...], str]:
    """Outputs of a program for another architecture, and by what it ran."""
    from bitwright.emulation import emulate, emulator_of

    result = emulate(program)(*inputs)
    by = "thread by thread" if program.manifest.device else f"by {emulator_of(program.manifest.arch).emulator}"
    return result if isinstance(result, tuple) else (result,), f"emulated {by}"


def _c_row(graph: Graph, target: str, recipe: str, data: Any, batch: int, plain: tuple[Array, ...]) -> Row:
    from bitwright import driver
    from bitwright.codegen.c.toolchain import toolchain

    program = driver.compile_c(graph, recipe=recipe, calibration=data, batch=batch)
    chain = toolchain(target.partition(":")[2] or "host")
    outputs = program.samples[0][1]
    small = chain.emulator is None or target == "c"
    predicted = sum(x.predicted_seconds or 0.0 for x in program.report.layers) if small else None
    ran = None
    if why := chain.missing():
        note = why
    elif chain.emulator is None:
        found = program.sizes(chain)
        note = f"{found.code} bytes of code"
    else:
        wrong = program.self_test(chain)
        ran = outputs if wrong == 0 else None
        told = "passed" if not wrong else f"{wrong} wrong"
        note = f"self-test {'emulated ' if chain.emulator else ''}on {chain.name}: {told}"
    return Row(
        target, recipe, predicted, "at 80 MHz" if small else "", float(program.source.table_bytes),
        float(program.source.arena_bytes), None, _distance(outputs, plain), ran, note,
    )  # fmt: skip


def _device_row(
    graph: Graph, target: str, recipe: str, data: Any, batch: int, inputs: list[Array], plain: tuple[Array, ...]
) -> Row:
    from bitwright import driver

    done = driver.simulate(graph, target, inputs, recipe=recipe, calibration=data, batch=batch)
    made = done.schedule
    most = max((x.activation_bytes for x in made.layers), default=0.0)
    note = f"{made.cycles:,.0f} cycles" + ("" if done.identical else "; NOT the reference's bits")
    return Row(
        made.device.name, recipe, made.seconds, "simulated", made.weight_bytes, most, done.energy,
        _distance(done.outputs, plain), done.outputs, note,
    )  # fmt: skip


def plot(rows: Sequence[Row], path: str | Path) -> None:
    """A bar of time for every target and recipe, with its bytes of weights, as PNG or SVG; hollow: not measured."""
    from matplotlib.figure import Figure

    shown = [r for r in rows if r.seconds]
    targets, recipes = list(dict.fromkeys(r.target for r in shown)), list(dict.fromkeys(r.recipe for r in shown))
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    thick = 0.8 / max(1, len(recipes))
    for r in shown:
        at = targets.index(r.target) + (recipes.index(r.recipe) - (len(recipes) - 1) / 2) * thick
        colour, time = f"C{recipes.index(r.recipe)}", (r.seconds or 0.0) * 1e3
        fill = colour if r.how == "measured" else "none"
        axes.barh(at, time, thick * 0.9, facecolor=fill, edgecolor=colour)
        axes.annotate(
            f"{r.weight_bytes / 1e3:.0f} kB", (time, at), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    for k, recipe in enumerate(recipes):
        axes.barh([0], [0], color=f"C{k}", label=recipe)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_yticks(range(len(targets)), targets)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds (filled: measured here; hollow: predicted or simulated), and bytes of weights")
    figure.legend(loc="outside upper center", ncols=len(recipes), fontsize=8)
    figure.savefig(path, dpi=120)
