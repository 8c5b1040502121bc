"""Accuracy against the share of stuck cells: the same network trained plainly and with drop-connect, on many chips.

    python benchmarks/faults.py [--chips 10] [--write]

A convolutional network on scikit-learn's digits, 4-bit weights in the crossbar of the device ``rram``, simulated; every
chip is another fault map, and every row also has three trainings of each kind. ``--write`` keeps the table in
benchmarks/results/faults.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import digits
import numpy as np
import torch
from torch import nn
from torch.nn import functional

import bitwright as bw
from bitwright.codegen.devices.cells import Faults
from bitwright.codegen.devices.library import text_of
from bitwright.codegen.devices.schema import parse_device
from bitwright.codegen.devices.simulate import Schedule, simulate
from bitwright.simulation import simulate_graph

RATES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
TRAININGS = 3
KINDS = (("plain", False, False), ("drop-connect", True, False), ("plain, known", False, True),
         ("drop-connect, known", True, True))  # fmt: skip
"""Name, whether cells are stuck in training, whether chips are tested and programmed around their faults."""


@dataclass(frozen=True)
class Setting:
    """A table: times more channels, share of stuck cells in training, and of those at the top in both."""

    wide: int
    trained: float
    high: float

    def __str__(self) -> str:
        many = {1: "5 thousand weights", 4: "29 thousand weights"}[self.wide]
        where = "half of them at the top, half at 0" if self.high else "all of them at 0"
        return f"{many}; stuck cells: {where}; in training {self.trained:.0%}"


SETTINGS = (Setting(1, 0.1, 0.5), Setting(4, 0.2, 0.5), Setting(4, 0.3, 0.0))
EPOCHS = 12
RECIPE = "observe-ranges, quantize-weights{bits=4}, quantize-int8"
RESULT = Path(__file__).parent / "results" / "faults.md"


def network(wide: int = 1) -> nn.Module:
    """5 thousand weights, 29 thousand with ``wide`` 4."""
    c = 8 * wide
    return nn.Sequential(
        nn.Conv2d(1, c, 3, 2, 1), nn.ReLU(), nn.Conv2d(c, 2 * c, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * c, 10),
    )  # fmt: skip


def trained(data: digits.Digits, seed: int, how: Setting, faulty: bool, known: bool) -> nn.Module:
    """The network after ``EPOCHS``, with cells stuck in every step if ``faulty``."""
    torch.manual_seed(seed)
    net = network(how.wide)
    stuck = {"rate": how.trained, "high": how.high, "known": known}
    training = bw.fault_training(net, **stuck, seed=seed) if faulty else None
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    steps = EPOCHS * (len(data.x) // 32)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.x))[: len(data.x) // 32 * 32].reshape(-1, 32):
            optimizer.zero_grad()
            functional.cross_entropy(net(data.x[batch]), data.y[batch]).backward()
            optimizer.step()
            schedule.step()
    return (training.finish() if training else net).eval()


def scheduled(net: nn.Module, data: digits.Digits, how: Setting) -> Schedule:
    """The network on a crossbar whose memory holds all test images at once."""
    text = text_of("rram").replace('size = "256 KiB"', 'size = "64 MiB"')
    device = parse_device(text.replace("high = 0.5", f"high = {how.high}"))
    graph = bw.capture(net, (data.test_x,))
    calibration = [(data.x[: len(data.test_x)].numpy(),)]
    done = simulate_graph(graph, device, RECIPE, calibration, [data.test_x.numpy()])
    assert done.identical
    return done.schedule


def accuracy(made: Schedule, data: digits.Digits, faults: Faults) -> float:
    """Share of the test images that are told right on one chip."""
    (logits,) = simulate(made, [data.test_x.numpy()], faults=faults)
    return float((logits.argmax(1) == data.test_y.numpy()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--chips", type=int, default=10, help="fault maps of each rate and network")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = digits.load()
    texts = [HEAD.format(trainings=TRAININGS, chips=options.chips)]
    for how in SETTINGS:
        texts.append(table(how, rows_of(how, data, options.chips)))
        print(texts[-1], flush=True)
    if options.write:
        RESULT.write_text("\n".join(texts), encoding="utf-8")


Rows = dict[tuple[str, float], list[float]]


def rows_of(how: Setting, data: digits.Digits, chips: int) -> Rows:
    """Accuracies of every kind and rate, over trainings and chips."""
    rows: Rows = {}
    for name, faulty, known in KINDS:
        for seed in range(TRAININGS):
            made = scheduled(trained(data, seed, how, faulty, known), data, how)
            for share in RATES:
                found = [accuracy(made, data, Faults(share, chip, known)) for chip in range(chips if share else 1)]
                rows.setdefault((name, share), []).extend(found)
    return rows


HEAD = """# Accuracy against stuck cells

Digits networks in 4 bits on the device `rram`, {trainings} trainings of each kind, {chips} chips for each; test
accuracy in percent, mean / worst. Drop-connect: `bitwright.fault_training`. Known: the chip's faults were found by
testing it, and healthy cells are programmed to make up for stuck ones. `python benchmarks/faults.py --write`
"""


def table(how: Setting, rows: Rows) -> str:
    """Mean and worst accuracy by rate, of every kind."""
    lines = [
        f"## {str(how).capitalize()}", "", "| stuck cells | " + " | ".join(name for name, *_ in KINDS) + " |",
        "|---|" + "---|" * len(KINDS),
    ]  # fmt: skip
    for share in RATES:
        found = [rows[name, share] for name, *_ in KINDS]
        cells = [f"{100 * np.mean(f):.1f} / {100 * np.min(f):.1f}" for f in found]
        lines.append(f"| {share:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
