"""Instruments watch a pipeline: timing, numbered dumps, diffs; and the reproducer a crash leaves behind."""

from __future__ import annotations

import difflib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.ir.graph import Graph
from bitwright.ir.text import parse, show
from bitwright.ir.weights import Weights
from bitwright.passes._pass import Context, Pass

if TYPE_CHECKING:
    from bitwright.passes._manager import PipelineReport

WEIGHT_LIMIT = 256 << 20
"""A reproducer holds the weights when they are smaller than this many bytes."""


class Instrument:
    """Base: hooks that do nothing."""

    def begin(self, graph: Graph) -> None:
        """Before the first pass."""

    def before(self, index: int, p: Pass, graph: Graph) -> None:
        """Before pass ``index``."""

    def after(self, index: int, p: Pass, before: Graph, after: Graph, changed: bool, seconds: float) -> None:
        """After pass ``index``, verified and cleaned up."""


class Timing(Instrument):
    """Seconds by pass, verification included."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []

    def after(self, index: int, p: Pass, before: Graph, after: Graph, changed: bool, seconds: float) -> None:
        self.seconds.append((p.name, seconds))


class Dump(Instrument):
    """Writes ``00.input.bw-ir`` and ``NN.after_<pass>.<changed|unchanged>.bw-ir`` (unchanged ones are empty)."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def begin(self, graph: Graph) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for old in self.directory.glob("[0-9][0-9].*.bw-ir"):
            old.unlink()
        (self.directory / "00.input.bw-ir").write_text(show(graph))

    def after(self, index: int, p: Pass, before: Graph, after: Graph, changed: bool, seconds: float) -> None:
        word = "changed" if changed else "unchanged"
        path = self.directory / f"{index + 1:02d}.after_{p.name}.{word}.bw-ir"
        path.write_text(show(after) if changed else "")


class Diff(Instrument):
    """Keeps a unified text diff for every pass that changed something."""

    def __init__(self, context_lines: int = 1) -> None:
        self.context_lines = context_lines
        self.diffs: list[tuple[str, str]] = []
        """(pass as text, diff); a change of weight values alone gives an empty diff."""
        self._shown: tuple[Graph, list[str]] | None = None

    def after(self, index: int, p: Pass, before: Graph, after: Graph, changed: bool, seconds: float) -> None:
        if changed:
            shown = self._shown[1] if self._shown is not None and self._shown[0] is before else None
            old = show(before).splitlines(keepends=True) if shown is None else shown
            new = show(after).splitlines(keepends=True)
            self._shown = after, new
            lines = difflib.unified_diff(old, new, f"before {p.name}", f"after {p.name}", n=self.context_lines)
            self.diffs.append((str(p), "".join(lines)))


def write_crash(directory: Path, graph: Graph, passes: Sequence[Pass], context: Context) -> str:
    """Leave ``crash.bw-ir``, ``crash.pipeline``, facts and weights; returns the sentence that tells so."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "crash.bw-ir"
    path.write_text(show(graph))
    (directory / "crash.pipeline").write_text(", ".join(map(str, passes)) + "\n")
    (directory / "crash.facts.json").write_text(json.dumps(context.facts, default=_plain))
    used = {k: graph.weights[k] for k in graph.used_weights()}
    size = sum(n.type.size * n.type.dtype.numpy.itemsize for n in graph.nodes if n.op.name == "weight")
    kept = size < WEIGHT_LIMIT
    if kept:
        Weights(used).save(directory / "crash.safetensors")
    note = "" if kept else f"\n(its weights, {size >> 20} MiB, were not written: replay uses random ones)"
    return f"wrote {path}; to replay: {shlex.quote(sys.executable)} -m bitwright.passes {shlex.quote(str(path))}{note}"


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return dict(value) if isinstance(value, Mapping) else str(value)


def replay(path: str | Path) -> tuple[Graph, PipelineReport]:
    """Run a reproducer again: the pipeline text beside ``crash.bw-ir``, with its weights or random ones."""
    from bitwright.passes._manager import run_pipeline
    from bitwright.passes._spec import parse_passes

    path = Path(path)
    graph = parse(path.read_text())
    file = path.with_suffix(".safetensors")
    weights = Weights.load(file) if file.exists() else random_weights(graph)
    graph = parse(path.read_text(), weights)
    context = Context(facts=json.loads(path.with_suffix(".facts.json").read_text()))
    return run_pipeline(graph, parse_passes(path.with_suffix(".pipeline").read_text()), context, crash_dir=None)


def random_weights(graph: Graph, seed: int = 0) -> Weights:
    """Values for every weight a graph names: floats are normal, integers fill their type; encodings are obeyed."""
    from bitwright.ir.types import NM, Unstructured
    from bitwright.passes.sparsity.magnitude_mask import unstructured_mask_array
    from bitwright.passes.sparsity.masks import fixed_count_mask_array, nm_mask_array

    out: dict[str, np.ndarray[Any, Any]] = {}
    for i, node in enumerate(n for n in graph.nodes if n.op.name == "weight"):
        rng, t = np.random.default_rng([seed, i]), node.type
        a: np.ndarray[Any, Any]
        if t.dtype.is_integer:
            low = max(t.dtype.lo, -(1 << 20))
            a = rng.integers(low + (t.dtype.bits == 8), min(t.dtype.hi, 1 << 20), t.static_shape, endpoint=True)
        else:
            a = rng.standard_normal(t.static_shape)
            a = a > 0 if t.dtype.kind == "bool" else a
        if isinstance(t.encoding, NM):
            e = t.encoding
            a = a * nm_mask_array(a.astype(np.float64), e.keep, e.group, e.axis, e.shared, e.block)
        elif isinstance(t.encoding, Unstructured) and t.encoding.count:
            a = a * fixed_count_mask_array(a.astype(np.float64), t.encoding)
        elif isinstance(t.encoding, Unstructured) and t.encoding.kept < 1.0:
            a = a * unstructured_mask_array(a.astype(np.float64), t.encoding)
        out[node.op.ref] = np.asarray(a).astype(t.dtype.numpy)  # type: ignore[attr-defined]
    return Weights(out)


__all__ = ["Diff", "Dump", "Instrument", "Timing", "random_weights", "replay", "write_crash"]
