"""Calibration data made from the model alone: inputs whose batch statistics are those the batch norms remember.

Haroush et al., "The Knowledge Within" (CVPR 2020). A folded norm's result has mean beta and deviation |gamma| on the
training data, so the loss is computed on the folded graph as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy, to_torch
from bitwright.ir.weights import Array
from bitwright.passes._norms import Norm

if TYPE_CHECKING:
    import torch

Scheme = Literal["bns", "gaussian", "logit"]
RATE, SMOOTHNESS = 0.1, 1e-2
"""Step of Adam in units of the inputs' deviation; weight of the squared difference of neighbouring pixels."""
CURE = "give real inputs as calibration data, or use a recipe that needs none (weight-only formats)"


def divergence(
    mean: torch.Tensor, variance: torch.Tensor, want_mean: torch.Tensor, want_variance: torch.Tensor
) -> torch.Tensor:
    """KL(N(want) || N(got)) by channel: log(s/s^) - (1 - (s^^2 + (m^ - m)^2) / s^2) / 2, hats for what is wanted.

    Zero where mean and variance agree, and only there.
    """
    apart = (want_variance + (want_mean - mean).square()) / variance
    return 0.5 * ((variance / want_variance).log() - 1 + apart)


def statistics_loss(
    graph: Graph, inputs: Mapping[str, torch.Tensor], norms: Mapping[str, Norm], grad: bool = True
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """(mean divergence over all channels of all norms, outputs) of one batch; differentiable in the inputs.

    Population variances: a batch of images has hundreds of values per channel. Channels whose norm is switched off
    (gamma 0) tell nothing and are left out.
    """
    import torch

    parts: list[torch.Tensor] = []

    def observe(name: str, value: torch.Tensor) -> None:
        if name not in norms:
            return
        norm, flat = norms[name], value.movedim(1, 0).flatten(1).double()
        alive = torch.from_numpy(norm.std > 1e-6 * max(float(norm.std.max()), 1e-30))
        if not bool(alive.any()):
            return
        want_mean, want_variance = torch.from_numpy(norm.beta), torch.from_numpy(norm.std**2)
        variance = flat.var(1, correction=0) + 1e-12 * want_variance
        parts.append(divergence(flat.mean(1), variance, want_mean, want_variance)[alive].mean())

    outputs = evaluate(graph, inputs, observe=observe, grad=grad)
    if not parts:
        raise InvalidInput(f"the model has no batch norm that tells the statistics of its inputs: {CURE}")
    return torch.stack(parts).mean(), outputs


def calibration_score(graph: Graph, norms: Mapping[str, Norm], data: Mapping[str, Array]) -> float:
    """How far a batch is from the data the model was trained on: 0 when every norm sees the statistics it remembers.

    ``data``: arrays by input name, shapes and dtypes of the graph's inputs. Raises :class:`InvalidInput` for a model
    without batch norm.
    """
    loss, _ = statistics_loss(graph, {k: to_torch(v) for k, v in data.items()}, norms, grad=False)
    return float(loss)


def start(graph: Graph, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Standard normal inputs, ``count`` rows where the batch is symbolic; the same for the same seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    out = {}
    for v in graph.inputs:
        if not v.type.dtype.is_float:
            raise InvalidInput(f"input {v.name!r} is {v.type.dtype}: only float inputs can be synthesized; {CURE}")
        if any(isinstance(d, str) for d in v.type.shape[1:]):
            raise InvalidInput(f"input {v.name!r} has type {v.type}: fix its symbolic sizes first (--size NAME=N)")
        shape = [count if isinstance(d, str) else d for d in v.type.shape]
        out[v.name] = torch.randn(shape, generator=generator).to(to_torch(np.zeros(1, v.type.dtype.numpy)).dtype)
    return out


def synthesize(
    graph: Graph,
    norms: Mapping[str, Norm],
    count: int = 64,
    scheme: Scheme = "bns",
    steps: int = 200,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> tuple[dict[str, Array], float, float]:
    """(inputs by name, loss at the start, loss at the end); the loss is that of the scheme.

    ``gaussian``: standard normal noise as it is (loss: the norms' divergence, NaN for a model without norms).
    ``bns``: noise moved by Adam until the norms see what they remember. ``logit``: the scores of evenly drawn
    classes are raised, with a prior for smooth images. ``norms``: results by name, as ``facts["norms"]`` holds them.
    Deterministic. Raises :class:`InvalidInput` for ``bns`` without norms and for inputs that are not float.
    """
    import torch

    if count < 1 or steps < 0:
        raise InvalidInput(f"synthesize: count is at least 1 and steps at least 0, not {count} and {steps}")
    inputs = start(graph, count, seed)
    known = {k: n for k, n in norms.items() if k in graph.types}
    if scheme == "gaussian":
        score = float(statistics_loss(graph, inputs, known, False)[0]) if known else float("nan")
        return {k: to_numpy(v) for k, v in inputs.items()}, score, score
    if scheme == "bns" and not known:
        raise InvalidInput(
            f"synthesize-calibration: the model has no batch norm whose statistics data could match: {CURE}"
        )
    classes = torch.arange(count)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    optimizer = torch.optim.Adam(list(leaves.values()), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1), eta_min=RATE / 50)
    first, best, kept = float("nan"), float("inf"), {k: v.detach().clone() for k, v in leaves.items()}
    for step in range(steps + 1):
        with torch.enable_grad():
            if scheme == "bns":
                loss, _ = statistics_loss(graph, leaves, known)
            else:
                loss = class_loss(evaluate(graph, leaves, grad=True)[0], classes, leaves)
        value = float(loss.detach())
        first = value if step == 0 else first
        if value < best:
            best, kept = value, {k: v.detach().clone() for k, v in leaves.items()}
        if step == steps:
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step / steps)
    return {k: to_numpy(v) for k, v in kept.items()}, first, best


def class_loss(scores: torch.Tensor, classes: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the wanted classes plus the smoothness prior; raises :class:`InvalidInput` for other outputs."""
    import torch

    if scores.ndim != 2 or len(scores) != len(classes):
        raise InvalidInput(f"scheme=logit needs class scores [rows, classes], not an output of {list(scores.shape)}")
    loss = torch.nn.functional.cross_entropy(scores.double(), classes % scores.shape[1])
    for x in inputs.values():
        for axis in range(2, x.ndim):
            loss = loss + SMOOTHNESS * x.double().diff(dim=axis).square().mean()
    return loss


__all__ = ["CURE", "calibration_score", "class_loss", "divergence", "statistics_loss", "synthesize"]
