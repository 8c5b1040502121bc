"""Compiles many small C programs into one shared object and compares each with the reference interpreter."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.codegen.c.emit import files
from bitwright.codegen.c.program import Source, source_of
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.types import TensorType, dtype_of
from tests.codegen.kernel_batch import body_of

Array = np.ndarray[Any, Any]
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-pedantic", "-fno-strict-aliasing"]


@dataclass
class Case:
    """A kernel-level graph on given inputs; floats may differ by ``tolerance`` of the largest result."""

    label: str
    graph: Graph
    inputs: Sequence[Array]
    tolerance: float = 2e-6


def one_region(
    *chain: tuple[ops.Op, Any], inputs: dict[str, Array], weights: dict[str, tuple[Array, TensorType]] | None = None
) -> Graph:
    """A graph of one region; ``weights`` are constant operands by the names the chain calls them."""
    weights = weights or {}
    everything = inputs | {k: a for k, (a, _) in weights.items()}
    body = body_of(*chain, inputs=everything)
    b = Builder("case", "kernel")
    outer = {k: b.input(k, TensorType(dtype_of(a.dtype), a.shape)) for k, a in inputs.items()}
    outer |= {k: b.weight(k, a, t) for k, (a, t) in weights.items()}
    typed = tuple(type(v)(v.name, weights[v.name][1]) if v.name in weights else v for v in body.inputs)
    body = type(body)(body.name, typed, body.nodes, body.outputs, body.output_names, body.weights, body.level)
    outs = b.emit_all(ops.Region(body, "generic"), *(outer[v.name] for v in body.inputs))
    return b.finish(outs)


def run(cases: Sequence[Case], folder: Path, options: Sequence[str] = ("-O1",)) -> list[str]:
    """What differs from the reference, one line per case that fails."""
    units, made = [], []
    for i, c in enumerate(cases):
        source = source_of(c.graph)
        made.append(source)
        place = folder / f"case{i}"
        place.mkdir(parents=True)
        for name, text in files(source, f"case{i}", []).items():
            (place / name).write_text(text)
        units += [str(place / "model.c"), str(place / "weights.c")]
    library = folder / "cases.so"
    command = ["gcc", *STRICT, "-ffp-contract=off", *options, "-shared", "-fPIC", "-o", str(library), *units, "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    loaded = ctypes.CDLL(str(library))
    failures = []
    for i, (c, source) in enumerate(zip(cases, made, strict=True)):
        why = compare(c, call(loaded[f"case{i}_run"], source, c.inputs))
        failures += [f"{c.label}: {why}"] if why else []
    return failures


def call(function: Any, source: Source, inputs: Sequence[Array]) -> list[Array]:
    """Call a program's C function."""
    g = source.graph
    given = [np.ascontiguousarray(a) for a in inputs]
    results = [np.zeros(g.types[o].static_shape, g.types[o].dtype.numpy) for o in g.outputs]
    function(*(a.ctypes.data_as(ctypes.c_void_p) for a in (*given, *results)))
    return results


def compare(case: Case, got: Sequence[Array]) -> str:
    """How the results differ from the reference; the empty string if they do not."""
    for k, (y, t) in enumerate(zip(got, evaluate(case.graph, list(case.inputs)), strict=True)):
        want = to_numpy(t)
        if want.dtype.kind != "f":
            if not np.array_equal(y, want):
                return f"result {k}: {int((y != want).sum())} of {want.size} elements differ"
            continue
        if not np.array_equal(np.isnan(y), np.isnan(want)):
            return f"result {k}: NaN in other places"
        scale = float(np.abs(np.where(np.isfinite(want), want, 0)).max(initial=0)) or 1.0
        ok = np.isclose(y, want, rtol=0, atol=case.tolerance * scale, equal_nan=True)
        if not ok.all():
            return f"result {k}: off by {float(np.nanmax(np.abs(y - want)))} of {scale}"
    return ""
