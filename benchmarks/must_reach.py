"""Every speed that the project must reach against its peers: measured, with the share of the bound, met or missed.

    python benchmarks/must_reach.py [--only gemm,f32,models] [--quick] [--dry]

Groups: gemm (with blocks), f32, avx2, gemv, models, decode, prefill, batch, threads, compile, tuner.

Ours are compiled with a recipe through the public interface; peers run in processes of their own (engines.py says which
variables name their interpreters). One core, interleaved rounds, median of min(wall, CPU); two threads: wall clock.
Results are kept by group, so groups can be measured in several runs. A kernel that does not exist yet, a peer that does
not run: a row that says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import peers
import reach_layers
import reach_models
import tables
from claims import merge, table
from reach import Found, Run

GROUPS: dict[str, Callable[[Run], Found]] = {
    "gemm": reach_layers.gemm_rows,
    "f32": reach_layers.f32_rows,
    "avx2": reach_layers.avx2_rows,
    "gemv": reach_layers.gemv_rows,
    "models": reach_models.model_rows,
    "decode": reach_models.decode_rows,
    "prefill": reach_models.prefill_rows,
    "batch": reach_models.batch_rows,
    "threads": reach_models.thread_rows,
    "compile": reach_models.compile_rows,
    "tuner": reach_models.tuner_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GROUPS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    parser.add_argument("--core", type=int)
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := [g for g in chosen if g not in GROUPS]:
        parser.error(f"unknown group {unknown[0]!r}: choose from {', '.join(GROUPS)}")
    core = tables.last_core() if args.core is None else args.core
    run = Run(5 if args.quick else args.rounds, 0.02, core)
    for name in chosen:
        env = tables.environment(peers.versions())
        rows, times = GROUPS[name](run)
        print(tables.heading(name, env) + "\n" + table(rows), flush=True)
        if not args.dry:
            merge(name, rows, times, env)


if __name__ == "__main__":
    main()
