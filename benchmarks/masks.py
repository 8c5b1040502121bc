"""Seconds to make masks, from 512 x 512 to 8192 x 8192, against one pass of |w| over the same memory, on one core.

    python benchmarks/masks.py [--sizes 512,1024,2048,4096,8192] [--rounds 3] [--write]

Every size and method runs in this process on one thread; a time is the best of the rounds on the CPU clock of the
thread, so that neighbours who take the core do not count. ``--write`` keeps the table in benchmarks/results/masks.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tables
import torch

from bitwright.passes.sparsity.masks import nm_mask, transposable_mask

METHODS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "abs + copy": lambda w: w.abs().clone(),
    "nm 2:4": lambda w: nm_mask(w, 2, 4),
    "nm 4:8": lambda w: nm_mask(w, 4, 8),
    "T exact 2:4": lambda w: transposable_mask(w, 2, 4, "exact"),
    "T fast 4:8": lambda w: transposable_mask(w, 4, 8, "fast"),
    "T greedy 4:8": lambda w: transposable_mask(w, 4, 8, "greedy"),
    "T two-approx 4:8": lambda w: transposable_mask(w, 4, 8, "two-approx"),
    "T exact 4:8": lambda w: transposable_mask(w, 4, 8, "exact"),
}
SLOW = {"T exact 4:8": 2048}
"""Methods measured up to a size only."""


def seconds(call: Callable[[torch.Tensor], torch.Tensor], w: torch.Tensor, rounds: int) -> float:
    """Best CPU time of the thread."""
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        call(w)
        times.append(time.thread_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="512,1024,2048,4096,8192")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {tables.last_core()})
    sizes = [int(s) for s in args.sizes.split(",")]
    head = "| method | " + " | ".join(f"{s}²" for s in sizes) + " | ns per element | over abs + copy |"
    lines = [head, "|---" * (len(sizes) + 3) + "|"]
    unit: dict[int, float] = {}
    for name, call in METHODS.items():
        cells, last = [], 0
        for size in sizes:
            if size > SLOW.get(name, size):
                cells.append("")
                continue
            w = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
            took = seconds(call, w, args.rounds)
            unit.setdefault(size, took)
            cells.append(f"{took:.4f} s")
            last = size
            per, ratio = took / size**2 * 1e9, took / unit[size]
        lines.append(f"| {name} | {' | '.join(cells)} | {per:.1f} at {last}² | {ratio:.1f} |")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    env = tables.environment({"torch": torch.__version__})
    note = (
        "One thread pinned to a core; best CPU time of the thread over the rounds; normal weights. Under load the"
        " machine was shared: CPU time leaves out the turns of other jobs, not what they do to the caches."
    )
    text = tables.heading("Masks", env, note) + "\n" + "\n".join(lines)
    text += f"\n\nPeak memory of the whole run, weights and torch included: {memory:.2f} GB.\n"
    print(text)
    if args.write:
        (tables.RESULTS / "masks.md").write_text(text)


if __name__ == "__main__":
    main()
