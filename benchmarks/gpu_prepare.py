"""Compiles what ``benchmarks/gpu.py`` runs on a device: one zip of programs and reference outputs."""

from __future__ import annotations

import io
import json
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_cases
import numpy as np

import bitwright as bw
from bitwright.codegen.targets import resolve
from bitwright.ir.errors import Unsupported
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.text import parse
from bitwright.ir.weights import Weights
from bitwright.pipeline import lower

Array = np.ndarray[Any, Any]


def prepare(path: Path, targets: Sequence[str], only: str = "", checks: bool = False) -> None:
    """Compile all cases (those whose name contains ``only``; ``checks``: not those to be timed) for all targets; prints
    a line for each."""
    cases = [c for c in (*gpu_cases.checked(), *(() if checks else gpu_cases.timed())) if only in c.name]
    listed: dict[str, list[dict[str, Any]]] = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for target in targets:
            rows = listed.setdefault(target, [])
            for number, case in enumerate(cases):
                rows.append(_prepared(archive, f"{target}/{number}", target, case))
        archive.writestr("cases.json", json.dumps(listed, indent=1))
    print(f"wrote {path}: {path.stat().st_size / 2**20:.1f} MiB")


def _prepared(archive: zipfile.ZipFile, file: str, target: str, case: gpu_cases.Case) -> dict[str, Any]:
    """One program in the archive: its entry of ``cases.json``."""
    graph, began = parse(case.text, Weights(case.weights())), time.perf_counter()
    try:
        program = bw.compile(graph, target=target, recipe=case.recipe)
    except Unsupported as error:
        print(f"{target} {case.name}: refused, {error}", flush=True)
        return {"name": case.name, "refused": str(error)}
    with tempfile.TemporaryDirectory() as folder:
        program.save(Path(folder) / "m.bw")
        archive.write(Path(folder) / "m.bw", f"{file}.bw")
    if not case.timed:
        archive.writestr(f"{file}.npz", _reference(graph, case, target))
    kernels = [x.kernel for x in program.report.layers]
    print(f"{target} {case.name}: {', '.join(dict.fromkeys(kernels))}, {time.perf_counter() - began:.1f} s", flush=True)
    return {
        "name": case.name, "file": file, "timed": case.timed, "operations": case.operations, "nbytes": case.nbytes,
        "peer": case.peer, "sizes": list(case.sizes), "kernels": kernels,
        "notes": [n for n in program.report.notes if "registers" in n],
    }  # fmt: skip


def _reference(graph: Graph, case: gpu_cases.Case, target: str) -> bytes:
    """Random inputs and what the interpreter makes of them at the kernel level, as bytes."""
    inputs = [gpu_cases.drawn(v.type.static_shape, str(v.type.dtype), 7 + i) for i, v in enumerate(graph.inputs)]
    outputs = [to_numpy(t) for t in evaluate(lower(graph, case.recipe, resolve(target)).graph, inputs)]
    arrays = {f"x{i}": a for i, a in enumerate(inputs)} | {f"y{i}": a for i, a in enumerate(outputs)}
    out = io.BytesIO()
    np.savez(out, **{k: np.ascontiguousarray(a).reshape(-1).view(np.uint8) for k, a in arrays.items()})  # type: ignore[arg-type]
    return out.getvalue()
