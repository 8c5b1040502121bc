"""What ``bitwright tune`` gains on whole models: tuned against untuned programs, and the share of the best known.

    python benchmarks/tuning.py [--models resnet50] [--minutes 10] [--known 10] [--folder DIR] [--quick] [--dry]

Every model is tuned into a database of its own below ``--folder`` (kept: a second run goes on from it, and with
``--minutes 0`` only compares), then the untuned and the tuned program run in interleaved rounds on one core, and their
outputs are compared. ``--known N``: tune for N minutes more into a second database, so that "share of the best" says
something: the kernels' times by the best records of all databases in the folder over those by the first one's, each
layer as often as it runs. Results are kept by model, so models can be measured in several runs.
"""

from __future__ import annotations

import argparse
import datetime
import getpass
import json
import os
import statistics
import subprocess
import tempfile
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

MODELS = ("efficientnet_b0", "mobilevit", "regnet_y", "segformer_b0", "mobilenet_v2")
"""Depthwise and grouped convolutions, exponentials behind products, odd channel counts: where defaults are weak."""
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
    """Candidates in the database, measured or failed."""
    chosen: int
    kernels: int
    date: str
    commit: str
    load: float
    share: float | None = None


def gain(name: str, minutes: float, folder: Path, rounds: int, core: int) -> Gain:
    """Tune one model (on top of what its database holds) and race both programs."""
    it = subject(name)
    graph = bw.capture(it.module, it.inputs)
    records = folder / f"{name}.sqlite"
    bw.tune(graph, records=records, minutes=minutes, recipe="int8", calibration=it.calibration)
    untuned = bw.compile(graph, recipe="int8", calibration=it.calibration)
    tuned = bw.compile(graph, recipe="int8", calibration=it.calibration, records=records)
    inputs = it.arrays
    calls = {"untuned": peers.bitwright_call(untuned, inputs), "tuned": peers.bitwright_call(tuned, inputs)}
    error = peers.relative_error(calls["tuned"]()[0], calls["untuned"]()[0])
    times = tables.race(calls, rounds=rounds, sample=0.05, core=core)
    ratios = sorted(a / b for a, b in zip(times.rounds["tuned"], times.rounds["untuned"], strict=True))
    quarter = len(ratios) // 4
    with Database(records, write=False) as database:
        tried = len(database.records(target=target_key(resolve("host"), cpu_name()), compiler=version()))
    return Gain(
        name, times.median("untuned"), times.median("tuned"), statistics.median(ratios), ratios[quarter],
        ratios[-1 - quarter], error, tried, len(tuned.manifest.tuning), len(tuned.manifest.steps),
        datetime.datetime.now().isoformat(timespec="minutes"), commit(), round(os.getloadavg()[0], 1),
    )  # fmt: skip


def commit() -> str:
    """The checkout's, shortened; the empty string outside of one."""
    line = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip()


def again(name: str, minutes: float, folder: Path) -> None:
    """Tune into a second database, which starts from what the first one knows."""
    it, second = subject(name), folder / f"{name}.second.sqlite"
    with Database(second) as database, Database(folder / f"{name}.sqlite", write=False) as first:
        database.merge(first)
    graph = bw.capture(it.module, it.inputs)
    bw.tune(graph, records=second, minutes=minutes, recipe="int8", calibration=it.calibration)


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
            str(g.tried), f"{g.error:.1e}", "" if g.share is None else f"{g.share:.1%}",
            f"{g.date} at {g.commit}, load {g.load}"]  # fmt: skip


HEADS = ["model", "untuned ms", "tuned ms", "tuned over untuned", "kernels by records", "candidates",
         "difference of outputs", "share of the best", "measured"]  # fmt: skip


def keep(gains: list[Gain], env: dict[str, Any]) -> None:
    """Write these models' results beside those of other models."""
    path = tables.RESULTS / "tuning.json"
    known = json.loads(path.read_text())["models"] if path.exists() else []
    new = {g.model for g in gains}
    found = sorted([*(Gain(**k) for k in known if k["model"] not in new), *gains], key=lambda g: g.ratio)
    text = tables.heading("What tuning gains on whole models", env, METHOD) + "\n"
    text += tables.markdown(HEADS, list(map(row, found)))
    tables.save("tuning", text, {"environment": env, "models": [asdict(g) for g in found]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--minutes", type=float, default=3.0, help="of tuning, a model")
    parser.add_argument("--known", type=float, default=0.0, help="minutes of tuning into a second database")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--folder", help="of the databases (default: one of this user's in the temporary folder)")
    parser.add_argument("--quick", action="store_true", help="half a minute a model, two models, no results")
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
        gains.append(gain(name, min(args.minutes, 0.5) if args.quick else args.minutes, folder, args.rounds, core))
        if args.known > 0:
            again(name, args.known, folder)
            gains[-1] = replace(gains[-1], share=share(name, folder))
        print("  ".join(row(gains[-1])), flush=True)
        if not (args.dry or args.quick):
            keep(gains, env)


if __name__ == "__main__":
    main()
