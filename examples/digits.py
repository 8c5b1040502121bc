"""A small residual network on scikit-learn's images of digits: data, training, and training under a 2:4 mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Digits:
    """1,797 images of 8 x 8, enlarged to 16 x 16 and scaled to 0..1; every fourth one is kept for testing."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load() -> Digits:
    """The data, split the same way every time."""
    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    x = functional.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
    y = torch.tensor(raw.target)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    test = torch.arange(len(y)) % 4 == 0
    return Digits(x[order[~test]], y[order[~test]], x[order[test]], y[order[test]])


class Block(nn.Module):
    """relu(x + conv(relu(conv(x)))), each convolution with its batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(x + self.norm2(self.conv2(y)))


def convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """464 thousand weights, 12 million multiplications an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(1, 32, 1)
        self.down1 = convolution(32, 64, 2)
        self.block1 = Block(64)
        self.down2 = convolution(64, 128, 2)
        self.block2 = Block(128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block2(self.down2(self.block1(self.down1(self.stem(x)))))
        out: Tensor = self.head(y.mean((2, 3)))
        return out


def train(
    net: Net, data: Digits, epochs: int, rate: float, after_step: Callable[[], None], show: Callable[[int, float], None]
) -> None:
    """AdamW with a one-cycle schedule; ``after_step`` may mend the weights, ``show(epoch, loss)`` reports."""
    torch.manual_seed(0)
    size = 64
    steps = len(data.y) // size
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    net.train()
    for epoch in range(epochs):
        order, total = torch.randperm(len(data.y)), 0.0
        for i in range(steps):
            rows = order[i * size : (i + 1) * size]
            loss = functional.cross_entropy(net(data.x[rows]), data.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            after_step()
            total += float(loss.detach())
        show(epoch, total / steps)
    net.eval()


def masks_2_4(net: Net) -> dict[str, Tensor]:
    """Keep the 2 largest of every 4 consecutive input channels, in every layer whose inputs divide by 4."""
    masks = {}
    for name, weight in net.named_parameters():
        if weight.ndim < 2 or weight.shape[1] % 4:
            continue
        groups = weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, 4))
        keep = torch.zeros_like(groups).scatter_(-1, groups.topk(2, dim=-1).indices, 1.0)
        masks[name] = keep.flatten(-2).movedim(-1, 1)
    return masks


def apply_masks(net: Net, masks: dict[str, Tensor]) -> None:
    """Set the weights outside the masks to zero."""
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name in masks:
                weight.mul_(masks[name])
