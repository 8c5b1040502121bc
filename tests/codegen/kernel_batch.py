"""Runs many kernels from one shared object: compile once, compare each with the reference interpreter."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.tvm.adapter import Machine, build_object
from bitwright.codegen.tvm.template import Config, Refused, Template
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.ops import Op
from bitwright.ir.types import TensorType, dtype_of

Array = np.ndarray[Any, Any]
GUARD = 192
"""Bytes around every output that must stay as they are."""


def body_of(*chain: tuple[Op, Any], inputs: dict[str, Array], outputs: tuple[str, ...] = ()) -> Graph:
    """A body from (operator, operand names) pairs; results are called v0, v1, ...; the last ones are the outputs."""
    b = Builder("body", "kernel")
    for name, a in inputs.items():
        b.input(name, TensorType(dtype_of(a.dtype), a.shape))
    last: tuple[str, ...] = ()
    count = 0
    for op, operands in chain:
        names = tuple(f"v{count + k}" for k in range(op.results))
        last = b.emit_all(op, *operands, names=names)
        count += op.results
    return b.finish(outputs or last)


@dataclass
class Case:
    """A body on given inputs."""

    label: str
    body: Graph
    inputs: dict[str, Array]
    rtol: float = 2e-5
    atol: float = 2e-5
    steps: int = 0
    """How far integer results may be off."""


@dataclass
class Batch:
    """Cases for one template and one target."""

    template: Template
    target: str
    cases: list[Case] = field(default_factory=list)

    def run(self) -> list[str]:
        """What differs, one line per case that fails."""
        target = BUILTIN[self.target]
        configs: list[Config] = []
        for c in self.cases:
            config = self.template.configure(c.body, {}, target)
            assert not isinstance(config, Refused), (c.label, config)
            configs.append(config)
        funcs = [
            self.template.emit(c.body, k, f"k{i}") for i, (c, k) in enumerate(zip(self.cases, configs, strict=True))
        ]
        library = load(build_object(funcs, Machine(target.mcpu)))
        failures = []
        for i, (c, k) in enumerate(zip(self.cases, configs, strict=True)):
            why = compare(c, k, self.template, library[f"k{i}"])
            failures += [f"{c.label} [{self.target}]: {why}"] if why else []
        return failures


def load(data: bytes) -> ctypes.CDLL:
    """An object file as a library in this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "k.o").write_bytes(data)
        subprocess.run(["gcc", "-shared", "-o", str(path / "k.so"), str(path / "k.o"), "-lm"], check=True)
        return ctypes.CDLL(str(path / "k.so"))


def placed(a: Array) -> tuple[Array, int]:
    """A copy in 64-byte aligned memory between guard bytes; and its address."""
    raw = np.full(a.nbytes + 2 * GUARD + 64, 0xA5, np.uint8)
    start = GUARD + (-(raw.ctypes.data + GUARD)) % 64
    raw[start : start + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
    return raw, start


def call(config: Config, template: Template, body: Graph, inputs: dict[str, Array], function: Any) -> list[Array]:
    """The kernel's outputs; fails if it wrote outside of them. Its tasks run in several uneven ranges."""
    packed = template.pack(body, config, {})
    outs = [np.zeros(body.types[o].static_shape, body.types[o].dtype.numpy) for o in body.outputs]
    blocks = {"input": [placed(inputs[v.name]) for v in body.inputs], "packed": [placed(p) for p in packed]}
    blocks["output"] = [placed(o) for o in outs]
    memory = [blocks[a.kind][a.index] for a in config.args]
    scratch = placed(np.zeros(config.scratch_bytes, np.uint8))
    pointers = [raw.ctypes.data + start for raw, start in memory]
    pointers += [scratch[0].ctypes.data + scratch[1]] if config.scratch_bytes else []
    cuts = sorted({0, config.tasks // 3, config.tasks // 2, config.tasks})
    for begin, end in pairwise(cuts):
        function(ctypes.c_int32(begin), ctypes.c_int32(end), *(ctypes.c_void_p(p) for p in pointers))
    results = []
    for o, (raw, start) in zip(outs, blocks["output"], strict=True):
        assert (raw[:start] == 0xA5).all(), "wrote before an output"
        assert (raw[start + o.nbytes :] == 0xA5).all(), "wrote behind an output"
        results.append(raw[start : start + o.nbytes].view(o.dtype).reshape(o.shape))
    if config.scratch_bytes:
        assert (scratch[0][scratch[1] + config.scratch_bytes :] == 0xA5).all(), "wrote behind the scratch"
    return results


def compare(case: Case, config: Config, template: Template, function: Any) -> str:
    """What differs from the interpreter, or the empty string."""
    got = call(config, template, case.body, case.inputs, function)
    want = [to_numpy(t) for t in evaluate(case.body, case.inputs)]
    for g, w in zip(got, want, strict=True):
        if g.shape != w.shape:
            return f"shape {g.shape}, not {w.shape}"
        if why := difference(g, w.astype(g.dtype) if w.dtype == bool else w, case):
            return why
    return ""


def difference(got: Array, want: Array, case: Case) -> str:
    """Floats within the tolerance (NaN and infinities in place), integers exactly."""
    if got.dtype != want.dtype:
        return f"dtype {got.dtype}, not {want.dtype}"
    if got.dtype.kind in "iub":
        off = np.abs(got.astype(object) - want.astype(object)) if case.steps else got != want
        bad = off > case.steps
    else:
        g, w = got.astype(np.float64), want.astype(np.float64)
        coarse = {"float16": 4e-3, "bfloat16": 3e-2}.get(str(got.dtype), 0.0)
        bad = ~np.isclose(g, w, max(case.rtol, coarse), max(case.atol, coarse), equal_nan=True)
    if not np.any(bad):
        return ""
    at = np.unravel_index(int(np.argmax(bad)), got.shape) if got.shape else ()
    return f"{int(np.sum(bad))} of {got.size} differ, at {[int(i) for i in at]}: {got[at]} not {want[at]}"
