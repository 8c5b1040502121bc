"""The groups of ``must_reach.py`` that are single layers: int8 and f32 products, AVX2, matrix-vector products."""

from __future__ import annotations

from functools import partial
from typing import Any

import engines
import gemm
import kernels
import peers
from claims import Claim, Group, Quoted, Row
from reach import Found, Run, compiled, int8_peers, measured, ready

from bitwright.codegen.targets.machine import peaks
from bitwright.runtime.bench import pinned

SHAPES = ((128, 3072, 768), (128, 768, 3072))
DENSE = ("ort int8", "openvino int8", "deepsparse int8 dense", "torch int8")
PATTERNS = ("2:4", "2:4 shared=64", "1:4", "2:8", "1:8", "2:16", "1:8 shared=64")
BLOCKS = ("2:4", "1:4", "1:8")


def recipe_of(pattern: str) -> str:
    return f"nm-mask{{pattern={pattern}}}, int8" if pattern else "int8"


def gemm_rows(run: Run) -> Found:
    """int8 linear layers, dense and N:M, and 1x4 blocks."""
    rows: list[Row] = []
    kept: dict[str, Any] = {}
    for m, n, k in SHAPES:
        it, missing = gemm.subject(m, n, k), dict[str, str]()
        print(f"{m}x{n}x{k}", flush=True)
        ours = [compiled(f"ours {p or 'dense'}", it, recipe_of(p), missing) for p in ("", *PATTERNS)]
        blocks = [compiled(f"ours {p} of 1x4", it, recipe_of(f"{p} block=4 shared=4"), missing) for p in BLOCKS] + [
            compiled(f"ours {b} of 1x4", it, "int8", missing, pruned=b) for b in ("b80", "b90")
        ]
        others = int8_peers(it, peers.Files(it), [run.core], sparse=("s24", "u80", "u90", "b80"))
        peak = kernels.peak("u8s8")
        times = measured([*ours, *blocks], others, missing, run, it.reference(),
                         more=[engines.Function("peak", peak.call)])  # fmt: skip
        work = {x: 2.0 * m * n * k for x in times.rounds}
        group = Group(times, work, peak.ops / times.median("peak"), missing)
        rows += [group.settle(c) for c in gemm_claims(f"int8 {m}x{n}x{k}")]
        kept[f"{m}x{n}x{k}"] = {x: times.median(x) for x in times.rounds} | {"missing": missing}
    return rows, kept


def gemm_claims(where: str) -> list[Claim]:
    sparse = ("deepsparse int8 u80",)
    out = [
        Claim(f"{where} dense", "ours dense", DENSE, 1.0),
        Claim(f"{where} dense", "ours dense", (), 0.92, 0.96),
        Claim(f"{where} 2:4", "ours 2:4", DENSE, 1.35, 1.46),
        Claim(f"{where} 2:4, one pattern per 64", "ours 2:4 shared=64", DENSE, 1.8, 1.95),
    ]
    for p in ("2:8", "1:4"):
        out += [Claim(f"{where} {p}", f"ours {p}", DENSE, 2.5, 2.8), Claim(f"{where} {p}", f"ours {p}", sparse, 1.6)]
    for p in ("2:16", "1:8"):
        out.append(Claim(f"{where} {p}", f"ours {p}", DENSE, 5.0, 5.7))
        out.append(Claim(f"{where} {p}", f"ours {p}", ("deepsparse int8 u90",), 2.3))
    out.append(Claim(f"{where} 1:8, one pattern per 64", "ours 1:8 shared=64", DENSE, 5.0, 6.7))
    for p, least, aim in (("2:4", 1.9, 2.0), ("1:4", 3.7, 4.0), ("1:8", 7.0, 8.0)):
        out.append(Claim(f"{where} 1x4 blocks {p}", f"ours {p} of 1x4", DENSE, least, aim))
    out.append(Claim(f"{where} 1x4 blocks 80 %", "ours b80 of 1x4", ("deepsparse int8 b80",), 1.5))
    out += [Claim(f"{where} 1x4 blocks {b[1:]} %", f"ours {b} of 1x4", DENSE, 1.0, aim)
            for b, aim in (("b80", 2.7), ("b90", 5.0))]  # fmt: skip
    return out


