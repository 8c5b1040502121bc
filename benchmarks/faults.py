"""Accuracy against the share of stuck cells: the same network trained plainly and with drop-connect, on many chips.

    python benchmarks/faults.py [--chips 10] [--write]

A convolutional network on scikit-learn's digits, 4-bit weights in the crossbar of the device ``rram``, simulated; every
chip is another fault map, and every row also has three trainings of each kind. ``--write`` keeps the table in
benchmarks/results/faults.md.
"""

from __future__ import annotations

import argparse
import sys
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
TRAINED = 0.1
"""Share of stuck cells in training."""
EPOCHS = 12
RECIPE = "observe-ranges, quantize-weights{bits=4}, quantize-int8"
RESULT = Path(__file__).parent / "results" / "faults.md"


def network() -> nn.Module:
    """5 thousand weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )


def trained(data: digits.Digits, seed: int, rate: float) -> nn.Module:
    """The network after ``EPOCHS``, with so many weights stuck in every step."""
    torch.manual_seed(seed)
    net = network()
    training = bw.fault_training(net, rate, seed=seed) if rate else None
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


def scheduled(net: nn.Module, data: digits.Digits) -> Schedule:
    """The network on a crossbar whose memory holds all test images at once."""
    device = parse_device(text_of("rram").replace('size = "256 KiB"', 'size = "64 MiB"'))
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
    rows: dict[tuple[str, float], list[float]] = {}
    for name, rate in (("plain", 0.0), ("drop-connect", TRAINED)):
        for seed in range(TRAININGS):
            made = scheduled(trained(data, seed, rate), data)
            for share in RATES:
                chips = range(options.chips if share else 1)
                found = [accuracy(made, data, Faults(share, chip)) for chip in chips]
                rows.setdefault((name, share), []).extend(found)
                print(f"{name} {seed} {share:.0%}: {np.mean(found):.3f}", flush=True)
    text = table(rows, options.chips)
    print(text)
    if options.write:
        RESULT.write_text(text, encoding="utf-8")


def table(rows: dict[tuple[str, float], list[float]], chips: int) -> str:
    """Mean and worst accuracy by rate, for both trainings."""
    lines = [
        "# Accuracy against stuck cells", "",
        f"Digits network of 5 thousand weights in 4 bits on the device `rram`, {TRAININGS} trainings of each kind, "
        f"{chips} chips for each; test accuracy in percent, mean and worst. Drop-connect: "
        f"`bitwright.fault_training(model, {TRAINED})`. `python benchmarks/faults.py --write`", "",
        "| stuck cells | plain | worst | drop-connect | worst |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for share in RATES:
        cells = [f"{100 * f(rows[name, share]):.1f}" for name in ("plain", "drop-connect") for f in (np.mean, np.min)]
        lines.append(f"| {share:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
