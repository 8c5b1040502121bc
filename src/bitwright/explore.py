"""Hardware and model together: which patterns a device's words should have, and which outputs get which bits.

The loop of arXiv:2311.14114 without the training: every set of patterns of a family is tried; for each, the outputs'
widths that lose least in so many cycles; what looks best is then compiled, simulated and measured.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.assemble import fit_batches
from bitwright.codegen.devices.schema import Device, parse_device
from bitwright.codegen.devices.select import Work, work_of
from bitwright.codegen.devices.words import Pattern, area_of, cover, lanes_of
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.infer import bind_graph
from bitwright.ir.interpret import evaluate, to_torch
from bitwright.passes._layers import layer_of
from bitwright.passes._measure import relative_rms
from bitwright.passes.pipelines import CANONICAL
from bitwright.passes.precision._channel_codes import BITS, codes_by_width, ranked, row_errors
from bitwright.passes.precision._weight_writer import why_not_low
from bitwright.simulation import simulate_graph

Array = np.ndarray[Any, Any]
SETS = 5000
"""Sets of patterns that are all tried."""
PARTS = 12
"""Words of a layer's outputs that are distributed; those of larger layers several at a time."""
BATCHES = 32
"""Batches of the calibration data on which errors are measured."""
PRICES = tuple(10.0 ** (k / 4) for k in range(-40, 13))
"""Errors that a cycle may cost, of the least to the most."""


@dataclass(frozen=True)
class Design:
    """A set of patterns, and the model for it. ``error``: of the outputs on the calibration data against the float
    model, root mean square over that of the outputs. ``area``: the device's proxy. ``recipe`` makes the model."""

    patterns: tuple[str, ...]
    recipe: str
    error: float
    cycles: float
    area: float
    energy: float
    weight_bytes: float

    @property
    def figures(self) -> tuple[float, float, float]:
        """What a design should have little of."""
        return self.error, self.cycles, self.area


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A layer; ``prefix`` [widths, O + 1]: summed errors of the first outputs, the neediest first, in each width."""

    name: str
    work: Work
    prefix: Array
    weight: float


@dataclass(frozen=True, slots=True)
class _Guess:
    patterns: tuple[str, ...]
    counts: tuple[tuple[int, int, int], ...]
    error: float
    cycles: float
    area: float

    @property
    def figures(self) -> tuple[float, float, float]:
        return self.error, self.cycles, self.area


def explore(
    graph: Graph, device: Device, calibration: Sequence[Any], *, batch: int = 1, designs: int = 16,
    progress: Callable[[str, float], None] | None = None,
) -> list[Design]:  # fmt: skip
    """The Pareto front of error, cycles and area: up to ``designs`` sets of patterns with their models, measured.

    ``device``: a family, with ``[options.words]``. ``calibration``: batches of inputs; ranges, sensitivities and errors
    come from them. Convolutions of several groups keep 4 bits. Raises :class:`InvalidInput` for a device that is no
    family of 4, 2 and 1 bits, without calibration data, and for a model without a layer that words can hold.
    """
    tell = progress or (lambda text, share: None)
    _check(device, calibration)
    data = fit_batches(graph, calibration)
    tell("measuring what each layer loses", 0.0)
    layers = _layers(graph, data, batch)
    guesses: list[_Guess] = []
    sets = list(_sets(device))
    for n, names in enumerate(sets):
        tell(f"patterns {', '.join(names)}", 0.1 + 0.4 * n / len(sets))
        guesses += _guesses(names, layers, device)
    best = sorted(front(guesses), key=lambda g: (g.cycles, g.error))
    chosen = [best[i] for i in sorted(set(np.linspace(0, len(best) - 1, designs).round().astype(int).tolist()))]
    made = []
    for n, guess in enumerate(chosen):
        tell(f"simulating {', '.join(guess.patterns)}", 0.5 + 0.5 * n / len(chosen))
        made.append(_measured(guess, graph, layers, device, data, batch))
    return sorted(front(made), key=lambda d: (d.cycles, d.error))


def front(designs: Sequence[Any]) -> list[Any]:
    """Those that no other beats in ``figures``: at least as good in all of them, and better in one."""
    if not designs:
        return []
    table = np.array([d.figures for d in designs])
    order = np.lexsort(table.T[::-1])
    kept: list[int] = []
    for i in order:
        if not kept or not (table[kept] <= table[i]).all(1).any():
            kept.append(int(i))
    return [designs[i] for i in kept]


def with_patterns(device: Device, active: Sequence[str]) -> Device:
    """The device with other active patterns."""
    options = {**device.options, "words": {**device.options["words"], "active": list(active)}}
    fields = {name: getattr(device, name) for name in Device.model_fields}
    return Device.model_construct(**{**fields, "options": options})


def save(designs: Sequence[Design], text: str, folder: str | Path) -> list[Path]:
    """Write every design as a device's file, ``text`` with its active patterns, and the recipe beside it."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for n, d in enumerate(designs, 1):
        names = ", ".join(f'"{p}"' for p in d.patterns)
        changed = re.sub(r"(?m)^active\s*=\s*\[.*?\]", f"active = [{names}]", text, count=1)
        parse_device(changed, f"design {n}")
        (out / f"design-{n}.toml").write_text(changed, encoding="utf-8")
        (out / f"design-{n}.recipe").write_text(d.recipe + "\n", encoding="utf-8")
        written.append(out / f"design-{n}.toml")
    return written


