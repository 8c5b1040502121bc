"""What rounding on calibration data holds at its peak, as the operating system counts it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bitwright.passes._memory import give_back

PEAK = """
import sys
import numpy as np, torch, bitwright as bw
from torch import nn

torch.set_num_threads(1)
WIDTH, TOKENS, BATCHES = 512, 1024, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.u, self.d = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.d(nn.functional.gelu(self.u(x + self.a(x))))


def megabytes(key):
    line = next(l for l in open("/proc/self/status") if l.startswith(key))
    return int(line.split()[1]) / 1024


def optimize(net, size, count):
    graph = bw.capture(net, (torch.zeros(1, size, WIDTH),))
    batches = [(np.random.default_rng(i).standard_normal((1, size, WIDTH), dtype=np.float32),) for i in range(count)]
    before = megabytes("VmRSS:")
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    bw.optimize(graph, sys.argv[1], calibration=batches)
    return megabytes("VmHWM:") - before


optimize(nn.Sequential(nn.Linear(WIDTH, 8)).eval(), 8, 1)  # what loading code takes is not the pass's
net = nn.Sequential(*[Block() for _ in range(3)]).eval()
model = sum(p.numel() for p in net.parameters()) * 4 / 2**20
activations = BATCHES * TOKENS * 4 * WIDTH * 4 / 2**20
print(optimize(net, TOKENS, BATCHES), 2 * activations + model)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are counted by Linux")
def test_adaquant_streams_layer_by_layer() -> None:
    """Below twice the largest layer's activations and the model, of three blocks."""
    spec = "quantize-weights{bits=4 rounding=adaquant iterations=2}"
    done = subprocess.run([sys.executable, "-c", PEAK, spec], capture_output=True, text=True, check=True, timeout=600)
    peak, limit = map(float, done.stdout.split())
    assert 0 < peak < limit


def test_give_back_can_be_called_anywhere() -> None:
    give_back()
