"""Whole models at batch 1: ours in float, int8 and sparse int8 against onnxruntime and OpenVINO in float and int8.

    python benchmarks/models.py [--models resnet50,bert_base] [--quick] [--recipes int8] [--profile] [--dry]

Weights are random (MiniLM's are real), pruned without training: speed is what is compared, and every engine's output
is checked against torch (a sparse program's against the model with the same mask). ``--profile`` adds where our int8
time goes, step by step. ``BITWRIGHT_NNCF_PYTHON`` names an interpreter that has nncf, for OpenVINO's best int8.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import tables

import bitwright as bw
from bitwright.runtime.bench import pinned

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import zoo

RECIPES = {
    "float": "float",
    "int8": "int8",
    "int8 2:4": "nm-mask{pattern=2:4}, int8",
    "int8 2:8": "nm-mask{pattern=2:8}, int8",
    "int8 2:16": "nm-mask{pattern=2:16}, int8",
    "bf16": "bf16",
}
MODELS = ("resnet50", "bert_base", "mobilenet_v2", "vit_small", "minilm")
TRANSFORMERS = ("bert_base", "vit_small", "minilm")
TOKENS = 128
TARGETS: dict[str, tuple[tuple[str, str, float], ...]] = {
    "resnet50": (("ours int8", "ort int8", 1.25),),
    "bert_base": (
        ("ours int8", "ort int8", 1.0),
        ("ours int8", "openvino int8", 1 / 1.15),
        ("ours int8 2:4", "openvino int8", 1 / 1.5),
        ("ours int8 2:8", "openvino int8", 1 / 2.2),
        ("ours int8 2:16", "openvino int8", 1 / 3),
    ),
    "vit_small": (("ours int8", "openvino int8", 1 / 1.2),),
}
"""Per model: ours, beginning of a peer's names (its fastest variant counts), most times as long as the peer."""


def subject(name: str, rows: int = 1) -> peers.Subject:
    """A model of the zoo in full size, calibrated on three random batches of ``rows``."""
    import torch

    module, inputs = zoo.ZOO[name]("full")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        batches = [_batch(name, tuple(x[:1].repeat(rows, *[1] * (x.dim() - 1)) for x in inputs)) for _ in range(3)]
    calibration = [tuple(x.numpy() for x in b) for b in batches]
    return peers.Subject(name, module, batches[0], calibration, name in TRANSFORMERS)


def _batch(name: str, like: tuple[Any, ...]) -> tuple[Any, ...]:
    import torch

    if name in ("bert_base", "minilm"):
        ids = torch.randint(1, zoo.VOCABULARY["full"], (1, TOKENS))
        return ids, torch.ones_like(ids)
    return tuple(torch.randn_like(x) for x in like)


def ours(
    it: peers.Subject, recipes: dict[str, str], want: peers.Array, failed: dict[str, str]
) -> tuple[dict[str, peers.Contender], dict[str, Any]]:
    """Every recipe compiled and checked."""
    out: dict[str, peers.Contender] = {}
    programs: dict[str, Any] = {}
    graph = bw.capture(it.module, it.inputs)
    for label, recipe in recipes.items():
        name = f"ours {label}"
        began = time.perf_counter()
        try:
            program = bw.compile(graph, recipe=recipe, calibration=it.calibration)
            seconds = time.perf_counter() - began
            call = peers.bitwright_call(program, it.arrays)
            error = peers.relative_error(call()[0], peers.masked_reference(graph, it, recipe, want))
        except Exception as problem:  # a failure of ours is a line of the results too
            failed[name] = f"{type(problem).__name__}: {problem}"
            print(f"  {name}: {failed[name]}", flush=True)
            continue
        out[name] = peers.Contender(name, call, error, f"compiled in {seconds:.0f} s, cache as found")
        programs[name] = program
        print(f"  {name}: compiled in {seconds:.1f} s, error {error:.4f}", flush=True)
    return out, programs


