"""What a program costs besides its speed: compiling (seconds, memory), loading, and the overhead of a call.

    python benchmarks/footprint.py [--model resnet50] [--recipe int8] [--dry]

Compiling (with capture) runs in a process of its own with an empty cache; its memory is the largest sum of the
proportional set sizes of its process tree. Loading and calling run in processes that import the runtime only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import peers
import psutil  # type: ignore[import-untyped,unused-ignore]
import tables

METHOD = (
    "Compiling on all cores and loading by the wall clock, the file in the page cache; a call: median of 200 batches "
    "of min(wall, CPU) on one core, its overhead is that less the best of the kernel alone."
)

COMPILE = """
import json, resource, sys, time
sys.path[:0] = {paths!r}
import models
import bitwright as bw
def cpu():
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)
it = models.subject({model!r})
print("ready", flush=True)
sys.stdin.readline()
began, own = time.perf_counter(), cpu()
graph = bw.capture(it.module, it.inputs)
captured = time.perf_counter() - began
program = bw.compile(graph, recipe={recipe!r}, calibration=it.calibration, cache_dir={cache!r})
seconds, used = time.perf_counter() - began, cpu() - own
program.save({output!r})
began, own = time.perf_counter(), cpu()
bw.compile(graph, recipe={recipe!r}, calibration=it.calibration, cache_dir={cache!r})
passes = sorted(((round(r.seconds, 2), r.name) for r in program.report.passes), reverse=True)[:6]
print(json.dumps({{"seconds": seconds, "capture_seconds": captured, "warm_seconds": time.perf_counter() - began,
                   "cpu_seconds": used, "warm_cpu_seconds": cpu() - own,
                   "passes": passes, "kernels": program.report.figures}}))
"""

LOAD = """
import json, sys, time
from bitwright.runtime.program import Program
times = []
for _ in range(20):
    began = time.perf_counter()
    program = Program.load({path!r})
    times.append(time.perf_counter() - began)
    program.close()
heavy = [m for m in ("torch", "onnx", "tvm") if m in sys.modules]
print(json.dumps({{"first": times[0], "median": sorted(times)[10], "worst": max(times), "heavy_imports": heavy}}))
"""

CALL = """
import json, os, time
import numpy as np
from bitwright.runtime.program import Program
os.sched_setaffinity(0, {{max(os.sched_getaffinity(0))}})
program = Program.load({path!r})
x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
rounds = []
for _ in range(200):
    began, own = time.perf_counter(), time.thread_time()
    for _ in range(50):
        program(x)
    rounds.append(min(time.perf_counter() - began, time.thread_time() - own) / 50)
rounds.sort()
steps = sum(s.best for s in program.profile(x, repeats=200))
print(json.dumps({{"median": rounds[100], "best": rounds[0], "kernels": steps}}))
"""


def python(code: str) -> dict[str, Any]:
    """The JSON that a fresh interpreter prints last."""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def tree_bytes(process: psutil.Process) -> int:
    """Proportional set size of a process and its children: shared pages count once."""
    total = 0
    for p in [process, *process.children(recursive=True)]:
        try:
            total += p.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError):
            continue
    return total


def compiling(model: str, recipe: str, folder: Path) -> dict[str, Any]:
    """Compile from a cold cache while watching memory."""
    here = Path(__file__).parent
    code = COMPILE.format(
        paths=[str(here), str(here.parent)], model=model, recipe=recipe,
        cache=str(folder / "cache"), output=str(folder / "model.bw"),
    )  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        errors: list[str] = []
        trouble = process.stderr
        drain = threading.Thread(target=lambda: errors.append(trouble.read()))
        drain.start()
        watched, peak, stop = psutil.Process(process.pid), [0], threading.Event()
        while process.stdout.readline().strip() not in ("ready", ""):
            pass
        start = tree_bytes(watched)

        def watch() -> None:
            while not stop.wait(0.2):
                peak[0] = max(peak[0], tree_bytes(watched))

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.stdin.write("\n")
        process.stdin.flush()
        last = process.stdout.read().strip()
        stop.set()
        watcher.join()
        drain.join()
    if not last:
        raise SystemExit(f"compiling {model} failed:\n{errors[0][-2000:]}")
    result: dict[str, Any] = json.loads(last.splitlines()[-1])
    return {**result, "peak_bytes": peak[0], "before_bytes": start}


def one_layer(path: Path) -> None:
    """A 64 x 64 linear layer on one row."""
    import torch

    import bitwright as bw

    bw.compile(torch.nn.Linear(64, 64).eval(), example_inputs=(torch.randn(1, 64),)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args()
    env = tables.environment(peers.versions())
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bitwright-footprint-") as name:
        folder = Path(name)
        compiled = compiling(args.model, args.recipe, folder)
        size = (folder / "model.bw").stat().st_size
        loaded = python(LOAD.format(path=str(folder / "model.bw")))
        one_layer(folder / "layer.bw")
        called = python(CALL.format(path=str(folder / "layer.bw")))
    overhead = called["median"] - called["kernels"]
    checks = [
        ("capture and compile, cold cache", f"{compiled['seconds']:.1f} s", "60 s", compiled["seconds"] < 60),
        ("peak memory while compiling", f"{compiled['peak_bytes'] / 1e9:.2f} GB", "4 GB", compiled["peak_bytes"] < 4e9),
        ("first load in a process", f"{loaded['first'] * 1e3:.1f} ms", "50 ms", loaded["first"] < 0.05),
        ("overhead of a call, one layer", f"{overhead * 1e6:.1f} us", "20 us", overhead < 20e-6),
    ]
    rows = [[what, got, limit, tables.verdict(ok)] for what, got, limit, ok in checks]
    rows += [
        ["compile again, warm cache", f"{compiled['warm_seconds']:.1f} s", "", ""],
        ["memory before compiling", f"{compiled['before_bytes'] / 1e9:.2f} GB", "", ""],
        ["later loads, median of 20", f"{loaded['median'] * 1e3:.1f} ms", "", ""],
        ["of the compile: capture", f"{compiled['capture_seconds']:.1f} s", "", ""],
        ["artifact", f"{size / 1e6:.1f} MB", "", ""],
        ["a whole call, one layer", f"{called['median'] * 1e6:.1f} us", "", ""],
    ]
    heavy = ", ".join(loaded["heavy_imports"]) or "none of torch, onnx, tvm"
    text = tables.heading(f"Footprint of {args.model}, {args.recipe}", env, METHOD)
    text += "\n" + tables.markdown(["", "measured", "below", ""], rows)
    text += f"\nLoading imports {heavy}. Dearest passes: "
    text += ", ".join(f"{p} {s} s" for s, p in compiled["passes"]) + ".\n"
    print(text, f"({time.perf_counter() - began:.0f} s)")
    if not args.dry:
        tables.save("footprint", text, {"environment": env, "compile": compiled, "load": loaded, "call": called})


if __name__ == "__main__":
    main()
