"""Seconds of the exact allocation of number formats: up to 500 layers with 12 choices each, three kinds of problem.

    python benchmarks/allocation.py [--layers 50,200,500] [--choices 12] [--seeds 3] [--write]

``formats``: losses fall by 4 per bit and layer sizes differ, as in networks. ``random``: losses and costs are
independent. ``correlated``: every loss is nearly a constant minus the cost, the hard case of a knapsack. The budget
lies at 20, 40 and 60 % of the way from the cheapest to the dearest; a time is the worst over seeds and budgets.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import tables

from bitwright.passes.precision.allocation import allocate


def problem(kind: str, layers: int, choices: int, seed: int) -> tuple[Any, Any]:
    """Losses and costs, one row per layer."""
    rng = np.random.default_rng(seed)
    if kind == "random":
        return rng.random((layers, choices)), rng.random((layers, choices))
    if kind == "correlated":
        costs = np.sort(rng.integers(1, 1000, (layers, choices)), 1)
        return 1000.0 - costs + rng.integers(0, 3, costs.shape), costs
    bits = np.linspace(2, 16, choices)
    sizes = rng.lognormal(10, 2, (layers, 1))
    spread = rng.uniform(0.5, 2, (layers, choices))
    return rng.lognormal(0, 3, (layers, 1)) * 4.0**-bits * spread, sizes * bits


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", default="50,200,500")
    parser.add_argument("--choices", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    sizes = [int(s) for s in args.layers.split(",")]
    lines = ["| problem | " + " | ".join(f"{s} layers" for s in sizes) + " | gap |", "|---" * (len(sizes) + 2) + "|"]
    for kind in ("formats", "random", "correlated"):
        cells, gap = [], 0.0
        for layers in sizes:
            worst = 0.0
            for seed in range(args.seeds):
                losses, costs = problem(kind, layers, args.choices, seed)
                for share in (0.2, 0.4, 0.6):
                    budget = float(costs.min(1).sum() + share * np.ptp(costs, axis=1).sum())
                    start = time.perf_counter()
                    found = allocate(losses, costs, budget)
                    worst, gap = max(worst, time.perf_counter() - start), max(gap, found.gap)
            cells.append(f"{worst:.2f} s")
        lines.append(f"| {kind} | {' | '.join(cells)} | {gap:g} |")
    import highspy

    version = highspy.Highs().version()  # type: ignore[no-untyped-call]
    note = f"{args.choices} choices a layer, one thread; worst of {args.seeds} seeds and three budgets; wall clock."
    head = tables.heading("Allocation", tables.environment({"highspy": str(version)}), note)
    text = f"{head}\n" + "\n".join(lines) + "\n"
    print(text)
    if args.write:
        (tables.RESULTS / "allocation.md").write_text(text)


if __name__ == "__main__":
    main()
