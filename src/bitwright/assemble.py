"""One compilation from graph to program: passes, kernels, artifact, report."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitwright._version import __version__
from bitwright.certificates import recorded
from bitwright.codegen.build import Kernel, build, nbytes_of
from bitwright.codegen.cache import Cache
from bitwright.codegen.cost import cost_of, working_set
from bitwright.codegen.cuda.build import build_gpu
from bitwright.codegen.targets.machine import cpu_name
from bitwright.codegen.tuning.records import Database
from bitwright.comparison import results_of
from bitwright.errors_by_layer import Measured, measure_layers
from bitwright.ir import ops
from bitwright.ir.batch import why_not_separable
from bitwright.ir.errors import InvalidInput, Problem, Unsupported
from bitwright.ir.graph import Graph, Node
from bitwright.ir.infer import bind_graph
from bitwright.ir.patterns import density
from bitwright.ir.target import Target
from bitwright.ir.text import show
from bitwright.ir.types import symbols_of
from bitwright.ir.work import macs
from bitwright.passes._batches import LazyBatches
from bitwright.passes._layers import name_of
from bitwright.passes._pass import Price
from bitwright.pipeline import Lowered, lower
from bitwright.program_manifest import manifest_of
from bitwright.runtime.artifact import Contents
from bitwright.runtime.program import Program
from bitwright.runtime.report import Formats, Layer, PassRow, Refusal, Report

Progress = Callable[[str, float], None]
_DIFF_LIMIT = 100_000


@dataclass(frozen=True, slots=True)
class Row:
    """What the report needs of a step that is no kernel of a program: its region, what it became and why."""

    node: Node
    template: str
    reason: str
    refused: tuple[tuple[str, str], ...] = ()


def assemble(
    graph: Graph,
    target: Target,
    recipe: Any,
    calibration: Sequence[Any],
    *,
    threads: int = 1,
    batch: int = 1,
    dump: str | Path | None = None,
    cache: Cache | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    measure: bool = False,
    began: float = 0.0,
    price: Price | None = None,
    records: str | Path | None = None,
) -> Program:
    """Compile ``graph`` for ``target``; see :func:`bitwright.compile` for the arguments and errors."""
    refuse_broken(graph)
    symbol, notes = batch_symbol(graph, batch)
    calibration = fit_batches(graph, calibration)
    done = lower(graph, recipe, target, calibration, dump=dump, progress=progress, price=price, wait=False)
    sizes = dict.fromkeys(graph.symbols, batch)
    bound = bind_graph(done.graph, sizes) if sizes else done.graph
    refuse_empty(bound)
    rows = batch if symbol else 1
    row_bytes = [_row_bytes(t, rows) if symbol else 0 for t in _port_types(bound)]
    split = len(bound.inputs)
    with Database(Path(records), write=False) if records is not None else nullcontext() as tuned:
        common: dict[str, Any] = {"cache": cache, "workers": workers, "progress": progress, "records": tuned}
        if target.kind == "gpu":
            built = build_gpu(bound, target, **common)
        else:
            ports = row_bytes[:split], row_bytes[split:]
            built = build(bound, target, rows=rows, row_inputs=ports[0], row_outputs=ports[1], **common)
    done = done.settled()  # output errors were measured while kernels were built
    errors = measure_layers(graph, done.quantized, calibration, done.context)
    report = report_of(graph, target, built.kernels, built.graph, done, errors)
    report.notes += [*notes, *built.notes]
    if measure and target.arch != platform.machine():
        report.notes.append(f"times are predicted, not measured: the program runs on {target.arch}")
        measure = False
    if records is not None:
        tuned_kernels = sum(bool(k.record) for k in built.kernels)
        report.notes.append(f"{tuned_kernels} of {len(built.kernels)} kernels were chosen by tuning records")
    report.figures = {
        "compile_seconds": time.perf_counter() - began if began else None,
        "kernels_compiled": float(built.compiled),
        "kernels": float(len(built.kernels)),
        "arena_bytes": float(built.plan.arena_bytes),
        "arena_bound_bytes": float(built.plan.bound_bytes),
        "weight_bytes": float(built.plan.weights_bytes),
        "predicted_seconds": float(sum(x.predicted_seconds or 0.0 for x in report.layers)),
    }
    results = results_of(built.plan, built.graph, graph, done.quantized)
    proofs = recorded(built, done.context.facts.get("certificates", {}))
    for row in report.layers:
        row.accumulator = "; ".join(str(c) for c in proofs if c.step == row.name)
    manifest = manifest_of(graph, bound, target, built, symbol, rows, threads, results)
    chosen = {k.node.output: k.record for k in built.kernels if k.record}
    manifest = manifest.model_copy(update={"certificates": proofs, "tuning": chosen})
    contents = Contents(manifest, show(built.graph), built.library, built.weights, report.to_json())
    program = Program.compiled(contents, threads)
    return with_measured(program, example_inputs(program, done.context.calibration)) if measure else program


def batch_symbol(graph: Graph, batch: int) -> tuple[str, list[str]]:
    """The symbol that any number of rows may be passed for, and notes on what was fixed instead.

    Raises :class:`InvalidInput` when sizes other than the batch are symbolic.
    """
    if batch < 1:
        raise InvalidInput(f"batch must be at least 1, not {batch}")
    symbols = graph.symbols
    if not symbols:
        return "", []
    first = next((s for v in graph.inputs if v.type.shape for s in symbols_of(v.type.shape[0])), symbols[0])
    if rest := [s for s in symbols if s != first]:
        raise InvalidInput(
            f"symbolic size{'s' if len(rest) > 1 else ''} {', '.join(map(repr, rest))} must be fixed to compile: "
            f"pass sizes={{{', '.join(f'{s!r}: ...' for s in rest)}}}"
        )
    if why := why_not_separable(graph, first):
        return "", [f"the batch is fixed to {batch}: {why}"]
    return first, []


def refuse_broken(graph: Graph) -> None:
    """NaN in a weight, or an infinity in a factor of a contraction, before any pass meets it."""
    factors = {x for n in graph.nodes if isinstance(n.op, ops.CONTRACTION) for x in n.inputs[:2]}
    for node in graph.nodes:
        if not isinstance(node.op, ops.Weight) or not node.type.dtype.is_float:
            continue
        a = graph.weights[node.op.ref].array
        with np.errstate(all="ignore"):
            if np.isfinite(float(a.sum(dtype=np.float32))):
                continue
        wide = a.astype(np.float32, copy=False)
        what = "NaN" if np.isnan(wide).any() else "an infinity" if np.isinf(wide).any() else ""
        if what == "NaN" or (what and node.output in factors):
            raise InvalidInput(f"weight {node.op.ref!r} contains {what}")


def refuse_empty(graph: Graph) -> None:
    """An empty input that something reads, or an empty result, means a size of zero nobody can have wanted."""
    used = {x for n in graph.nodes for x in n.inputs} | set(graph.outputs)
    for name in [*(v.name for v in graph.inputs if v.name in used), *graph.outputs]:
        t = graph.types[name]
        if t.is_static and t.size == 0:
            node = graph.producers.get(name)
            place = node.origin or name if node else f"input {name!r}"
            raise Unsupported(
                Problem("empty tensor", place, f"%{name} has no elements: {t}", "give it a size above zero")
            )


def fit_batches(graph: Graph, calibration: Sequence[Any]) -> Sequence[Any]:
    """Calibration batches, all checked, cut to the graph's fixed batch where their first axis is a multiple of it."""
    if isinstance(calibration, LazyBatches):
        return LazyBatches(calibration, partial(_fitted, graph))
    return [b for batch in calibration for b in _fitted(graph, batch)]