def f32_rows(run: Run) -> Found:
    """f32 linear layers, dense and unstructured."""
    rows: list[Row] = []
    kept: dict[str, Any] = {}
    for m, n, k in SHAPES:
        it, missing = gemm.subject(m, n, k), dict[str, str]()
        files, where = peers.Files(it), f"f32 {m}x{n}x{k}"
        print(where, flush=True)
        ours = [compiled("ours dense", it, "float", missing)]
        ours += [compiled(f"ours {u}", it, "float", missing, pruned=u) for u in ("u80", "u90", "u95")]
        ours += [compiled(f"ours {d} of 64", it, f"fixed-count-mask{{count={d} per=64}}", missing) for d in (12, 6, 3)]
        wanted: list[Any] = [
            ("ort float", "onnxruntime", files.float32, {}), ("openvino float", "openvino", files.float32, {}),
            *((f"deepsparse float {u or 'dense'}", "deepsparse", partial(files.deepsparse, u, integers=False),
               {"batch": m}) for u in ("", "u80", "u90")),
        ]  # fmt: skip
        peak = kernels.peak("f32")
        more = [engines.Function("peak", peak.call)]
        times = measured(ours, ready(wanted, it, [run.core]), missing, run, it.reference(), more=more)
        group = Group(times, {x: 2.0 * m * n * k for x in times.rounds}, peak.ops / times.median("peak"), missing)
        best = ("ort float", "openvino float", "deepsparse float dense")
        claims = [
            Claim(f"{where} dense", "ours dense", best, 1.0), Claim(f"{where} dense", "ours dense", (), 0.84, 0.95),
            *(Claim(f"{where} {u[1:]} %", f"ours {u}", (f"deepsparse float {u}",), 1.25) for u in ("u80", "u90")),
            *(Claim(f"{where} {u[1:]} %, over our dense", f"ours {u}", ("ours dense",), least, aim)
              for u, least, aim in (("u80", 1.0, 2.7), ("u90", 1.0, 4.5), ("u95", 1.0, 8.0))),
            *(Claim(f"{where} {d} of every 64", f"ours {d} of 64", ("ours dense",), 1.0, aim)
              for d, aim in ((12, 3.8), (6, 6.2), (3, 10.9))),
        ]  # fmt: skip
        rows += [group.settle(c) for c in claims]
        kept[f"{m}x{n}x{k}"] = {x: times.median(x) for x in times.rounds} | {"missing": missing}
    return rows, kept


def avx2_rows(run: Run) -> Found:
    """The AVX2 build against itself."""
    m, n, k = SHAPES[0]
    it, missing = gemm.subject(m, n, k), dict[str, str]()
    ours = [compiled(f"ours {p or 'dense'}", it, recipe_of(p), missing, target="x86-avx2") for p in ("", "2:4", "1:4")]
    times = measured(ours, [], missing, run)
    group = Group(times, missing=missing)
    rows = [
        group.settle(Claim(f"AVX2 int8 {p}, over our dense", f"ours {p}", ("ours dense",), least, aim))
        for p, least, aim in (("2:4", 1.65, 1.8), ("1:4", 3.3, 3.6))
    ]
    return rows, {x: times.median(x) for x in times.rounds} | {"missing": missing}


LOW = {
    "4-bit": "weight-only{group=128}", "2-bit": "weight-only{bits=2 group=128}",
    "ternary": "weight-only{bits=ternary group=0}",
}  # fmt: skip
GGML = (
    Quoted("ggml q4_K, cold", 0.347, ("ort int4",), 0.467),
    Quoted("ggml tq2_0, cached", 0.218, ("ort int4",), 0.112),
    Quoted("ggml tq2_0, cold", 0.260, ("ort int4",), 0.467),
)
"""4096x4096, one row; against onnxruntime's 4-bit kernel of that study, cached and cold."""


def plain_linear(rows: int, outputs: int, inputs: int) -> peers.Subject:
    """A linear layer without bias, which every exporter writes as one MatMul."""
    import torch

    it = gemm.subject(rows, outputs, inputs)
    with torch.no_grad():
        it.module.bias = None
    it.name = f"plain-{it.name}"
    return it


def gemv_rows(run: Run) -> Found:
    """4096x4096 with weights of 4 and 2 bits: one row cached and cold, 16 and 128 rows."""
    rows: list[Row] = []
    kept: dict[str, Any] = {}
    for m in (1, 16, 128):
        it, missing = plain_linear(m, 4096, 4096), dict[str, str]()
        print(f"{m}x4096x4096, low bits", flush=True)
        ours = [compiled(f"ours {x}", it, recipe, missing) for x, recipe in LOW.items()]
        files = peers.Files(it)
        others = ready([
            ("ort int4", "onnxruntime", files.int4_onnxruntime, {}),
            ("openvino int4", "openvino", files.int4_openvino, {"more": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}}),
        ], it, [run.core])  # fmt: skip
        with pinned(run.core):
            top = peaks("avx512-vnni")
        for sweep in (0, engines.SWEEP) if m == 1 else (0,):
            state = "cold" if sweep else "cached"
            times = measured(ours, others, missing, run, it.reference(), sweep=sweep)
            sizes = {o.name: float(o.program.manifest.weights_bytes) for o in ours if o is not None}
            quotes = [q for q in GGML if q.name.endswith(state)]
            group = Group(times, sizes, top["memory" if sweep else "cache"], missing, quotes)
            rows += [group.settle(c) for c in gemv_claims(m, state)]
            kept[f"{m} rows, {state}"] = {x: times.median(x) for x in times.rounds} | {"missing": dict(missing)}
    return rows, kept


def gemv_claims(m: int, state: str) -> list[Claim]:
    where = f"{m}x4096x4096, {state}"
    if m > 1:
        return [Claim(f"4-bit {where}", "ours 4-bit", ("openvino int4", "ort int4"), 1.2, 1.4)]
    tq2 = (f"ggml tq2_0, {state}",)
    if state == "cached":
        first = [Claim(f"4-bit {where}", "ours 4-bit", ("ort int4", "openvino int4"), 1.05, 1.2)]
    else:
        first = [Claim(f"4-bit {where}", "ours 4-bit", ("ggml q4_K, cold",), 1.35, 1.6),
                 Claim(f"4-bit {where}, of the read bandwidth", "ours 4-bit", (), 0.85)]  # fmt: skip
    least, aim = (3.5, 4.2) if state == "cached" else (2.0, 2.5)
    return first + [Claim(f"{x} {where}", f"ours {x}", tq2, least, aim) for x in ("2-bit", "ternary")]
