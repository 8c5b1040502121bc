"""Inputs of a workload for measuring and comparing; NumPy only, so that a machine with a device can draw them again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.types import TensorType

KINDS = ("random", "random", "extremes")


def drawn(key: str, types: Sequence[TensorType], small: bool, seed: int) -> list[list[NDArray[Any]]]:
    """A list of inputs for each of :data:`KINDS`; the same for the same arguments.

    ``small``: wide integers are indices, and stay 0 or 1.
    """
    rng = np.random.default_rng([seed, *hashlib.blake2b(key.encode(), digest_size=8).digest()])
    return [[_values(t, kind, rng, small) for t in types] for kind in KINDS]


def _values(t: TensorType, kind: str, rng: np.random.Generator, small: bool) -> NDArray[Any]:
    """``extremes``: only the format's ends (of floats: large values of both signs, and zeros)."""
    shape, dtype = t.static_shape, t.dtype
    if not dtype.is_integer:
        floats = rng.standard_normal(shape) if kind == "random" else rng.choice([-30.0, 0.0, 30.0, 1e-3], shape)
        return np.asarray(floats).astype(dtype.numpy)
    if dtype.bits == 1:
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype.numpy)
    low, high = (0, 1) if small and dtype.bits > 16 else (max(dtype.lo, -(1 << 20)), min(dtype.hi, 1 << 20))
    codes = rng.integers(low, high + 1, shape) if kind == "random" else rng.choice([low, high], shape)
    return np.asarray(codes).astype(dtype.numpy)
