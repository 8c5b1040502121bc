"""AdaQuant: learns weights, their scales and the activation's range together, on the error of the layer's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bitwright.ir.errors import InvalidInput
from bitwright.passes.precision._integer_codes import Levels
from bitwright.passes.precision._rounding_common import Rounded

if TYPE_CHECKING:
    import torch


class Rates(NamedTuple):
    """Learning rates of the four Adam optimizers, absolute."""

    activation: float = 1e-1
    """Of the range of the activation, and of its zero point in codes."""
    range: float = 1e-3
    """Of the ranges of the weights, and of their zero points in codes."""
    weight: float = 1e-5
    bias: float = 1e-3


PAPER = Rates()
"""As in the code of the paper, whose layers have weights near 0.03 and activations near 1."""
_LOOKS = 20
"""How often the error on all inputs is taken; the best state seen is the result."""


@dataclass
class _State:
    """What is learnt. ``weight`` [g, o, k], ``reach`` (scale * top) and ``zero`` [g, o, scales], ``bias`` [g, 1, o].

    Weights and reach are in units of each scale over the mean one: Adam's steps have one size for all, and channels of
    small scales would be thrown about by the steps that large ones need.
    """

    weight: torch.Tensor
    reach: torch.Tensor
    zero: torch.Tensor
    bias: torch.Tensor
    x_reach: torch.Tensor
    x_zero: torch.Tensor

    def copy(self) -> _State:
        return _State(*(t.detach().clone() for t in vars(self).values()))


def adaquant(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    form: Levels,
    mask: torch.Tensor | None = None,
    *,
    columns: torch.Tensor | None = None,
    x_bits: int | None = None,
    bias: torch.Tensor | None = None,
    relu: bool = False,
    iterations: int = 1000,
    batch: int = 50,
    rates: Rates | None = PAPER,
    seed: int = 0,
) -> Rounded:
    """Codes, scales and bias of a layer by AdaQuant (Hubara et al., ICML 2021, arXiv 2006.10518).

    Minimises |W X - Q(W + V) Q(X)|² over V, the scales (and zero points) of the weights, the range and zero point of
    the activation, and the bias, by straight-through gradients; V is continuous, so that a code may move by more than
    one. Four Adam optimizers, minibatches of ``batch`` rows of ``inputs``, squared error after relu where ``relu``.

    ``weight`` [outputs, K] or [groups, outputs, K]; ``inputs`` [(groups,) rows, K], float; ``scale`` and ``zero``
    [(groups,) outputs, scales], ``columns`` (long [K]) the scale of each column when there are several. ``x_bits``:
    bits of the activation, per tensor and asymmetric over its extremes; None leaves it float. ``rates`` None adapts the
    paper's rates to the magnitudes of the layer. Masked weights get the zero point. The result is the best state seen
    on all inputs, the nearest codes among them: its error is never above ``error_nearest``.
    """
    import torch

    task = _Task(weight, inputs, form, mask, columns, x_bits, bias, relu)
    state = task.start(scale, zero)
    used = rates if rates is not None else task.rates(state)
    learnt = [t for t in vars(state).values() if t.requires_grad]
    groups = [([state.x_reach, state.x_zero], used.activation), ([state.reach, state.zero], used.range)]
    groups += [([state.weight], used.weight), ([state.bias], used.bias)]
    chosen = [([t for t in ts if t.requires_grad], rate) for ts, rate in groups]
    optimizers = [torch.optim.Adam(ts, lr=rate) for ts, rate in chosen if ts]
    generator = torch.Generator().manual_seed(seed)
    first = least = task.error(state)
    best, rows, look = state.copy(), task.x.shape[1], max(1, iterations // _LOOKS)
    for i in range(1, iterations + 1):
        some = torch.randint(rows, (min(batch, rows),), generator=generator) if batch < rows else slice(None)
        with torch.enable_grad():
            loss = (task.output(state, task.x[:, some]) - task.y[:, some]).square().mean()
            grads = torch.autograd.grad(loss, learnt)
        for t, g in zip(learnt, grads, strict=True):
            t.grad = g
        for o in optimizers:
            o.step()
        if i % look == 0 or i == iterations:
            error = task.error(state)
            if error < least:
                best, least = state.copy(), error
    return task.result(best, least, first, weight.dim() == 2)


class _Task:
    """The layer in f32 with groups first, and its output for a state."""

    def __init__(
        self, weight: torch.Tensor, inputs: torch.Tensor, form: Levels, mask: torch.Tensor | None,
        columns: torch.Tensor | None, x_bits: int | None, bias: torch.Tensor | None, relu: bool,
    ) -> None:  # fmt: skip
        import torch

        if weight.dim() not in (2, 3) or inputs.dim() != weight.dim() or inputs.shape[-1] != weight.shape[-1]:
            raise InvalidInput(f"weights {list(weight.shape)} and inputs {list(inputs.shape)} do not fit")
        if not inputs.numel() or not bool(torch.isfinite(inputs).all() and torch.isfinite(weight).all()):
            raise InvalidInput("the inputs are empty, or inputs or weights have NaN or infinities")
        if form.step > 1 and mask is not None and not bool(mask.all()):
            raise InvalidInput("bipolar codes have no zero, and the mask needs one: use ternary")
        w, x = (t if t.dim() == 3 else t[None] for t in (weight.detach().float(), inputs.detach().float()))
        kept = torch.ones_like(w, dtype=torch.bool) if mask is None else mask.reshape(w.shape)
        self.w, self.x, self.kept, self.form, self.relu = w * kept, x, kept, form, relu
        self.columns, self.steps = columns, None if x_bits is None else (1 << x_bits) - 1
        self.b = torch.zeros(w.shape[0], 1, w.shape[1]) if bias is None else bias.float().reshape(w.shape[0], 1, -1)
        y = x @ self.w.transpose(1, 2) + self.b
        self.y = y.relu() if relu else y

    def start(self, scale: torch.Tensor, zero: torch.Tensor | None) -> _State:
        """The state of nearest rounding."""
        import torch

        s = scale.detach().float().reshape(*self.w.shape[:2], -1)
        z = torch.zeros_like(s) if zero is None else zero.detach().float().reshape(s.shape)
        lo, hi = float(self.x.min().clamp_max(0)), float(self.x.max().clamp_min(0))
        reach = torch.tensor(max(hi - lo, 1e-30))
        x_zero = torch.tensor(0.0 if self.steps is None else -lo / float(reach) * self.steps)
        mean = s.double().mean().clamp_min(1e-30).float()
        self.unit = (s / mean).clamp_min(1e-6)
        self.given = s
        weight = self.w / self.wide(self.unit)
        self.reach = s * self.form.top / self.unit
        state = _State(weight, self.reach.clone(), z, self.b.clone(), reach, x_zero)
        for name, t in vars(state).items():
            fixed = (name == "zero" and self.form.symmetric) or (name in ("x_reach", "x_zero") and self.steps is None)
            t.requires_grad_(not fixed)
        return state

    def rates(self, state: _State) -> Rates:
        """The paper's rates, relative to magnitudes that its layers have."""
        step = float((state.reach / max(1, self.form.top)).detach().mean())
        size = float(self.y.square().mean().sqrt())
        reach = float(state.x_reach.detach())
        return Rates(1e-2 * reach, 2e-3 * float(state.reach.detach().mean()), 3e-3 * step, 1e-3 * size)

    def scales(self, state: _State) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and whole zero point, [g, o, scales]."""
        scale = (state.reach * self.unit / self.form.top).clamp_min(1e-30)
        return scale, _through(state.zero, lambda z: z.round().clamp(self.form.lo, self.form.hi))

    def wide(self, t: torch.Tensor) -> torch.Tensor:
        return t if self.columns is None else t[..., self.columns]

    def codes(self, state: _State) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes with straight-through gradients, zero points, scales."""
        import torch

        scale, zero = (self.wide(t) for t in self.scales(state))
        at = state.weight * self.wide(self.unit) / scale + zero
        inside = at.clamp(self.form.lo, self.form.hi)
        q = inside + (self.form.round(at) - inside).detach()
        return torch.where(self.kept, q, zero.expand_as(q)), zero, scale

    def output(self, state: _State, x: torch.Tensor) -> torch.Tensor:
        """The quantized layer's output for rows of inputs."""
        q, zero, scale = self.codes(state)
        if self.steps is not None:
            xs = (state.x_reach / self.steps).clamp_min(1e-30)
            xz = _through(state.x_zero, lambda z: z.round().clamp(0, self.steps))
            x = (_through(x / xs, lambda v: v.round()) + xz).clamp(0, self.steps).sub(xz) * xs
        y = x @ ((q - zero) * scale).transpose(1, 2) + state.bias
        return y.relu() if self.relu else y

    def error(self, state: _State) -> float:
        """Squared output error on all inputs over the squared output."""
        import torch

        with torch.no_grad():
            difference = (self.output(state, self.x) - self.y).square().sum(dtype=torch.float64)
            return float(difference / self.y.square().sum(dtype=torch.float64).clamp_min(1e-300))

    def result(self, state: _State, error: float, nearest: float, flat: bool) -> Rounded:
        import torch

        with torch.no_grad():
            q, zero, scale = (t.double() for t in self.codes(state))
            if torch.equal(state.reach, self.reach):  # scales that were not learnt come back bit for bit
                scale = self.wide(self.given).double()
        learnt = None
        if self.steps is not None:
            x_zero = int(state.x_zero.round().clamp(0, self.steps))
            learnt = max(float(state.x_reach), 1e-30) / self.steps, x_zero
        change = (state.bias - self.b)[:, 0].double()
        scale, zero = scale.expand(q.shape), zero.expand(q.shape)
        if flat:
            q, scale, zero, change = q[0], scale[0], zero[0], change[0]
        return Rounded(q, scale, zero, error, nearest, learnt, change)


def _through(x: torch.Tensor, f: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``f(x)`` with the gradient of x."""
    return x + (f(x) - x).detach()


__all__ = ["PAPER", "Rates", "adaquant"]
