"""The number formats and patterns a layer may take, as text such as ``s4+2:4``, and the passes that apply one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bitwright.ir.errors import InvalidInput
from bitwright.ir.target import Target
from bitwright.ir.types import F32, NM, S8
from bitwright.passes._pass import Pass
from bitwright.passes.sparsity.masks import Pattern

if TYPE_CHECKING:
    from bitwright.passes.precision.quantize_weights import QuantizeWeights

Rounding = Literal["nearest", "adaround", "adaquant", "gptq", "gpfq"]
DENSE = ("f32", "s8", "s4")
PATTERNS = (Pattern(2, 4), Pattern(2, 8))


@dataclass(frozen=True, slots=True)
class Choice:
    """What one layer becomes: ``bits`` of its weights (32: float layer) and of its activation, and a pattern along its
    reduction.

    >>> str(Choice.parse("s4+2:4")), str(Choice.parse("s4a4")), Choice.parse("f32").bits
    ('s4+2:4', 's4a4', 32)
    """

    bits: int
    pattern: Pattern | None = None
    activation: int = 8
    """Bits of what the layer reads; 8 in float layers, where they say nothing."""

    def __str__(self) -> str:
        head = "f32" if self.bits == 32 else f"s{self.bits}" + (f"a{self.activation}" if self.activation < 8 else "")
        return f"{head}+{self.pattern}" if self.pattern else head

    @staticmethod
    def parse(text: str) -> Choice:
        """Read ``f32``, or ``s2`` to ``s8`` with ``a2`` to ``a8`` for the activation, and ``+keep:group`` behind.

        Raises :class:`InvalidInput` for anything else.
        """
        m = re.fullmatch(r"(?:f32|s([2-8])(?:a([2-8]))?)(?:\+(\d+:\d+))?", text.strip())
        if not m:
            listed = "write f32, or s2 to s8 with a2 to a8 for activations, as in s8, s4a4 or s4+2:4"
            raise InvalidInput(f"assign-precision: {text!r} is no choice: {listed}")
        return Choice(int(m[1] or 32), Pattern.parse(m[3]) if m[3] else None, int(m[2] or 8))

    @property
    def is_float(self) -> bool:
        """True for the layer as it is."""
        return self.bits == 32 and self.pattern is None

    @property
    def density(self) -> float:
        """Share of the weights that stay."""
        return self.pattern.keep / self.pattern.group if self.pattern else 1.0

    def index_bits(self) -> float:
        """Bits a kept weight needs to say where in its group it was."""
        return float(max(1, (self.pattern.group - 1).bit_length())) if self.pattern else 0.0

    def size(self, weights: int) -> float:
        """Bytes of a layer of so many weights, positions included."""
        return weights * self.density * (self.bits + self.index_bits()) / 8

    def bit_operations(self, macs: int) -> float:
        """Multiply-accumulates times the bits of both factors (HAWQ-V3); activations of float layers take 32."""
        return macs * self.density * self.bits * (32 if self.bits == 32 else self.activation)

    def encoding(self, axis: int) -> NM | None:
        return self.pattern.along(axis) if self.pattern else None

    def steps(self, layers: Sequence[str], rounding: Rounding, rebuild: bool) -> tuple[Pass, ...]:
        """The passes that give this choice to ``layers``, but for the quantization of activations."""
        return (*self.mask_steps(layers, rebuild), *self.code_steps(layers, rounding))

    def mask_steps(self, layers: Sequence[str], rebuild: bool, alone: bool = False) -> tuple[Pass, ...]:
        """Those that give the pattern; ``alone``: as if each layer were the only one that changes."""
        from bitwright.passes.sparsity.nm_mask import NMMask
        from bitwright.passes.sparsity.reconstruct import Reconstruct

        if not self.pattern:
            return ()
        only = "|".join(layers)
        again = Reconstruct(only=only, inputs="parallel" if alone else "sequential")
        return (NMMask(pattern=self.pattern, only=only), *([again] if rebuild else []))

    def code_steps(self, layers: Sequence[str], rounding: Rounding) -> tuple[QuantizeWeights, ...]:
        """Those that give weights below 8 bits."""
        from bitwright.passes.precision.quantize_weights import QuantizeWeights

        return (
            (QuantizeWeights(bits=str(self.bits), only="|".join(layers), rounding=rounding),) if self.bits < 8 else ()
        )


def choices_of(text: str, target: Target | None) -> tuple[Choice, ...]:
    """``auto``: float, 8 and 4 bits, and the patterns the target's integer kernels gain from; or a list with ``|``."""
    if text != "auto":
        found = tuple(dict.fromkeys(Choice.parse(part) for part in text.split("|")))
        return found
    formats = [Choice.parse(t) for t in DENSE]
    if target is not None:
        if not target.rate(target.activation, S8):
            formats = formats[:1]
        dense = formats[-2:]  # no patterns in f32 where integers run: those are smaller, faster and nearer
        for pattern in PATTERNS:
            for c in dense:
                kind = F32 if c.bits == 32 else target.activation
                if target.sparse_gain(kind, pattern.along(1)) > 1.05:
                    formats.append(Choice(c.bits, pattern))
    return tuple(formats)
