"""Everything that ``make bench`` measures, one script after the other: what each took, and which failed.

    python benchmarks/bench.py [--only gemm,must_reach] [--list]

A script that fails does not stop the others; it is named at the end, and the exit status is 1. Peers that are not
installed are left out by the scripts themselves, each with a line that says so. Figures to quote want an idle machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS: dict[str, tuple[str, ...]] = {
    "kernels": ("--rounds", "6"),
    "gemm": ("--rounds", "9"),
    "footprint": (),
    "models": ("--rounds", "6", "--recipes", "float,int8,int8 2:4,int8 2:8", "--profile"),
    "tuning": ("--models", "efficientnet_b0,mobilevit,regnet_y", "--minutes", "1.5"),
    "must_reach": ("--rounds", "5"),
    "curves": ("--rounds", "5"),
    "predictions": ("--models", "resnet50,bert_base,mobilenet_v2,1x768x3072,4x768x3072,64x768x3072"),
    "masks": ("--sizes", "512,1024,2048", "--write"),
    "accumulators": (),
    "allocation": ("--write",),
}
"""Script to the arguments that fit it into its share of the time."""
LIMIT = 1800.0
"""Seconds after which a script counts as hung."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SCRIPTS))
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := [s for s in chosen if s not in SCRIPTS]:
        parser.error(f"unknown script {unknown[0]!r}: choose from {', '.join(SCRIPTS)}")
    folder, ended = Path(__file__).parent, []
    for name in chosen:
        line = [sys.executable, str(folder / f"{name}.py"), *SCRIPTS[name]]
        print(f"== {name}.py {' '.join(SCRIPTS[name])}", flush=True)
        if args.list:
            continue
        began = time.monotonic()
        try:
            code = subprocess.run(
                line, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=LIMIT, check=False
            ).returncode
            said = "done" if code == 0 else f"FAILED with exit status {code}"
        except subprocess.TimeoutExpired:
            code, said = 1, f"FAILED: no end within {LIMIT / 60:.0f} minutes"
        ended.append((name, said, time.monotonic() - began, code))
        print(f"== {name}.py: {said} after {ended[-1][2]:.0f} s", flush=True)
    for name, said, seconds, _ in ended:
        print(f"{name:14} {seconds:6.0f} s  {said}")
    return int(any(code for *_, code in ended))


if __name__ == "__main__":
    sys.exit(main())
