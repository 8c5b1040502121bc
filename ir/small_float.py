"""Sums in small floats, bit exact: a sign, e exponent and m mantissa bits, bias b; no NaN, no infinity, no subnormals.

The smallest magnitude is 2^-b; what lies below becomes +0, before rounding. The largest is
2^(2^e - b - 1) * (2 - 2^-m); what lies above becomes it. ``floor`` cuts the mantissa of the magnitude (toward zero),
``nearest`` rounds half to even. Two formats make a dot product: that of each product and that of each sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import DType
from bitwright.ir.weights import Array

Rounding = Literal["floor", "nearest"]
Format = tuple[int, int, int]
"""Exponent bits, mantissa bits, bias."""

_SLAB = 1 << 21
"""Partial sums held at once."""

_MAX = float(np.finfo(np.float64).max)


def small_float_range(exponent_bits: int, mantissa_bits: int, bias: int) -> tuple[float, float]:
    """The smallest positive and the largest value of a format.

    >>> small_float_range(4, 7, 10), small_float_range(4, 7, 12)[1]
    ((0.0009765625, 63.75), 15.9375)
    """
    e, m, b = _format((exponent_bits, mantissa_bits, bias))
    return 2.0**-b, 2.0 ** (2**e - b - 1) * (2 - 2.0**-m)


def round_small_float(x: Any, exponent_bits: int, mantissa_bits: int, bias: int, rounding: Rounding = "floor") -> Any:
    """``x`` (a number, array or tensor) in a small float; f32 and f64 keep their type where it holds the result.

    >>> float(round_small_float(-1.999, 4, 2, 10)), float(round_small_float(1e9, 4, 7, 10))
    (-1.75, 63.75)
    """
    f = _format((exponent_bits, mantissa_bits, bias))
    a, back = _open(x, f)
    return back(_rounder(f, rounding)(a))


def small_float_dot(
    x: Any, w: Any, product: Format, accumulator: Format, chunk: int = 16, rounding: Rounding = "floor"
) -> Any:
    """Sum over the last axis of x * w, every product and every sum rounded; the other axes broadcast.

    The order is fixed: within each ``chunk`` consecutive terms from a zero sum on, in index order; then the sums of
    the chunks, in order, again from zero. A linear layer is ``small_float_dot(x[:, None], w, ...)``.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise InvalidInput(f"chunk must be a whole number, at least 1, not {chunk!r}")
    product, accumulator = _format(product), _format(accumulator)
    (a, back), (b, back_w) = _open(x, accumulator), _open(w, accumulator)
    if not a.ndim or not b.ndim or a.shape[-1] != b.shape[-1]:
        raise InvalidInput(f"x and w need a last axis of one length, got {list(a.shape)} and {list(b.shape)}")
    try:
        shape = np.broadcast_shapes(a.shape, b.shape)[:-1]
    except ValueError as e:
        raise InvalidInput(f"shapes {list(a.shape)} and {list(b.shape)} do not broadcast") from e
    q_product, q_sum = _rounder(product, rounding), _rounder(accumulator, rounding)
    add = np.add if _sum_is_exact(product, accumulator) else _odd_sum
    mul = np.multiply if _is_f32(a) and _is_f32(b) else _odd_product
    a, b = (_chunked(t, chunk) for t in (a, b))
    total = np.zeros(shape)
    step = max(1, _SLAB // max(1, total.size))
    for first in range(0, a.shape[-2], step):
        u, v = a[..., first : first + step, :], b[..., first : first + step, :]
        inner = np.zeros((*shape, u.shape[-2]))
        for i in range(u.shape[-1]):
            inner = q_sum(add(inner, q_product(mul(u[..., i], v[..., i]))))
        for i in range(inner.shape[-1]):
            total = q_sum(add(total, inner[..., i]))
    return (back_w if hasattr(w, "detach") and not hasattr(x, "detach") else back)(total)


def format_of(dtype: DType) -> Format:
    """A number format as a small float (which has no infinities and no subnormals): bias 2^(e - 1) - 1 if it has none.

    >>> format_of(DType("float", 12, 4, 7, 10))
    (4, 7, 10)
    """
    if not dtype.is_float:
        raise InvalidInput(f"{dtype} is no floating-point format: small-float sums have ones such as f4m7b10")
    return _format(
        (dtype.exponent, dtype.mantissa, 2 ** (dtype.exponent - 1) - 1 if dtype.bias is None else dtype.bias)
    )


def sums_fit(product: Format, accumulator: Format, digits: int = 53) -> bool:
    """True when floats of ``digits`` significant bits round every sum as the exact one: rounding twice is harmless.

    With M mantissa bits at most, a sum that does not fit lies within 2^(M + 3 - digits) of its larger part, relative
    to it; every other value or midpoint of the format is 2^-(M + 2) away; and the part itself is never reached while
    exponents are fewer than ``digits`` apart.
    """
    mantissa = max(product[1], accumulator[1])
    top = max(2**e - b - 1 for e, _, b in (product, accumulator))
    return 2 * mantissa + 5 <= digits and top + max(product[2], accumulator[2]) < digits


def _chunked(a: Array, chunk: int) -> Array:
    """[..., k] as [..., chunks, chunk]; zeros at the end change no sum."""
    chunk = max(1, min(chunk, a.shape[-1]))
    tail = -a.shape[-1] % chunk
    if tail:
        a = np.concatenate([a, np.zeros((*a.shape[:-1], tail))], -1)
    return a.reshape(*a.shape[:-1], a.shape[-1] // chunk, chunk)


def _rounder(f: Format, rounding: str) -> Callable[[Array], Array]:
    if rounding not in ("floor", "nearest"):
        raise InvalidInput(f"rounding is 'floor' or 'nearest', not {rounding!r}")
    smallest, largest = small_float_range(*f)
    drop = 52 - f[1]
    mask, half = -(1 << drop), (1 << (drop - 1)) - 1

    def rounded(a: Array) -> Array:
        bits = a.view(np.int64)  # sign and magnitude: cutting low bits goes toward zero
        if rounding == "nearest":
            bits = bits + (((bits >> drop) & 1) + half)
        q = (bits & mask).view(np.float64)
        q = np.minimum(np.maximum(q, -largest), largest)
        return np.where(np.abs(a) < smallest, 0.0, q)

    return rounded


def _format(f: Any) -> Format:
    if len(f) != 3 or any(isinstance(v, bool) or not isinstance(v, int | np.integer) for v in f):
        raise InvalidInput(f"a small float is (exponent bits, mantissa bits, bias), all whole numbers, not {f!r}")
    e, m, b = (int(v) for v in f)
    if not 1 <= e <= 11 or not 0 <= m <= 51 or b > 1022 or 2**e - b - 1 > 1022:
        raise InvalidInput(f"exponent {e}, mantissa {m}, bias {b}: more than f64 can hold, or less than a float has")
    return e, m, b


def _open(x: Any, f: Format) -> tuple[Array, Callable[[Array], Any]]:
    """f64 values of an array or tensor, and how to give a result back in the kind that came in."""
    tensor = hasattr(x, "detach")
    given: Any = x.detach().cpu() if tensor else np.asarray(x)
    dtype = str(given.dtype).removeprefix("torch.")
    try:
        a = np.ascontiguousarray(given.double().numpy() if tensor else given.astype(np.float64)).reshape(given.shape)
    except (TypeError, ValueError) as e:
        raise InvalidInput(f"small floats are made of numbers, not {dtype}: {e}") from e
    if np.isnan(a).any():
        raise InvalidInput("a small float has no NaN, and x contains one")
    a = np.clip(a, -_MAX, _MAX)  # infinities saturate
    single = dtype in ("float32", "float16", "bfloat16") and f[1] <= 23 and f[2] <= 126 and 2 ** f[0] - f[2] <= 128

    def back(result: Array) -> Any:
        result = result.astype(np.float32) if single else result
        if not tensor:
            return result
        import torch

        return torch.from_numpy(np.ascontiguousarray(result)).reshape(result.shape).to(x.device)

    return a, back


def _is_f32(a: Array) -> bool:
    """True when f32 holds the values: then their products are exact in f64."""
    with np.errstate(over="ignore"):
        return bool(np.all(a.astype(np.float32) == a))


def _sum_is_exact(product: Format, accumulator: Format) -> bool:
    """True when f64 holds any sum of a product and an accumulator: from their lowest bit to their carry."""
    lowest = min(-b - m for _, m, b in (product, accumulator))
    highest = max(2**e - b - 1 for e, _, b in (product, accumulator)) + 1
    return bool(highest - lowest <= 52)


def _odd(value: Array, error: Array) -> Array:
    """``value + error`` (error below half an ulp) rounded to odd: rounding it again is rounding the exact value."""
    bits: Array = value.view(np.int64)
    toward_zero = bits - ((error < 0) != (value < 0))
    odd: Array = np.where(error != 0, toward_zero | 1, bits).view(np.float64)
    return odd


def _odd_sum(a: Array, b: Array) -> Array:
    s = a + b
    t = s - a
    return _odd(s, (a - (s - t)) + (b - t))


def _odd_product(a: Array, b: Array) -> Array:
    """The product of f64 values rounded to odd, by Dekker's exact product of their mantissas."""
    (u, i), (v, j) = np.frexp(np.clip(a, -1e300, 1e300)), np.frexp(np.clip(b, -1e300, 1e300))
    p = u * v
    (u1, u0), (v1, v0) = _split(u), _split(v)
    error = u0 * v0 - (((p - u1 * v1) - u0 * v1) - u1 * v0)
    with np.errstate(over="ignore", under="ignore"):
        product: Array = np.ldexp(_odd(p, error), i + j)
    return product


def _split(a: Array) -> tuple[Array, Array]:
    c = a * 134217729.0
    high = c - (c - a)
    return high, a - high


__all__ = [
    "Format", "Rounding", "format_of", "round_small_float", "small_float_dot", "small_float_range", "sums_fit",
]  # fmt: skip
