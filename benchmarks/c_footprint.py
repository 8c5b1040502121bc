"""Flash and RAM of networks as freestanding C on Cortex-M cores, by recipe; results/c_footprint.md.

Two networks with random weights: a keyword-spotting CNN of 50 thousand weights (input 49 x 10, the shape of Hello Edge,
arXiv:1711.07128), and the CIFAR-10 network of the CMSIS-NN paper (arXiv:1801.06601, table 1), whose weights are
87.3 KiB in 8 bits.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from tables import environment, heading, markdown, save
from torch import nn

import bitwright as bw
from bitwright.codegen.c.toolchain import toolchain

CORES = ("cortex-m0", "cortex-m4", "cortex-m7", "cortex-m55")
LOW = "observe-ranges, quantize-weights{{bits={}}}, quantize-int8"
COUNTED = "observe-ranges, quantize-weights{bits=bipolar}, quantize-int8{bits=2}"
RECIPES = {
    "int8": "int8",
    "int8, 2:4": "nm-mask{pattern=2:4}, int8",
    "4 bits": LOW.format(4),
    "4 bits, 2:4": "nm-mask{pattern=2:4}, " + LOW.format(4),
    "2 bits": LOW.format(2),
    "1 bit": LOW.format("bipolar"),
    "1 bit, activations 2 bits (popcount)": COUNTED,
}


def keywords() -> tuple[nn.Module, tuple[int, ...]]:
    """A keyword-spotting CNN of about 50 thousand weights."""
    layers: list[nn.Module] = [nn.Conv2d(1, 48, (10, 4), (2, 2), (4, 1)), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(48, 48, 3, padding=1, groups=48), nn.ReLU(), nn.Conv2d(48, 48, 1), nn.ReLU()]
    layers += [nn.Conv2d(48, 88, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(88, 12)]
    return nn.Sequential(*layers), (1, 1, 49, 10)


def cifar() -> tuple[nn.Module, tuple[int, ...]]:
    """The network of the CMSIS-NN paper."""
    layers = [
        nn.Conv2d(3, 32, 5, padding=2), nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 5, padding=2), nn.ReLU(),
        nn.AvgPool2d(2, 2), nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2, 2), nn.Flatten(),
        nn.Linear(1024, 10),
    ]  # fmt: skip
    return nn.Sequential(*layers), (1, 3, 32, 32)


def rows_of(net: nn.Module, shape: tuple[int, ...], cores: list[str]) -> list[tuple[str, ...]]:
    """A row for every recipe: constants, code by core, RAM, self-test."""
    rng = np.random.default_rng(0)
    data = [(rng.standard_normal(shape).astype(np.float32),) for _ in range(8)]
    graph = bw.capture(net.eval(), (torch.zeros(shape),), name="net")
    out = []
    for name, recipe in RECIPES.items():
        program = bw.compile_c(graph, recipe=recipe, calibration=data, name="net")
        found = [program.sizes(c) for c in cores]
        forms = sorted({f for c in program.source.calls for f in c.forms})
        told = "passed" if program.self_test() == 0 else "FAILED"
        out.append((
            name, f"{found[0].tables / 1024:.1f}", *(f"{s.code / 1024:.1f}" for s in found),
            f"{found[0].ram / 1024:.1f}", told, "; ".join(forms),
        ))  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    torch.manual_seed(0)
    cores = [c for c in CORES if not toolchain(c).missing()]
    if not cores:
        raise SystemExit(toolchain(CORES[0]).missing())
    env = environment({c: toolchain(c).compiler for c in cores[:1]})
    method = "KiB, `-Os`; constants are the same on every core, RAM is the static arena. Weights are random."
    parts = [heading("Footprint as freestanding C", env, method)]
    data = {}
    for title, (net, shape) in {"Keyword spotting": keywords(), "CIFAR-10 network of CMSIS-NN": cifar()}.items():
        count = sum(p.numel() for p in net.parameters())
        heads = ["recipe", "constants", *(f"code {c[7:]}" for c in cores), "RAM", "self-test", "weights"]
        rows = rows_of(net, shape, cores)
        data[title] = rows
        parts.append(f"## {title}, {count:,} parameters\n\n{markdown(heads, rows)}")
    text = "\n\n".join(parts) + "\n"
    print(text)
    if not options.dry:
        save("c_footprint", text, {"environment": env, "tables": data})


if __name__ == "__main__":
    main()
