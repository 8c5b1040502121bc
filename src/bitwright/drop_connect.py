"""Training that learns around stuck cells: each step some weights read as a crossbar's faults (arXiv:2404.15498)."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bitwright.codegen.devices.cells import around
from bitwright.ir.errors import InvalidInput


class _Stuck(nn.Module):
    """A weight whose pairs of conductances are partly stuck, others at each use in training."""

    def __init__(self, rate: float, high: float, known: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.rate, self.high, self.known, self.generator = rate, high, known, generator

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight
        top = weight.detach().abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.dim() - 1))
        draws, kinds = [], []
        for _ in range(2):
            draw, kind = (torch.rand(weight.shape, generator=self.generator).to(weight.device) for _ in range(2))
            draws.append(draw < self.rate)
            kinds.append(torch.where(kind < self.high, top, torch.zeros_like(top)))
        faulty, held = torch.stack(draws), torch.stack(kinds)
        pair = torch.stack([torch.relu(weight), torch.relu(-weight)])
        read = torch.where(faulty, held, around(weight, pair, faulty, held, top) if self.known else pair)
        return read[0] - read[1]


class FaultTraining:
    """What :func:`fault_training` returns: the layers, and the way back to a plain model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.refused: dict[str, str] = {}
        """Chosen layers that train without faults, with the reason."""
        self._modules: dict[str, nn.Module] = {}

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose weights are partly stuck."""
        return tuple(self._modules)

    def finish(self) -> nn.Module:
        """Give the layers their plain weights back, as trained; the model. Calling it again changes nothing."""
        for module in self._modules.values():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
                rest = dict(module._parameters)
                module._parameters.clear()
                module._parameters.update({"weight": rest.pop("weight"), **rest})  # the order the state had
        return self.model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()


def fault_training(
    model: nn.Module, rate: float = 0.1, *, high: float = 0.5, known: bool = False, only: str = "*", except_: str = "",
    seed: int = 0,
) -> FaultTraining:  # fmt: skip
    """Train ``model`` in your own loop with weights of which other cells are stuck at each use (drop-connect).

    A weight is a pair of conductances w = G+ - G-. Each of the two is stuck with probability ``rate``: at the largest
    magnitude of its output with probability ``high``, else at 0; what is stuck gets no gradient. Faults are drawn anew
    at every forward pass in training mode, never in ``eval()``. ``known``: for chips that are tested, and programmed
    such that the other cell of a pair makes up for a stuck one as far as it can. ``only`` and ``except_`` are globs on
    names of Linear and Conv modules. ``finish()`` of the result (or leaving it as a context manager) gives the plain
    model back.

    Layers that do not fit are listed in ``refused``. Raises :class:`InvalidInput` for options out of range, and when no
    layer is left.

    >>> fc = nn.Linear(8, 4)
    >>> with fault_training(fc, rate=0.5) as training:
    ...     faulty = bool((fc.weight != fc.parametrizations.weight.original).any())
    >>> training.layers, faulty, sorted(fc.state_dict())
    (('',), True, ['bias', 'weight'])
    """
    for name, value in (("rate", rate), ("high", high)):
        if not 0 <= value <= 1:
            raise InvalidInput(f"{name} is a share from 0 to 1, not {value!r}")
    training = FaultTraining(model)
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or not _named(name, only):
            continue
        if except_ and _named(name, except_):
            continue
        if parametrize.is_parametrized(module, "weight"):
            training.refused[name] = "weight is parametrized already: remove that first"
        elif id(module.weight) in seen:
            training.refused[name] = "weight is shared with a layer before it: give it a copy"
        else:
            seen.add(id(module.weight))
            training._modules[name] = module
    if not training.layers:
        why = "; ".join(f"{n or 'the model'}: {r}" for n, r in training.refused.items())
        raise InvalidInput(why or f"only={only} except_={except_} names no Linear or convolution of the model")
    for module in training._modules.values():
        parametrize.register_parametrization(module, "weight", _Stuck(rate, high, known, generator))
        module.parametrizations.train(module.training)  # type: ignore[union-attr]
    return training


def _named(name: str, globs: str) -> bool:
    return any(fnmatchcase(name, g) for g in globs.split("|"))
