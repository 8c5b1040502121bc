"""Number formats of tensors, as plain functions: integer codes, small floats, and which split of bits suits the data.

Integers: :func:`quantize_codes`. Small floats: :func:`quantize_float`, with the split from :func:`lognormal_format`
(from the spread of the magnitudes alone) or :func:`mse_format` (tried on the data).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from bitwright.ir.errors import InvalidInput
from bitwright.ir.small_float import round_small_float, small_float_range
from bitwright.passes.precision._integer_codes import Codes, Levels, levels, quantize_codes
from bitwright.passes.precision._lognormal import (
    FloatFormat,
    lognormal_cosine,
    lognormal_error,
    lognormal_format,
    lognormal_sparsity,
    lognormal_threshold,
    splits,
    stochastic_prune,
)

if TYPE_CHECKING:
    import torch


class FloatCodes(NamedTuple):
    """``values`` (numbers of the small float) times ``scale`` stand for the tensor."""

    values: torch.Tensor
    scale: float

    def real(self) -> torch.Tensor:
        """The values that are stood for."""
        return self.values * self.scale


def quantize_float(
    x: torch.Tensor, exponent: int, mantissa: int, scale: Literal["log", "max", "mse"] = "log"
) -> FloatCodes:
    """Nearest numbers of a small float with bias 2^(exponent - 1); zeros stay zero, the top clamps, no subnormals.

    ``scale="log"`` centres the mean of log2|x| (a power of two, which shifts exponents); ``"max"`` puts the largest
    magnitude on the largest number; ``"mse"`` takes the power of two of smallest squared error. Raises
    :class:`InvalidInput` for NaN and infinities.
    """
    import torch

    if not bool(torch.isfinite(x).all()):
        raise InvalidInput("only finite values have a small float: x has NaN or infinities")
    alive = x[x != 0].double().abs()
    if not alive.numel():
        return FloatCodes(x.clone(), 1.0)
    bias = 1 << (exponent - 1)
    top = small_float_range(exponent, mantissa, bias)[1]
    if scale == "log":
        scales = [2.0 ** round(float(alive.log2().mean()))]
    elif scale == "max":
        scales = [float(alive.max()) / top]
    elif scale == "mse":
        first = math.ceil(math.log2(float(alive.max()) / top))
        scales = [2.0 ** (first - i) for i in range(max(4, 2 * bias))]
    else:
        raise InvalidInput(f"scale is 'log', 'max' or 'mse', not {scale!r}")
    best, least = FloatCodes(x, 1.0), math.inf
    for s in scales:
        values = round_small_float(x.double() / s, exponent, mantissa, bias, "nearest").to(x.dtype)
        error = float((values.double() * s - x.double()).square().sum())
        if error < least:
            best, least = FloatCodes(values, s), error
    return best


def log2_spread(x: torch.Tensor) -> float:
    """Standard deviation of log2|x| over the non-zeros: the sigma of :func:`lognormal_format`."""
    alive = x[x != 0].double().abs().log2()
    if alive.numel() < 2:
        raise InvalidInput("the spread of magnitudes needs at least two non-zero values")
    return float(alive.std())


def mse_format(x: torch.Tensor, bits: int) -> FloatFormat:
    """The split of ``bits`` (sign included) with the smallest mean squared error on ``x``, relative to its power."""
    power = float(x.double().square().sum())
    if not power > 0:
        raise InvalidInput("all values are zero: any format holds them")

    def error(e: int, m: int) -> float:
        return float((quantize_float(x, e, m, "mse").real().double() - x.double()).square().sum()) / power

    return min((FloatFormat(e, m, error(e, m)) for e, m in splits(bits)), key=lambda f: (f.error, f.exponent))


def range_norm_constant(n: int, form: Literal["paper", "code"] = "code") -> float:
    """C(n) with C(n) * (max - min) an estimate of the standard deviation of ``n`` values (range batch norm).

    ``paper``: 1 / sqrt(2 ln n), which tends to twice the deviation of normal values; ``code``: 0.5402 / sqrt(2 ln n),
    0.81 (n = 16) to 0.98 (n = 12,544) of it. Banner et al., NeurIPS 2018, arXiv 1805.11046.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise InvalidInput(f"a range needs at least two values, not {n!r}")
    factor = 1.0 if form == "paper" else 0.5 * 0.35 * (1 + math.sqrt(math.pi * math.log(4)))
    return factor / math.sqrt(2 * math.log(n))


def range_norm_scale(x: torch.Tensor, chunks: int = 16, form: Literal["paper", "code"] = "code") -> torch.Tensor:
    """The deviation-like scale of each channel of ``x`` [N, C, ...]: C(n) times the mean range over ``chunks`` parts.

    n is the number of values in a part. Raises :class:`InvalidInput` when the values do not divide into the parts.
    """
    values = x.transpose(0, 1).reshape(x.shape[1], -1)
    if chunks < 1 or values.shape[1] % chunks or values.shape[1] < 2 * chunks:
        raise InvalidInput(f"{values.shape[1]} values per channel do not divide into {chunks} parts of at least two")
    parts = values.reshape(x.shape[1], chunks, -1)
    return (parts.amax(2) - parts.amin(2)).mean(1) * range_norm_constant(parts.shape[2], form)


def range_norm_fold(
    gamma: torch.Tensor, beta: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, *, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and offset of each channel of a range batch norm at inference: y = x * factor + offset.

    ``scale`` is what its implementations keep under the name ``running_var``, which is no variance: the inverse of a
    deviation (``inverse``) or a deviation. There is no epsilon and no square root.
    """
    factor = gamma * scale if inverse else gamma / scale
    return factor, beta - mean * factor


__all__ = [
    "Codes", "FloatCodes", "FloatFormat", "Levels", "levels", "log2_spread", "lognormal_cosine", "lognormal_error",
    "lognormal_format", "lognormal_sparsity", "lognormal_threshold", "mse_format", "quantize_codes", "quantize_float",
    "range_norm_constant", "range_norm_fold", "range_norm_scale", "splits", "stochastic_prune",
]  # fmt: skip
