"""A2Q+ weights for training: integer codes that cannot overflow an accumulator, with gradients.

Colbert et al., A2Q+: Improving Accumulator-Aware Weight Quantization, ICML 2024, section 3; penalty and the norm in the
log domain: Colbert et al., A2Q, ICCV 2023, section 4.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from bitwright.ir.errors import InvalidInput
from bitwright.ir.numerics import a2q_plus_cap
from bitwright.passes.accumulators._a2q import FACTORS, Limit, Shrink, fit

_MARGIN = 1 - 1e-5
"""Room for the rounding of float32 sums, which the integers must not exceed."""


class A2QWeight(nn.Module):
    """Parametrization of a weight [outputs, ...]: ``scale * codes``, codes = trunc(radius * v / ||v||₁), v centred.

    ``radius`` is a learned norm over the learned ``scale``, both one for each output and in log2, at most
    :func:`a2q_plus_cap`; positive and negative codes then sum to half of it each, so that a sum with any codes of
    ``input_bits`` bits (signed or not, whatever the zero point) fits ``bits`` bits, partial sums in any order included.
    Rounding passes gradients straight through. ``kept`` (bool, the weight's shape): elsewhere codes are zero.

    Rows that fit as they are lose nothing: they are ``loose``, neither centred nor rounded toward zero but to the
    nearest. Their radius is at most half the cap less half a unit for each weight, so that they stay inside, too.
    """

    kept: Tensor
    loose: Tensor
    log_cap: Tensor

    def __init__(
        self, weight: Tensor, bits: int, weight_bits: int = 8, input_bits: int = 8, kept: Tensor | None = None
    ) -> None:
        """Scale and norm start where ``weight`` is met best; raises :class:`InvalidInput` where nothing fits."""
        super().__init__()
        if not 2 <= bits <= 64 or not 2 <= weight_bits <= 16 or not 1 <= input_bits <= 32:
            raise InvalidInput(f"no such widths: accumulator {bits}, weights {weight_bits}, inputs {input_bits} bits")
        self.cap = a2q_plus_cap(bits, input_bits) * _MARGIN
        if self.cap < 2:
            raise InvalidInput(f"not even weights of 1 and -1 fit {bits} bits with {input_bits}-bit inputs")
        self.top = 2 ** (weight_bits - 1) - 1
        kept = torch.ones(weight.shape, dtype=torch.bool) if kept is None else kept.detach().clone()
        self.register_buffer("kept", kept.to(weight.device))
        room = self.cap / 2 - self.kept.flatten(1).sum(1) / 2
        flat = torch.where(self.kept, weight.detach(), 0.0).abs().flatten(1).double()
        loose = flat.sum(1) <= room * flat.amax(1).clamp(min=1e-12) / self.top
        self.register_buffer("loose", loose)
        self.register_buffer("log_cap", torch.where(loose, room.double(), self.cap).log2().to(weight))
        scale, norm = self._start(weight)
        self.log_scale = nn.Parameter(scale.log2().to(weight))
        self.log_norm = nn.Parameter(norm.log2().to(weight))

    def _start(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and l1 norm [O] by the search over coarser scales that ``constrain-weights`` does."""
        w = weight.detach().double().cpu().reshape(len(weight), -1).numpy()
        unit = np.maximum(np.abs(w).max(1, initial=0.0), 1e-12) / self.top
        kept = self.kept.cpu().reshape(w.shape).numpy()
        limit = Limit(self.cap / 2, halves=True, lo=-self.top, hi=self.top)
        found = fit(np.where(kept, w, 0.0) / unit[:, None], kept, limit, FACTORS, centre=True, refit=False)
        scale = unit * np.where(self.loose.cpu().numpy(), 1.0, found.divisor)
        centred = self._centred(torch.from_numpy(w).reshape(self.kept.shape)).reshape(w.shape).numpy()
        inside = Shrink(centred / scale[:, None], limit).project(np.ones(len(w)))
        norm = np.maximum(np.abs(inside).sum(1), 1.0) * scale
        return torch.from_numpy(scale), torch.from_numpy(norm)

    def projected(self, weight: Tensor) -> Tensor:
        """The weight to start from (EP-init): both halves within the cap, centred where a row did not fit as it was.

        Its norm is ``log_norm``'s."""
        w = weight.detach().double().cpu().reshape(len(weight), -1)
        scale = self.log_scale.detach().double().cpu().exp2()[:, None]
        centred = self._centred(w.reshape(self.kept.shape)).reshape(w.shape) / scale
        inside = Shrink(centred.numpy(), Limit(self.cap / 2, halves=True)).project(np.ones(len(w)))
        return (torch.from_numpy(inside) * scale).reshape(weight.shape).to(weight)

    def _centred(self, v: Tensor) -> Tensor:
        axes, kept = tuple(range(1, v.ndim)), self.kept.to(v.device)
        v = torch.where(kept, v, 0.0)
        mean = v.sum(axes, keepdim=True) / kept.sum(axes, keepdim=True).clamp(min=1)
        return torch.where(kept & ~self._column(self.loose).to(v.device), v - mean, v)

    def _column(self, per_output: Tensor) -> Tensor:
        return per_output.reshape(-1, *[1] * (self.kept.ndim - 1))

    @property
    def radius(self) -> Tensor:
        """The l1 norm of the codes before rounding, [O]: never above the cap."""
        return (self.log_norm - self.log_scale).clamp(max=self.log_cap).exp2()

    def codes(self, v: Tensor) -> Tensor:
        """Integers in the dtype of ``v``, with straight-through gradients."""
        centred = self._centred(v)
        norm = centred.abs().sum(tuple(range(1, v.ndim)), keepdim=True).clamp(min=1e-12)
        exact = self._column(self.radius) * centred / norm
        whole = torch.where(self._column(self.loose), exact.round(), exact.trunc())
        rounded = whole.clamp(-self.top, self.top)
        return exact + (rounded - exact).detach()

    def forward(self, v: Tensor) -> Tensor:
        """The weight that is computed with."""
        return self._column(self.log_scale.exp2()) * self.codes(v)

    def penalty(self) -> Tensor:
        """How far the norms lie above the cap, in log2, summed over outputs: where it is not 0 they get no gradient."""
        return (self.log_norm - self.log_scale - self.log_cap).clamp(min=0).sum()


__all__ = ["A2QWeight"]
