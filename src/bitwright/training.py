"""Training under N:M masks in a plain torch loop: SR-STE and T-SR-STE, S-STE, unbiased sparse gradients.

Sources: SR-STE (arXiv 2102.04010), transposable masks (arXiv 2102.08124), MVUE gradients (arXiv 2203.10991), masked
decay and refresh of T-SR-STE (arXiv 2404.01847), S-STE (arXiv 2409.09099).
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import NM
from bitwright.passes.sparsity._training import Draws, Phase, SparseWeight, Unbiased, unbiased_forward
from bitwright.passes.sparsity.masks import Pattern

Method = Literal["sr-ste", "s-ste"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Refresh:
    """Masks chosen anew after ``step`` steps; ``layers``: the share of each layer's mask bits that changed."""

    step: int
    flip_rate: float
    layers: Mapping[str, float]


@dataclass
class _Layer:
    """One weight under a mask, and the modules that use it (several when it is shared)."""

    name: str
    parameter: nn.Parameter
    modules: list[nn.Module]
    sparse: SparseWeight
    due: bool = True
    """The masked decay of the coming step is still to be added."""
    handle: Any = None


class SparseTraining:
    """What :func:`sparse_training` returns: schedule, statistics and the way back to a plain model."""

    def __init__(self, model: nn.Module, nm: NM, refresh_every: int, decay: float, method: Method) -> None:
        self.model, self.pattern, self.refresh_every, self.decay, self.method = model, nm, refresh_every, decay, method
        self.refused: dict[str, str] = {}
        """Chosen layers that stay dense, with the reason."""
        self.steps = 0
        """Optimizer steps so far."""
        self.history: list[Refresh] = []
        self.phase: Phase = "sparse"
        self._layers: list[_Layer] = []
        self._optimizer: Any = None
        self._open = True

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the masked layers; a shared weight counts once, under its first name."""
        return tuple(layer.name for layer in self._layers)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The mask of each layer now, bool in the shape of its weight."""
        return {layer.name: layer.sparse.mask.clone() for layer in self._layers}

    @property
    def flip_rate(self) -> float:
        """Share of all mask bits that the last refresh changed; 0 before the first."""
        return self.history[-1].flip_rate if self.history else 0.0

    def attach(self, optimizer: torch.optim.Optimizer) -> Self:
        """Count the steps of this optimizer from now on, so that :meth:`step` need not be called.

        Raises :class:`InvalidInput` when it trains none of the masked weights, or another one is attached already.
        """
        self._check_open()
        if self._optimizer is not None:
            raise InvalidInput("an optimizer is attached already: its steps are the ones that count")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(layer.parameter) in held for layer in self._layers):
            raise InvalidInput("the optimizer trains none of the masked weights: attach the one that does")
        self._optimizer = optimizer.register_step_post_hook(lambda *_: self._count())
        return self

    def step(self) -> None:
        """Count one optimizer step, after ``optimizer.step()``; every ``refresh_every``-th chooses the masks anew."""
        if self._optimizer is not None:
            raise InvalidInput("the attached optimizer counts its steps itself: do not call step() as well")
        self._count()

    def _count(self) -> None:
        self._check_open()
        self.steps += 1
        for layer in self._layers:
            layer.due = True
        if self.phase == "sparse" and self.steps % self.refresh_every == 0:
            self.refresh()

    def refresh(self) -> Refresh:
        """Choose all masks anew from the dense weights, now; of S-STE it only counts what changed."""
        self._check_open()
        rates, flipped, total = {}, 0.0, 0
        for layer in self._layers:
            rates[layer.name] = layer.sparse.refresh(layer.parameter)
            flipped += rates[layer.name] * layer.parameter.numel()
            total += layer.parameter.numel()
        self.history.append(Refresh(self.steps, flipped / total, rates))
        return self.history[-1]

    def freeze(self) -> None:
        """Keep the masks as they are from now on; what is masked gets neither gradient nor masked decay."""
        self._check_open()
        for layer in self._layers:
            layer.sparse.freeze(layer.parameter)
        self.phase = "frozen"

    def dense_finetune(self) -> None:
        """Compute with the dense weights from now on, the last phase of T-SR-STE; :meth:`enable` goes back."""
        self._set("dense")

    disable = dense_finetune

    def enable(self) -> None:
        """Train under masks again, chosen anew from the weights."""
        self._set("sparse")
        self.refresh()

    def _set(self, phase: Phase) -> None:
        self._check_open()
        self.phase = phase
        for layer in self._layers:
            layer.sparse.phase = phase

    def finish(self) -> nn.Module:
        """Write what the layers compute with into their plain weights, and remove everything else; the model.

        Parameters stay the same objects and the state has its old keys. Calling it again changes nothing.
        """
        return self._close(write=True)

    def _close(self, write: bool) -> nn.Module:
        if not self._open:
            return self.model
        self._open = False
        if self._optimizer is not None:
            self._optimizer.remove()
        for layer in self._layers:
            layer.handle.remove()
            if write:
                with torch.no_grad():
                    layer.parameter.copy_(layer.sparse(layer.parameter))
            for module in layer.modules:
                vars(module).pop("forward", None)
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
                rest = dict(module._parameters)
                module._parameters.clear()
                module._parameters.update({"weight": rest.pop("weight"), **rest})  # the order the state had
        return self.model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish; after an error the plain model gets its dense weights back, from which masks can be made again."""
        self._close(write=kind is None)

    def state_dict(self) -> dict[str, Any]:
        """Steps, phase, statistics and random counts; masks and scales are in the model's own state."""
        return {
            "pattern": str(self.pattern),
            "layers": list(self.layers),
            "steps": self.steps,
            "phase": self.phase,
            "history": [asdict(entry) for entry in self.history],
            "draws": {layer.name: d.count for layer in self._layers if (d := layer.sparse.draws)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, next to ``model.load_state_dict`` and the optimizer's; both runs then agree bit
        by bit. Raises :class:`InvalidInput` when pattern or layers are others."""
        self._check_open()
        for key, mine in (("pattern", str(self.pattern)), ("layers", list(self.layers))):
            if state.get(key) != mine:
                raise InvalidInput(f"the saved state has {key} {state.get(key)}, this training {mine}")
        self._set(state["phase"])
        self.steps = state["steps"]
        self.history = [Refresh(**entry) for entry in state["history"]]
        for layer in self._layers:
            layer.due = True
            if layer.sparse.draws:
                layer.sparse.draws.count = state["draws"].get(layer.name, 0)

    def _check_open(self) -> None:
        if not self._open:
            raise InvalidInput("this sparse training is finished: start another one on the model")

    def _add(self, name: str, modules: list[nn.Module], draws: Draws | None) -> None:
        parameter: Any = modules[0].weight
        sparse = SparseWeight(parameter, self.pattern, self.method == "s-ste", name or type(modules[0]).__name__)
        sparse.draws = draws
        layer = _Layer(name, parameter, modules, sparse)
        for module in modules:
            plain = type(module).forward is nn.Linear.forward
            parametrize.register_parametrization(module, "weight", sparse)
            if draws and plain:
                vars(module)["forward"] = types.MethodType(unbiased_forward, module)
        layer.handle = parameter.register_hook(lambda grad: self._decayed(layer, grad))
        self._layers.append(layer)

    def _decayed(self, layer: _Layer, grad: Tensor) -> Tensor:
        """The gradient with decay * (1 - mask) * w, once for each step however many passes accumulate into it."""
        if self.method == "s-ste" or self.phase != "sparse" or not self.decay:
            return grad
        if layer.parameter.grad is not None and not layer.due:
            return grad
        layer.due = False
        return grad + self.decay * torch.where(layer.sparse.mask, 0.0, layer.parameter.detach())


def sparse_training(
    model: nn.Module,
    pattern: str | Pattern = "2:4",
    *,
    transposable: bool = False,
    shared: int = 1,
    block: int = 1,
    refresh_every: int = 40,
    decay: float = 2e-4,
    mvue: Unbiased | None = None,
    method: Method = "sr-ste",
    only: str = "*",
    except_: str = "",
    seed: int = 0,
) -> SparseTraining:
    """Train a model under N:M masks in your own loop; its Linear and Conv layers named by ``only`` get masks.

    Layers compute with mask * w, and the gradient goes straight through to the dense w, which your optimizer trains.
    Masks are those of the ``nm-mask`` pass (``transposable``: of ``transposable-mask``), on outputs by inputs at each
    tap of a convolution, and are chosen anew every ``refresh_every`` optimizer steps: call ``step()`` of the result
    after ``optimizer.step()``, or ``attach(optimizer)`` once. ``decay`` * (1 - mask) * w is added to the gradient
    once a step, in the backward pass (so gradient clipping sees it; a loss scaler scales the rest but not it).

    ``method="s-ste"``: layers compute with the soft-thresholded weight, continuous in w, times a scale that is fixed
    here; there is no masked decay, and ``refresh_every`` only sets how often flips are counted. ``mvue``: Linear
    layers make their weight gradient from an unbiased sparse output gradient, with ``pattern`` along batch and time.
    ``only`` and ``except_`` are globs on module names, alternatives separated by ``|``. ``finish()`` of the result
    (or leaving it as a context manager) gives the plain model back, with weights that obey the pattern.

    Layers that do not fit are listed in ``refused`` with the reason. Raises :class:`InvalidInput` when no layer is
    left, and for options out of range.

    >>> fc = nn.Linear(8, 4)
    >>> with sparse_training(fc, "2:4") as training:
    ...     optimizer = torch.optim.SGD(fc.parameters(), lr=0.1)
    ...     fc(torch.ones(1, 8)).sum().backward()
    ...     optimizer.step()
    ...     training.step()
    >>> int((fc.weight.reshape(4, 2, 4) != 0).sum(-1).max())
    2
    """
    p = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    nm = replace(p.along(1, shared, block), transposable=transposable)
    _check(nm, refresh_every, decay, mvue, method)
    training = SparseTraining(model, nm, refresh_every, float(decay), method)
    wanted = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)) and _named(name, only)
        if not (except_ and _named(name, except_))
    }
    chosen: dict[int, list[str]] = {}
    for name, module in wanted.items():
        why = _why_not(model, module, wanted.values(), nm)
        if why:
            training.refused[name] = why
        else:
            chosen.setdefault(id(module.weight), []).append(name)
    if not chosen:
        why = "; ".join(f"{n or type(wanted[n]).__name__}: {r}" for n, r in training.refused.items())
        raise InvalidInput(why or f"only={only} except_={except_} names no Linear or convolution of the model")
    unbiased = [n for n in chosen.values() if type(wanted[n[0]]).forward is nn.Linear.forward]
    if mvue and not unbiased:
        raise InvalidInput("mvue is for Linear layers, and none of them has a mask: leave it out")
    for i, names in enumerate(chosen.values()):
        draws = Draws(nm, mvue, seed, i) if mvue and names in unbiased else None
        training._add(names[0], [wanted[n] for n in names], draws)
    return training


def _named(name: str, globs: str) -> bool:
    return any(fnmatchcase(name, g) for g in globs.split("|"))


def _check(nm: NM, refresh_every: int, decay: float, mvue: str | None, method: str) -> None:
    if isinstance(refresh_every, bool) or not isinstance(refresh_every, int) or refresh_every < 1:
        raise InvalidInput(f"refresh_every is a whole number of steps, at least 1, not {refresh_every!r}")
    if not (math.isfinite(decay) and decay >= 0):
        raise InvalidInput(f"decay is a number of at least 0, not {decay!r}")
    if method not in ("sr-ste", "s-ste"):
        raise InvalidInput(f"method is sr-ste or s-ste, not {method!r}")
    if mvue not in (None, "optimal", "two-draw"):
        raise InvalidInput(f"mvue is None, optimal or two-draw, not {mvue!r}")
    if mvue == "two-draw" and nm.keep != 2:
        raise InvalidInput(f"two-draw keeps 2 of a group, not {nm.keep}")
    if nm.shared < 1 or nm.block < 1:
        raise InvalidInput(f"shared and block are at least 1, not {nm.shared} and {nm.block}")
    plain = nm.shared == nm.block == 1
    if nm.transposable and not plain:
        raise InvalidInput("a transposable mask has neither shared nor block")
    if method == "s-ste" and (nm.transposable or not plain):
        raise InvalidInput("s-ste thresholds each group on its own: transposable, shared and block need sr-ste")


def _why_not(model: nn.Module, module: nn.Module, wanted: Any, nm: NM) -> str:
    """Why a layer stays dense, or the empty string."""
    if isinstance(module, TRANSPOSED):
        return "transposed convolution: no sparse kernel"
    if parametrize.is_parametrized(module, "weight"):
        return "weight is parametrized already: remove that first"
    weight: Any = module.weight
    if not isinstance(weight, nn.Parameter) or isinstance(weight, nn.parameter.UninitializedParameter):
        return "weight is not a parameter with values yet: run the model once, remove weight_norm"
    if not weight.requires_grad:
        return "weight is not trained (requires_grad is False)"
    if not weight.is_floating_point():
        return f"weight is {weight.dtype}"
    others = [n for n, m in model.named_modules() for p in m._parameters.values() if p is weight and not _in(m, wanted)]
    if others:
        return f"weight is shared with {others[0]}, which is not chosen"
    return _misfit(module, weight, nm)


def _in(module: nn.Module, wanted: Any) -> bool:
    return any(module is m for m in wanted)


def _misfit(module: nn.Module, weight: Tensor, nm: NM) -> str:
    convolution = isinstance(module, CONVOLUTIONS)
    if convolution and module.groups != 1:
        return "depthwise convolution has no reduction over channels" if weight.shape[1] == 1 else "grouped convolution"
    outputs, inputs = weight.shape[:2]
    if inputs % (nm.group * nm.block):
        what = "input channels" if convolution else "inputs"
        return f"{inputs} {what} are not a multiple of {nm.group * nm.block}"
    return f"{outputs} outputs are not a multiple of shared={nm.shared}" if outputs % nm.shared else ""
