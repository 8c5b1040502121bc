"""Magnitudes that masks are made from: float32 or float64, finite, in the shape of the weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bitwright.ir.errors import InvalidInput
from bitwright.ir.patterns import share

if TYPE_CHECKING:
    import torch


def floats(weight: torch.Tensor, name: str) -> torch.Tensor:
    """The weight detached, half precision widened; raises :class:`InvalidInput` for integers, NaN, infinities."""
    import torch

    if not weight.is_floating_point():
        raise InvalidInput(f"{name} is {weight.dtype}: masks are made on float weights, before quantization")
    w = weight.detach()
    w = w if w.dtype in (torch.float32, torch.float64) else w.float()
    if w.numel() and not all(math.isfinite(float(x)) for x in torch.aminmax(w)):  # one pass, which NaN survives
        what = "NaN" if bool(torch.isnan(w).any()) else "an infinity"
        raise InvalidInput(f"{name} contains {what}: magnitudes cannot be compared")
    return w


def check_axis(weight: torch.Tensor, axis: int, name: str) -> None:
    """Raises :class:`InvalidInput` when the weight has no such axis."""
    if not -weight.dim() <= axis < weight.dim():
        raise InvalidInput(f"{name} has rank {weight.dim()}, no axis {axis}")


__all__ = ["check_axis", "floats", "share"]
