"""AdaRound: learns for each weight whether to round up or down, against the error of the layer's output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitwright.ir.errors import InvalidInput
from bitwright.passes.precision._integer_codes import Levels
from bitwright.passes.precision._rounding_common import Layer, Rounded, layer, like

if TYPE_CHECKING:
    import torch

STRETCH_LO, STRETCH_HI = -0.1, 1.1
WEIGHT = 0.01
"""Of the regularizer; the output error is taken relative to the mean squared output, as if outputs were about 1."""
WARM = 0.2
"""Share of the iterations without regularizer."""
BETA_FIRST, BETA_LAST = 20.0, 2.0


def adaround(
    weight: torch.Tensor,
    gram: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    form: Levels,
    mask: torch.Tensor | None = None,
    iterations: int = 10_000,
) -> Rounded:
    """Codes of a layer by AdaRound (Nagel et al., ICML 2020).

    A rectified sigmoid of a learnt variable is added to the weight rounded down; Adam lowers the squared error of the
    outputs plus 0.01 times a regularizer that drives each of them to 0 or 1, its exponent annealed from 20 to 2 after
    a warm-up of a fifth. The rate of Adam is 1e-3 at 10,000 iterations and in inverse proportion for others. The
    error is taken over all inputs at once through ``gram`` [(groups,) K, K], the sum of x xᵀ. Shapes as in GPTQ.
    Outputs for which nearest rounding has a smaller error keep that.
    """
    import torch

    if iterations < 1:
        raise InvalidInput(f"iterations is at least 1, not {iterations}")
    if form.step > 1:
        raise InvalidInput("bipolar codes cannot round up or down: use nearest or gpfq")
    task = layer(weight, scale, zero, form, gram, mask)
    at = task.weight / task.scale + task.zero
    low = torch.floor(at).clamp(form.lo, form.hi)
    start = ((at - low).clamp(0.001, 0.999) - STRETCH_LO) / (STRETCH_HI - STRETCH_LO)
    v = torch.log(start / (1 - start)).float().requires_grad_()
    s, z, w, g = (t.float() for t in (task.scale, task.zero, task.weight, task.gram / task.power() * _outputs(task)))
    low, kept = low.float(), task.kept.float()
    optimizer = torch.optim.Adam([v], lr=10.0 / iterations)
    with torch.enable_grad():
        for i in range(iterations):
            up = (torch.sigmoid(v) * (STRETCH_HI - STRETCH_LO) + STRETCH_LO).clamp(0, 1)
            difference = (((low + up).clamp(form.lo, form.hi) - z) * s - w) * kept
            loss = ((difference @ g) * difference).sum()
            done = i / iterations
            if done >= WARM:
                beta = BETA_LAST + (BETA_FIRST - BETA_LAST) * (1 - (done - WARM) / (1 - WARM))
                loss = loss + WEIGHT * ((1 - (2 * up - 1).abs().pow(beta)) * kept).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        up = (torch.sigmoid(v) * (STRETCH_HI - STRETCH_LO) + STRETCH_LO >= 0.5).double()
        codes = task.zeroed((low.double() + up).clamp(form.lo, form.hi))
    return like(task.better(codes), weight)


def _outputs(task: Layer) -> int:
    """Outputs of a layer: with the power of all of them at that number, the mean squared output is 1."""
    shape = task.weight.shape
    return int(shape[0] * shape[1])


__all__ = ["adaround"]
