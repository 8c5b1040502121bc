"""GPTQ: columns rounded one by one, each error made up for by the columns still to come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitwright.ir.errors import InvalidInput
from bitwright.passes.precision._integer_codes import Levels
from bitwright.passes.precision._rounding_common import Layer, Rounded, layer, like

if TYPE_CHECKING:
    import torch

BLOCK = 128


def gptq(
    weight: torch.Tensor,
    gram: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    form: Levels,
    mask: torch.Tensor | None = None,
    damping: float = 0.01,
    order: bool = True,
) -> Rounded:
    """Codes of a layer by GPTQ (Frantar et al., ICLR 2023).

    ``weight`` [outputs, K] or [groups, outputs, K]; ``gram`` [(groups,) K, K]: the sum of x xᵀ over the inputs;
    ``scale`` and ``zero`` broadcast against the weight, so that scales per channel and per group of inputs (fixed
    beforehand) are the same to it. ``damping``: share of the mean diagonal added to the diagonal. ``order``: columns of
    large inputs first. Masked weights (False in ``mask``) get the zero point, and their error is made up for too.
    Outputs for which nearest rounding has a smaller error keep that.
    """
    if not damping >= 0:
        raise InvalidInput(f"damping is at least 0, not {damping}")
    task = layer(weight, scale, zero, form, gram, mask)
    import torch

    codes = torch.stack([_one(task, g, damping, order) for g in range(len(task.weight))])
    return like(task.better(codes), weight)


def _one(task: Layer, group: int, damping: float, order: bool) -> torch.Tensor:
    import torch

    w, s, z, kept, h = (t[group].clone() for t in (task.weight, task.scale, task.zero, task.kept, task.gram))
    seen = h.diagonal().clone()
    h.diagonal().add_(damping * float(seen.mean()))
    h.diagonal()[seen == 0] = 1.0
    places = torch.argsort(seen, descending=True, stable=True) if order else torch.arange(len(seen))
    w, s, z, kept = (t[:, places] for t in (w, s, z, kept))
    upper = _inverse_factor(h[places][:, places])
    codes = torch.empty_like(w)
    for begin in range(0, w.shape[1], BLOCK):
        end = min(begin + BLOCK, w.shape[1])
        errors = w.new_empty(len(w), end - begin)
        for j in range(begin, end):
            q = torch.where(kept[:, j], task.form.round(w[:, j] / s[:, j] + z[:, j]), z[:, j])
            codes[:, j] = q
            errors[:, j - begin] = (w[:, j] - (q - z[:, j]) * s[:, j]) / upper[j, j]
            w[:, j + 1 : end] -= torch.outer(errors[:, j - begin], upper[j, j + 1 : end])
        w[:, end:] -= errors @ upper[begin:end, end:]
    out = torch.empty_like(codes)
    out[:, places] = codes
    return out


def _inverse_factor(h: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse; more is added to the diagonal until there is one."""
    import torch

    more = 1e-10 * float(h.diagonal().mean())
    for _ in range(12):
        lower, bad = torch.linalg.cholesky_ex(h)
        if not int(bad):
            upper: torch.Tensor
            upper, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(bad):
                return upper
        h = h.clone()
        h.diagonal().add_(more)
        more *= 10
    raise InvalidInput("the inputs of the layer make no usable Gram matrix: raise damping")


__all__ = ["gptq"]
