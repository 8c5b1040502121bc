"""A model as freestanding C: from graph to sources, sizes and budgets."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.assemble import Row, batch_symbol, fit_batches, refuse_broken, refuse_empty, report_of
from bitwright.codegen.c.emit import files
from bitwright.codegen.c.program import Call, Source, source_of
from bitwright.codegen.c.toolchain import Sizes, Toolchain, run_self_test, sizes, toolchain
from bitwright.errors_by_layer import measure_layers
from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.ir.files import save
from bitwright.ir.graph import Graph
from bitwright.ir.infer import bind_graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.target import Target
from bitwright.pipeline import lower
from bitwright.runtime.report import Report

Progress = Callable[[str, float], None]
Array = np.ndarray[Any, Any]
SAMPLES = 2
"""Inputs whose expected results the self-test carries."""


@dataclass(frozen=True)
class CProgram:
    """Sources of a model with the samples of its self-test, and the record of the compilation."""

    source: Source
    name: str
    samples: tuple[tuple[tuple[Array, ...], tuple[Array, ...]], ...]
    report: Report

    def save(self, folder: str | Path) -> list[Path]:
        """Write the files into a folder, which is made; an existing one may hold only files of these names."""
        folder = Path(folder)
        texts = files(self.source, self.name, self.samples)
        if folder.is_file():
            raise InvalidInput(f"{folder} is a file; C sources go into a folder")
        built = {"libmodel.a", "selftest", "model.o", "weights.o", "report.json"}
        if folder.exists() and (others := {p.name for p in folder.iterdir()} - set(texts) - built):
            raise InvalidInput(f"{folder} holds other files ({', '.join(sorted(others)[:3])}): name a new folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BitwrightError(f"cannot write {folder}: {error.strerror or error}") from error
        paths = []
        for name, text in texts.items():
            path = folder / name
            save(path, text)
            paths.append(path)
        save(folder / "report.json", self.report.to_json())
        return [*paths, folder / "report.json"]

    def sizes(self, chain: str | Toolchain = "cortex-m4") -> Sizes:
        """Bytes of code, tables and RAM as this compiler makes them."""
        made = chain if isinstance(chain, Toolchain) else toolchain(chain)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            return sizes(Path(folder), made)

    def self_test(self, chain: str | Toolchain = "host") -> int:
        """Run the self-test, emulated where needed: the number of wrong elements."""
        made = chain if isinstance(chain, Toolchain) else toolchain(chain)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            return run_self_test(Path(folder), made)

    def check_budget(self, flash: int | None, ram: int | None, chain: str | Toolchain = "cortex-m4") -> Sizes:
        """The sizes; raises :class:`InvalidInput` that names the layers that do not fit, with bytes and a cure."""
        made = chain if isinstance(chain, Toolchain) else toolchain(chain)
        found = self.sizes(made)
        problems = []
        if flash is not None and found.flash > flash:
            rows = sorted(((self.source.call_bytes(c), c) for c in self.source.calls), key=lambda r: -r[0])
            problems.append(
                f"it needs {kib(found.flash)} of flash ({kib(found.tables)} of constants, {kib(found.code)} of code "
                f"for {made.name}) where {kib(flash)} are allowed; the largest layers: "
                f"{_largest(rows, found.flash - flash)}. "
                "Fewer bits or a mask make them smaller: quantize-weights{bits=4}, nm-mask{pattern=2:4}"
            )
        if ram is not None and found.ram > ram:
            rows = sorted(zip(self.source.live, self.source.calls, strict=True), key=lambda r: -r[0])
            over = [(n, c) for n, c in rows if n > ram] or rows[:1]
            problems.append(
                f"it needs {kib(found.ram)} of RAM (no plan needs less than {kib(self.source.bound_bytes)}) where "
                f"{kib(ram)} are allowed; layers whose inputs and results do not fit: {_largest(over, 0)}. "
                "Smaller inputs or fewer channels there help; weights do not count"
            )
        if problems:
            raise InvalidInput(f"{self.name} does not fit: " + "; and ".join(problems))
        return found


def _largest(rows: Sequence[tuple[int, Call]], enough: int, most: int = 5) -> str:
    """The layers that make up ``enough`` bytes, largest first, with their sizes."""
    named: list[str] = []
    total = 0
    for nbytes, call in rows:
        if len(named) == most or (named and enough and total >= enough):
            break
        named.append(f"{call.label.split(',')[0].split(' (')[0]} {kib(nbytes)}")
        total += nbytes
    return ", ".join(named)


def kib(nbytes: int) -> str:
    """``12.0 KiB``."""
    return f"{nbytes / 1024:.1f} KiB"


def parse_size(text: str) -> int:
    """Bytes of ``256K``, ``64KiB``, ``1M`` or ``2048``; raises :class:`InvalidInput`.

    >>> parse_size("256K"), parse_size("1.5 MiB"), parse_size("100")
    (262144, 1572864, 100)
    """
    m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)(?:i?[bB])?\s*", text)
    if not m or float(m[1]) <= 0:
        raise InvalidInput(f"{text!r} is not a size such as 256K or 1M")
    return int(float(m[1]) * {"": 1, "k": 1024, "m": 1024 * 1024}[m[2].lower()])


def assemble_c(
    graph: Graph,
    target: Target,
    recipe: Any,
    calibration: Sequence[Any],
    *,
    batch: int = 1,
    dump: str | Path | None = None,
    progress: Progress | None = None,
    name: str = "",
) -> CProgram:
    """Compile ``graph`` to C; see :func:`bitwright.compile_c` for the arguments and errors."""
    refuse_broken(graph)
    _, notes = batch_symbol(graph, batch)
    calibration = fit_batches(graph, calibration)
    done = lower(graph, recipe, target, calibration, dump=dump, progress=progress)
    sizes_of = dict.fromkeys(graph.symbols, batch)
    bound = bind_graph(done.graph, sizes_of) if sizes_of else done.graph
    refuse_empty(bound)
    source = source_of(bound)
    nodes = source.graph.producers
    rows = [Row(nodes[c.outputs[0]], "c", "; ".join(c.forms) or "loops") for c in source.calls if c.outputs[0] in nodes]
    errors = measure_layers(graph, done.quantized, calibration, done.context)
    report = report_of(graph, target, rows, source.graph, done, errors)
    report.notes += notes
    report.figures = {
        "arena_bytes": float(source.arena_bytes),
        "arena_bound_bytes": float(source.bound_bytes),
        "weight_bytes": float(source.table_bytes),
    }
    return CProgram(source, name or graph.name, tuple(_samples(source, bound, calibration)), report)


def _samples(
    source: Source, bound: Graph, calibration: Sequence[Any]
) -> list[tuple[tuple[Array, ...], tuple[Array, ...]]]:
    """Inputs (from the calibration data, or random) and what the reference says to them."""
    out = []
    given = [calibration[k] for k in range(min(SAMPLES, len(calibration)))]
    rng = np.random.default_rng(0)
    for k in range(SAMPLES):
        arrays = []
        for i, v in enumerate(bound.inputs):
            shape = v.type.static_shape
            batch = given[k % len(given)] if given else None
            if batch is not None:
                full = np.asarray(batch[v.name] if isinstance(batch, dict) else batch[i])
                start = 0 if k < len(given) or not shape else min(k * shape[0], max(0, len(full) - shape[0]))
                full = full[start : start + shape[0]] if shape else full
            if batch is None or full.shape != shape:
                kind = v.type.dtype.numpy
                full = rng.standard_normal(shape) if kind.kind == "f" else rng.integers(0, 2, shape)
            arrays.append(np.ascontiguousarray(np.asarray(full).astype(v.type.dtype.numpy)))
        results = tuple(np.asarray(t) for t in evaluate(bound, arrays))
        out.append((tuple(arrays), results))
    return out
