"""How the gain grows with the work: int8 layers over 1 to 1024 rows, and over 50 to 95 % of zeros, against the peers.

    python benchmarks/curves.py [--only rows,sparsity] [--quick] [--dry]

Whole programs and whole calls of the peers, one core, interleaved rounds; GOP/s count the dense layer's operations.
"Best dense peer" is the fastest of onnxruntime, OpenVINO and DeepSparse on the layer without zeros. Every panel is
written when it is measured, beside those of earlier runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import gemm
import peers
import tables
from reach import Run, compiled, int8_peers, measured, ready

LAYERS = ((3072, 768), (768, 3072))
ROWS = tuple(4**i for i in range(6))
RECIPES = {"dense": "int8", "2:4": "nm-mask{pattern=2:4}, int8", "2:8": "nm-mask{pattern=2:8}, int8"}
SHARES = (50, 60, 70, 80, 90, 95)
NM = {50.0: "2:4", 75.0: "2:8", 87.5: "2:16", 93.75: "1:16"}
PEERS = ("ort", "openvino", "deepsparse int8 dense")
Points = dict[str, dict[float, float]]
"""Contender to (rows or share of zeros) to seconds."""


def by_rows(n: int, k: int, rows: Sequence[int], run: Run) -> Points:
    """Every contender over the rows of one layer."""
    found: Points = {}
    for m in rows:
        it, missing = gemm.subject(m, n, k), dict[str, str]()
        ours = [compiled(f"ours {x}", it, r, missing) for x, r in RECIPES.items()]
        others = [p for p in int8_peers(it, peers.Files(it), [run.core], deepsparse=False) if "bf16" not in p.name]
        times = measured(ours, [p for p in others if p.engine != "torch"], missing, run)
        for name in times.rounds:
            if not name.endswith(": contraction"):
                found.setdefault(name, {})[m] = times.median(name)
        print(f"{m}x{n}x{k} " + ", ".join(f"{x} {v[m] * 1e6:.0f} us" for x, v in found.items() if m in v), flush=True)
    return found


def by_sparsity(m: int, n: int, k: int, shares: Sequence[int], run: Run) -> Points:
    """Every way of leaving weights out of one layer; 0: the dense layer."""
    it, missing = gemm.subject(m, n, k), dict[str, str]()
    files = peers.Files(it)
    ours = [compiled("ours dense@0", it, "int8", missing)]
    ours += [compiled(f"ours N:M@{s}", it, f"nm-mask{{pattern={p}}}, int8", missing) for s, p in NM.items()]
    ours += [
        compiled(f"ours 4x4 blocks@{s}", it, f"nm-mask{{pattern={p} block=4 shared=4}}, int8", missing)
        for s, p in NM.items()
    ]
    ours += [compiled(f"ours 1x4 blocks@{s}", it, "int8", missing, pruned=f"b{s}") for s in shares]
    ours += [compiled(f"ours f32 unstructured@{s}", it, "float", missing, pruned=f"u{s}") for s in shares]
    wanted: list[Any] = [
        (f"deepsparse {what}@{s}", "deepsparse", partial(files.deepsparse, f"{kind}{s}", integers=integers),
         {"batch": m})
        for s in shares
        for what, kind, integers in (("int8", "u", True), ("int8 1x4", "b", True), ("f32", "u", False))
    ]  # fmt: skip
    dense = [p for p in int8_peers(it, files, [run.core]) if "bf16" not in p.name and p.engine != "torch"]
    for p in dense:
        p.name += "@0"
    times = measured(ours, [*dense, *ready(wanted, it, [run.core])], missing, run)
    found: Points = {}
    for label in times.rounds:
        name, _, share = label.partition("@")
        if ": contraction" not in share:
            found.setdefault(name, {})[float(share)] = times.median(label)
    return found


def best_dense(found: Points, at: float) -> float:
    return min(v[at] for name, v in found.items() if name.startswith(PEERS) and at in v)


def draw(axis: Any, found: Points, title: str, heights: Any, logarithmic: bool) -> None:
    """One panel; ours in full lines."""
    for name, points in found.items():
        xs = sorted(points)
        ours = name.startswith("ours")
        axis.plot(xs, [heights(x, points[x]) for x in xs], "-o" if ours else "--x", label=name, markersize=4,
                  linewidth=1.8 if ours else 1.0)  # fmt: skip
    if logarithmic:
        axis.set_xscale("log", base=2)
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6)


def rows_table(found: Points, ops: float) -> str:
    """Microseconds, and ours over the best dense peer."""
    xs = sorted(found["ours dense"])
    lines = []
    for m in xs:
        best = best_dense(found, m)
        cells = [f"{found[x][m] * 1e6:.1f}" if m in found[x] else "" for x in found]
        gains = [f"{best / found[f'ours {x}'][m]:.2f}x" for x in RECIPES]
        lines.append([f"{m:g}", *cells, *gains, f"{ops * m / found['ours dense'][m] / 1e9:.0f}"])
    heads = ["rows", *(f"{x}, us" for x in found), *(f"{x} over best" for x in RECIPES), "dense GOP/s"]
    return tables.markdown(heads, lines)


def sparsity_table(found: Points) -> str:
    """Speed over the best dense peer by share of zeros."""
    best = best_dense(found, 0.0)
    xs = sorted({x for v in found.values() for x in v})
    lines = [[name, *(f"{best / v[x]:.2f}" if x in v else "" for x in xs)] for name, v in found.items()]
    return tables.markdown(["speed over the best dense peer", *(f"{x:g} %" for x in xs)], lines)


def shown(parts: dict[str, Any], axes: Any) -> str:
    """Tables of all panels, drawn into ``axes``."""
    text = ""
    for axis, (name, part) in zip(axes, parts.items(), strict=False):
        kind, layer = name.split()
        n, k = map(int, layer.split("x"))
        env, found = part["environment"], {x: {float(at): s for at, s in v.items()} for x, v in part["points"].items()}
        if kind == "rows":
            ops, title = 2.0 * n * k, f"{layer}: dense-equivalent GOP/s over rows"
            draw(axis, found, title, lambda m, s, o=ops: o * m / s / 1e9, True)
            text += f"\n## Layer {layer}, int8, by rows\n\n"
        else:
            title, best = f"128x{layer}: speed over the best dense int8 peer by share of zeros", best_dense(found, 0.0)
            draw(axis, found, title, lambda _, s, b=best: b / s, False)
            text += f"\n## Layer 128x{layer}, by share of zeros\n\n"
        text += f"{env['date']}, load {' '.join(map(str, env['load']))}.\n\n"
        text += rows_table(found, 2.0 * n * k) if kind == "rows" else sparsity_table(found)
    return text


def keep(name: str, found: Points, env: dict[str, Any], *, dry: bool) -> None:
    """Write one panel beside those of earlier runs; print its table."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    path = tables.RESULTS / "curves.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    parts[name] = {"environment": env, "points": {x: {str(at): s for at, s in v.items()} for x, v in found.items()}}
    parts = {f"{kind} {n}x{k}": parts[f"{kind} {n}x{k}"] for kind in ("rows", "sparsity") for n, k in LAYERS
             if f"{kind} {n}x{k}" in parts}  # fmt: skip
    lines = -(-len(parts) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(12, 4.2 * lines), squeeze=False)
    text = shown(parts, axes.reshape(-1))
    print(text, flush=True)
    if not dry:
        figure.tight_layout()
        figure.savefig(tables.RESULTS / "curves.png", dpi=110)
        heading = tables.heading("Rows and sparsity", env)
        tables.save("curves", f"{heading}{text}\n![curves](curves.png)\n", {"parts": parts})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="rows,sparsity")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="half of the points, 3 rounds")
    parser.add_argument("--core", type=int)
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args()
    core = tables.last_core() if args.core is None else args.core
    run = Run(3 if args.quick else args.rounds, 0.02, core)
    step = 2 if args.quick else 1
    for part in args.only.split(","):
        for n, k in LAYERS:
            env = tables.environment(peers.versions())
            if part == "rows":
                found = by_rows(n, k, ROWS[::step], run)
            else:
                found = by_sparsity(128, n, k, SHARES[::step], run)
            keep(f"{part} {n}x{k}", found, env, dry=args.dry or args.quick)


if __name__ == "__main__":
    main()
