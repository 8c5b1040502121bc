"""Rounding methods on tensors: from the weights of a layer and its inputs to integer codes.

All take a format (``formats.levels``), scales and zero points that broadcast against the weight, and an optional mask
whose zeros they keep; all return :class:`Rounded`, with the layer's output error beside that of nearest rounding. A
sum of x xᵀ over the inputs (:func:`gram_of`) is all that most of them need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitwright.ir.errors import InvalidInput
from bitwright.passes.precision._adaquant import PAPER, Rates, adaquant
from bitwright.passes.precision._adaround import adaround
from bitwright.passes.precision._gpfq import gpfq
from bitwright.passes.precision._gptq import gptq
from bitwright.passes.precision._integer_codes import Levels
from bitwright.passes.precision._rounding_common import Rounded, layer, like

if TYPE_CHECKING:
    import torch


def nearest(
    weight: torch.Tensor,
    gram: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    form: Levels,
    mask: torch.Tensor | None = None,
) -> Rounded:
    """The nearest codes; shapes as in :func:`gptq`."""
    task = layer(weight, scale, zero, form, gram, mask)
    return like(task.better(task.nearest()), weight)


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    """The sum of x xᵀ over the rows of ``inputs`` [(groups,) rows, K], float64 [(groups,) K, K]."""
    import torch

    if inputs.dim() not in (2, 3) or not bool(torch.isfinite(inputs).all()):
        raise InvalidInput(f"inputs are finite rows of K values, not {list(inputs.shape)} with NaN or infinities")
    x = inputs.double()
    return x.transpose(-1, -2) @ x


__all__ = ["PAPER", "Rates", "Rounded", "adaquant", "adaround", "gpfq", "gptq", "gram_of", "nearest"]
