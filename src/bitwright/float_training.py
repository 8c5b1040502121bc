"""Fine-tuning under small-float accumulators in a plain torch loop (Blumenfeld et al., ICLR 2024; arXiv 2401.14110)."""

from __future__ import annotations

import types
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, Self, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.ir.errors import InvalidInput
from bitwright.ir.semantics_small_float import Sums, conv, linear
from bitwright.ir.small_float import format_of
from bitwright.passes.accumulators._small_float_gradient import Estimator, SmallFloatDots
from bitwright.passes.accumulators.small_float_sums import formats

Stage = Literal["no-underflow", "full"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class SmallFloatTraining:
    """What :func:`small_float_training` returns: the stages, and the way back to a plain model."""

    def __init__(self, model: nn.Module, sums: dict[Stage, Sums], stages: tuple[Stage, ...], how: Estimator) -> None:
        self.model, self.stages, self.estimator = model, stages, how
        self.refused: dict[str, str] = {}
        """Chosen layers whose sums stay as they are, with the reason."""
        self._sums, self._at, self._open = sums, 0, True
        self._modules: dict[str, nn.Module] = {}

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that sum in small floats."""
        return tuple(self._modules)

    @property
    def stage(self) -> Stage:
        """The stage that is under way."""
        return self.stages[self._at]

    @property
    def sums(self) -> Sums:
        """How the layers sum now."""
        return self._sums[self.stage]

    def advance(self) -> Stage:
        """Go on to the next stage; raises :class:`InvalidInput` when the last one is under way."""
        self._check_open()
        if self._at + 1 == len(self.stages):
            raise InvalidInput(f"{self.stage!r} is the last of the stages {', '.join(self.stages)}")
        self._at += 1
        return self.stage

    def finish(self) -> nn.Module:
        """Give the layers their plain forward back; the model. Calling it again changes nothing.

        Compile it with ``recipe="small-float-sums{acc=... product=...}"``: those are the sums of stage ``full``.
        """
        if self._open:
            self._open = False
            for module in self._modules.values():
                vars(module).pop("forward", None)
        return self.model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def _check_open(self) -> None:
        if not self._open:
            raise InvalidInput("this training is finished: its layers are plain again")

    def _add(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module
        forward = _linear if isinstance(module, nn.Linear) else _conv
        vars(module)["forward"] = types.MethodType(lambda m, x: forward(m, x, self._dots), module)

    def _dots(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = SmallFloatDots.apply(a, b, self.sums, self.estimator)  # type: ignore[no-untyped-call]
        return y


def small_float_training(
    model: nn.Module, *, acc: str = "", product: str = "", chunk: int = 16,
    rounding: Literal["floor", "nearest"] = "floor", stages: Sequence[Stage] = ("no-underflow", "full"),
    estimator: Estimator = "identity", only: str = "*", except_: str = "",
) -> SmallFloatTraining:  # fmt: skip
    """Train ``model`` in your own loop with layers whose products and sums are small floats.

    ``acc``, ``product``, ``chunk`` and ``rounding`` are those of the pass ``small-float-sums`` (either format may be
    left out, both: M7E4 with biases 10 and 12); forward passes of stage ``full`` have the bits of the compiled program.
    Underflow is hard to escape by gradient descent: in stage ``no-underflow`` small values are kept, and a few steps of
    ``full`` follow after ``advance()``. ``estimator``: ``identity`` takes the gradient of exact sums, ``immediate`` and
    ``recursive`` that of the terms that were not lost (see ``passes/accumulators/_small_float_gradient.py``); these
    take several times as long, and pay below 12 bits. ``only`` and ``except_`` are globs on module names.

    Layers that do not fit are listed in ``refused``. Raises :class:`InvalidInput` for formats that there are none of,
    for options out of range, and when no layer is left.

        training = bitwright.small_float_training(model, acc="f4m7b10")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        for epoch in range(6):
            if epoch == 5:
                training.advance()
            for x, y in data:
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
        training.finish()
    """
    if estimator not in get_args(Estimator):
        raise InvalidInput(f"estimator is one of {', '.join(get_args(Estimator))}, not {estimator!r}")
    known = get_args(Stage)
    if isinstance(stages, str) or not stages or any(s not in known for s in stages):
        raise InvalidInput(f"stages is a sequence of {' and '.join(known)}, not {stages!r}")
    of_product, of_sum = (format_of(f) for f in formats(acc, product, chunk))
    sums = {s: Sums(of_product, of_sum, chunk, rounding, s == "full") for s in stages}
    training = SmallFloatTraining(model, sums, tuple(stages), estimator)
    for name, module in model.named_modules():
        kind = isinstance(module, (nn.Linear, *CONVOLUTIONS))
        if not kind or not _named(name, only) or (except_ and _named(name, except_)):
            continue
        if why := _why_not(module):
            training.refused[name] = why
        else:
            training._add(name, module)
    if not training.layers:
        why = "; ".join(f"{n or 'the model'}: {r}" for n, r in training.refused.items())
        raise InvalidInput(why or f"only={only} except_={except_} names no Linear or convolution of the model")
    return training


def _named(name: str, globs: str) -> bool:
    return any(fnmatchcase(name, g) for g in globs.split("|"))


def _why_not(module: nn.Module) -> str:
    if "forward" in vars(module):
        return "its forward is replaced already: finish that training first"
    if type(module) not in (nn.Linear, *CONVOLUTIONS):
        return f"{type(module).__name__} may compute something else than its base class"
    if getattr(module, "groups", 1) != 1:
        return "a convolution of several groups"
    return ""


def _linear(module: Any, x: Tensor, dots: Any) -> Tensor:
    return linear(x, module.weight, module.bias, dots)


def _conv(module: Any, x: Tensor, dots: Any) -> Tensor:
    n = len(module.kernel_size)
    padding = module._reversed_padding_repeated_twice  # last axis first, begin and end of each
    begin, end = tuple(padding[-2::-2]), tuple(padding[::-2])
    if module.padding_mode != "zeros":
        x, begin, end = F.pad(x, padding, mode=module.padding_mode), (0,) * n, (0,) * n
    alone = x.dim() == n + 1
    x = x[None] if alone else x
    y = conv(x, module.weight, module.bias, (module.stride, begin + end, module.dilation), dots)
    return y[0] if alone else y


__all__ = ["SmallFloatTraining", "small_float_training"]