def plot(designs: Sequence[Design], path: str | Path) -> None:
    """Error against cycles as PNG or SVG, coloured by area."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    x, y = [d.cycles for d in designs], [100 * d.error for d in designs]
    dots = axes.scatter(x, y, c=[d.area for d in designs], cmap="viridis", s=45, zorder=3)
    for d in designs:
        axes.annotate(
            "+".join(d.patterns), (d.cycles, 100 * d.error), xytext=(4, 4), textcoords="offset points", fontsize=6
        )
    figure.colorbar(dots, label="area proxy (bits)")
    axes.set_xscale("log")
    axes.set_xlabel("cycles")
    axes.set_ylabel("error of the outputs (%)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


# --- the model -----------------------------------------------------------------------------------------------


def _check(device: Device, calibration: Sequence[Any]) -> None:
    words = device.words
    if words is None:
        raise InvalidInput(f"{device.name} is no family of patterns: it has no [options.words] (see simd124)")
    bits = {i.parsed.w.bits for p in words.pattern for i, _ in lanes_of(p, device)}
    if not bits <= set(BITS):
        raise InvalidInput(f"explore searches words of 4, 2 and 1 bits, {device.name} has {sorted(bits)}")
    if not len(calibration):
        raise InvalidInput("explore needs calibration data to measure errors on: --calibrate inputs.npz")


def _layers(graph: Graph, data: Sequence[Any], batch: int) -> list[_Layer]:
    from bitwright.driver import optimize

    plain, _ = optimize(graph, CANONICAL)
    bound = bind_graph(plain, dict.fromkeys(plain.symbols, batch)) if plain.symbols else plain
    want = _outputs(plain, data)
    found: dict[str, _Layer] = {}
    for n in bound.nodes:
        name = layer_of(bound, n) if isinstance(n.op, ops.Linear | ops.Conv) else ""
        if not name or name in found or why_not_low(bound, n, 4, True) or bound.types[n.inputs[1]].encoding is not None:
            continue
        w = to_torch(bound.constant(n.inputs[1]))
        errors = row_errors(w, codes_by_width(w))
        sorted_ = errors[ranked(errors)]
        prefix = np.concatenate([np.zeros((1, 3)), np.cumsum(sorted_, 0)]).T
        tried, _ = optimize(plain, f"quantize-channels{{counts=0/{len(w)}/0 only={name}}}")
        loss = relative_rms(_outputs(tried, data), want) ** 2
        found[name] = _Layer(name, work_of(n, bound), prefix, loss / max(float(prefix[1, -1]), 1e-30))
    if not found:
        raise InvalidInput("the model has no linear layer or convolution with constant, unmasked f32 weights")
    return list(found.values())


def _outputs(graph: Graph, data: Sequence[Any]) -> list[Any]:
    """The outputs of some batches, one after another."""
    return [y for batch in itertools.islice(data, BATCHES) for y in evaluate(graph, batch)]


def _sets(device: Device) -> Iterator[tuple[str, ...]]:
    """Sets of at most as many patterns as the device holds, each with lanes of the widest instruction."""
    words = device.words
    assert words is not None
    widest = max((i for p in words.pattern for i, _ in lanes_of(p, device)), key=lambda i: i.parsed.w.bits).name
    found = [
        tuple(p.name for p in some)
        for size in range(1, words.held + 1)
        for some in itertools.combinations(words.pattern, size)
        if any(widest in p.lanes for p in some)
    ]
    if len(found) > SETS:
        raise InvalidInput(f"the family has {len(found)} sets of patterns, explore tries up to {SETS}: declare fewer")
    yield from found


def _lanes(pattern: Pattern, device: Device) -> tuple[int, int, int]:
    held = {int(i.parsed.w.bits): n for i, n in lanes_of(pattern, device)}
    four, two, one = (held.get(b, 0) for b in BITS)
    return four, two, one


def _guesses(names: tuple[str, ...], layers: Sequence[_Layer], device: Device) -> list[_Guess]:
    """For every price of an error, the widths that cost least with these patterns."""
    assert device.words is not None
    lanes = [_lanes(p, device) for n in names for p in device.words.pattern if p.name == n]
    depth = lanes_of(device.words.pattern[0], device)[0][0].depth
    area = area_of(device, names)
    options = [_options(layer, lanes, depth) for layer in layers]
    scale = sum(float(cycles.max()) for _, cycles, _ in options)
    found: dict[tuple[tuple[int, int, int], ...], _Guess] = {}
    for price in PRICES:
        picks = [int(np.argmin(errors + price * cycles / scale)) for _, cycles, errors in options]
        rows = [tuple(int(v) for v in counts[i]) for (counts, _, _), i in zip(options, picks, strict=True)]
        counts = tuple((a, b, c) for a, b, c in rows)
        error = sum(float(errors[i]) for (_, _, errors), i in zip(options, picks, strict=True))
        cycles = sum(float(cycles[i]) for (_, cycles, _), i in zip(options, picks, strict=True))
        found.setdefault(counts, _Guess(names, counts, error, cycles, area))
    return front(list(found.values()))


def _options(layer: _Layer, lanes: Sequence[tuple[int, int, int]], depth: int) -> tuple[Array, Array, Array]:
    """(outputs by width, cycles, error) of every way to hold a layer's outputs in so many words of each pattern."""
    work = layer.work
    outputs = work.outputs * work.groups
    chunks = work.batch * work.rows * ceil(work.taps * work.channels / depth)
    if work.groups > 1:
        words = cover((work.outputs, 0, 0), tuple(lanes))
        assert words is not None
        all_wide = layer.weight * layer.prefix[0, -1]
        return np.array([[outputs, 0, 0]]), np.array([sum(words) * work.groups * chunks]), np.array([all_wide])
    most = ceil(outputs / max(n[0] for n in lanes))
    unit = ceil(most / PARTS)
    grid = np.indices((ceil(most / unit) + 1,) * len(lanes)).reshape(len(lanes), -1).T * unit
    held = grid @ np.array(lanes)
    grid, held = (a[held.sum(1) >= outputs] for a in (grid, held))
    four = np.minimum(held[:, 0], outputs)
    two = np.minimum(held[:, 1], outputs - four)
    p = layer.prefix
    errors = p[0, four] + (p[1, four + two] - p[1, four]) + (p[2, -1] - p[2, four + two])
    counts = np.stack([four, two, outputs - four - two], 1)
    return counts, grid.sum(1) * chunks, layer.weight * errors


def _measured(
    guess: _Guess, graph: Graph, layers: Sequence[_Layer], device: Device, data: Sequence[Any], batch: int
) -> Design:
    one = [
        f"quantize-channels{{counts={'/'.join(map(str, counts))} only={layer.name}}}"
        for layer, counts in zip(layers, guess.counts, strict=True)
    ]
    recipe = ", ".join(["observe-ranges", *one, "quantize-int8"])
    done = simulate_graph(graph, with_patterns(device, guess.patterns), recipe, data, batch=batch)
    if not done.identical:
        raise InvalidInput(f"the outputs of {device.name} are not the reference's: a meaning loses what was proved")
    error = relative_rms(_outputs(done.lowered.graph, data), _outputs(graph, data))
    made = done.schedule
    return Design(guess.patterns, recipe, error, made.cycles, guess.area, done.energy, made.weight_bytes)


__all__ = ["Design", "explore", "front", "plot", "save", "with_patterns"]
