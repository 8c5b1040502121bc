"""Weights of 4 and 2 bits, packed and unpacked in the kernel, against the same weights in bytes.

    python benchmarks/lowbit.py [--quick] [--target host] [--rounds 25] [--core 1] [--dry]

A row is one linear layer (activations u8, requantized to u8) of random codes: compiled as it is, and with the type of
its weights widened to s8, which makes the dense 8-bit kernel. Both programs must give the same bytes, then they are
raced in one process. "cold": 16 copies of the program take turns, so that weights come from memory. "limit": bytes of
the weights over the read bandwidth measured in this run (of the cache, or of memory when cold), and operations over
the peak; "of it": the share reached (a prefetched stream can beat the plain loop that reads memory). "form": unpacked
in registers for every tile, in panels once for all rows of a task, or "bytes", where the cost model expects either to
take more than 1.03 times as long as bytes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tables

import bitwright as bw
from bitwright.codegen.targets import resolve
from bitwright.codegen.targets.machine import peaks
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.types import NM, S8, U8, TensorType, parse_dtype, parse_type
from bitwright.runtime.bench import pinned
from bitwright.runtime.program import Program

Array = np.ndarray[Any, Any]
COPIES = 16
SLOWEST = 0.97
"""A packed layer may take this share of the speed of bytes at worst."""
WANTED = {("4096x4096", "s4"): 1.5, ("4096x4096", "ternary"): 1.9}
"""Gain at one row from memory on AVX-512, where bytes decide (half and a quarter of them)."""


@dataclass(frozen=True)
class Workload:
    rows: int
    outputs: int
    inputs: int
    dtype: str
    pattern: NM | None = None
    cold: bool = False

    @property
    def shape(self) -> str:
        return f"{self.outputs}x{self.inputs}"

    @property
    def label(self) -> str:
        nm = f" {self.pattern.keep}:{self.pattern.group}" if self.pattern else ""
        return f"{self.dtype}{nm}, {self.rows} x {self.shape}{', cold' if self.cold else ''}"


WORKLOADS = (
    *(Workload(1, 4096, 4096, d, cold=True) for d in ("s4", "ternary")),
    Workload(1, 4096, 4096, "s4", NM(2, 4, 1), cold=True),
    *(
        Workload(rows, n, k, d)
        for n, k in ((4096, 4096), (768, 3072), (3072, 768))
        for rows in (1, 8, 128)
        for d in ("s4", "ternary")
    ),
    *(Workload(rows, 4096, 4096, "s4", NM(2, 4, 1)) for rows in (1, 8, 128)),
)


def codes(it: Workload) -> Array:
    rng, d = np.random.default_rng(0), parse_dtype(it.dtype)
    w = rng.integers(d.lo, d.hi + 1, (it.outputs, it.inputs)).astype(np.int8)
    if it.pattern is None:
        return w
    groups = w.reshape(len(w), -1, it.pattern.group)
    rank = rng.random(groups.shape, np.float32).argsort(-1).argsort(-1)
    return np.where(rank < it.pattern.keep, groups, 0).reshape(w.shape).astype(np.int8)


def graph_of(it: Workload, w: Array, *, in_bytes: bool) -> Graph:
    b = Builder(level="integer")
    kind = TensorType(S8 if in_bytes else parse_dtype(it.dtype), w.shape, it.pattern)
    x = b.input("x", parse_type(f"u8[{it.rows}, {it.inputs}]"))
    acc = b.emit(ops.IntLinear(x_zero=3), x, b.weight("fc.weight", w, kind))
    m = b.weight("m", np.full(it.outputs, 1 << 30, np.int32))
    e = b.weight("e", np.full(it.outputs, 38, np.int32))
    return b.finish([b.emit(ops.Requantize(U8, 128, 1), acc, m, e)])


def turns(program: Program, x: Array, cold: bool) -> Callable[[], object]:
    """A call of the program, or of the next of its copies."""
    if not cold:
        return lambda: program(x)
    contents = program.contents
    copies = itertools.cycle([Program(replace(contents, weights=contents.weights.copy())) for _ in range(COPIES)])
    return lambda: next(copies)(x)


def row(it: Workload, target: str, top: dict[str, float], rounds: int, core: int) -> dict[str, Any]:
    """Compile both, compare, race."""
    w = codes(it)
    packed, wide = (bw.compile(graph_of(it, w, in_bytes=b), target=target) for b in (False, True))
    x = np.random.default_rng(1).integers(0, 256, (it.rows, it.inputs)).astype(np.uint8)
    if not np.array_equal(packed(x), wide(x)):
        raise AssertionError(f"{it.label}: packed weights and bytes disagree")
    reason = next(r.reason for r in packed.report.layers if r.weight == "fc")
    calls = {"bytes": turns(wide, x, it.cold), "packed": turns(packed, x, it.cold)}
    times = tables.race(calls, rounds=rounds, sample=0.02, core=core)
    sizes = {"bytes": wide.manifest.weights_bytes, "packed": packed.manifest.weights_bytes}
    memory = sizes["packed"] / top["memory" if it.cold else "cache"]
    density = it.pattern.density if it.pattern else 1.0
    limit = max(memory, 2 * it.rows * w.size * density / top["int8"])
    return {
        "workload": it.label, "shape": it.shape, "dtype": it.dtype, "rows": it.rows, "cold": it.cold,
        "pattern": str(it.pattern or ""), "form": form_of(reason),
        "bytes": sizes, "seconds": {n: times.median(n) for n in calls}, "gain": times.ratio("bytes", "packed"),
        "limit": limit, "share": limit / times.median("packed"), "reason": reason,
    }  # fmt: skip


def form_of(reason: str) -> str:
    if "unpacked in the kernel" not in reason:
        return "bytes"
    return "panels" if "once for all rows" in reason else "registers"


def checks_of(found: list[dict[str, Any]], isa: str) -> list[tuple[str, bool]]:
    worst = min(found, key=lambda r: r["gain"])
    out = [(f"slowest against bytes {worst['gain']:.2f} ({worst['workload']}; at least {SLOWEST})",
            worst["gain"] >= SLOWEST)]  # fmt: skip
    for r in found:
        want = WANTED.get((r["shape"], r["dtype"]))
        if isa == "avx512-vnni" and want and r["cold"] and not r["pattern"]:
            out.append((f"{r['workload']}: gain {r['gain']:.2f} (at least {want})", r["gain"] >= want))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="host", help="a target's name, or host")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="7 rounds")
    parser.add_argument("--core", type=int)
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args()
    core = tables.last_core() if args.core is None else args.core
    target = resolve(args.target)
    env = tables.environment({"bitwright": bw.__version__})
    found = []
    with pinned(core):
        top = peaks(target.isa)
        for it in WORKLOADS:
            found.append(row(it, args.target, top, 7 if args.quick else args.rounds, core))
            r = found[-1]
            print(f"{r['workload']:36} {r['form']:10} {r['gain']:.2f}x  {r['share']:.0%} of the limit", flush=True)
    lines = [
        [
            r["workload"], r["form"], f"{r['bytes']['bytes'] / 1e6:.2f}", f"{r['bytes']['packed'] / 1e6:.2f}",
            f"{r['seconds']['bytes'] * 1e6:.1f}", f"{r['seconds']['packed'] * 1e6:.1f}", f"{r['gain']:.2f}x",
            f"{r['limit'] * 1e6:.1f}", f"{r['share']:.0%}",
        ]
        for r in found
    ]  # fmt: skip
    heads = ["weights, shape", "form", "MB in bytes", "MB", "us in bytes", "us", "gain", "limit us", "of it"]
    checks = checks_of(found, target.isa)
    text = tables.heading(f"Weights below 8 bits, {target.isa}", env)
    text += f"\nPeak {top['int8'] / 1e9:.0f} GOP/s; reads {top['cache'] / 1e9:.0f} GB/s from the cache, "
    text += f"{top['memory'] / 1e9:.0f} GB/s from memory.\n\n{tables.markdown(heads, lines)}\n"
    text += "".join(f"- {t}: {tables.verdict(ok)}\n" for t, ok in checks)
    print(text)
    if not args.dry:
        stem = "lowbit" if target.isa == "avx512-vnni" else f"lowbit-{target.isa}"
        tables.save(stem, text, {"environment": env, "peaks": top, "rows": found, "checks": [list(c) for c in checks]})


if __name__ == "__main__":
    main()
