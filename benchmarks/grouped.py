"""Linear layers of weights with group scales and activations quantized at run time, against onnxruntime's MatMulNBits.

    python benchmarks/grouped.py [--quick] [--target host] [--rounds 25] [--core 1] [--only 4096] [--dry]

A row is a whole layer, f32 in and f32 out: largest magnitude and codes of each activation row, then the product. The
result is compared with the reference. "cold": copies of the program take turns, so that weights come from memory.
onnxruntime runs the same 4-bit codes (blocks of 128, accuracy level 4: 8-bit products); it has no 2-bit kernel here.
"recorded": the best other engine as it was measured on this kind of machine in November 2026 (ggml: no wheel to run
here); a row that must beat it says by how much. "of bandwidth" and "of peak": bytes of the weights over the read
bandwidth (cache or memory) and operations over the int8 peak, both measured in this run.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peers
import tables

import bitwright as bw
from bitwright.codegen.targets import resolve
from bitwright.codegen.targets.machine import peaks
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.types import parse_type
from bitwright.runtime.bench import pinned
from bitwright.runtime.program import Program

Array = np.ndarray[Any, Any]
SWEPT = 128 << 20
"""Bytes that copies of a program take together, so that none is left in a cache."""


@dataclass(frozen=True)
class Workload:
    """``recorded``: engine, milliseconds, and how many times as fast ours must be."""

    rows: int
    outputs: int
    inputs: int
    recipe: str
    label: str
    cold: bool = False
    recorded: tuple[str, float, float] | None = None

    @property
    def name(self) -> str:
        return f"{self.label}, {self.rows} x {self.outputs}x{self.inputs}{', cold' if self.cold else ''}"


FOUR, TWO, TERNARY = "weight-only{group=128}", "weight-only{bits=2 group=128}", "weight-only{bits=ternary group=0}"
SPARSE = "nm-mask{pattern=2:4}, weight-only{group=0}"
WORKLOADS = (
    Workload(1, 4096, 4096, FOUR, "4-bit g128", recorded=("ort", 0.112, 1.05)),
    Workload(1, 4096, 4096, FOUR, "4-bit g128", cold=True, recorded=("ggml q4_K", 0.347, 1.35)),
    Workload(1, 4096, 4096, "weight-only{group=32}", "4-bit g32"),
    Workload(1, 4096, 4096, TWO, "2-bit g128", recorded=("ggml tq2_0", 0.218, 3.5)),
    Workload(1, 4096, 4096, TWO, "2-bit g128", cold=True, recorded=("ggml tq2_0", 0.260, 2.0)),
    Workload(1, 4096, 4096, TERNARY, "ternary", recorded=("ggml tq2_0", 0.218, 3.5)),
    Workload(1, 4096, 4096, TERNARY, "ternary", cold=True, recorded=("ggml tq2_0", 0.260, 2.0)),
    Workload(1, 4096, 4096, SPARSE, "4-bit 2:4"),
    Workload(1, 4096, 4096, SPARSE, "4-bit 2:4", cold=True),
    Workload(16, 4096, 4096, FOUR, "4-bit g128", recorded=("openvino int4", 0.775, 1.2)),
    Workload(128, 4096, 4096, FOUR, "4-bit g128"),
    Workload(128, 768, 3072, FOUR, "4-bit g128", recorded=("openvino int4", 0.787, 1.2)),
    Workload(128, 3072, 768, FOUR, "4-bit g128", recorded=("openvino int4", 0.881, 1.2)),
    Workload(16, 4096, 4096, TWO, "2-bit g128", recorded=("ggml q2_K", 2.975, 3.0)),
)


def graph_of(it: Workload) -> Graph:
    b, rng = Builder(), np.random.default_rng(0)
    x = b.input("x", parse_type(f"f32[{it.rows}, {it.inputs}]"))
    w = b.weight("fc.weight", rng.standard_normal((it.outputs, it.inputs), np.float32) * np.float32(0.02))
    return b.finish([b.emit(ops.Linear(), x, w)])


def prepared(it: Workload) -> Graph:
    """The graph with its codes, before integers."""
    from bitwright.driver import optimize

    return optimize(graph_of(it), it.recipe)[0]


def matmul_nbits(graph: Graph, it: Workload, path: Path) -> None:
    """The 4-bit layer as a file of one MatMulNBits."""
    import onnx
    from onnx import TensorProto as T
    from onnx import helper as h

    node = next(n for n in graph.nodes if isinstance(n.op, ops.Dequantize))
    codes, scale = (np.asarray(graph.constant(x)) for x in node.inputs[:2])
    unsigned = (codes.astype(np.int16) + 8).astype(np.uint8)
    packed = (unsigned[:, ::2] | unsigned[:, 1::2] << np.uint8(4)).reshape(it.outputs, -1, 64)
    node = h.make_node(
        "MatMulNBits", ["x0", "w", "s"], ["y"], domain="com.microsoft", K=it.inputs, N=it.outputs, bits=4,
        block_size=128, accuracy_level=4,
    )  # fmt: skip
    tensors = [
        onnx.numpy_helper.from_array(packed, "w"),
        onnx.numpy_helper.from_array(scale.astype(np.float32).reshape(-1), "s"),
    ]
    made = h.make_graph(
        [node], "g", [h.make_tensor_value_info("x0", T.FLOAT, [it.rows, it.inputs])],
        [h.make_tensor_value_info("y", T.FLOAT, [it.rows, it.outputs])], tensors,
    )  # fmt: skip
    opsets = [h.make_opsetid("", 20), h.make_opsetid("com.microsoft", 1)]
    onnx.save(h.make_model(made, opset_imports=opsets, ir_version=10), str(path))


def in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def row(it: Workload, args: argparse.Namespace, top: dict[str, float]) -> dict[str, Any]:
    graph = prepared(it)
    program = bw.compile(graph, target=args.target)
    x = np.random.default_rng(1).standard_normal((it.rows, it.inputs)).astype(np.float32)
    want = to_numpy(evaluate(graph, [x])[0])
    error = peers.relative_error(program(x), want)
    if error > 1e-4:
        raise AssertionError(f"{it.name}: off by {error:.1e}")
    nbytes = program.manifest.weights_bytes
    count = -(-SWEPT // nbytes) if it.cold else 1
    copies = [program] + [
        Program(replace(program.contents, weights=program.contents.weights.copy())) for _ in range(count - 1)
    ]
    calls = {"ours": in_turn([lambda p=p: p(x) for p in copies])}  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        if it.label.startswith("4-bit g128"):
            matmul_nbits(graph, it, Path(folder) / "m.onnx")
            sessions = [peers.onnxruntime_call(Path(folder) / "m.onnx", [x]) for _ in range(count)]
            calls["ort"] = in_turn(list(sessions))
        times = tables.race(calls, rounds=7 if args.quick else args.rounds, sample=0.02, core=args.core)
    seconds = times.median("ours")
    kernel = next(r for r in program.report.layers if r.weight)
    return {
        "workload": it.name, "seconds": seconds, "best": times.best("ours"), "bytes": nbytes, "reason": kernel.reason,
        "ort": times.median("ort") if "ort" in calls else None,
        "gain": times.ratio("ort", "ours") if "ort" in calls else None, "recorded": it.recorded,
        "over_recorded": it.recorded[1] * 1e-3 / seconds if it.recorded else None,
        "bandwidth": nbytes / seconds / top["memory" if it.cold else "cache"],
        "peak": 2 * it.rows * it.outputs * it.inputs / seconds / top["int8"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="host", help="a target's name, or host")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="7 rounds")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--core", type=int, default=tables.last_core())
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args()
    target = resolve(args.target)
    env = tables.environment(peers.versions())
    found = []
    with pinned(args.core):
        top = peaks(target.isa)
        for it in WORKLOADS:
            if args.only in it.name:
                found.append(row(it, args, top))
                r = found[-1]
                print(f"{r['workload']:32} {r['seconds'] * 1e3:.4f} ms  over recorded {r['over_recorded']}", flush=True)
    lines, checks = [], []
    for r in found:
        beaten = ""
        if r["recorded"]:
            engine, ms, want = r["recorded"]
            beaten = f"{r['over_recorded']:.2f}x ({engine} {ms} ms)"
            if target.isa == "avx512-vnni":
                checks.append((f"{r['workload']}: {beaten}, at least {want}x", r["over_recorded"] >= want))
        ort = f"{r['ort'] * 1e3:.4f} ({r['gain']:.2f}x)" if r["ort"] else ""
        lines.append([
            r["workload"], f"{r['bytes'] / 1e6:.2f}", f"{r['seconds'] * 1e3:.4f}", f"{r['best'] * 1e3:.4f}", ort,
            beaten, f"{r['bandwidth']:.0%}", f"{r['peak']:.0%}",
        ])  # fmt: skip
    heads = ["layer", "MB", "ms", "best ms", "ort ms", "over recorded", "of bandwidth", "of peak"]
    text = tables.heading(f"Weights with group scales, {target.isa}", env)
    text += f"\nPeak {top['int8'] / 1e9:.0f} GOP/s; reads {top['cache'] / 1e9:.0f} GB/s from the cache, "
    text += f"{top['memory'] / 1e9:.0f} GB/s from memory.\n\n{tables.markdown(heads, lines)}\n"
    text += "".join(f"- {t}: {tables.verdict(ok)}\n" for t, ok in checks)
    print(text)
    if not args.dry:
        stem = "grouped" if target.isa == "avx512-vnni" else f"grouped-{target.isa}"
        tables.save(stem, text, {"environment": env, "peaks": top, "rows": found, "checks": [list(c) for c in checks]})


if __name__ == "__main__":
    main()
