"""A small transformer on scikit-learn's images of digits: 16 patches of 4 x 4 pixels, three pre-norm blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, BLOCKS = 64, 4, 3


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind its layer norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(b, s, self.heads, d // self.heads).transpose(1, 2) for f in self._projections())
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, d)
        x = x + self.out(attended)
        mixed: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return mixed

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.query, self.key, self.value


class Transformer(nn.Module):
    """150 thousand weights; images of 1 x 16 x 16 to ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        patches = x.reshape(b, 4, 4, 4, 4).transpose(2, 3).reshape(b, 16, 16)
        y = self.norm(self.blocks(self.embed(patches) + self.place))
        out: Tensor = self.head(y.mean(1))
        return out
