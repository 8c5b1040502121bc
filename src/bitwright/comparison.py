"""A program against the model it was made from, layer by layer: the first bad layer has a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitwright.certificates import Checked, check
from bitwright.codegen.plan import Plan
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.infer import bind_graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.runtime.manifest import Result
from bitwright.runtime.program import Program

BOUND = 1e-2
"""Relative RMS error above which a layer counts as bad: room for the rounding of float sums (a code may then differ
by one step behind a float operator); a wrong kernel, packing or plan is far outside."""


@dataclass(frozen=True, slots=True)
class Row:
    """One layer of the program.

    ``error``: relative RMS error against the reference, which is the same compilation run by the interpreter.
    ``drift``: the same against the captured model before any lossy pass; None where the model has no such value.
    """

    layer: str
    origin: str
    error: float
    drift: float | None
    bound: float

    @property
    def ok(self) -> bool:
        return bool(self.error <= self.bound)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows in execution order; ``first_bad`` is the name of the first layer out of bounds, or empty.

    ``certificates``: the accumulator certificates, derived anew from the packed weights.
    """

    rows: tuple[Row, ...]
    certificates: tuple[Checked, ...] = ()

    @property
    def first_bad(self) -> str:
        return next((r.layer for r in self.rows if not r.ok), "")

    def first_drifted(self, bound: float) -> Row | None:
        """The first layer in execution order that is further than ``bound`` from the captured model; None: no layer."""
        return next((r for r in self.rows if r.drift is not None and not r.drift <= bound), None)

    @property
    def bad_certificates(self) -> tuple[Checked, ...]:
        return tuple(c for c in self.certificates if not c.ok)


def verify_program(
    program: Program,
    graph: Graph,
    inputs: Mapping[str, Any] | Sequence[Any],
    bound: float = BOUND,
    calibration: Sequence[Any] = (),
) -> Comparison:
    """Compare every value of a program with the reference, and with the captured model ``graph``.

    The compilation is repeated on ``graph`` with the recorded passes and calibration facts, and its kernel-level
    form runs in the interpreter. ``inputs``: one chunk of the batch. ``calibration``: what the program was compiled
    with, where its passes computed weights from data. Raises :class:`InvalidInput` when the model is not the one the
    program was made from.
    """
    names = [v.name for v in graph.inputs]
    lowered = _repeat(program, graph, calibration) if names == list(program.input_names[: len(names)]) else graph
    if tuple(v.name for v in lowered.inputs) != program.input_names:  # passes may have added inputs at the end
        raise InvalidInput(f"the program takes inputs {list(program.input_names)}, the model {names}")
    given = program.input_names
    arrays = [np.ascontiguousarray(inputs[n]) for n in given] if isinstance(inputs, Mapping) else list(inputs)
    steps = [s for s in program.manifest.steps if s.result is not None]
    want = _values(lowered, arrays, {s.label for s in steps})
    if any(s.label not in want for s in steps):
        missing = next(s.label for s in steps if s.label not in want)
        raise InvalidInput(f"the model does not compute {missing!r}: is it the model the program was made from?")
    plain = _values(graph, arrays[: len(names)], {s.result.reference for s in steps if s.result is not None})
    traced = program.trace(*arrays)
    origins = {x.name: x.origin for x in program.report.layers}
    rows = []
    for step in steps:
        assert step.result is not None
        got, reference = traced[step.label], plain.get(step.result.reference)
        drift = None
        if reference is not None and reference.size == got.size:
            drift = _error(_real(got, step.result).reshape(reference.shape), reference)
        rows.append(Row(step.label, origins.get(step.label, ""), _error(got, want[step.label]), drift, bound))
    return Comparison(tuple(rows), check(program.contents))


def _values(graph: Graph, inputs: list[Any], wanted: set[str]) -> dict[str, np.ndarray[Any, Any]]:
    values: dict[str, np.ndarray[Any, Any]] = {}

    def keep(name: str, value: Any) -> None:
        if name in wanted:
            values[name] = to_numpy(value)

    evaluate(graph, inputs, observe=keep)
    return values


