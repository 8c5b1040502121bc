"""Integer layers with 16-bit sums against the same layers with 32-bit sums, compiled for AVX2 without VNNI.

    python benchmarks/accumulators.py [--quick] [--rounds 31] [--core 1] [--dry]

Both programs of a row come from one graph (contraction, bias-free requantization to u8) through the whole pipeline,
with ``lower-accumulators{width=32}`` and with its ``auto``; their outputs are compared bit for bit on inputs that make
the largest sums, then the two are raced in one process. Weights are random codes: "4 bits" are normal numbers rounded
to -7..7 by output, "full 4 bits" only the extremes -7 and 7, "2 bits" -1, 0, 1, "l1" 8-bit codes whose absolute sum is
at most 128 by output, as constrain-weights leaves them, "1 bit" -1 and 1 (by look-up tables). "found" is the speed-up
of the kernel study (references, CPU kernels, section 4) for such sums: spilled every 8 and 64 products, and never;
look-ups for 1 bit. Our 32-bit kernel is a little faster than the one it is measured against there, and our times
include the requantization and the call.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tables

import bitwright as bw
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.types import NM, S8, U8, TensorType, parse_type
from bitwright.runtime.bench import pinned

Array = np.ndarray[Any, Any]
TARGET = "x86-avx2"
LEAST, SHARE = 1.25, 0.9
"""The gain that one workload must have, and the share of a found gain that each must have."""


def rounded(rng: np.random.Generator, shape: tuple[int, ...], hi: int) -> Array:
    """Normal weights in codes of -hi..hi, scaled by output."""
    w = rng.standard_normal(shape)
    codes: Array = np.round(w / np.abs(w).reshape(shape[0], -1).max(1).reshape(-1, *[1] * (w.ndim - 1)) * hi).astype(
        np.int8
    )
    return codes


def within_l1(rng: np.random.Generator, shape: tuple[int, ...], cap: int = 128) -> Array:
    """8-bit codes whose absolute values sum to at most ``cap`` by output, rounded toward zero."""
    w = rng.laplace(size=shape) ** 3
    codes: Array = np.trunc(w * cap / np.abs(w).sum(1, keepdims=True)).astype(np.int8)
    return codes


def extremes(rng: np.random.Generator, shape: tuple[int, ...], hi: int) -> Array:
    """The two extremes, and one zero a row (weights of two values alone would take look-up tables)."""
    codes = rng.choice([-hi, hi], shape).astype(np.int8)
    codes[:, 0] = 0
    return codes


WEIGHTS: Mapping[str, tuple[Callable[[np.random.Generator, tuple[int, ...]], Array], float | None]] = {
    "4 bits": (lambda r, s: rounded(r, s, 7), 1.43),
    "full 4 bits": (lambda r, s: extremes(r, s, 7), 1.43),
    "2 bits": (lambda r, s: r.integers(-1, 2, s).astype(np.int8), 1.56),
    "6 bits": (lambda r, s: rounded(r, s, 31), None),
    "l1": (within_l1, 1.75),
    "1 bit": (lambda r, s: r.choice([-1, 1], s).astype(np.int8), None),
}
"""Kind of weights: how they are made, and the gain found for them."""

LOOK_UPS = {"u4": 4.1, "u6": 2.7}
"""Gain found for weights of 1 bit at 16 rows, by format of the activations."""


@dataclass(frozen=True)
class Workload:
    """``shape``: rows x outputs x inputs of a linear layer, or height=width x inputs x outputs of a 3x3 convolution."""

    kind: str
    shape: tuple[int, int, int]
    pattern: NM | None = None
    conv: bool = False
    x: str = "u8"

    @property
    def label(self) -> str:
        dims = "x".join(map(str, self.shape))
        x = f" x {self.x}" if self.x != "u8" else ""
        return f"{self.kind}{x}, {'3x3 conv ' if self.conv else ''}{dims}" + (
            f", {self.pattern}" if self.pattern else ""
        )

    @property
    def found(self) -> float | None:
        """The study measured dense layers of many rows, and look-ups at 16 rows."""
        if self.kind == "1 bit":
            return LOOK_UPS.get(self.x) if self.shape[0] == 16 else None
        return WEIGHTS[self.kind][1] if self.pattern is None and not self.conv and self.shape[0] > 1 else None


WORKLOADS = (
    *(Workload(kind, shape) for kind in WEIGHTS if kind != "1 bit" for shape in ((128, 768, 3072), (128, 3072, 768))),
    Workload("4 bits", (1, 768, 768)),
    Workload("4 bits", (128, 3072, 768), NM(2, 4, 1)),
    Workload("4 bits", (128, 3072, 768), NM(1, 4, 1)),
    Workload("4 bits", (28, 128, 128), conv=True),
    *(Workload("1 bit", (rows, 3072, 3072), x=x) for x in ("u4", "u6", "u8") for rows in (1, 16)),
    Workload("1 bit", (128, 3072, 768)),
)


def masked(w: Array, pattern: NM | None, rng: np.random.Generator) -> Array:
    if pattern is None:
        return w
    groups = w.reshape(len(w), -1, pattern.group)
    rank = rng.random(groups.shape).argsort(-1).argsort(-1)
    return np.where(rank < pattern.keep, groups, 0).reshape(w.shape).astype(np.int8)


def graph_of(it: Workload) -> tuple[Graph, Array]:
    """The layer with its requantization, and inputs that make the sums of the first outputs as large as they get."""
    rng = np.random.default_rng(0)
    b, (rows, outputs, inputs) = Builder(level="integer"), it.shape
    if it.conv:
        size, inputs, outputs = it.shape
        w = WEIGHTS[it.kind][0](rng, (outputs, inputs, 3, 3))
        x = b.input("x", parse_type(f"u8[1, {inputs}, {size}, {size}]"))
        op: ops.Op = ops.IntConv((1, 1), (1, 1, 1, 1), x_zero=3)
        data = np.where(rng.random((1, inputs, size, size)) < 0.7, 255, 0).astype(np.uint8)
    else:
        w = masked(WEIGHTS[it.kind][0](rng, (outputs, inputs)), it.pattern, rng)
        x, op = b.input("x", parse_type(f"{it.x}[{rows}, {inputs}]")), ops.IntLinear(x_zero=3)
        most = b.types[x].dtype.hi
        data = rng.integers(0, most + 1, (rows, inputs)).astype(np.uint8)
        for i in range(min(rows, 64)):
            data[i] = most * (w[i % outputs] > 0 if i % 2 else w[i % outputs] < 0)
    acc = b.emit(op, x, b.weight("fc.weight", w, TensorType(S8, w.shape, it.pattern)))
    m = b.weight("m", np.full(outputs, 1 << 30, np.int32))
    e = b.weight("e", np.full(outputs, 38, np.int32))
    return b.finish([b.emit(ops.Requantize(U8, 128, 1), acc, m, e)]), data


def row(it: Workload, rounds: int, core: int) -> dict[str, Any]:
    """Compile both, compare, race."""
    graph, data = graph_of(it)
    wide = bw.compile(graph, target=TARGET, recipe="lower-accumulators{width=32}")
    auto = bw.compile(graph, target=TARGET)
    if not np.array_equal(wide(data), auto(data)):
        raise AssertionError(f"{it.label}: 16-bit and 32-bit sums disagree")
    reason = next(x.reason for x in auto.report.layers if x.weight == "fc")
    narrow = re.search(r"([su]16) sums,? spilled every (\d+) terms", reason)
    calls = {"s32": lambda: wide(data), "auto": lambda: auto(data)}
    times = tables.race(calls, rounds=rounds, sample=0.02, core=core)
    gain = times.ratio("s32", "auto")
    return {
        "workload": it.label, "sums": f"{narrow[1]}, {narrow[2]} terms" if narrow else "s32",
        "s32": times.median("s32"), "auto": times.median("auto"), "gain": gain, "found": it.found,
        "share": gain / it.found if it.found else None, "reason": reason,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--quick", action="store_true", help="9 rounds")
    parser.add_argument("--core", type=int)
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args()
    core = tables.last_core() if args.core is None else args.core
    env = tables.environment({"bitwright": bw.__version__})
    found = []
    with pinned(core):
        for it in WORKLOADS:
            found.append(row(it, 9 if args.quick else args.rounds, core))
            print(f"{found[-1]['workload']:40} {found[-1]['gain']:.2f}x")
    rows = [
        [
            r["workload"], r["sums"], f"{r['s32'] * 1e6:.1f}", f"{r['auto'] * 1e6:.1f}", f"{r['gain']:.2f}x",
            f"{r['found']:.2f}x" if r["found"] else "", f"{r['share']:.0%}" if r["share"] is not None else "",
        ]
        for r in found
    ]  # fmt: skip
    heads = ["weights, shape", "sums", "s32 us", "auto us", "gain", "found", "of that"]
    best, worst = max(r["gain"] for r in found), min(r["gain"] for r in found)
    shares = [r["share"] for r in found if r["share"] is not None]
    checks = (
        (f"best gain over 32-bit sums {best:.2f} (at least {LEAST})", best >= LEAST),
        (f"smallest share of a found gain {min(shares):.0%} (at least {SHARE:.0%})", min(shares) >= SHARE),
        (f"slowest against 32-bit sums {worst:.2f} (at least 0.98: auto slows nothing)", worst >= 0.98),
    )
    text = tables.heading(f"Accumulators: 16-bit against 32-bit sums, {TARGET}", env)
    text += f"\n{tables.markdown(heads, rows)}\n" + "".join(f"- {t}: {tables.verdict(ok)}\n" for t, ok in checks)
    print(text)
    if not args.dry:
        tables.save("accumulators", text, {"environment": env, "rows": found, "checks": [list(c) for c in checks]})


if __name__ == "__main__":
    main()
