"""The groups of ``must_reach.py`` that are whole models: batch 1 and 16, two threads, compiling, the tuner."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import engines
import footprint
import models
import numpy as np
import peers
import tables
from claims import Claim, Group, Quoted, Row
from reach import Found, Run, compiled, int8_peers, measured, ready

SPARSE = {"dense": "int8"} | {p: f"nm-mask{{pattern={p} skip_first=true}}, int8" for p in ("2:4", "2:8", "2:16")}
BLOCKS = "fixed-count-mask{count=3 per=16 block=4 skip_first=true}, int8"
"""81 % of the blocks of four are zero."""
PEER = ("openvino int8", "ort int8", "torch int8", "deepsparse int8 dense")
BERT = [
    Claim("BERT-base int8, 128 tokens", "ours dense", PEER, 1.15, 1.3),
    *(Claim(f"BERT-base int8 {p}", f"ours {p}", PEER, least)
      for p, least in (("2:4", 1.5), ("2:8", 2.2), ("2:16", 3.0))),
    Claim("BERT-base int8 2:16", "ours 2:16", ("deepsparse int8 u90",), 1.8),
]  # fmt: skip
CLAIMS = {
    "resnet50": [
        Claim("ResNet-50 int8, batch 1", "ours dense", PEER, 1.0, 1.15),
        Claim("ResNet-50 int8 2:4", "ours 2:4", PEER, 1.2, 1.3),
        Claim("ResNet-50 int8 2:8", "ours 2:8", PEER, 1.8, 2.2),
    ],
    "bert_base": BERT,
    "mobilenet_v2": [Claim("MobileNetV2 int8", "ours dense", PEER, 1.0, 1.2)],
    "vit_small": [Claim("ViT-S/16 int8", "ours dense", PEER, 1.2, 1.4)],
}
LIMITS = {"seconds": 15.0, "warm_seconds": 2.0, "peak_bytes": 2e9}


def field(
    name: str, it: peers.Subject, claims: Sequence[Claim], run: Run, missing: dict[str, str], *, threads: int = 1,
    recipes: Mapping[str, str] = SPARSE,
) -> Group:  # fmt: skip
    """The contenders that the claims name, in one race."""
    print(f"{name}, {threads} thread(s)", flush=True)
    named = {c.ours.removeprefix("ours ") for c in claims}
    ours = [compiled(f"ours {x}", it, recipe, missing, threads=threads) for x, recipe in recipes.items() if x in named]
    kinds = sorted({x.split()[-1] for c in claims for x in c.against if x.startswith("deepsparse")} - {"dense"})
    cores = [run.core] if threads == 1 else ()
    others = int8_peers(it, peers.Files(it), cores, sparse=kinds, threads=threads)
    longer = dataclasses.replace(run, seconds=0.1)
    times = measured(ours, others, missing, longer, it.reference(), wall=threads > 1)
    return Group(times, missing=missing)


def model_rows(run: Run) -> Found:
    """Batch 1, one thread."""
    rows: list[Row] = []
    kept: dict[str, Any] = {}
    for name, claims in CLAIMS.items():
        missing: dict[str, str] = {}
        group = field(name, models.subject(name), claims, run, missing)
        rows += [group.settle(c) for c in claims]
        kept[name] = medians(group)
    return rows, kept


def medians(group: Group) -> dict[str, Any]:
    return {n: group.times.median(n) for n in group.times.rounds} | {"missing": dict(group.missing)}


DECODER = {
    "decode": [
        Claim("Llama-like decode, 4-bit", "ours 4-bit", ("ort int4", "openvino int4"), 1.2, 1.5),
        Claim("Llama-like decode, 2-bit", "ours 2-bit", ("llama.cpp tq2_0",), 1.5, 2.2),
        Claim("Llama-like decode, 4-bit 2:4", "ours 4-bit 2:4", ("ort int4", "openvino int4"), 1.2, 2.0),
    ],
    "prefill": [
        Claim("Llama-like prefill, int8", "ours int8", ("openvino int8", "ort int8"), 1.1, 1.2),
        Claim("Llama-like prefill, 8-bit weights", "ours 8-bit", ("openvino int8", "ort int8"), 1.1, 1.2),
    ],
}


def decode_rows(run: Run) -> Found:
    """Two layers like Llama's: a token against 127 others."""
    return _decoder_rows("decode", run)


def prefill_rows(run: Run) -> Found:
    """The same on a prompt of 128 tokens."""
    return _decoder_rows("prefill", run)