def _fitted(graph: Graph, b: Any) -> list[Any]:
    names = [v.name for v in graph.inputs]
    arrays = [b[n] for n in names if n in b] if isinstance(b, dict) else list(b)
    if len(arrays) != len(names):
        given = sorted(b) if isinstance(b, dict) else f"{len(arrays)} arrays"
        raise InvalidInput(f"a calibration batch needs inputs {names}, got {given}")
    arrays = [_convert(np.asarray(a), v.type.dtype.numpy, v.name) for a, v in zip(arrays, graph.inputs, strict=True)]
    cut = _cut(graph, arrays)
    for given, a, v in zip(arrays, cut[0], graph.inputs, strict=True):
        if len(a.shape) != v.type.rank or any(
            d != n if isinstance(n, int) else not d for d, n in zip(a.shape, v.type.shape, strict=True)
        ):
            shape = "x".join(map(str, given.shape))
            raise InvalidInput(f"calibration data for input {v.name!r} is {shape}; the model takes {v.type}")
    return cut


def _convert(a: np.ndarray[Any, Any], want: np.dtype[Any], name: str) -> np.ndarray[Any, Any]:
    if a.dtype.kind == "f" and not np.isfinite(a).all():
        raise InvalidInput(f"calibration data for input {name!r} contains NaN or infinity")
    try:
        return a if a.dtype == want else a.astype(want)
    except (TypeError, ValueError) as e:
        raise InvalidInput(f"calibration data for input {name!r} are no numbers: {e}") from e


