"""What a contraction would take in a format and a pattern: measured on this machine and remembered, or predicted.

A measurement compiles the layer alone, with its input quantized before it and its result after it as in a network,
and times that kernel. Times are kept by machine, target and layer in the user's cache, so a layer is measured once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitwright import advice
from bitwright._version import __version__
from bitwright.codegen.cache import Cache, default_directory
from bitwright.codegen.cost import cost_of
from bitwright.codegen.targets.machine import cpu_name
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.files import beside
from bitwright.ir.graph import Graph, Node, subgraph
from bitwright.ir.target import Target
from bitwright.ir.types import F32, NM

REPEATS = 30
_FORMAT = 1
"""Part of every key: raise it when the meaning of a time or of a key changes."""


@dataclass
class Prices:
    """``prices(graph, value, bits, pattern, measure)``: seconds of one contraction on one core, and the source."""

    target: Target
    store: Path | None = None
    """The file measured times are kept in; None: the user's cache."""
    known: dict[str, float] = field(default_factory=dict)
    _read: bool = False

    def __call__(self, graph: Graph, value: str, bits: int, pattern: NM | None, measure: bool) -> tuple[float, str]:
        node = graph.producers[value]
        if measure and isinstance(node.op, ops.Linear | ops.Conv):
            return self._measured(node, graph, bits, pattern), "measured"
        return self._predicted(node, graph, bits, pattern), "predicted by the cost model"

    def _predicted(self, node: Node, graph: Graph, bits: int, pattern: NM | None) -> float:
        body, _ = subgraph(graph, [node], node.outputs)
        if bits < 32:
            body = advice.integer_form(node, body, self.target, pattern, bits) or body
        elif pattern is not None:
            body = advice.with_pattern(node, body, pattern)
        return cost_of(body, self.target).seconds

    # --- measurements ----------------------------------------------------------------------------------------

    def _measured(self, node: Node, graph: Graph, bits: int, pattern: NM | None) -> float:
        types = [str(graph.types[x]) for x in node.inputs[:2]]
        asked = [repr(node.op), *types, str(bits), str(pattern)]
        key = "|".join([f"format {_FORMAT}", self.target.fingerprint, __version__, *asked])
        if not self._read:
            self.known |= self._load()
            self._read = True
        if key not in self.known:
            self.known[key] = self._time(node, graph, bits, pattern)
            self._save()
        return self.known[key]

    def _time(self, node: Node, graph: Graph, bits: int, pattern: NM | None) -> float:
        from bitwright.assemble import assemble

        layer = self._alone(node, graph)
        x = np.random.default_rng(0).standard_normal(layer.inputs[0].type.static_shape).astype(np.float32)
        steps = [f"nm-mask{{pattern={pattern.keep}:{pattern.group}}}"] if pattern else []
        if bits < 32:
            steps += [
                f"observe-ranges, quantize-weights{{bits={bits}}}" if bits < 8 else "observe-ranges",
                "quantize-int8",
            ]
        calibration = [(x,)] if bits < 32 else []
        program = assemble(layer, self.target, ", ".join(steps), calibration, cache=Cache(None))
        rows = [r for r in program.report.layers if r.operations]
        seconds = {s.label: s.seconds for s in program.profile(x, repeats=REPEATS)}
        return sum(seconds[r.name] for r in rows)

    def _alone(self, node: Node, graph: Graph) -> Graph:
        """The contraction with random weights between a layer before and one after it that make its operands."""
        rng = np.random.default_rng(0)
        b = Builder("layer")
        x = b.input("x", graph.types[node.inputs[0]].with_dtype(F32))
        w = graph.types[node.inputs[1]]
        weight = (rng.standard_normal(w.static_shape) / np.sqrt(w.size / w.static_shape[0])).astype(np.float32)
        y = b.emit(node.op, x, b.weight("layer.weight", weight))
        return b.finish([b.emit(ops.Unary("relu"), y)], ["y"])

    def _file(self) -> Path:
        if self.store is not None:
            return self.store
        machine = hashlib.blake2b(cpu_name().encode(), digest_size=6).hexdigest()
        return default_directory() / f"latency-{machine}.json"

    def _load(self) -> dict[str, float]:
        """What is known already; a damaged file counts as empty."""
        try:
            data: Any = json.loads(self._file().read_text())
            return {str(k): float(v) for k, v in data.items() if float(v) > 0}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _save(self) -> None:
        file = self._file()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with beside(file) as temporary:
                temporary.write_text(json.dumps(self._load() | self.known, indent=0))
        except OSError:
            pass  # a cache that cannot be written only costs time