def _decoder_rows(part: str, run: Run) -> Found:
    import decoder

    it, missing = decoder.subject(part, 128), dict[str, str]()
    it.calibration = [tuple(np.maximum(a, -1e4) for a in it.arrays)]  # a causal mask holds infinities
    recipes = decoder.DECODE if part == "decode" else decoder.PREFILL | {"ours int8": "int8"}
    named = {c.ours for c in DECODER[part]}
    ours = [compiled(name, it, recipe, missing) for name, recipe in recipes.items() if name in named]
    files = peers.Files(it)
    if part == "decode":
        more = {"more": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}}
        others = ready([
            ("ort int4", "onnxruntime", files.int4_onnxruntime, {}),
            ("openvino int4", "openvino", files.int4_openvino, more),
        ], it, [run.core])  # fmt: skip
    else:
        others = int8_peers(it, files, [run.core], deepsparse=False)
    times = measured(ours, others, missing, dataclasses.replace(run, seconds=0.05))
    quoted = [Quoted("llama.cpp tq2_0", 1.434, ("ort int4",), 1.748)]
    group = Group(times, missing=missing, quoted=quoted)
    return [group.settle(c) for c in DECODER[part]], medians(group)


def batch_rows(run: Run) -> Found:
    """ResNet-50 at batch 16."""
    it, missing = models.subject("resnet50", rows=16), dict[str, str]()
    claims = [
        Claim("ResNet-50 int8, batch 16", "ours dense", PEER, 1.0),
        Claim("ResNet-50 int8, batch 16, 1x4 blocks 80 %", "ours b80", ("deepsparse int8 b80",), 1.2),
    ]
    group = field("resnet50, batch 16", it, claims, run, missing, recipes={"dense": "int8", "b80": BLOCKS})
    return [group.settle(c) for c in claims], medians(group)


def thread_rows(run: Run) -> Found:
    """Two threads, by the wall clock; and how each program of ours scales."""
    rows: list[Row] = []
    kept: dict[str, Any] = {}
    claims = {
        "resnet50": [Claim("ResNet-50 int8, two threads", "ours dense", PEER, 1.0)],
        "bert_base": [
            Claim("BERT-base int8, two threads", "ours dense", PEER, 1.15),
            Claim("BERT-base int8 2:16, two threads", "ours 2:16", ("deepsparse int8 u90",), 1.3),
        ],
    }
    for name, these in claims.items():
        missing: dict[str, str] = {}
        it = models.subject(name)
        group = field(name, it, these, run, missing, threads=2)
        rows += [group.settle(c) for c in these]
        rows.append(scaling(name, it, run, missing))
        kept[name] = medians(group)
    return rows, kept


def scaling(name: str, it: peers.Subject, run: Run, missing: dict[str, str]) -> Row:
    """One thread over two, wall clock."""
    one = compiled("ours, one thread", it, "int8", missing)
    two = engines.Ours("ours, two threads", one.program, it.arrays, 2) if one else None
    longer = dataclasses.replace(run, seconds=0.1)
    group = Group(measured([one, two], [], missing, longer, wall=True), missing=missing)
    return group.settle(Claim(f"{name} int8, scaling", "ours, two threads", ("ours, one thread",), 1.9))


def compile_rows(run: Run) -> Found:
    """Seconds from a cold and a warm cache and memory, as limits: the ratio is limit over measured.

    Seconds are min(wall, CPU of all processes): on a machine with other work the wall clock measures that.
    """
    rows: list[Row] = []
    kept: dict[str, Any] = {}
    for name in ("resnet50", "bert_base"):
        with tempfile.TemporaryDirectory(prefix="bitwright-reach-") as folder:
            found = kept[name] = footprint.compiling(name, "int8", Path(folder))
        for what, limit in LIMITS.items():
            unit = "GB" if what.endswith("bytes") else "s"
            value = (
                found[what] / 1e9 if unit == "GB" else min(found[what], found[what.replace("seconds", "cpu_seconds")])
            )
            most = limit / (1e9 if unit == "GB" else 1)
            note, work = f"{value:.2f} {unit}, at most {most:g} {unit}", f"compile {name} int8: {what}"
            rows.append(Row(work, "bitwright", "the limit", None, None, most / value, None, 1.0, None, None, note))
    return rows, kept


def tuner_rows(run: Run) -> Found:
    """What ``tuning.py`` has measured: gains of whole models, and how near ResNet-50 came to the best known."""
    path, wanted = tables.RESULTS / "tuning.json", "tuner, ResNet-50: share of the best known kernel time"
    found = json.loads(path.read_text())["models"] if path.exists() else []
    rows = [
        Row(f"tuner, {m['model']}", "tuned", "untuned", m["tuned"] * 1e3, m["untuned"] * 1e3, 1 / m["ratio"], None, 1.0,
            None, None, f"{m['tried']} candidates, {m['date']}")
        for m in found
    ]  # fmt: skip
    share = next((m["share"] for m in found if m["model"] == "resnet50" and m["share"]), None)
    why = "" if share else "python benchmarks/tuning.py --models resnet50 --minutes 10 --known 10 measures it"
    rows.append(Row(wanted, "tuned", "all known records", None, None, share, None, 0.95, None, None, why))
    return rows, {}
