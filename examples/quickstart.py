"""The shortest useful program: a module in, a 2:4 int8 program out, saved, loaded and called."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import bitwright as bw

torch.manual_seed(0)
module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
x = torch.randn(32, 64)

graph = bw.capture(module, (x,), dynamic_batch=True, name="mlp")
program = bw.compile(graph, recipe="nm-mask{pattern=2:4}, int8", calibration=[x.numpy()])

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "mlp.bw"
    program.save(path)
    loaded = bw.load(path)  # needs neither torch nor the compiler

y = loaded(x.numpy())
assert np.array_equal(y, program(x))
for layer in loaded.report.layers:
    print(layer.name, layer.op, layer.pattern, layer.kernel, layer.reason)
for refusal in loaded.report.refusals:
    print("refused:", refusal.place, refusal.reason)
