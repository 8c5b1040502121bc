"""Compile one kernel, call it through ctypes in two task ranges, and compare with the reference interpreter."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.codegen.tvm.adapter import build_object
from bitwright.codegen.tvm.template import Config, Refused, Template, canonical
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.target import Isa, Rate, Target
from bitwright.ir.types import F32, U8, parse_type

Array = np.ndarray[Any, Any]
_BITS: dict[str, int] = {"avx512-vnni": 512, "avx-vnni": 256, "avx2": 256, "portable": 128}
_MCPU = {"avx512-vnni": "znver4", "avx-vnni": "alderlake", "avx2": "haswell", "portable": "x86-64"}
ISAS: tuple[Isa, ...] = ("avx512-vnni", "avx2", "portable")
_SLACK = 64


def target(isa: Isa = "avx512-vnni") -> Target:
    """A CPU target of an instruction-set level, for tests."""
    return Target(
        isa, "cpu", isa, _MCPU[isa], (), _BITS[isa], 32, 32768, 1 << 20, 1 << 25, 2, 2e10, 1e11, 1e11, 1e-7,
        (Rate(F32, F32, F32, 1e11),), (), U8, "tests",
    )  # fmt: skip


def runnable(isa: Isa) -> bool:
    """Whether this machine can execute the level."""
    flags = Path("/proc/cpuinfo").read_text()
    need = {"avx512-vnni": "avx512_vnni", "avx-vnni": "avx_vnni", "avx2": "avx2", "portable": "sse2"}
    return f" {need[isa]}" in flags


def graph_of(build: Callable[[Builder], Any], **inputs: str) -> Graph:
    """A body: ``graph_of(lambda b: b.emit(Unary("exp"), "x"), x="f32[3, 4]")``."""
    b = Builder("body")
    for name, text in inputs.items():
        b.input(name, parse_type(text))
    out = build(b)
    return b.finish([out] if isinstance(out, str) else out)


def padded(array: Array) -> tuple[Array, Array]:
    """A copy with slack before and after (the whole buffer, and the part that holds the values)."""
    raw = np.full(array.nbytes + 3 * _SLACK, 0xA5, np.uint8)
    start = -raw.ctypes.data % 64 + _SLACK
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return raw, view


class Kernel:
    """A compiled kernel of a body."""

    def __init__(self, template: Template, body: Graph, on: Target, constants: dict[str, Array] | None = None) -> None:
        self.body = canonical(body)
        names = {v.name: w.name for v, w in zip(body.inputs, self.body.inputs, strict=True)}
        held = {names[k]: v for k, v in (constants or {}).items()}
        made = template.configure(self.body, held, on)
        assert not isinstance(made, Refused), made.reason
        self.config: Config = made
        self.packed = template.pack(self.body, made, held)
        assert template.verify(self.body, made, held, self.packed) == ""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "k.o").write_bytes(build_object([template.emit(self.body, made, "kernel")], on.isa))
            command = ["gcc", "-shared", "-Wl,-z,defs", "-o", str(folder / "k.so"), str(folder / "k.o"), "-lm"]
            subprocess.run(command, check=True, capture_output=True)
            self.call = ctypes.CDLL(str(folder / "k.so")).kernel

    def __call__(self, inputs: Sequence[Array], ranges: int = 2) -> list[Array]:
        """The outputs; every task range is one call."""
        args, outputs, hold = self.bind(inputs)
        tasks = self.config.tasks
        for r in range(ranges):
            self.call(tasks * r // ranges, tasks * (r + 1) // ranges, *args)
        for raw, view in hold:
            start = view.ctypes.data - raw.ctypes.data
            assert (raw[:start] == 0xA5).all(), "written before a buffer"
            assert (raw[start + view.nbytes :] == 0xA5).all(), "written past a buffer"
        return outputs

    def bind(self, inputs: Sequence[Array]) -> tuple[list[Any], list[Array], list[tuple[Array, Array]]]:
        """ctypes arguments after begin and end, the output arrays, and every buffer."""
        hold, outputs, args = [], [], []
        for a in self.config.args:
            if a.kind == "output":
                t = self.body.types[self.body.outputs[a.index]]
                source = np.zeros(t.static_shape, t.dtype.numpy)
            else:
                source = inputs[a.index] if a.kind == "input" else self.packed[a.index]
            hold.append(padded(source))
            if a.kind == "output":
                outputs.append(hold[-1][1])
            args.append(ctypes.c_void_p(hold[-1][1].ctypes.data))
        if self.config.scratch_bytes:
            hold.append(padded(np.full(self.config.scratch_bytes, 0xFF, np.uint8)))
            args.append(ctypes.c_void_p(hold[-1][1].ctypes.data))
        return args, outputs, hold


def run_template(template: Template, body: Graph, inputs: Sequence[Array], on: Target) -> list[Array]:
    """Compile, link and run one kernel."""
    return Kernel(template, body, on)(inputs)


def expected(body: Graph, inputs: Sequence[Array]) -> list[Array]:
    """What the reference interpreter says."""
    return [to_numpy(t) for t in evaluate(body, list(inputs))]


def check(
    template: Template,
    body: Graph,
    inputs: Sequence[Array],
    isa: Isa = "avx512-vnni",
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> None:
    """The kernel's outputs against the reference: integers exactly, floats within tolerances."""
    got = run_template(template, body, inputs, target(isa))
    for g, w in zip(got, expected(body, inputs), strict=True):
        compare(g, w, rtol, atol)


def compare(got: Array, want: Array, rtol: float, atol: float) -> None:
    """Integers exactly; floats within tolerances, NaN and infinities in the same places."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if want.dtype.kind in "iub":
        np.testing.assert_array_equal(got, want)
    else:
        kind = np.float64 if want.dtype == np.float64 else np.float32
        np.testing.assert_allclose(got.astype(kind), want.astype(kind), rtol=rtol, atol=atol, equal_nan=True)
