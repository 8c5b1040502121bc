"""Measure the contraction kernels on this machine, one thread, against the measured peak of the core.

    python benchmarks/kernels.py [--only int8,f32,conv,shared,avx2,attention] [--rounds 12]

Kernels of one table are interleaved; a sample is a batch of about 1.5 ms on the thread's CPU clock; the best of
all rounds counts. Integer kernels store bytes, as layers do. "eff." is dense-equivalent: 2*M*N*K over time, whatever
the sparsity.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.instructions import x86
from bitwright.codegen.tvm import adapter, contract
from bitwright.codegen.tvm.contract import ContractSpec, Conv, EpilogueParam, KernelFunc, Knobs, Matrix, StoreAcc
from bitwright.codegen.tvm.contract.spec import Isa
from bitwright.codegen.tvm.spelling import call
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec, const, fma
from bitwright.ir.types import F32, NM, S8, S32, U8

Array = NDArray[Any]
SAMPLE_NS = 1_500_000


def aligned(a: Array) -> Array:
    """A 64-byte aligned copy with 64 readable bytes behind it."""
    raw = np.zeros(a.nbytes + 192, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    out[...] = a
    return out


def load(func: KernelFunc, isa: str) -> tuple[Callable[..., None], float]:
    """The compiled kernel and the seconds it took."""
    began = time.process_time()
    code = adapter.build_object([func.primfunc], isa)
    seconds = time.process_time() - began
    with tempfile.TemporaryDirectory(prefix="bitwright-kernels-") as name:
        folder = Path(name)
        (folder / "k.o").write_bytes(code)
        subprocess.run(["gcc", "-shared", "-o", folder / "k.so", folder / "k.o"], check=True)
        function = getattr(ctypes.CDLL(str(folder / "k.so")), func.name)  # stays mapped when the file goes
    function.restype = None
    return function, seconds


@dataclass
class Case:
    """One kernel ready to run."""

    label: str
    ops: float
    call: Callable[[], None]
    seconds: float = 0.0
    best: float = float("inf")
    number: int = 1

    def sample(self) -> None:
        start = time.thread_time_ns()
        for _ in range(self.number):
            self.call()
        self.best = min(self.best, (time.thread_time_ns() - start) / self.number)

    def calibrate(self) -> None:
        self.sample()
        self.number = max(1, int(SAMPLE_NS / max(self.best, 1)))


@dataclass(frozen=True)
class StoreBytes(StoreAcc):
    """What an integer layer stores: sums clamped to a byte (without the scale of a real epilogue)."""

    @property
    def params(self) -> Sequence[EpilogueParam]:
        return (EpilogueParam("out", U8, self.rows * self.cols),)

    def store(self, b: Builder, pointers: Mapping[str, Pointer], acc: Vec, row: Index, col: Index, valid: int) -> None:
        b.store(pointers["out"], row * self.cols + col, acc.clip(0, 255).cast(U8), valid)


def sparse_weights(spec: ContractSpec, rng: np.random.Generator) -> Array:
    """Random weights that keep ``keep`` of every group, the same ones for outputs that share a pattern (channels are
    the last axis while choosing)."""
    shape = spec.weight_shape
    last = shape if len(shape) == 2 else (shape[0], *shape[2:], shape[1])
    dense = rng.integers(-127, 128, last).astype(spec.weight_dtype.numpy)
    if spec.sparsity and spec.pattern:
        (keep, group), shared = spec.sparsity, spec.pattern.shared
        score = rng.random((-(-last[0] // shared), *last[1:-1], last[-1] // group, group))
        limit = np.sort(score, -1)[..., group - keep, None]
        kept = (score >= limit).reshape(-1, *last[1:])
        dense = dense * np.repeat(kept, shared, 0)[: last[0]]
    return dense if len(shape) == 2 else np.ascontiguousarray(dense.transpose(0, 3, 1, 2))


def case(
    label: str, spec: ContractSpec, isa: Isa, change: Callable[[Knobs], Knobs] = lambda k: k, positive: bool = False
) -> Case:
    """Build one contraction; ``positive`` weights of at most 6 bits make pmaddubsw provably exact."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, spec.input_elements).astype(spec.input_dtype.numpy)
    arrays = [x]
    if spec.right == "constant":
        weight = sparse_weights(spec, rng)
        if positive:
            weight = np.clip(weight, -63, 63)
        knobs = change(contract.knobs(spec, isa, weight))
        arrays += contract.pack(spec, knobs, weight)
    else:
        assert isinstance(spec.geometry, Matrix)
        g = spec.geometry
        knobs = change(contract.knobs(spec, isa))
        arrays.append(rng.standard_normal(g.batch * g.cols * g.depth).astype(np.float32))
    store = StoreBytes if spec.element == "u8s8" else StoreAcc
    func = contract.emit(spec, knobs, store(spec.rows, spec.cols, spec.acc_dtype), "kernel")
    function, seconds = load(func, isa)
    arrays.append(np.zeros(spec.rows * spec.cols, spec.acc_dtype.numpy))
    if func.scratch_bytes:
        arrays.append(np.zeros(func.scratch_bytes, np.uint8))
    held = [aligned(a) for a in arrays]
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in held]

    def run(_held: list[Array] = held) -> None:
        function(0, func.tasks, *pointers)

    return Case(f"{label} [{knobs.rows}x{knobs.vectors}]", 2.0 * spec.macs, run, seconds)