def race(name: str, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """One model: Markdown and data."""
    print(f"{name}", flush=True)
    it = subject(name)
    want, files = it.reference(), peers.Files(it)
    failed: dict[str, str] = {}
    chosen = {k: v for k, v in RECIPES.items() if not args.recipes or k in args.recipes.split(",")}
    field, programs = ours(it, chosen, want, failed)
    for label, make in peers.peer_calls(it, files, torch=args.torch).items():
        if args.peers and not any(label.startswith(p) for p in args.peers.split(",")):
            continue
        got = peers.contend(label, make, want)
        if isinstance(got, str):
            failed[label] = got
        else:
            field[label] = got
            print(f"  {label}: ready, error {got.error:.4f}", flush=True)
    gc.collect()
    calls: dict[str, Callable[[], object]] = {n: c.call for n, c in field.items()}
    times = tables.race(
        calls, rounds=6 if args.quick else args.rounds, sample=0.1 if args.quick else 0.25, core=args.core
    )
    best = {p: times.fastest([n for n in calls if n.startswith(p)]) for p in ("ort int8", "openvino int8")}
    bars = [b for b in best.values() if b is not None]
    rows = [
        [n, f"{times.median(n) * 1e3:.2f}", f"{times.best(n) * 1e3:.2f}", f"{times.wall[n] * 1e3:.2f}",
         *(f"{times.ratio(n, b):.2f}" for b in bars), f"{field[n].error:.4f}", field[n].note]
        for n in calls
    ]  # fmt: skip
    heads = ["", "median ms", "best ms", "best wall ms", *(f"time / {b}" for b in bars), "error", "note"]
    text = f"\n## {name}\n\n{tables.markdown(heads, rows)}\n"
    checks = []
    for mine, peer, most in TARGETS.get(name, ()):
        against = best[peer]
        if mine in calls and against is not None:
            ratio = times.ratio(mine, against)
            checks.append([f"{mine} over {against}", ratio, most])
            text += f"- {mine} takes {ratio:.2f}x of {against} (at most {most:.2f}): {tables.verdict(ratio <= most)}\n"
    text += "".join(f"- {n} did not run: {why}\n" for n, why in failed.items())
    data: dict[str, Any] = {
        "median": {n: times.median(n) for n in calls}, "best": {n: times.best(n) for n in calls}, "checks": checks,
        "best_wall": dict(times.wall), "errors": {n: field[n].error for n in calls}, "failed": failed,
    }  # fmt: skip
    if args.profile:
        for label, program in programs.items():
            with pinned(args.core):
                part, steps = profile(label, program, it.arrays, 5 if args.quick else 15)
            text += part
            data.setdefault("profiles", {})[label] = steps
    return text, data


def profile(label: str, program: Any, arrays: list[peers.Array], repeats: int) -> tuple[str, list[dict[str, Any]]]:
    """Where a program's time goes: its dearest steps, and the sum by kind of kernel."""
    layers = {x.name: x for x in program.report.layers}
    steps = []
    for s in program.profile(*arrays, repeats=repeats):
        layer = layers.get(s.label)
        steps.append({
            "step": s.label, "kernel": layer.kernel if layer else s.kernel, "op": layer.op if layer else "",
            "shape": list(layer.shape) if layer else [], "us": s.seconds * 1e6,
            "gops": layer.operations / max(s.seconds, 1e-9) / 1e9 if layer and layer.operations else 0.0,
            "predicted_us": (layer.predicted_seconds or 0.0) * 1e6 if layer else 0.0,
        })  # fmt: skip
    steps.sort(key=lambda s: -s["us"])
    total = sum(s["us"] for s in steps) or 1.0
    rows = [
        [s["step"], s["kernel"], s["op"][:60], "x".join(map(str, s["shape"])), f"{s['us']:.0f}",
         f"{s['us'] / total:.1%}", f"{s['gops']:.0f}" if s["gops"] else "",
         f"{s['predicted_us'] / max(s['us'], 1e-9):.0%}"]
        for s in steps[:12]
    ]  # fmt: skip
    kinds: dict[str, list[float]] = {}
    for s in steps:
        entry = kinds.setdefault(f"{s['kernel']}: {s['op'][:40]}", [0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += s["us"]
        entry[2] += s["predicted_us"]
    table = [
        [k, n, f"{us:.0f}", f"{us / total:.1%}", f"{want / max(us, 1e-9):.0%}"]
        for k, (n, us, want) in sorted(kinds.items(), key=lambda e: -e[1][1])[:16]
    ]
    text = f"\n### {label}: {len(steps)} steps, {total / 1e3:.2f} ms\n\n"
    text += tables.markdown(["step", "kernel", "operators", "shape", "us", "share", "GOP/s", "predicted / us"], rows)
    text += "\n" + tables.markdown(["kind", "steps", "us", "share", "predicted / us"], table)
    return text, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--recipes", default="", help=f"some of {', '.join(RECIPES)}")
    parser.add_argument("--peers", default="", help="beginnings of peers' names, such as 'ort int8,openvino'")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="6 short rounds; saves nothing")
    parser.add_argument("--torch", action="store_true", help="torch eager and inductor too")
    parser.add_argument("--profile", action="store_true", help="our time by step")
    parser.add_argument("--core", type=int)
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args()
    env = tables.environment(peers.versions())
    text, data = tables.heading("Whole models, batch 1", env), {"environment": env, "models": {}}
    print(text)
    args.core = tables.last_core() if args.core is None else args.core
    for name in args.models.split(","):
        if name not in MODELS:
            parser.error(f"unknown model {name!r}: choose from {', '.join(MODELS)}")
        part, found = race(name, args)
        print(part, flush=True)
        text += part
        data["models"][name] = found
        gc.collect()
        if not (args.dry or args.quick):
            tables.save("models", text, data)


if __name__ == "__main__":
    main()
