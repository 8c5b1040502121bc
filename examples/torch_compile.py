"""bitwright behind ``torch.compile``: the module keeps its Python interface, its graphs run as programs."""

from __future__ import annotations

import torch
from torch import nn

torch.manual_seed(0)
module = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
x = torch.randn(4, 3, 8, 8)
module(x)
module.eval()

fast = torch.compile(module, backend="bitwright")  # options={"recipe": "int8", "calibration": ...} for int8
with torch.no_grad():
    want, got = module(x), fast(x)
print("largest difference", float((want - got).abs().max()))
assert torch.allclose(want, got, atol=1e-4)
