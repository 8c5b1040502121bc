"""Whole networks on a GPU: ours in f16, bf16, int8 and 2:4 beside torch eager and torch.compile, as graphs of launches.

    python benchmarks/gpu_models.py --prepare gpu-models [--only resnet50]   here, without a GPU: TVM, NVRTC, torch
    python benchmarks/gpu_models.py gpu-models                               there: torch for the peers; no TVM

With ``src`` on PYTHONPATH. Networks are those of the tests (random weights), at full size. First each program's outputs
are compared with the reference's, stored with it; then ours and both peers (f16) take turns, each as one CUDA graph,
and the table has medians. Without a device it says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.ir.errors import BitwrightError
from bitwright.ir.files import save
from bitwright.runtime.artifact import read
from bitwright.runtime.cuda import CudaProgram, Recorded
from bitwright.runtime.cuda_driver import CudaDriver, Driver

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests.zoo

Array = np.ndarray[Any, Any]
RECIPES = {
    "f16": "f16",
    "2:4 f16": "nm-mask{pattern=2:4}, f16",
    "int8": "int8",
    "2:4 int8": "nm-mask{pattern=2:4}, int8",
    "4-bit": "weight-only{group=128}",
}
MODELS = {
    "resnet50": ((1, 32), ("f16", "2:4 f16", "int8", "2:4 int8")),
    "vit_small": ((1, 32), ("f16", "int8", "2:4 int8")),
    "bert_base": ((1, 16), ("f16", "2:4 f16", "int8", "2:4 int8")),
    "llama": ((1,), ("f16", "4-bit")),
}
"""By name in ``tests/zoo.py``: batches and recipes."""
ROUNDS, EACH = 15, 8
FAR = 0.05
"""Root mean square of the difference from the reference over that of its outputs: bf16 attention moves single codes."""


@dataclass(frozen=True)
class Case:
    """One program: its file, its network and batch, and its recipe's short name."""

    file: str
    model: str
    batch: int
    recipe: str

    @property
    def name(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.recipe}"


def network(model: str, batch: int, size: str = "full") -> tuple[Any, tuple[Any, ...]]:
    """The network and inputs of ``batch`` rows."""
    from tests.zoo import ZOO

    module, inputs = ZOO[model](size)
    return module, tuple(x[:1].repeat(batch, *[1] * (x.dim() - 1)) for x in inputs)


def prepare(folder: Path, target: str, only: str = "", size: str = "full") -> list[Case]:
    """Compile every program whose name contains ``only`` into ``folder``, and evaluate the reference."""
    import bitwright as bw
    from bitwright.codegen.targets import resolve
    from bitwright.ir.interpret import evaluate, to_numpy
    from bitwright.pipeline import lower

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for model, (batches, recipes) in MODELS.items():
        for batch in batches:
            for recipe in recipes:
                case = Case(f"{len(made)}.bw", model, batch, recipe)
                if only not in case.name:
                    continue
                module, inputs = network(model, batch, size)
                arrays = [x.numpy() for x in inputs]
                graph, text = bw.capture(module, inputs), RECIPES[recipe]
                program = bw.compile(graph, recipe=text, calibration=[tuple(arrays)], target=target)
                program.save(folder / case.file)
                lowered = lower(graph, text, resolve(target), [tuple(arrays)]).graph
                wanted = [to_numpy(t) for t in evaluate(lowered, arrays)]
                held = {f"x{i}": a for i, a in enumerate(arrays)} | {f"y{i}": a for i, a in enumerate(wanted)}
                np.savez_compressed(folder / f"{case.file}.npz", **held)  # type: ignore[arg-type]
                made.append(case)
                print(f"{case.name}: {len(program.manifest.launches)} launches", flush=True)
    about = {"target": target, "size": size, "cases": [vars(c) for c in made]}
    save(folder / "models.json", json.dumps(about, indent=1))
    return made


def distance(got: Array, want: Array) -> float:
    """Root mean square of the difference over that of ``want``."""
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.sqrt(np.square(a - b).mean() / max(float(np.square(b).mean()), 1e-30)))


def checked(folder: Path, case: Case, driver: Driver) -> tuple[Recorded, float]:
    """The program recorded on its stored inputs, and how far its outputs are from the reference's."""
    program = CudaProgram(read(folder / case.file), driver)
    with np.load(folder / f"{case.file}.npz") as held:
        inputs = [held[f"x{i}"] for i in range(len(program.inputs))]
        wanted = [held[f"y{i}"] for i in range(len(program.outputs))]
    result = program(*inputs)
    results = result if isinstance(result, tuple) else (result,)
    return program.record(*inputs), max(distance(a, b) for a, b in zip(results, wanted, strict=True))


def peers(model: str, batch: int, size: str) -> dict[str, Callable[[], float]]:
    """Seconds of a call of torch eager and torch.compile in f16, each replayed as a graph of :data:`EACH` calls."""
    import gpu_peers
    import torch

    module, inputs = network(model, batch, size)
    module = module.cuda().half()
    moved = [x.cuda().half() if x.is_floating_point() else x.cuda() for x in inputs]
    found = {"torch eager": gpu_peers.recorded([lambda: module(*moved)] * EACH)}
    compiled = torch.compile(module, mode="max-autotune-no-cudagraphs")
    found["torch.compile"] = gpu_peers.recorded([lambda: compiled(*moved)] * EACH)
    return {name: lambda run=run: run() / EACH for name, run in found.items()}  # type: ignore[misc]


def measure(folder: Path, driver: Callable[[], Driver], with_torch: bool) -> list[str]:
    """Check and time everything in ``folder``: the lines of the table."""
    about = json.loads((folder / "models.json").read_text())
    cases = [Case(**c) for c in about["cases"]]
    lines = []
    for model, batch in dict.fromkeys((c.model, c.batch) for c in cases):
        others = peers(model, batch, about["size"]) if with_torch else {}
        for case in (c for c in cases if (c.model, c.batch) == (model, batch)):
            recorded, off = checked(folder, case, driver())
            told = "right" if off <= FAR else "WRONG"
            ours_all = Recorded.chained([recorded] * EACH)
            ours: list[float] = []
            theirs: dict[str, list[float]] = {name: [] for name in others}
            for _ in range(ROUNDS):
                ours.append(ours_all.seconds() / EACH)
                for name, run in others.items():
                    theirs[name].append(run())
            took = statistics.median(ours)
            beside = ", ".join(f"{n} {statistics.median(t) / took:.2f}x" for n, t in theirs.items())
            lines.append(f"{case.name:<36}{told:>6} ({off:.1e}){took * 1e6:>11.1f} us  {beside}")
            print(lines[-1], flush=True)
    return lines


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="the folder to run")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="compile into this folder")
    parser.add_argument("--only", default="", help="prepare the programs whose name contains this")
    parser.add_argument("--target", default="cuda-sm90", choices=("cuda-sm80", "cuda-sm90"))
    given = parser.parse_args()
    if given.prepare:
        prepare(given.prepare, given.target, given.only)
    if not given.folder:
        return 0
    arch = {"cuda-sm80": "sm_80", "cuda-sm90": "sm_90a"}[given.target]
    try:
        first = CudaDriver(arch)
    except BitwrightError as error:
        print(f"nothing was run and nothing is claimed: {error}")
        return 0
    print(f"{first.name}: outputs against the reference, microseconds a call, peers' time over ours")
    import importlib.util

    lines = measure(given.folder, lambda: CudaDriver(arch), importlib.util.find_spec("torch") is not None)
    return sum("WRONG" in line for line in lines)


if __name__ == "__main__":
    sys.exit(main())
