"""A program against the model it was made from, layer by layer: the first bad layer has a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitwright.codegen.plan import Plan
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.runtime.manifest import Result
from bitwright.runtime.program import Program

FLOAT_BOUND, LOW_BIT_BOUND = 1e-3, 0.25
"""Relative RMS error above which a layer counts as bad: rounding of f32 sums; what 8-bit codes may accumulate."""


@dataclass(frozen=True, slots=True)
class Row:
    """One layer: relative RMS error of its value against the float model, and whether that is within ``bound``."""

    layer: str
    origin: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return bool(self.error <= self.bound)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows in execution order; ``first_bad`` is the name of the first layer out of bounds, or empty."""

    rows: tuple[Row, ...]

    @property
    def first_bad(self) -> str:
        return next((r.layer for r in self.rows if not r.ok), "")


def verify_program(
    program: Program, graph: Graph, inputs: Mapping[str, Any] | Sequence[Any], bound: float | None = None
) -> Comparison:
    """Compare every value of a program that the captured model also computes.

    ``inputs``: one chunk of the batch. ``bound``: relative RMS error allowed everywhere (None: 1e-3 for float
    programs, 0.25 where codes are 8 bits). Raises :class:`InvalidInput` when the model is not the program's.
    """
    names = [v.name for v in graph.inputs]
    arrays = [np.ascontiguousarray(inputs[n]) for n in names] if isinstance(inputs, Mapping) else list(inputs)
    if tuple(names) != program.input_names:
        raise InvalidInput(f"the program takes inputs {list(program.input_names)}, the model {names}")
    steps = [s for s in program.manifest.steps if s.result is not None and s.result.reference]
    wanted = {s.result.reference for s in steps if s.result is not None}
    values: dict[str, np.ndarray[Any, Any]] = {}

    def keep(name: str, value: Any) -> None:
        if name in wanted:
            values[name] = to_numpy(value).astype(np.float64)

    evaluate(graph, arrays, observe=keep)
    if not wanted & values.keys() and wanted:
        raise InvalidInput(
            "the model computes none of the program's values: is it the model the program was made from?"
        )
    low = any(s.result is not None and s.result.scale is not None for s in program.manifest.steps)
    default = bound if bound is not None else LOW_BIT_BOUND if low or _is_low_bit(program) else FLOAT_BOUND
    traced = program.trace(*arrays)
    origins = {x.name: x.origin for x in program.report.layers}
    rows = []
    for step in steps:
        assert step.result is not None
        want = values.get(step.result.reference)
        got = _real(traced[step.label], step.result)
        if want is not None and want.size == got.size:
            rows.append(Row(step.label, origins.get(step.label, ""), _error(got.reshape(want.shape), want), default))
    return Comparison(tuple(rows))


def _is_low_bit(program: Program) -> bool:
    return any(x.formats.x in ("u8", "s8") for x in program.report.layers)


def _real(value: np.ndarray[Any, Any], result: Result) -> np.ndarray[Any, Any]:
    real = value.astype(np.float64)
    if result.scale is not None:
        real = (real - result.zero) * result.scale
    return real.transpose(0, 3, 1, 2) if result.last and real.ndim == 4 else real


def _error(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    finite = np.isfinite(want)
    if not np.array_equal(np.isfinite(got), finite):
        return float("inf")
    norm = float(np.square(want[finite]).sum())
    difference = float(np.square(got[finite] - want[finite]).sum())
    return (difference / norm) ** 0.5 if norm else difference**0.5


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
