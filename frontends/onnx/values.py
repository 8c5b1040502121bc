"""What an ONNX name stands for while importing: a tensor (computed, constant or sizes), a sequence, nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bitwright.frontends.onnx.symbolic import Entry, Poly
from bitwright.ir.errors import Problem, Unsupported
from bitwright.ir.types import TensorType
from bitwright.ir.weights import Array, Handle


@dataclass(eq=False, slots=True)
class Packed:
    """The operands of the Dequantize that made a value: integers, scale, zero."""

    q: Val
    scale: Val
    zero: Val | None
    axis: int | None
    group: int


@dataclass(eq=False, slots=True)
class Val:
    """A tensor. ``handle``: its value is known. ``entries``: known up to symbolic sizes. ``ir``: emitted name."""

    type: TensorType
    handle: Handle | None = None
    entries: Array | None = None
    ir: str | None = None
    label: str = ""
    packed: Packed | None = None
    sources: frozenset[str] = frozenset()
    """Graph inputs it is computed from."""

    @property
    def array(self) -> Array | None:
        return None if self.handle is None else self.handle.array

    @property
    def shape(self) -> tuple[int | str, ...]:
        return self.type.shape

    @property
    def rank(self) -> int:
        return len(self.type.shape)

    @property
    def dims(self) -> tuple[Entry, ...]:
        """The shape as numbers and polynomials."""
        return tuple(Poly.of(d) for d in self.type.shape)


@dataclass(eq=False, slots=True)
class Seq:
    """A sequence whose length is known while importing."""

    items: tuple[Val, ...]


@dataclass(eq=False, slots=True)
class Nothing:
    """An empty optional."""


@dataclass(eq=False, slots=True)
class Poison:
    """The result of a node that could not be imported; whatever reads it is skipped in silence."""


Value = Val | Seq | Nothing | Poison


class NotStatic(Exception):
    """An operand that must be known while importing is computed when the model runs."""

    def __init__(self, what: str, sources: Iterable[str] = (), bindable: bool = True) -> None:
        super().__init__(what)
        self.what, self.sources, self.bindable = what, frozenset(sources), bindable


class NeedsConstants(Unsupported):
    """Some graph inputs are used where a constant is needed; ``inputs`` can be given as ``constants=``."""

    def __init__(self, problems: Iterable[Problem], inputs: Iterable[str]) -> None:
        super().__init__(problems)
        self.inputs = tuple(inputs)


def as_entries(value: Val, limit: int = 4096) -> Array | None:
    """The value as an object array of entries; None when it is computed or large."""
    if value.entries is not None:
        return value.entries
    if value.handle is None or value.type.size > limit:
        return None
    array = value.handle.array
    out = np.empty(array.shape, dtype=object)
    out.reshape(-1)[:] = array.reshape(-1).tolist() if array.size else []
    return out