def _cut(graph: Graph, arrays: list[np.ndarray[Any, Any]]) -> list[Any]:
    fixed = [v.type.shape[0] if v.type.shape else 0 for v in graph.inputs]
    if any(not isinstance(f, int) or f == 0 for f in fixed):
        return [tuple(arrays)]
    counts = {a.shape[0] // int(f) for a, f in zip(arrays, fixed, strict=True) if a.ndim and a.shape[0] % int(f) == 0}
    if len(counts) != 1 or (n := counts.pop()) <= 1:
        return [tuple(arrays)]
    return [tuple(a[i * int(f) : (i + 1) * int(f)] for a, f in zip(arrays, fixed, strict=True)) for i in range(n)]


def _port_types(graph: Graph) -> list[Any]:
    return [*(v.type for v in graph.inputs), *(graph.types[o] for o in graph.outputs)]


def _row_bytes(t: Any, rows: int) -> int:
    return nbytes_of(t) // rows


def report_of(
    graph: Graph, target: Target, kernels: Sequence[Kernel | Row], bound: Graph, done: Lowered, errors: Measured
) -> Report:
    """The record of a compilation: ``kernels`` of the kernel-level graph ``bound``, made from ``graph``."""
    passes, text = done.report, done.diffs
    rows = [
        PassRow(
            index=r.index, name=r.name, options=r.options, seconds=r.seconds, nodes_before=r.nodes_before,
            nodes_after=r.nodes_after, changed=r.changed, notes=list(r.notes), error=r.output_error,
            diff=text.get(f"{r.name}{r.options}", text.get(r.name, ""))[:_DIFF_LIMIT],
        )
        for r in passes.rows
    ]  # fmt: skip
    remarks: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, place, facts in passes.remarks:
        remarks.setdefault(place, []).append((name, facts))
    weights = working_set(bound, target)
    layers = [_layer(k, bound, target, weights, errors, remarks) for k in kernels]
    seen = [Refusal(pass_name=r.pass_name, place=r.place, reason=r.reason, cure=r.cure) for r in passes.refusals]
    whole = [f"{name}: {_told(facts)}" for name, facts in remarks.get("model", [])]
    return Report(
        model=graph.name, target=target.name, layers=layers, passes=rows, refusals=seen, pipeline=passes.pipeline,
        notes=whole,
        facts={k: v for k, v in done.context.facts.items() if k.startswith(("ranges", "precision"))},
        machine={"cpu": cpu_name(), "isa": target.isa, "source": target.source},
        versions={"bitwright": __version__},
    )  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _told(facts: Mapping[str, object]) -> str:
    return ", ".join(f"{k} {_short(v)}" for k, v in facts.items())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _matters(template: str, reason: str) -> bool:
    """Whether the report tells why this template refused a contraction whose kernel was chosen for ``reason``."""
    return template == "contract" or (template == "lanes" and reason.startswith("runs dense"))


def _layer(
    k: Kernel | Row,
    graph: Graph,
    target: Target,
    weights: int,
    measured: Measured,
    remarks: dict[str, list[tuple[str, dict[str, Any]]]],
) -> Layer:
    """The report row of one kernel."""
    assert isinstance(k.node.op, ops.Region)
    body = k.node.op.body
    root = next((n for n in body.nodes if macs(n, body)), None)
    heads = [n for n in body.nodes if not isinstance(n.op, ops.Constant)]
    label = "+".join(dict.fromkeys(n.op.spelling for n in heads))
    dense = k.reason.startswith(("dense", "runs dense"))
    cost = cost_of(body, target, generic=k.template.endswith("generic"), sparse=not dense, working_set=weights)
    formats, pattern, kept, weight = Formats(out=str(body.types[body.outputs[0]].dtype)), "", None, ""
    notes = [
        f"{t}: {why}"
        for t, why in k.refused
        if root is not None and isinstance(root.op, ops.CONTRACTION) and _matters(t, k.reason)
    ]
    origin = k.node.origin or next((n.origin for n in heads if n.origin), "")
    if root is not None:
        behind = root.inputs[2 if isinstance(root.op, ops.GroupLinear) else 1]  # its weight, or the second operand
        w = body.types[behind]
        formats = Formats(
            x=str(body.types[root.inputs[0]].dtype),
            w=str(w.dtype),
            out=formats.out,
            acc=str(getattr(root.op, "acc", root.type.dtype)),
        )
        pattern, origin = str(w.encoding or ""), root.origin or origin
        outer = dict(zip((v.name for v in body.inputs), k.node.inputs, strict=True)).get(behind)
        array = graph.constant(outer) if outer is not None else None
        kept = density(array) if isinstance(array, np.ndarray) else None
        source = graph.producers.get(outer) if outer is not None else None
        weight = name_of(source.op.ref, root.origin) if source and isinstance(source.op, ops.Weight) else ""
    told: list[tuple[str, dict[str, Any]]] = []
    for key in dict.fromkeys((weight, *(x for n in heads for x in (n.output, n.origin, *n.inputs)))):
        told += [r for r in remarks.get(key, []) if r not in told] if key else []
    figures = {f"{name}.{key}": float(v) for name, facts in told for key, v in facts.items() if _is_number(v)}
    notes += [f"{name}: {_told(facts)}" for name, facts in told]
    values = [p for n in reversed(heads) for o in n.outputs for p in _names(o)]
    error = next((measured.errors[p] for p in values if p in measured.errors), None)
    if error and root is not None and isinstance(root.op, ops.CONTRACTION):
        figures["result.output_snr_db"] = -20 * math.log10(error)
    if clipped := [measured.clipped[p] for p in values if p in measured.clipped]:
        figures["result.saturation"] = clipped[0]
    return Layer(
        name=k.node.output, op=label, origin=origin, shape=k.node.type.shape, formats=formats, pattern=pattern,
        density=kept, kernel=k.template, reason=k.reason, bytes=cost.bytes, operations=cost.operations,
        predicted_seconds=cost.seconds, limit_seconds=cost.limit, error=error, weight=weight, figures=figures,
        notes=notes,
    )  # fmt: skip


def _names(value: str) -> tuple[str, ...]:
    """What a value was called before layout and quantization passes put their endings on it."""
    plain = value.removesuffix(".last")
    return (value, plain, plain.removesuffix(".q"), plain.removesuffix(".acc"), plain.removesuffix(".real"))


def example_inputs(program: Program, calibration: Sequence[Any] = ()) -> list[np.ndarray[Any, Any]]:
    """Inputs of one chunk to measure a program with: from the first calibration batch, or seeded random values."""
    if calibration:
        first = calibration[0]
        given = [first[n] for n in program.input_names] if isinstance(first, dict) else list(first)
        rows = program.manifest.chunks[0]
        heads = [t.factor * rows or next(iter(t.shape), 0) for t in program.inputs]
        sizes = [int(n) if np.ndim(v) else 0 for n, v in zip(heads, given, strict=True)]
        if all(np.ndim(v) == 0 or len(v) >= n for v, n in zip(given, sizes, strict=True)):
            cut = [v[:n] if np.ndim(v) else v for v, n in zip(given, sizes, strict=True)]
            return [np.ascontiguousarray(v) for v in cut]
    from bitwright.ir.types import parse_dtype

    rng = np.random.default_rng(0)
    out = []
    for t in program.inputs:
        rows = program.manifest.chunks[0]
        shape = tuple(d if isinstance(d, int) else t.factor * rows for d in t.shape)
        dtype = parse_dtype(t.dtype).numpy
        values = rng.standard_normal(shape) if dtype.kind not in "iub" else rng.integers(0, 2, shape)
        out.append(np.asarray(values).astype(dtype))
    return out


def with_measured(program: Program, inputs: Sequence[Any], repeats: int = 20) -> Program:
    """The program with measured seconds per layer in its report (median over ``repeats`` calls)."""
    times = {s.label: s.seconds for s in program.profile(*inputs, repeats=repeats)}
    report = program.report.with_seconds(times)
    for row in report.layers:
        if row.measured_seconds and row.limit_seconds is not None:
            row.share_of_limit = min(1.0, row.limit_seconds / row.measured_seconds)
    contents = program.contents
    return Program(replace(contents, report=report.to_json()), threads=program.threads)