def peak(element: str) -> Case:
    """Sixteen independent accumulators in registers: what the core can do."""
    b = Builder("peak")
    out = b.param("out", S32 if element == "u8s8" else F32, 16)
    kind = S32 if element == "u8s8" else F32
    acc = [b.register(kind, 16, const(i, kind, 16)) for i in range(16)]
    seed = b.let(b.load(out, 0, 16))
    with b.loop(b.end, b.begin):
        for r in acc:
            if element == "u8s8":
                r.set(call(x86.VPDPBUSD_512, r.get(), seed.bits(U8), seed.bits(S8)))
            else:
                r.set(fma(seed, r.get(), seed))
    total = acc[0].get()
    for r in acc[1:]:
        total = total + r.get()
    b.store(out, 0, total)
    function, _ = load(KernelFunc(b.finish(), "peak", 1, 0, ("out",)), "avx512-vnni")
    out_array = aligned(np.zeros(16, kind.numpy))
    pointer = ctypes.c_void_p(out_array.ctypes.data)
    rounds = 100_000

    def run(_held: Array = out_array) -> None:
        function(0, rounds, pointer)

    return Case(f"peak {element}", 2.0 * rounds * 16 * (64 if element == "u8s8" else 16), run)


def table(title: str, cases: list[Case], rounds: int) -> None:
    """Interleave, then print GOP/s, the ratio to the first kernel and the share of the peak (the last one)."""
    for c in cases:
        c.calibrate()
    for _ in range(rounds):
        for c in cases:
            c.sample()
    base, top = cases[0], cases[-1]
    print(f"\n{title}\n{'kernel':44}{'us':>9}{'eff. GOP/s':>12}{'vs first':>10}{'of peak':>9}{'compile s':>11}")
    for c in cases:
        rate = c.ops / c.best
        ratio = rate / (base.ops / base.best)
        share = rate / (top.ops / top.best)
        print(f"{c.label:44}{c.best / 1e3:9.1f}{rate:12.0f}{ratio:10.2f}{share:9.2f}{c.seconds:11.2f}")


def matrix_table(
    element: Any, shape: tuple[int, int, int], patterns: list[tuple[int, int]], isa: Isa, rounds: int
) -> None:
    m, n, k = shape
    dense = ContractSpec(element, Matrix(m, n, k))
    cases = [case("dense", dense, isa)]
    cases += [case(f"{p[0]}:{p[1]}", replace(dense, pattern=NM(*p, axis=1)), isa) for p in patterns]
    table(f"{element} {m}x{n}x{k} on {isa}", [*cases, peak(element)], rounds)


def conv_table(element: Any, rounds: int) -> None:
    def conv(size: int, cin: int, cout: int, kernel: int, stride: int = 1) -> ContractSpec:
        p = kernel // 2
        return ContractSpec(
            element, Conv(1, size, size, cin, cout, (kernel, kernel), (stride, stride), padding=(p, p, p, p))
        )

    layers = [(56, 64, 64, 3), (28, 128, 128, 3), (14, 256, 256, 3), (7, 512, 512, 3), (56, 64, 256, 1)]
    layers += [(56, 256, 64, 1), (14, 1024, 256, 1)]
    strided = [(56, 128, 128, 3, 2), (28, 256, 512, 1, 2), (224, 3, 64, 7, 2)]
    cases = [case(f"{s}x{s}x{i} -> {o}, {k}x{k}", conv(s, i, o, k), "avx512-vnni") for s, i, o, k in layers]
    cases += [
        case(f"{s}x{s}x{i} -> {o}, {k}x{k} s{t}", conv(s, i, o, k, t), "avx512-vnni") for s, i, o, k, t in strided
    ]
    for pattern in ((2, 4), (1, 4)):
        sparse = replace(conv(56, 64, 64, 3), pattern=NM(*pattern, axis=1))
        cases.append(case(f"56x56x64 -> 64, 3x3 {pattern[0]}:{pattern[1]}", sparse, "avx512-vnni"))
    table(f"{element} convolution", [*cases, peak(element)], rounds)


