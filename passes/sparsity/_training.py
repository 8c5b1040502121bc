"""Tensor parts of sparse training: lowered masks, straight-through weights, S-STE, the unbiased linear layer."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.ir.types import NM
from bitwright.passes.sparsity._magnitude import share
from bitwright.passes.sparsity._mvue import mvue_mask
from bitwright.passes.sparsity._transposable import transposable_mask
from bitwright.passes.sparsity.masks import nm_mask

Phase = Literal["sparse", "frozen", "dense"]
Unbiased = Literal["optimal", "two-draw"]


def lowered_mask(weight: Tensor, nm: NM, name: str) -> Tensor:
    """Bool [O, I, *taps] for a weight of that shape: ``nm`` along the inputs of each tap, as the passes mask it.

    With ``nm.transposable`` every tap, a matrix of outputs by inputs, obeys the pattern on both axes: the best mask
    for 2:4, one of at least 0.998 of the best otherwise. Computed on the CPU, returned where the weight lives.
    Raises :class:`InvalidInput` for NaN and infinities, quoting ``name``.
    """
    w = weight.detach().cpu()
    if not nm.transposable:
        return nm_mask(w, nm.keep, nm.group, nm.axis, nm.shared, nm.block, name).contiguous().to(weight.device)
    taps = w.movedim(1, -1)  # inputs are whole groups here, so no tile crosses from one tap into the next
    method: Literal["exact", "fast"] = "exact" if (nm.keep, nm.group) == (2, 4) else "fast"
    kept = transposable_mask(taps.reshape(len(w), -1), nm.keep, nm.group, method, name)
    return kept.reshape(taps.shape).movedim(-1, 1).contiguous().to(weight.device)


def soft_threshold(weight: Tensor, keep: int, group: int, axis: int = 1) -> Tensor:
    """sign(a) max(|a| - t, 0), t the (group - keep)-th smallest magnitude of each group: continuous in the weight.

    At most ``keep`` of a group are not zero, fewer when magnitudes tie at the threshold. A shorter last group keeps
    its share rounded up. Source: S-STE (arXiv 2409.09099), there for 2:4.
    """
    a = weight.movedim(axis, -1)
    size = a.shape[-1]
    full, parts = size - size % group, []
    for part, n in ((a[..., :full], group), (a[..., full:], size % group)):
        if part.numel():
            groups = part.reshape(*part.shape[:-1], -1, n)
            magnitude, pruned = groups.abs(), n - share(keep, group, n)
            level = magnitude.kthvalue(pruned, dim=-1, keepdim=True).values if pruned else torch.zeros(())
            parts.append((groups.sign() * (magnitude - level.to(a)).clamp(min=0)).reshape(part.shape))
    return torch.cat(parts, -1).movedim(-1, axis) if parts else weight


def soft_scale(weight: Tensor, soft: Tensor) -> float:
    """<w, S(w)> / |S(w)|^2, the scale that brings S(w) nearest to w; 1 where S(w) is zero."""
    w, s = weight.double(), soft.double()
    energy = float((s * s).sum())
    return float((w * s).sum()) / energy if energy else 1.0


class StraightThrough(torch.autograd.Function):
    """The value given, whose gradient goes to the weight unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class SparseWeight(nn.Module):
    """A parametrization: the weight that the layer computes with, made from the dense weight that is trained.

    ``mask`` (bool, of the weight's shape) and ``scale`` (f64, S-STE only, else 1) are buffers and travel in the
    model's state.
    """

    mask: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, nm: NM, soft: bool, name: str) -> None:
        super().__init__()
        self.nm, self.soft, self.layer = nm, soft, name
        self.phase: Phase = "sparse"
        self.draws: Draws | None = None
        self.register_buffer("mask", self.choose(weight))
        scale = soft_scale(weight.detach(), self.threshold(weight)) if soft else 1.0
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))

    def threshold(self, weight: Tensor) -> Tensor:
        return soft_threshold(weight.detach(), self.nm.keep, self.nm.group, self.nm.axis)

    def choose(self, weight: Tensor) -> Tensor:
        """The mask of a weight as it is now."""
        return self.threshold(weight) != 0 if self.soft else lowered_mask(weight, self.nm, self.layer)

    def refresh(self, weight: Tensor) -> float:
        """Choose the mask anew; the share of its bits that changed."""
        chosen = self.choose(weight)
        flipped = float((chosen != self.mask).double().mean())
        self.mask.copy_(chosen)
        return flipped

    def freeze(self, weight: Tensor) -> None:
        """Stop choosing. The soft weights of S-STE become the trained ones, so that the layer stays what it was."""
        if self.soft and self.phase == "sparse":
            self.mask.copy_(self.choose(weight))
            with torch.no_grad():
                weight.copy_(self(weight))
            self.scale.fill_(1.0)
        self.phase = "frozen"

    def forward(self, weight: Tensor) -> Tensor:
        if self.phase == "dense":
            return weight
        if self.phase == "frozen":  # what is masked gets no gradient: nothing will ever read it again
            return torch.where(self.mask, weight, 0.0)
        dense = weight.detach()
        value = self.threshold(dense) * self.scale.to(dense.dtype) if self.soft else torch.where(self.mask, dense, 0.0)
        out: Tensor = StraightThrough.apply(weight, value)  # type: ignore[no-untyped-call]
        return out


class Draws:
    """Random numbers of one layer by count: the n-th backward pass always meets the same ones."""

    def __init__(self, nm: NM, method: Unbiased, seed: int, layer: int) -> None:
        self.nm, self.method, self.key, self.count = nm, method, (seed, layer), 0

    def sparse(self, grad: Tensor, name: str) -> Tensor:
        """dY [rows, outputs] with at most ``keep`` of every ``group`` rows left in each column, unbiased."""
        state = np.random.SeedSequence((*self.key, self.count)).generate_state(1, np.uint64)
        self.count += 1
        generator = torch.Generator().manual_seed(int(state[0]) & (1 << 63) - 1)
        out = mvue_mask(grad.cpu(), self.nm.keep, self.nm.group, 0, generator, self.method, name)
        return out.to(grad.device)


class UnbiasedLinear(torch.autograd.Function):
    """x W^T + b, whose weight gradient is dY^T X with an unbiased sparse dY; the other gradients are exact.

    Groups run along the rows (batch and time), the axis that dY^T X sums over. Source: arXiv 2203.10991.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, draws: Draws, name: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.draws, ctx.layer = draws, name
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        rows = grad.reshape(-1, grad.shape[-1])
        dx = (grad @ weight.to(grad.dtype)).to(x.dtype) if to_x else None
        dw = None
        if to_weight:
            sparse = ctx.draws.sparse(rows, f"gradient of {ctx.layer}")
            dw = (sparse.T @ x.reshape(-1, x.shape[-1]).to(grad.dtype)).to(weight.dtype)
        return dx, dw, rows.sum(0) if to_bias else None, None, None


def unbiased_forward(module: nn.Linear, x: Tensor) -> Tensor:
    """What replaces ``forward`` of a Linear layer whose parametrization carries ``draws``."""
    sparse: Any = module.parametrizations["weight"][0]  # type: ignore[index]
    out: Tensor = UnbiasedLinear.apply(x, module.weight, module.bias, sparse.draws, sparse.layer)  # type: ignore[no-untyped-call]
    return out
