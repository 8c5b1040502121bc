"""What every rounding method gets and gives: a layer as matrices, its codes, and its output error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bitwright.ir.errors import InvalidInput
from bitwright.passes.precision._integer_codes import Levels

if TYPE_CHECKING:
    import torch


class Rounded(NamedTuple):
    """``codes`` (float, whole numbers, the weight's shape) mean ``(codes - zero) * scale``.

    ``error`` and ``error_nearest`` (nearest codes with the scale that was given): sum of squared differences of the
    layer's outputs over the sum of the squared outputs. ``input``: scale and zero point of the activations where the
    method learnt them; ``bias``: the change of the bias where it learnt one, [groups, outputs].
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    error: float
    error_nearest: float
    input: tuple[float, int] | None = None
    bias: torch.Tensor | None = None

    def real(self) -> torch.Tensor:
        """The weights that the codes stand for, float64."""
        return (self.codes.double() - self.zero) * self.scale


@dataclass
class Layer:
    """Weights [groups, outputs, K] (float64) with what broadcasts against them; True in ``kept`` where not masked."""

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    form: Levels
    kept: torch.Tensor
    gram: torch.Tensor
    """float64 [groups, K, K]: the sum of x xᵀ over the inputs."""

    def nearest(self) -> torch.Tensor:
        """The nearest codes."""
        return self.zeroed(self.form.round(self.weight / self.scale + self.zero))

    def zeroed(self, codes: torch.Tensor) -> torch.Tensor:
        """The zero point where masked."""
        import torch

        return torch.where(self.kept, codes, self.zero.expand_as(codes))

    def errors(self, codes: torch.Tensor) -> torch.Tensor:
        """Squared output error of each output, [groups, outputs]."""
        return self.output_errors((codes - self.zero) * self.scale)

    def output_errors(self, real: torch.Tensor) -> torch.Tensor:
        """Squared output error of each output for other real weights."""
        difference = real - self.weight
        return ((difference @ self.gram) * difference).sum(-1).clamp_min(0.0)

    def power(self) -> float:
        """Sum of the squared outputs."""
        return max(float(((self.weight @ self.gram) * self.weight).sum()), 1e-300)

    def better(self, codes: torch.Tensor) -> Rounded:
        """The codes, with those of ``nearest`` for the outputs where these are better."""
        import torch

        plain = self.nearest()
        before, after = self.errors(plain), self.errors(codes)
        chosen = torch.where((after <= before)[..., None], codes, plain)
        power = self.power()
        total = float(torch.minimum(before, after).sum())
        return Rounded(chosen, self.scale, self.zero, total / power, float(before.sum()) / power)


def layer(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    form: Levels,
    gram: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> Layer:
    """Checked and in float64; a matrix [outputs, K] becomes one group. Raises :class:`InvalidInput`."""
    import torch

    if weight.dim() not in (2, 3) or gram.dim() != weight.dim() or gram.shape[-2:] != (weight.shape[-1],) * 2:
        raise InvalidInput(f"weights {list(weight.shape)} and the Gram matrix {list(gram.shape)} do not fit")
    for name, t in (("the weights have", weight), ("the Gram matrix of the inputs has", gram)):
        if not bool(torch.isfinite(t).all()):
            raise InvalidInput(f"{name} NaN or infinities")
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    if form.step > 1 and not bool(kept.all()):
        raise InvalidInput("bipolar codes have no zero, and the mask needs one: use ternary")
    zero = torch.zeros((), dtype=torch.float64) if zero is None else zero
    w, s, z, g = (t.double() for t in (weight, scale, zero, gram))
    if weight.dim() == 2:
        w, kept, g = w[None], kept[None], g[None]
        s, z = (t[None] if t.dim() == 2 else t for t in (s, z))
    w = torch.where(kept, w, torch.zeros((), dtype=torch.float64))
    return Layer(w, s.expand(w.shape), z.expand(w.shape), form, kept, g)


def like(result: Rounded, weight: torch.Tensor) -> Rounded:
    """Without the axis of groups that a matrix did not have."""
    if weight.dim() == 3:
        return result
    first = result._replace(codes=result.codes[0], scale=result.scale[0], zero=result.zero[0])
    return first._replace(bias=result.bias[0]) if result.bias is not None else first


__all__ = ["Layer", "Rounded", "layer", "like"]
