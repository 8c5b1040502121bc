"""Fine-tuning under an accumulator's width, in a plain torch loop (A2Q+, Colbert et al., ICML 2024)."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bitwright.ir.errors import InvalidInput
from bitwright.passes.accumulators.a2q import A2QWeight

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ConstrainedTraining:
    """What :func:`constrained_training` returns: the penalty, the codes as they are, and the way back."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        self.model, self._modules, self._open = model, modules, True

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the constrained modules."""
        return tuple(self._modules)

    def _weights(self) -> dict[str, tuple[A2QWeight, Tensor]]:
        if not self._open:
            raise InvalidInput("this training is finished: its weights are plain again")
        found = {}
        for name, m in self._modules.items():
            held = m.parametrizations.weight  # type: ignore[union-attr]
            found[name] = held[0], held.original  # type: ignore[index, union-attr]
        return found  # type: ignore[return-value]

    def codes(self) -> dict[str, Tensor]:
        """The integer weights of each layer now, int16 in the shape of the weight."""
        with torch.no_grad():
            return {n: a2q.codes(v).round().to(torch.int16) for n, (a2q, v) in self._weights().items()}

    def penalty(self) -> Tensor:
        """Add this, times a small factor such as 1e-3, to the loss: it brings norms above their cap back."""
        parts = [a2q.penalty() for a2q, _ in self._weights().values()]
        return torch.stack(parts).sum()

    def finish(self) -> nn.Module:
        """Write what the layers compute with into their plain weights, and remove everything else; the model.

        Compile it with ``recipe="int8, constrain-weights{bits=...}"``: the codes are found again and stay.
        """
        if self._open:
            self._open = False
            for module in self._modules.values():
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        return self.model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()


def constrained_training(
    model: nn.Module, *, bits: int, weight_bits: int = 8, input_bits: int = 8, only: str = "*", except_: str = "",
    keep_zeros: bool = False,
) -> ConstrainedTraining:  # fmt: skip
    """Train ``model`` in your own loop with weights whose integer sums always fit ``bits`` bits.

    Linear layers and convolutions whose name ``only`` selects and ``except_`` does not (globs) get weights
    ``scale * codes``, codes of ``weight_bits`` bits, for inputs of ``input_bits`` bits. ``keep_zeros``: weights that
    are zero now, as a mask leaves them, stay zero. Make the optimizer after this call: scales and norms are parameters
    of the model, too. Raises :class:`InvalidInput` for widths that fit nothing, and when no layer is selected.

        training = bitwright.constrained_training(model, bits=16)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for x, y in data:
            optimizer.zero_grad()
            (loss(model(x), y) + 1e-3 * training.penalty()).backward()
            optimizer.step()
        training.finish()
    """
    chosen: dict[str, nn.Module] = {}
    for name, m in model.named_modules():
        names = [p for p in only.split("|") if fnmatchcase(name, p)]
        if isinstance(m, KINDS) and names and not any(fnmatchcase(name, p) for p in except_.split("|") if p):
            if parametrize.is_parametrized(m, "weight"):
                raise InvalidInput(f"the weight of {name!r} has a parametrization already: finish that training first")
            chosen[name] = m
    if not chosen:
        raise InvalidInput(f"only={only!r} except_={except_!r} selects no linear layer or convolution")
    made = {}
    for name, m in chosen.items():
        weight = m.weight
        assert isinstance(weight, Tensor)
        made[name] = A2QWeight(weight, bits, weight_bits, input_bits, weight != 0 if keep_zeros else None)
    for name, m in chosen.items():
        with torch.no_grad():
            m.weight.copy_(made[name].projected(m.weight))  # type: ignore[operator, arg-type]
        parametrize.register_parametrization(m, "weight", made[name])
    return ConstrainedTraining(model, chosen)


__all__ = ["ConstrainedTraining", "constrained_training"]