def shared_table(element: Any, shape: tuple[int, int, int], isa: Isa, rounds: int) -> None:
    """One pattern for 64, 32 and 16 outputs beside a pattern of every output's own."""
    dense = ContractSpec(element, Matrix(*shape))
    cases = [case("dense", dense, isa)]
    for keep, group in ((2, 4), (1, 4), (2, 8), (1, 8), (2, 16)):
        for shared in (1, 64, 32, 16):
            spec = replace(dense, pattern=NM(keep, group, 1, shared))
            label = f"{keep}:{group}" + (f", one for {shared} outputs" if shared > 1 else "")
            cases.append(case(label, spec, isa))
    sizes = "x".join(map(str, shape))
    table(f"{element} {sizes} on {isa}, shared patterns", [*cases, peak(element)], rounds)


def avx2_table(shape: tuple[int, int, int], rounds: int) -> None:
    sizes = "x".join(map(str, shape))
    dense = ContractSpec("u8s8", Matrix(*shape))
    for positive, weights in ((True, "7-bit weights"), (False, "any weights")):
        cases = [case(f"dense, {weights}", dense, "avx2", positive=positive)]
        for keep, group in ((2, 4), (1, 4), (1, 8)):
            for shared in (1, 64):
                spec = replace(dense, pattern=NM(keep, group, 1, shared))
                label = f"{keep}:{group}" + (", one for 64 outputs" if shared > 1 else "") + f", {weights}"
                cases.append(case(label, spec, "avx2", positive=positive))
        table(f"u8s8 {sizes} on avx2, {weights}", [*cases, peak("u8s8")], rounds)
    cases = [case("dense, avx-vnni", dense, "avx-vnni")]
    cases.append(case("2:4, avx-vnni", replace(dense, pattern=NM(2, 4, axis=1)), "avx-vnni"))
    cases.append(case("dense, portable", dense, "portable"))
    cases.append(case("2:4, one for 64 outputs, portable", replace(dense, pattern=NM(2, 4, 1, 64)), "portable"))
    table(f"u8s8 {sizes} without AVX-512", [*cases, peak("u8s8")], rounds)
    floats = ContractSpec("f32", Matrix(*shape))
    cases = [case("dense f32 avx2", floats, "avx2")]
    for keep, group, shared in ((2, 4, 1), (2, 4, 64), (1, 4, 1), (4, 16, 1), (2, 16, 1)):
        label = f"{keep}:{group}" + (f", one for {shared} outputs" if shared > 1 else "")
        cases.append(case(f"{label} f32 avx2", replace(floats, pattern=NM(keep, group, 1, shared)), "avx2"))
    cases.append(case("dense f32 portable", floats, "portable"))
    table(f"f32 {sizes} without AVX-512", [*cases, peak("f32")], rounds)


def attention_table(rounds: int) -> None:
    cases = [
        case("12 heads q*k^T 128x128x64", ContractSpec("f32", Matrix(128, 128, 64, 12), right="nk"), "avx512-vnni"),
        case("12 heads p*v 128x64x128", ContractSpec("f32", Matrix(128, 64, 128, 12), right="kn"), "avx512-vnni"),
        case("one 256x512x256 kn", ContractSpec("f32", Matrix(256, 512, 256), right="kn"), "avx512-vnni"),
    ]
    table("f32 with a run-time right operand", [*cases, peak("f32")], rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="int8,f32,conv,shared,avx2,attention")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    chosen, rounds = args.only.split(","), args.rounds
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    every = [(2, 4), (4, 8), (1, 4), (2, 8), (4, 16), (1, 8), (2, 16), (1, 16)]
    if "int8" in chosen:
        matrix_table("u8s8", (128, 3072, 768), every, "avx512-vnni", rounds)
        matrix_table("u8s8", (128, 768, 3072), [(2, 4), (1, 4), (1, 8)], "avx512-vnni", rounds)
    if "f32" in chosen:
        matrix_table("f32", (128, 3072, 768), [(2, 4), (1, 4), (2, 8), (1, 8)], "avx512-vnni", rounds)
        matrix_table("f32", (128, 768, 3072), [(2, 4), (1, 4), (1, 8)], "avx512-vnni", rounds)
    if "conv" in chosen:
        conv_table("u8s8", rounds)
        conv_table("f32", rounds)
    if "shared" in chosen:
        for shape in ((128, 3072, 768), (128, 768, 3072)):
            shared_table("u8s8", shape, "avx512-vnni", rounds)
            shared_table("f32", shape, "avx512-vnni", rounds)
    if "avx2" in chosen:
        for shape in ((128, 3072, 768), (128, 768, 3072)):
            avx2_table(shape, rounds)
    if "attention" in chosen:
        attention_table(rounds)


if __name__ == "__main__":
    main()
