"""Measure the row kernels (ns per element) and attention (GFLOP/s) on this machine, one thread.

    python benchmarks/rows.py [--target x86-avx512-vnni] [--rounds 12]

A sample is a batch of about 1.5 ms on the thread's CPU clock; the best of all rounds counts.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.tvm.adapter import Machine, build_object
from bitwright.codegen.tvm.attention import AttentionTemplate
from bitwright.codegen.tvm.rows import Rows
from bitwright.codegen.tvm.template import Refused, Template
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.types import U8, TensorType, dtype_of

Array = NDArray[Any]
SAMPLE_NS = 1_500_000
Chain = list[tuple[ops.Op, tuple[str, ...]]]


@dataclass
class Job:
    """A kernel to time; ``work`` is elements for rows, FLOP for attention."""

    label: str
    template: Template
    inputs: dict[str, Array]
    chain: Chain
    work: float
    unit: str


def body_of(job: Job) -> Graph:
    """The job's body; results are v0, v1, ..."""
    b = Builder("body", "kernel")
    for name, a in job.inputs.items():
        b.input(name, TensorType(dtype_of(a.dtype), a.shape))
    last = ""
    for k, (op, operands) in enumerate(job.chain):
        (last,) = b.emit_all(op, *operands, names=(f"v{k}",))
    return b.finish((last,))


def aligned(a: Array) -> Array:
    """A 64-byte aligned copy with 64 readable bytes behind it."""
    raw = np.zeros(a.nbytes + 192, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    out[...] = a
    return out


def prepare(job: Job, target: str) -> Callable[[], None]:
    """Compile; the result runs the kernel once."""
    body = body_of(job)
    config = job.template.configure(body, {}, BUILTIN[target])
    if isinstance(config, Refused):
        raise SystemExit(f"{job.label}: {config.reason}")
    code = build_object([job.template.emit(body, config, "k")], Machine(config.mcpu))
    folder = Path(tempfile.mkdtemp(prefix="bitwright-rows-"))
    (folder / "k.o").write_bytes(code)
    subprocess.run(["gcc", "-shared", "-o", folder / "k.so", folder / "k.o", "-lm"], check=True)
    function = ctypes.CDLL(str(folder / "k.so"))["k"]
    function.restype = None
    out = body.types[body.outputs[0]]
    arrays = [aligned(job.inputs[v.name]) for v in body.inputs] + [aligned(np.zeros(out.static_shape, out.dtype.numpy))]
    if config.scratch_bytes:
        arrays.append(aligned(np.zeros(config.scratch_bytes, np.uint8)))
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
    tasks = ctypes.c_int32(config.tasks)

    def run(keep: Any = arrays) -> None:
        function(ctypes.c_int32(0), tasks, *pointers)

    return run


def best_seconds(run: Callable[[], None], rounds: int) -> float:
    """Seconds of one call, the best of all rounds."""
    run()
    began = time.thread_time_ns()
    run()
    calls = max(1, SAMPLE_NS // max(time.thread_time_ns() - began, 1))
    best = float("inf")
    for _ in range(rounds):
        began = time.thread_time_ns()
        for _ in range(calls):
            run()
        best = min(best, (time.thread_time_ns() - began) / calls)
    return best * 1e-9


def row_jobs() -> list[Job]:
    """Softmax, norms and reductions."""
    rng = np.random.default_rng(0)
    jobs = []
    for rows, n in ((1024, 128), (128, 768), (128, 3072), (2048, 49)):
        x = rng.standard_normal((rows, n), dtype=np.float32)
        g = rng.standard_normal(n, dtype=np.float32)
        scale, zero = np.array(0.02, np.float32), np.array(128, np.uint8)
        norm = {"x": x, "g": g, "h": g}
        both: dict[str, Array] = {**norm, "y": x, "s": scale, "z": zero}
        layer = (ops.LayerNorm(), ("x", "g", "h"))
        cases: list[tuple[str, dict[str, Array], Chain]] = [
            ("softmax", {"x": x}, [(ops.Softmax(), ("x",))]),
            ("layer norm", norm, [layer]),
            ("add, layer norm", norm | {"y": x}, [(ops.Binary("add"), ("x", "y")), (layer[0], ("v0", "g", "h"))]),
            ("layer norm, quantize", both, [layer, (ops.Quantize(U8), ("v0", "s", "z"))]),
            ("rms norm", {"x": x, "g": g}, [(ops.RmsNorm(), ("x", "g"))]),
            ("mean", {"x": x}, [(ops.Reduce("mean", (-1,)), ("x",))]),
        ]  # fmt: skip
        jobs += [Job(f"{label} {rows}x{n}", Rows(), ins, chain, x.size, "ns/el") for label, ins, chain in cases]
    return jobs


def attention_jobs() -> list[Job]:
    """Heads of common models."""
    rng = np.random.default_rng(0)
    jobs = []
    shapes = (
        ("BERT-base", 12, 128, 64, False), ("ViT-S", 6, 197, 64, False), ("GPT-2 causal", 12, 128, 64, True),
        ("long", 12, 512, 64, False), ("decode", 12, 1, 64, False),
    )  # fmt: skip
    for label, heads, length, depth, causal in shapes:
        keys = 512 if length == 1 else length
        view: list[tuple[ops.Op, tuple[str, ...]]] = []
        for k, (x, size) in enumerate((("q", length), ("k", keys), ("v", keys))):
            view.append((ops.Reshape((1, size, heads, depth)), (x,)))
            view.append((ops.Transpose((0, 2, 1, 3)), (f"v{2 * k}",)))
        chain: Chain = [
            *view, (ops.Attention(depth**-0.5, causal), ("v1", "v3", "v5")), (ops.Transpose((0, 2, 1, 3)), ("v6",)),
            (ops.Reshape((1, length, heads * depth)), ("v7",)),
        ]  # fmt: skip
        inputs = {
            x: rng.standard_normal((1, size, heads * depth), dtype=np.float32)
            for x, size in (("q", length), ("k", keys), ("v", keys))
        }
        flop = 4.0 * heads * length * keys * depth
        jobs.append(
            Job(f"{label} {heads}x{length}x{keys}x{depth}", AttentionTemplate(), inputs, chain, flop, "GFLOP/s")
        )
    return jobs


def main() -> None:
    """Print one line per kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="x86-avx512-vnni")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", default="rows,attention")
    args = parser.parse_args()
    jobs = row_jobs() if "rows" in args.only else []
    jobs += attention_jobs() if "attention" in args.only else []
    for job in jobs:
        seconds = best_seconds(prepare(job, args.target), args.rounds)
        figure = seconds / job.work * 1e9 if job.unit == "ns/el" else job.work / seconds / 1e9
        print(f"{job.label:<36}{figure:8.3f} {job.unit:<8}{seconds * 1e6:10.1f} us")


if __name__ == "__main__":
    main()
