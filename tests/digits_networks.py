"""Small networks trained on scikit-learn's 8 x 8 digits in seconds, the same way every time; for accuracy tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.driver import capture
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy


@dataclass(frozen=True)
class Data:
    """Images [n, 1, 8, 8] in 0..1 and their digits; every third one is kept for testing."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def batches(self, count: int = 4, size: int = 64) -> list[tuple[np.ndarray, ...]]:
        """Calibration batches of training images."""
        return [(self.x[i * size : (i + 1) * size].numpy(),) for i in range(count)]


@cache
def data() -> Data:
    """1,797 images, split the same way every time."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(raw.target)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    test = torch.arange(len(y)) % 3 == 0
    return Data(x[order[~test]], y[order[~test]], x[order[test]], y[order[test]])


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu6: bool = False) -> nn.Module:
    """Convolution, batch norm, ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU6() if relu6 else nn.ReLU())


class Plain(nn.Module):
    """Three convolutions, mean, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, 16, 3), conv(16, 32, 3, 2), conv(32, 32, 3))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).mean((2, 3)))
        return out


class Depthwise(nn.Module):
    """A MobileNet: a stem and three pairs of depthwise and pointwise convolution."""

    def __init__(self, relu6: bool = False) -> None:
        super().__init__()
        layers = [conv(1, 16, 3, relu6=relu6)]
        for inputs, outputs, stride in ((16, 32, 2), (32, 32, 1), (32, 64, 1)):
            layers += [conv(inputs, inputs, 3, stride, inputs, relu6), conv(inputs, outputs, 1, relu6=relu6)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).mean((2, 3)))
        return out


@cache
def trained(kind: str, epochs: int = 8) -> nn.Module:
    """The ``plain``, ``depthwise`` or ``relu6`` network, trained with Adam and one cycle, in eval mode."""
    digits = data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Plain() if kind == "plain" else Depthwise(kind == "relu6")
        steps = len(digits.y) // 64
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * steps)
        for _ in range(epochs):
            order = torch.randperm(len(digits.y))
            for i in range(steps):
                rows = order[i * 64 : (i + 1) * 64]
                loss = functional.cross_entropy(net(digits.x[rows]), digits.y[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return net.eval()


def captured(net: nn.Module) -> Graph:
    """The graph of a network for any number of images."""
    return capture(net, (data().x[:4],), dynamic_batch=True)


def accuracy(graph: Graph) -> float:
    """Percent of the test images that the graph names rightly."""
    (scores,) = evaluate(graph, [data().test_x])
    return 100 * float((to_numpy(scores).argmax(1) == data().test_y.numpy()).mean())


def unbalanced(net: nn.Module, sigma: float = 1.0) -> nn.Module:
    """The same function with log-normal factors on the gamma and beta of each norm of a depthwise network, undone in
    the layer that reads it: the channel ranges that trained depthwise networks have (Nagel et al. 2019, figure 2)."""
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(0)
    assert isinstance(net, Depthwise)
    layers = [(block[0], block[1]) for block in net.body if isinstance(block, nn.Sequential)]
    readers = [*(layer for layer, _ in layers[1:]), net.head]
    with torch.no_grad():
        for (_, norm), reader in zip(layers, readers, strict=True):
            assert isinstance(norm, nn.BatchNorm2d)
            assert isinstance(reader, nn.Conv2d | nn.Linear)
            factor = torch.exp(sigma * torch.randn(norm.num_features, generator=generator))
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            if getattr(reader, "groups", 1) > 1:
                reader.weight.div_(factor.reshape(-1, 1, 1, 1))
            else:
                reader.weight.div_(factor.reshape(1, -1, *[1] * (reader.weight.ndim - 2)))
    return net
