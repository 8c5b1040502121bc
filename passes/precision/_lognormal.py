"""Values whose magnitudes are near-lognormal: stochastic pruning to a wanted sparsity, and the best small float.

Chmiel et al., Neural gradients are near-lognormal (ICLR 2021, arXiv 2006.08173). Pruning has sigma in natural logs,
the float format in log2, as the paper's code does. Below, Q is the upper tail of the normal distribution.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from bitwright.ir.errors import InvalidInput

if TYPE_CHECKING:
    import torch

_ROOT2 = math.sqrt(2.0)


def _below(z: float) -> float:
    """The normal distribution function."""
    return 0.5 * math.erfc(-z / _ROOT2)


def _scaled_tail(log_factor: float, z: float) -> float:
    """exp(log_factor) Q(z), without overflow for large z."""
    import torch

    if z <= 0:
        return math.exp(log_factor) * 0.5 * math.erfc(z / _ROOT2)
    return 0.5 * math.exp(log_factor - z * z / 2) * float(torch.special.erfcx(torch.tensor(z / _ROOT2).double()))


def lognormal_sparsity(alpha: float, sigma: float) -> float:
    """Expected share of zeros after stochastic pruning at ``alpha`` times the median magnitude.

    ``sigma``: standard deviation of ln|x|. S = Phi(ln a / s) - exp(s^2 / 2) / a Phi(ln a / s - s), section 3 of the
    paper.

    >>> round(lognormal_sparsity(7.822, 1.0), 3)
    0.8
    """
    if not alpha >= 0:
        raise InvalidInput(f"alpha is a threshold over the median magnitude, at least 0, not {alpha}")
    sigma = _sigma(sigma)
    if alpha == 0:
        return 0.0
    z = math.log(alpha) / sigma
    return _below(z) - _scaled_tail(sigma**2 / 2 - math.log(alpha), sigma - z)


def lognormal_threshold(sigma: float, sparsity: float, zeros: float = 0.0) -> float:
    """The ``alpha`` whose expected sparsity is ``sparsity``: the threshold is alpha * exp(mean of ln|x|).

    ``zeros``: share of values that are zero already (counted in ``sparsity``, not in ``sigma``); 0.0 is returned
    when they suffice. Raises :class:`InvalidInput` for shares outside [0, 1).
    """
    sigma = _sigma(sigma)
    if not (0 <= sparsity < 1 and 0 <= zeros <= 1):
        raise InvalidInput(f"sparsity lies in [0, 1) and zeros in [0, 1], got {sparsity} and {zeros}")
    wanted = (sparsity - zeros) / (1 - zeros) if zeros < sparsity else 0.0
    if wanted <= 0:
        return 0.0
    low, high = -9.0, 20.0
    while lognormal_sparsity(math.exp(low), sigma) > wanted:
        low *= 2
    while lognormal_sparsity(math.exp(high), sigma) < wanted:
        high *= 2
        if high > 600:
            raise InvalidInput(f"no threshold gives a sparsity of {sparsity} at sigma {sigma}: choose a smaller one")
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if lognormal_sparsity(math.exp(middle), sigma) < wanted else (low, middle)
    return math.exp((low + high) / 2)


def lognormal_cosine(alpha: float, sigma: float) -> float:
    """Expected cosine between x and its stochastic pruning at ``alpha`` times the median magnitude."""
    sigma = _sigma(sigma)
    if not alpha > 0:
        return 1.0
    z = math.log(alpha) / sigma
    low = _scaled_tail(math.log(alpha) + sigma**2 / 2 - 2 * sigma**2, sigma - z)
    return math.sqrt(1 / (low + _below(2 * sigma - z)))


def stochastic_prune(
    x: torch.Tensor, sparsity: float, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, float]:
    """Unbiased pruning to an expected sparsity, and its threshold t.

    Magnitudes above t stay; others become t with probability |x| / t, else 0. The threshold comes from the mean and
    standard deviation of ln|x| over the non-zeros, taken as lognormal.
    """
    import torch

    magnitude = x.abs()
    alive = magnitude[magnitude > 0].double().log()
    if not bool(torch.isfinite(x).all()):
        raise InvalidInput("only finite values can be pruned: x has NaN or infinities")
    if alive.numel() < 2 or float(alive.std()) == 0:
        raise InvalidInput("pruning needs at least two different non-zero magnitudes")
    zeros = 1 - alive.numel() / x.numel()
    threshold = lognormal_threshold(float(alive.std()), sparsity, zeros) * math.exp(float(alive.mean()))
    if threshold == 0:
        return x.clone(), 0.0
    lifted = torch.rand(x.shape, generator=generator, dtype=torch.float32) * threshold < magnitude
    small = torch.where(lifted, torch.sign(x) * threshold, torch.zeros((), dtype=x.dtype)).to(x.dtype)
    return torch.where(magnitude > threshold, x, small), threshold


class FloatFormat(NamedTuple):
    """A sign, ``exponent`` and ``mantissa`` bits; magnitudes from 2^-E to about 2^E, E = 2^(exponent - 1).

    ``error``: expected relative error (lognormal rule) or relative mean squared error (measured).
    """

    exponent: int
    mantissa: int
    error: float

    @property
    def bias(self) -> int:
        """The exponent bias that centres the format on 1."""
        return 1 << (self.exponent - 1)


def lognormal_error(sigma: float, exponent: int, mantissa: int) -> float:
    """Expected mean relative error of a small float on values whose log2|x| is normal with mean 0.

    Rounding inside the range, underflow and overflow, less what the clamp at 2^E leaves of a large value.
    ``sigma``: standard deviation of log2|x|.
    """
    sigma = _sigma(sigma)
    if exponent < 1 or mantissa < 0:
        raise InvalidInput(f"a float has at least one exponent bit, got {exponent} and mantissa {mantissa}")
    reach = 2.0 ** (exponent - 1)
    inside = math.erf(reach / sigma / _ROOT2)
    kept = _scaled_tail(reach * math.log(2) + (sigma * math.log(2)) ** 2 / 2, reach / sigma + sigma * math.log(2))
    outside = math.erfc(reach / sigma / _ROOT2)
    return inside * 2.0**-mantissa / (8 * math.log(2)) + outside - kept


def lognormal_format(sigma: float, bits: int) -> FloatFormat:
    """The split of ``bits`` (sign included) with the smallest expected relative error; ``sigma`` of log2|x|.

    >>> lognormal_format(1.0, 4)[:2], lognormal_format(3.0, 8)[:2]
    ((2, 1), (4, 3))
    """
    return min(
        (FloatFormat(e, m, lognormal_error(sigma, e, m)) for e, m in splits(bits)), key=lambda f: (f.error, f.exponent)
    )


def splits(bits: int) -> list[tuple[int, int]]:
    """Exponent and mantissa bits of every small float of ``bits`` bits, sign included."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 3 <= bits <= 8:
        raise InvalidInput(f"a small float has 3 to 8 bits, not {bits!r}")
    return [(e, bits - 1 - e) for e in range(1, bits)]


def _sigma(sigma: float) -> float:
    if not (sigma > 0 and math.isfinite(sigma)):
        raise InvalidInput(f"sigma is a standard deviation above zero, not {sigma}")
    return float(sigma)


__all__ = [
    "FloatFormat", "lognormal_cosine", "lognormal_error", "lognormal_format", "lognormal_sparsity",
    "lognormal_threshold", "splits", "stochastic_prune",
]  # fmt: skip
