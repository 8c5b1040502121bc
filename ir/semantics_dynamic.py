"""Meaning of activations quantized at run time and of linear layers with a weight scale for every group of inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bitwright.ir import ops
from bitwright.ir.types import U8

Tensor = torch.Tensor
SMALLEST = 2.0**-120
"""Largest magnitude of a row below which it counts as zeros: 127 over it must stay finite."""
OFFSET = 128
"""What u8 codes are higher than s8 ones."""


def _dynamic_quantize(op: ops.DynamicQuantize, x: Tensor) -> tuple[Tensor, Tensor]:
    top = x.abs().amax(-1, keepdim=True)
    usable = torch.isfinite(top) & (top >= SMALLEST)
    safe = torch.where(usable, top, torch.ones_like(top))
    inverse = torch.where(usable, torch.full_like(top, 127.0) / safe, 0.0)  # 127.0 / safe would round twice
    codes = torch.nan_to_num(torch.round(x * inverse), nan=0.0).to(torch.int32)
    scale = torch.where(torch.isfinite(top), top / torch.full_like(top, 127.0), torch.nan)
    return (codes + OFFSET).to(torch.uint8) if op.dtype == U8 else codes.to(torch.int8), scale


def _group_linear(
    op: ops.GroupLinear, x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor | None = None
) -> Tensor:
    outputs, depth = w.shape
    group = op.group or depth
    count = -(-depth // group)
    for name, t in (("w_scale", w_scale), ("w_zero", w_zero)):
        if t is not None and tuple(t.shape) != (outputs, count):
            raise ValueError(f"{name} is {list(t.shape)}, expected {[outputs, count]} for groups of {group}")
    if tuple(x_scale.shape) != (*x.shape[:-1], 1):
        raise ValueError(f"x_scale is {list(x_scale.shape)}, expected {[*x.shape[:-1], 1]}")
    if x.device.type == "meta":  # the shape only
        return F.linear(x.float(), w.float())
    total = torch.zeros((), dtype=torch.float32)
    for g in range(count):
        at = slice(g * group, (g + 1) * group)
        codes = w[:, at].double()
        if w_zero is not None:
            codes = codes - w_zero[:, g : g + 1].double()
        total = total + F.linear(x[..., at].double(), codes).float() * w_scale[:, g].float()
    return total * x_scale


DYNAMIC_MEANING: dict[type[ops.Op], Callable[..., Any]] = {
    ops.DynamicQuantize: _dynamic_quantize,
    ops.GroupLinear: _group_linear,
}

__all__ = ["DYNAMIC_MEANING", "OFFSET", "SMALLEST"]
