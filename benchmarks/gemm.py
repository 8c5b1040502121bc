"""Single linear layers in int8, dense and 2:4: our kernels and whole programs against onnxruntime and OpenVINO.

    python benchmarks/gemm.py [--quick] [--shapes 128x3072x768] [--rounds 25] [--core 1] [--dry]

A shape is rows x outputs x inputs. "kernel" is the contraction alone with its accumulators stored (kernels.py); a
"program" takes and gives f32, as the peers' QDQ models do: quantize, contract, dequantize with bias. "contraction" is
the contracting step inside the program: the median of single profiled calls, which are not interleaved with the rest,
so its share of the peak is good to the clock's few per cent only. GOP/s are dense-equivalent. ``--quick`` does not
save.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import kernels
import numpy as np
import peers
import tables

import bitwright as bw
from bitwright.codegen.targets.machine import peaks
from bitwright.codegen.tvm.contract import ContractSpec, Matrix
from bitwright.codegen.tvm.contract.spec import Isa
from bitwright.ir.types import NM
from bitwright.runtime.bench import pinned

RECIPES = {"dense": "int8", "2:4": "nm-mask{pattern=2:4}, int8"}
ISA: Isa = "avx512-vnni"


def subject(m: int, n: int, k: int) -> peers.Subject:
    """One linear layer with bias over normal inputs."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = torch.nn.Linear(k, n).eval()
        batches = [torch.randn(m, k) for _ in range(3)]
    return peers.Subject(f"gemm-{m}x{n}x{k}", layer, (batches[0],), [(b.numpy(),) for b in batches])


def kernel_calls(m: int, n: int, k: int) -> dict[str, Callable[[], object]]:
    """The contraction alone, and the loop that measures the core's peak."""
    dense = ContractSpec("u8s8", Matrix(m, n, k))
    sparse = replace(dense, pattern=NM(2, 4, axis=1))
    return {
        "kernel dense": kernels.case("dense", dense, ISA).call,
        "kernel 2:4": kernels.case("2:4", sparse, ISA).call,
        "peak": kernels.peak("u8s8").call,
    }


def contraction_seconds(program: Any, array: np.ndarray[Any, Any], repeats: int) -> tuple[float, list[dict[str, Any]]]:
    """Median seconds of the program's longest step, and all its steps; single calls, not interleaved with the race."""
    steps = [
        {"step": s.label, "kernel": s.kernel, "median_us": s.seconds * 1e6, "best_us": s.best * 1e6}
        for s in program.profile(array, repeats=repeats)
    ]
    return max(s["median_us"] for s in steps) / 1e6, steps


def shape(m: int, n: int, k: int, rounds: int, core: int) -> tuple[str, dict[str, Any]]:
    """Race everything on one shape; Markdown and data."""
    it = subject(m, n, k)
    files, want, graph = peers.Files(it), it.reference(), bw.capture(it.module, it.inputs)
    ops = 2.0 * m * n * k
    calls: dict[str, Callable[[], object]] = dict(kernel_calls(m, n, k))
    per_call = {name: ops for name in calls} | {"peak": 2.0 * 100_000 * 16 * 64}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    steps: dict[str, Any] = {}
    inner: dict[str, float] = {}
    for label, recipe in RECIPES.items():
        name = f"program {label}"
        try:
            program = bw.compile(graph, recipe=recipe, calibration=it.calibration)
        except Exception as error:  # a failure of ours is a row of the table too
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        calls[name] = peers.bitwright_call(program, it.arrays)
        errors[name] = peers.relative_error(program(*it.arrays), peers.masked_reference(graph, it, recipe, want))
        with pinned(core):
            inner[f"contraction {label}"], steps[name] = contraction_seconds(program, it.arrays[0], 20 * rounds)
    for name, make in peers.peer_calls(it, files).items():
        got = peers.contend(name, make, want)
        if isinstance(got, str):
            failed[name] = got
        else:
            calls[name], errors[name] = got.call, got.error
    times = tables.race(calls, rounds=rounds, sample=0.02, core=core)
    best = times.fastest([n for n in calls if n.startswith(("ort int8", "openvino int8"))])
    peak = per_call["peak"] / times.median("peak")
    rows = []
    for name in calls:
        amount = per_call.get(name, ops)
        rate = amount / times.median(name)
        rows.append([
            name, f"{times.median(name) * 1e6:.1f}", f"{times.best(name) * 1e6:.1f}", f"{rate / 1e9:.0f}",
            f"{times.ratio('peak', name) * amount / per_call['peak']:.0%}",
            "" if name == "peak" or best is None else f"{times.ratio(best, name):.2f}x",
            f"{errors[name]:.4f}" if name in errors else "",
        ])  # fmt: skip
    for name, seconds in inner.items():
        rows.append([f"{name} (profiled apart)", f"{seconds * 1e6:.1f}", "", f"{ops / seconds / 1e9:.0f}",
                     f"{ops / seconds / peak:.0%}", "", ""])  # fmt: skip
    heads = ["", "median us", "best us", "GOP/s", "of peak", f"speed over {best}", "error"]
    checks = targets(times, best, ops, per_call["peak"])
    text = f"\n## u8 x s8, {m}x{n}x{k}\n\n{tables.markdown(heads, rows)}\n"
    text += "".join(f"- {name}: {value:.2f} (at least {want}): {tables.verdict(value >= want)}\n"
                    for name, value, want in checks)  # fmt: skip
    text += "".join(f"- {name} did not run: {why}\n" for name, why in failed.items())
    data = {
        "seconds": {n: times.median(n) for n in calls}, "best": {n: times.best(n) for n in calls}, "errors": errors,
        "contraction": inner, "steps": steps, "failed": failed, "checks": [list(c) for c in checks], "peak": peak,
    }  # fmt: skip
    return text, data


def targets(times: tables.Times, best: str | None, ops: float, peak_ops: float) -> list[tuple[str, float, float]]:
    """(what, measured, at least) for the speed items of the issue."""
    out = [
        ("dense kernel, share of the measured peak", times.ratio("peak", "kernel dense") * ops / peak_ops, 0.85),
        ("2:4 kernel, speed over our dense kernel", times.ratio("kernel dense", "kernel 2:4"), 1.2),
    ]
    programs = "program dense" in times.rounds and "program 2:4" in times.rounds
    if programs:
        out.append(("2:4 program, speed over our dense program", times.ratio("program dense", "program 2:4"), 1.2))
    if best is not None and "program 2:4" in times.rounds:
        out.append((f"2:4 program, speed over the best peer ({best})", times.ratio(best, "program 2:4"), 1.1))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="128x3072x768,128x768x3072")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="8 rounds")
    parser.add_argument("--core", type=int)
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args()
    core = tables.last_core() if args.core is None else args.core
    env = tables.environment(peers.versions())
    with pinned(core):
        top = peaks(ISA)
    text = tables.heading("Single linear layers, int8", env)
    text += f"\nPeak of the core by codegen/targets/machine.py: {top['int8'] / 1e9:.0f} GOP/s int8.\n"
    print(text)
    data: dict[str, Any] = {"environment": env, "peaks": top, "shapes": {}}
    for name in args.shapes.split(","):
        m, n, k = map(int, name.split("x"))
        part, found = shape(m, n, k, 8 if args.quick else args.rounds, core)
        print(part)
        text += part
        data["shapes"][name] = found
    if not (args.dry or args.quick):
        tables.save("gemm", text, data)


if __name__ == "__main__":
    main()
