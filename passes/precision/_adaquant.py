"""AdaQuant: learns weights, their scales and the activation's range together, on the error of the layer's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from bitwright.ir.errors import InvalidInput
from bitwright.passes._memory import give_back
from bitwright.passes.precision._integer_codes import Levels
from bitwright.passes.precision._rounding_common import Rounded
from bitwright.passes.sparsity._inputs import all_finite

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
BLOCK = 1 << 18
"""Weights learnt at a time: what the gradients hold is some twenty times as much."""
_ROWS = 512
"""Rows whose error is taken at a time."""


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
    begin: torch.Tensor | None = None,
) -> Rounded:
    """Codes, scales and bias of a layer by AdaQuant (Hubara et al., ICML 2021, arXiv 2006.10518).

    Minimises |W X - Q(W + V) Q(X)|² over V, the scales (and zero points) of the weights, the range and zero point of
    the activation, and the bias, by straight-through gradients; V is continuous, so that a code may move by more than
    one. Four Adam optimizers, whose rates fall linearly to zero (the paper's stay), minibatches of ``batch`` rows of
    ``inputs``, squared error after relu where ``relu``.

    ``weight`` [outputs, K] or [groups, outputs, K]; ``inputs`` [(groups,) rows, K], float; ``scale`` and ``zero``
    [(groups,) outputs, scales], ``columns`` (long [K]) the scale of each column when there are several. ``x_bits``:
    bits of the activation, per tensor and asymmetric over its extremes; None leaves it float. ``rates`` None adapts the
    paper's rates to the magnitudes of the layer. ``begin``: weights in the shape of ``weight``, such as those of GPTQ's
    codes, that learning starts from where they give the smaller error. Masked weights get the zero point. The result
    is the best state seen on all inputs, the nearest codes among them: its error is never above ``error_nearest``.
    """
    import torch

    task = _Task(weight, inputs, form, mask, columns, x_bits, bias, relu)
    task.begin = None if begin is None else begin.detach().float().reshape(task.w.shape)
    state = task.start(scale, zero)
    used = rates if rates is not None else task.rates(state)
    parts = [
        part.result(*part.learn(start, used, iterations, batch, seed))
        for part, start in task.parts(state, x_bits is None)
    ]
    codes, scales, zeros, change = (torch.cat(ts, 1) for ts in zip(*(p.tensors for p in parts), strict=True))
    power = max(sum(p.power for p in parts), 1e-300)
    if weight.dim() == 2:
        codes, scales, zeros, change = codes[0], scales[0], zeros[0], change[0]
    error, nearest = sum(p.error for p in parts) / power, sum(p.nearest for p in parts) / power
    scales, zeros = scales.expand(codes.shape), zeros.expand(codes.shape)
    return Rounded(codes, scales, zeros, error, nearest, parts[0].input, change)


def weight_rate(inputs: int) -> float:
    """The weights' rate in steps of their codes. Where outputs sum few products one code moves them much, and larger
    rates swing about the nearest codes instead of leaving them: depthwise networks want a tenth of what wide layers do.
    """
    return 1e-3 * min(10.0, max(1.0, inputs / 64))


class _Part(NamedTuple):
    """Some of the outputs, done: codes, scales, zero points and change of the bias; squared errors and outputs."""

    tensors: tuple[torch.Tensor, ...]
    error: float
    nearest: float
    power: float
    input: tuple[float, int] | None


class _Task:
    """The layer in f32 with groups first, and its output for a state."""

    y: torch.Tensor
    """What the float layer gives, of the pieces that :meth:`parts` makes."""
    begin: torch.Tensor | None = None
    """Weights to start from where they are better."""

    def __init__(
        self, weight: torch.Tensor, inputs: torch.Tensor, form: Levels, mask: torch.Tensor | None,
        columns: torch.Tensor | None, x_bits: int | None, bias: torch.Tensor | None, relu: bool,
    ) -> None:  # fmt: skip
        import torch

        if weight.dim() not in (2, 3) or inputs.dim() != weight.dim() or inputs.shape[-1] != weight.shape[-1]:
            raise InvalidInput(f"weights {list(weight.shape)} and inputs {list(inputs.shape)} do not fit")
        if not inputs.numel() or not (all_finite(inputs) and all_finite(weight)):
            raise InvalidInput("the inputs are empty, or inputs or weights have NaN or infinities")
        if form.step > 1 and mask is not None and not bool(mask.all()):
            raise InvalidInput("bipolar codes have no zero, and the mask needs one: use ternary")
        w, x = (t if t.dim() == 3 else t[None] for t in (weight.detach().float(), inputs.detach().float()))
        kept = torch.ones((), dtype=torch.bool).expand(w.shape) if mask is None else mask.reshape(w.shape)
        self.w, self.x, self.kept, self.form, self.relu = w if mask is None else w * kept, x, kept, form, relu
        self.columns, self.steps = columns, None if x_bits is None else (1 << x_bits) - 1
        self.b = torch.zeros(w.shape[0], 1, w.shape[1]) if bias is None else bias.float().reshape(w.shape[0], 1, -1)

    def parts(self, state: _State, apart: bool) -> Iterator[tuple[_Task, _State]]:
        """The layer piece by piece where outputs can be learnt ``apart``, each with its share of the state."""
        groups, outputs, k = self.w.shape
        step = max(1, min(BLOCK // (groups * k), 4 * BLOCK // (groups * self.x.shape[1]))) if apart else outputs
        for i in range(0, outputs, step):
            some, part = slice(i, i + step), copy(self)
            part.w, part.kept, part.unit = self.w[:, some], self.kept[:, some], self.unit[:, some]
            part.given, part.reach, part.b = self.given[:, some], self.reach[:, some], self.b[..., some]
            part.y, part.begin = part.plain(self.x), None if self.begin is None else self.begin[:, some]
            weight = part.w / self.wide(part.unit)
            own = (weight, state.reach[:, some], state.zero[:, some], state.bias[..., some])
            start = _State(*(t.detach().clone() for t in (*own, state.x_reach, state.x_zero)))
            for t, whole in zip(vars(start).values(), vars(state).values(), strict=True):
                t.requires_grad_(whole.requires_grad)
            yield part, start
            give_back()

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The float layer's output for rows of inputs."""
        y = x @ self.w.transpose(1, 2) + self.b
        return y.relu_() if self.relu else y

    def learn(self, state: _State, used: Rates, iterations: int, batch: int, seed: int) -> tuple[_State, float, float]:
        """The best state seen, its error, and that of nearest codes."""
        import torch

        learnt = [t for t in vars(state).values() if t.requires_grad]
        groups = [([state.x_reach, state.x_zero], used.activation), ([state.reach, state.zero], used.range)]
        groups += [([state.weight], used.weight), ([state.bias], used.bias)]
        chosen = [([t for t in ts if t.requires_grad], rate) for ts, rate in groups]
        optimizers = [(torch.optim.Adam(ts, lr=rate), rate) for ts, rate in chosen if ts]
        generator = torch.Generator().manual_seed(seed)
        first = self.error(state)
        least = self.improve(state, first)
        best, rows, look = state.copy(), self.x.shape[1], max(1, iterations // _LOOKS)
        for i in range(1, iterations + 1):
            some = torch.randint(rows, (min(batch, rows),), generator=generator) if batch < rows else slice(None)
            with torch.enable_grad():
                loss = (self.output(state, self.x[:, some]) - self.y[:, some]).square().mean()
                grads = torch.autograd.grad(loss, learnt)
            for t, g in zip(learnt, grads, strict=True):
                t.grad = g
            left = 1 - (i - 1) / iterations
            for o, rate in optimizers:
                o.param_groups[0]["lr"] = rate * left
                o.step()
            if i % look == 0 or i == iterations:
                error = self.error(state)
                if error < least:
                    best, least = state.copy(), error
        return best, least, first

    def improve(self, state: _State, error: float) -> float:
        """Put the weights to begin with into the state if these are better than its own of this error: the least."""
        if self.begin is None:
            return error
        other = replace(state, weight=self.begin / self.wide(self.unit))
        found = self.error(other)
        if found < error:
            state.weight.data.copy_(other.weight)
        return min(found, error)

    def start(self, scale: torch.Tensor, zero: torch.Tensor | None) -> _State:
        """The state of nearest rounding, its weights not yet in units: :meth:`parts` does that piece by piece."""
        import torch

        s = scale.detach().float().reshape(*self.w.shape[:2], -1)
        z = torch.zeros_like(s) if zero is None else zero.detach().float().reshape(s.shape)
        lo, hi = float(self.x.min().clamp_max(0)), float(self.x.max().clamp_min(0))
        reach = torch.tensor(max(hi - lo, 1e-30))
        x_zero = torch.tensor(0.0 if self.steps is None else -lo / float(reach) * self.steps)
        mean = s.double().mean().clamp_min(1e-30).float()
        self.unit = (s / mean).clamp_min(1e-6)
        self.given = s
        self.reach = s * self.form.top / self.unit
        state = _State(self.w.detach(), self.reach.clone(), z, self.b.clone(), reach, x_zero)
        for name, t in vars(state).items():
            fixed = (name == "zero" and self.form.symmetric) or (name in ("x_reach", "x_zero") and self.steps is None)
            t.requires_grad_(not fixed)
        return state

    def rates(self, state: _State) -> Rates:
        """The paper's rates, relative to magnitudes that its layers have."""
        step = float((state.reach / max(1, self.form.top)).detach().mean())
        size = float(self.plain(self.x[:, :: max(1, self.x.shape[1] // _ROWS)]).square().mean().sqrt())
        reach = float(state.x_reach.detach())
        return Rates(
            1e-2 * reach, 2e-3 * float(state.reach.detach().mean()), weight_rate(self.w.shape[-1]) * step, 1e-3 * size
        )

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
        """Squared output error on all inputs."""
        import torch

        with torch.no_grad():
            return math.fsum(
                float((self.output(state, x) - y).square_().sum(dtype=torch.float64))
                for x, y in zip(torch.split(self.x, _ROWS, 1), torch.split(self.y, _ROWS, 1), strict=True)
            )

    def result(self, state: _State, error: float, nearest: float) -> _Part:
        """The state as codes and scales, f32."""
        import torch

        with torch.no_grad():
            q, zero, scale = self.codes(state)
            if torch.equal(state.reach, self.reach):  # scales that were not learnt come back bit for bit
                scale = self.wide(self.given)
        learnt = None
        if self.steps is not None:
            x_zero = int(state.x_zero.round().clamp(0, self.steps))
            learnt = max(float(state.x_reach), 1e-30) / self.steps, x_zero
        change = (state.bias - self.b)[:, 0].detach()
        tensors = (q, scale, zero, change)
        return _Part(tensors, error, nearest, float(self.y.square().sum(dtype=torch.float64)), learnt)


def _through(x: torch.Tensor, f: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``f(x)`` with the gradient of x."""
    return x + (f(x) - x).detach()


__all__ = ["PAPER", "Rates", "adaquant", "weight_rate"]