def _repeat(program: Program, graph: Graph, calibration: Sequence[Any]) -> Graph:
    """The kernel-level graph the program was built from: the recorded passes with the recorded facts."""
    from bitwright.codegen.build import select
    from bitwright.codegen.targets import resolve
    from bitwright.passes._manager import run_pipeline
    from bitwright.passes._pass import Context
    from bitwright.passes._spec import parse_passes

    report = program.report
    target = resolve(report.target or "host", calibrate=False)
    passes = list(parse_passes(report.pipeline))
    changing, missing = {r.name for r in report.passes if r.changed}, {f for p in passes for f in (*p.needs, *p.uses)}
    missing -= set(report.facts)
    # analyses are not repeated where what they found is recorded, or nobody asked for it
    passes = [p for p in passes if not p.establishes or p.name in changing or missing & set(p.establishes)]
    facts = {k: {n: r if isinstance(r, str) else tuple(r) for n, r in v.items()} for k, v in report.facts.items()}
    facts["recorded-precision"] = facts.pop("precision", {})
    context = Context(target, calibration, facts=facts)
    lowered, _ = run_pipeline(graph, passes, context, crash_dir=None)
    rows = program.manifest.chunks[0]
    bound = bind_graph(lowered, dict.fromkeys(graph.symbols, rows)) if graph.symbols else lowered
    return select(bound, target)[0]


def _real(value: np.ndarray[Any, Any], result: Result) -> np.ndarray[Any, Any]:
    real = value.astype(np.float64)
    if result.scale is not None:
        real = (real - result.zero) * result.scale
    return real.transpose(0, 3, 1, 2) if result.last and real.ndim == 4 else real


def _error(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    got, want = got.astype(np.float64), want.astype(np.float64)
    if got.shape != want.shape:
        return float("inf")
    finite = np.isfinite(want)
    if not np.array_equal(np.isfinite(got), finite):
        return float("inf")
    norm = float(np.square(want[finite]).sum())
    difference = float(np.square(got[finite] - want[finite]).sum())
    return float(np.sqrt(difference / norm if norm else difference))


def results_of(plan: Plan, built: Graph, captured: Graph, quantized: Graph | None) -> dict[str, Result]:
    """Where each step's first result lies and what it stands for, by step label."""
    out: dict[str, Result] = {}
    for step, places in zip(plan.steps, plan.places, strict=True):
        written = next((i for i, a in enumerate(step.args) if "w" in a.access), None)
        if written is None or step.label not in built.types:
            continue
        place, t = places[written], built.types[step.label]
        if place.space not in ("arena", "output"):
            continue
        reference, scale, zero, last = _meaning(step.label, captured, quantized)
        out[step.label] = Result(
            space=place.space, index=place.index, offset=place.offset, dtype=str(t.dtype), shape=t.static_shape,
            reference=reference, scale=scale, zero=zero, last=last,
        )  # fmt: skip
    return out


def _meaning(name: str, captured: Graph, quantized: Graph | None) -> tuple[str, float | None, int, bool]:
    """(name in the captured graph, scale, zero, channels last) of a value of the program."""
    last = name.endswith(".last")
    base = name.removesuffix(".last")
    if base in captured.types and captured.types[base].dtype.is_float:
        return base, None, 0, last
    node = quantized.producers.get(base) if quantized is not None else None
    while node is not None and not isinstance(node.op, ops.Quantize) and len(node.inputs) == 1:
        node = quantized.producers.get(node.inputs[0]) if quantized is not None else None  # through views of codes
    plain = base.removesuffix(".q")
    if quantized is None or node is None or not isinstance(node.op, ops.Quantize) or plain not in captured.types:
        return "", None, 0, last
    scale = quantized.constant(node.inputs[1])
    zero = quantized.constant(node.inputs[2]) if len(node.inputs) > 2 else 0
    if scale is None or np.size(scale) != 1:  # type: ignore[arg-type]
        return "", None, 0, last
    return plain, float(np.asarray(scale)), int(np.asarray(zero)), last
