"""GPFQ: each weight rounded so that the running error of the neuron's output stays small."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitwright.ir.errors import InvalidInput
from bitwright.passes.precision._integer_codes import Levels
from bitwright.passes.precision._rounding_common import Layer, Rounded, layer, like

if TYPE_CHECKING:
    import torch


def gpfq(
    weight: torch.Tensor,
    gram: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    form: Levels,
    mask: torch.Tensor | None = None,
    cross: torch.Tensor | None = None,
) -> Rounded:
    """Codes of a layer by greedy path following (Lybrand and Saab, JMLR 2021; Zhang, Zhou and Saab 2022).

    With u the error so far, weight t becomes Q(<x_t, u + w_t x_t> / |x_t|²), x_t column t of the inputs. All of it is
    in ``gram`` [(groups,) K, K], the sum of x xᵀ. ``cross``: the sum of x' xᵀ with x' the inputs that the rounded
    layer will get and x the original ones; ``gram`` is then that of x', and the error is against the original
    layer. Shapes of ``weight``, ``scale``, ``zero`` and ``mask`` as in GPTQ; masked weights get the zero point. Outputs
    for which nearest rounding has a smaller error keep that (not with ``cross``).
    """
    import torch

    task = layer(weight, scale, zero, form, gram, mask)
    if cross is not None and cross.shape != gram.shape:
        raise InvalidInput(f"cross has shape {list(cross.shape)}, the Gram matrix {list(gram.shape)}")
    other = task.gram if cross is None else cross.double().reshape(task.gram.shape)
    codes = torch.stack([_one(task, g, other[g]) for g in range(len(task.weight))])
    if cross is not None:
        plain, power = task.nearest(), task.power()
        before, after = (float(task.errors(c).sum()) / power for c in (plain, codes))
        return like(Rounded(codes, task.scale, task.zero, after, before), weight)
    return like(task.better(codes), weight)


def _one(task: Layer, group: int, cross: torch.Tensor) -> torch.Tensor:
    import torch

    w, s, z, kept, gram = (t[group] for t in (task.weight, task.scale, task.zero, task.kept, task.gram))
    size = gram.diagonal()
    codes, real = torch.empty_like(w), torch.zeros_like(w)
    for t in range(w.shape[1]):
        pull = w[:, : t + 1] @ cross[t, : t + 1] - real[:, :t] @ gram[t, :t]
        aim = pull / size[t] if float(size[t]) > 0 else w[:, t]
        q = torch.where(kept[:, t], task.form.round(aim / s[:, t] + z[:, t]), z[:, t])
        codes[:, t], real[:, t] = q, (q - z[:, t]) * s[:, t]
    return codes


__all__ = ["gpfq"]
