"""What ``bitwright tune`` gains on whole models: tuned against untuned programs, and how near it comes to the best known.

    python benchmarks/tuning.py [--models efficientnet_b0,unet] [--minutes 10] [--folder DIR] [--quick] [--dry]

Every model is tuned into a database of its own below ``--folder`` (kept, so that a second run goes on from it), then
the untuned and the tuned program run in interleaved rounds on one core. Both programs' outputs are compared. ``share
of the best``: sum of the kernels' times with the best records of this database over that with the best of all
databases in the folder (each layer as often as it runs); 100 % where no other run knows better.
"""

from __future__ import annotations

import argparse
import getpass
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import models
import peers
import tables

import bitwright as bw
from bitwright.codegen.targets import resolve
from bitwright.codegen.targets.machine import cpu_name
from bitwright.codegen.tuning.records import Database
from bitwright.codegen.tuning.tasks import tasks_of
from bitwright.codegen.tuning.workload import target_key
from bitwright.codegen.tvm.select import version
from bitwright.pipeline import lower

MODELS = ("efficientnet_b0", "regnet_y", "mobilenet_v2", "unet", "convnext_tiny", "resnet50", "minilm")
"""Depthwise and grouped convolutions, odd channel counts, large images, then what the defaults were made on."""
METHOD = (
    "One thread, one core, batch 1, int8. Tuned over untuned time of the whole program: median (quartiles) of "
    "interleaved rounds, min(wall, CPU of the thread)."
)
QUICK = ("digits", "mobilenet_v2")


def subject(name: str, rows: int = 1) -> peers.Subject:
    """A model of the zoo, or one of ``transformers`` with random weights."""
    if name not in MORE:
        return models.subject(name, rows)
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = _features(MORE[name]())
        batches = [(torch.randn(rows, 3, 224, 224),) for _ in range(3)]
    return peers.Subject(name, module, batches[0], [tuple(x.numpy() for x in b) for b in batches])


def _efficientnet() -> Any:
    from transformers import EfficientNetConfig, EfficientNetModel

    return EfficientNetModel(
        EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, image_size=224, hidden_dim=1280)
    )


def _regnet() -> Any:
    from transformers import RegNetConfig, RegNetModel

    sizes, depths = [48, 104, 208, 440], [1, 3, 6, 6]
    return RegNetModel(RegNetConfig(embedding_size=32, hidden_sizes=sizes, depths=depths, groups_width=8))


def _mobilevit() -> Any:
    from transformers import MobileViTConfig, MobileViTModel

    return MobileViTModel(MobileViTConfig(image_size=224))


def _segformer() -> Any:
    from transformers import SegformerConfig, SegformerModel

    return SegformerModel(SegformerConfig())


MORE = {"efficientnet_b0": _efficientnet, "regnet_y": _regnet, "mobilevit": _mobilevit, "segformer_b0": _segformer}


def _features(model: Any) -> Any:
    """A vision model of ``transformers`` from one tensor to one tensor."""
    import torch

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.model(x).last_hidden_state)

    return Features().eval()


@dataclass(frozen=True)
class Gain:
    """One model: seconds of a call untuned and tuned, tuned over untuned with quartiles, what was tried and chosen."""

    model: str
    untuned: float
    tuned: float
    ratio: float
    low: float
    high: float
    error: float
    tried: int
    seconds: float
    chosen: int
    kernels: int
    share: float = 1.0


def gain(name: str, minutes: float, folder: Path, rounds: int, core: int) -> Gain:
    """Tune one model (on top of what its database holds) and race both programs."""
    it = subject(name)
    graph = bw.capture(it.module, it.inputs)
    records = folder / f"{name}.sqlite"
    began = time.perf_counter()
    found = bw.tune(graph, records=records, minutes=minutes, recipe="int8", calibration=it.calibration)
    seconds = time.perf_counter() - began
    untuned = bw.compile(graph, recipe="int8", calibration=it.calibration)
    tuned = bw.compile(graph, recipe="int8", calibration=it.calibration, records=records)
    inputs = it.arrays
    calls = {"untuned": peers.bitwright_call(untuned, inputs), "tuned": peers.bitwright_call(tuned, inputs)}
    error = peers.relative_error(calls["tuned"]()[0], calls["untuned"]()[0])
    times = tables.race(calls, rounds=rounds, sample=0.05, core=core)
    ratios = sorted(a / b for a, b in zip(times.rounds["tuned"], times.rounds["untuned"], strict=True))
    quarter = len(ratios) // 4
    return Gain(
        name, times.median("untuned"), times.median("tuned"), statistics.median(ratios), ratios[quarter],
        ratios[-1 - quarter], error, found.tried, seconds, len(tuned.manifest.tuning), len(tuned.manifest.steps),
    )  # fmt: skip


def share(name: str, folder: Path) -> float:
    """Best kernel times that all databases of the folder know together, over those that this model's own knows."""
    it = subject(name)
    target = resolve("host")
    lowered = lower(bw.capture(it.module, it.inputs), "int8", target, it.calibration).graph
    keys = (target_key(target, cpu_name()), version())
    known = [Database(p, write=False) for p in sorted(folder.glob("*.sqlite"))]
    mine = [d for d in known if d.path.stem == name]
    try:
        total = [0.0, 0.0]
        for task in tasks_of(lowered, target):
            seconds = max([r.default_seconds for d in mine for r in d.records(task.key, *keys)] or [task.predicted])
            for i, databases in enumerate((known, mine)):
                best = [p.ratio for d in databases for p in d.best(task.key, *keys)]
                total[i] += seconds * task.count * min([1.0, *best])
        return total[0] / total[1]
    finally:
        for d in known:
            d.close()


def row(g: Gain) -> list[str]:
    """One line of the table."""
    spread = f"{g.ratio:.3f} ({g.low:.3f} to {g.high:.3f})"
    return [g.model, f"{g.untuned * 1e3:.3f}", f"{g.tuned * 1e3:.3f}", spread, f"{g.chosen} of {g.kernels}",
            str(g.tried), f"{g.seconds / 60:.1f}", f"{g.error:.1e}", f"{g.share:.1%}"]  # fmt: skip


HEADS = ["model", "untuned ms", "tuned ms", "tuned over untuned", "kernels by records", "candidates tried", "minutes",
         "difference of outputs", "share of the best"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--minutes", type=float, default=10.0, help="of tuning, a model")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--folder", help="of the databases (default: one of this user's in the temporary folder)")
    parser.add_argument("--quick", action="store_true", help="half a minute a model, two models")
    parser.add_argument("--core", type=int)
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args()
    names = list(QUICK) if args.quick and args.models == ",".join(MODELS) else args.models.split(",")
    core = tables.last_core() if args.core is None else args.core
    folder = Path(args.folder or Path(tempfile.gettempdir()) / f"bitwright-tuning-{getpass.getuser()}")
    folder.mkdir(parents=True, exist_ok=True)
    env = tables.environment(peers.versions())
    gains = []
    for name in names:
        g = gain(name, min(args.minutes, 0.5) if args.quick else args.minutes, folder, args.rounds, core)
        gains.append(replace(g, share=share(name, folder)))
        print("  ".join(row(gains[-1])), flush=True)
    text = (
        tables.heading("What tuning gains on whole models", env, METHOD)
        + "\n"
        + tables.markdown(HEADS, list(map(row, gains)))
    )
    print(text)
    if not (args.dry or args.quick):
        tables.save("tuning", text, {"environment": env, "models": [asdict(g) for g in gains]})


if __name__ == "__main__":
    main()
