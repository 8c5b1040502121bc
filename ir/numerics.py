"""How wide an accumulator must be: exact integer intervals, and the small-float accumulators beside them.

A sum is over k of (x - x_zero) * (w - w_zero), x anywhere in its bounds. All integer results are Python ints; nothing
is rounded on the way. A register that wraps needs room for the final sum only; one that saturates, or an order that
the compiler may change, needs room for every partial sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.small_float import round_small_float, small_float_dot, small_float_range
from bitwright.ir.types import NM
from bitwright.ir.weights import Array

Register = Literal["wrap", "saturate"]
REGISTERS: tuple[Register, Register] = ("wrap", "saturate")
Bound = int | Sequence[int] | Array
"""One bound for all inputs, or one for each k."""

_CHUNK = 1 << 20
_EXACT = 1 << 24
"""Below this, f32 holds every whole number."""
"""Weights widened at once."""


class Witness(NamedTuple):
    """Inputs, one for each k: ``high`` gives the largest sum, ``low`` the smallest."""

    high: list[int]
    low: list[int]


def bits_for(lo: int, hi: int) -> int:
    """The smallest two's complement width that holds every integer from ``lo`` to ``hi``.

    >>> bits_for(0, 65536), bits_for(-128, 127), bits_for(-4, -4), bits_for(0, 0)
    (18, 8, 3, 1)
    """
    lo, hi = _whole("lo", lo), _whole("hi", hi)
    if lo > hi:
        raise InvalidInput(f"a range needs lo <= hi, got {lo} and {hi}")
    return 1 + max((-lo - 1).bit_length() if lo < 0 else 0, hi.bit_length() if hi > 0 else 0)


def type_bound(
    x_lo: int, x_hi: int, w_lo: int, w_hi: int, terms: int, *, x_zero: int = 0, w_zero: int = 0,
    register: Register = "wrap",
) -> tuple[int, int]:  # fmt: skip
    """Smallest and largest sum of ``terms`` products when nothing but the bounds is known: all four corners count.

    ``register="saturate"``: of any number of products up to ``terms``.

    >>> type_bound(-8, 7, -128, 127, 64)
    (-65024, 65536)
    """
    terms = _whole("terms", terms)
    if terms < 0:
        raise InvalidInput(f"the number of terms cannot be negative, got {terms}")
    lo, hi = _corners(_scalars("x", x_lo, x_hi, x_zero), _scalars("w", w_lo, w_hi, w_zero))
    if _saturates(register):
        lo, hi = min(lo, 0), max(hi, 0)
    return terms * lo, terms * hi


def kept_terms(terms: int, pattern: NM) -> int:
    """The most non-zero terms that an N:M pattern along the reduction allows; a shorter last group keeps its share.

    >>> kept_terms(19, NM(2, 4, 1)), kept_terms(18, NM(2, 4, 1))
    (10, 9)
    """
    groups, tail = divmod(_whole("terms", terms), pattern.group * pattern.block)
    share = -(-pattern.keep * -(-tail // pattern.block) // pattern.group)
    return pattern.keep * pattern.block * groups + min(tail, share * pattern.block)


def accumulator_range(
    weights: Any, x_lo: Bound, x_hi: Bound, *, x_zero: int = 0, w_zero: int = 0
) -> tuple[list[int], list[int]]:
    """Smallest and largest final sum of every row of ``weights`` [out, k]; some input attains each.

    >>> accumulator_range([[1, -2], [3, 4]], 0, 255)
    ([-510, 0], [255, 1785])
    """
    w = _matrix(weights)
    return _sums(w, *_inputs(x_lo, x_hi, w.shape[1], x_zero), _whole("w_zero", w_zero))


def prefix_range(
    weights: Any, x_lo: Bound, x_hi: Bound, *, x_zero: int = 0, w_zero: int = 0
) -> tuple[list[int], list[int]]:
    """Smallest and largest partial sum of every row, in any order and any split: the sums of all subsets of terms.

    >>> prefix_range([[1, -2]], 1, 255)
    ([-510], [255])
    """
    w = _matrix(weights)
    lo, hi = _inputs(x_lo, x_hi, w.shape[1], x_zero)
    zero = _whole("w_zero", w_zero)
    if isinstance(lo, int) and isinstance(hi, int):
        return _sums(w, min(lo, 0), max(hi, 0), zero)
    return _sums(w, np.minimum(lo, 0), np.maximum(hi, 0), zero)


def accumulator_bits(
    weights: Any, x_lo: Bound, x_hi: Bound, *, register: Register = "saturate", x_zero: int = 0, w_zero: int = 0
) -> int:
    """The narrowest two's complement accumulator that is right for all rows and all inputs within the bounds.

    >>> accumulator_bits([[1, -1]], 1, 1, register="wrap"), accumulator_bits([[1, -1]], 1, 1)
    (1, 2)
    """
    reach = prefix_range if _saturates(register) else accumulator_range
    lo, hi = reach(weights, x_lo, x_hi, x_zero=x_zero, w_zero=w_zero)
    return bits_for(min(lo), max(hi)) if lo else 1


def safe_terms(
    bits: int, x_lo: int, x_hi: int, w_lo: int, w_hi: int, *, x_zero: int = 0, w_zero: int = 0
) -> int | None:
    """The largest number of products whose partial sums all fit a signed register; None: any number fits.

    >>> safe_terms(16, 0, 255, -128, 127), safe_terms(16, 0, 15, -8, 7), safe_terms(8, 0, 0, -1, 1)
    (1, 273, None)
    """
    half = 1 << (_width("bits", bits) - 1)
    lo, hi = _corners(_scalars("x", x_lo, x_hi, x_zero), _scalars("w", w_lo, w_hi, w_zero))
    counts = ([half // -lo] if lo < 0 else []) + ([(half - 1) // hi] if hi > 0 else [])
    return min(counts, default=None)


def witness(weights_row: Any, x_lo: Bound, x_hi: Bound, *, w_zero: int = 0) -> Witness:
    """Inputs that attain the bounds of one row, whatever the zero point of the inputs.

    >>> witness([3, -1, 0], -128, 127)
    Witness(high=[127, -128, -128], low=[-128, 127, -128])
    """
    row = _matrix([list(weights_row)] if isinstance(weights_row, Sequence) else weights_row[None])[0]
    lo, hi = (np.broadcast_to(np.asarray(b, object), row.shape).tolist() for b in _inputs(x_lo, x_hi, len(row), 0))
    factors = [int(w) - _whole("w_zero", w_zero) for w in row.tolist()]
    pairs = list(zip(factors, lo, hi, strict=True))
    return Witness([h if w > 0 else s for w, s, h in pairs], [h if w < 0 else s for w, s, h in pairs])


def a2q_cap(accumulator_bits: int, input_bits: int, signed_input: bool) -> float:
    """A2Q: the largest l1 norm of a row of integer weights that cannot overflow; never above the exact value.

    >>> a2q_cap(16, 4, False), a2q_cap(12, 4, True)
    (2047.9375, 255.875)
    """
    p, n = _width("accumulator_bits", accumulator_bits), _width("input_bits", input_bits)
    return _down(Fraction((1 << (p - 1)) - 1, 1 << (n - bool(signed_input))))


def a2q_plus_cap(accumulator_bits: int, input_bits: int) -> float:
    """A2Q+: the same for rows that sum to zero, whose positive and negative halves are each half the norm.

    >>> round(a2q_plus_cap(16, 4), 1), round(a2q_plus_cap(16, 8), 3)
    (4368.9, 256.996)
    """
    p, n = _width("accumulator_bits", accumulator_bits), _width("input_bits", input_bits)
    return _down(Fraction((1 << p) - 2, (1 << n) - 1))


def _down(exact: Fraction) -> float:
    """The largest float that is not above ``exact``."""
    near = float(exact)
    return near if Fraction(near) <= exact else math.nextafter(near, -math.inf)


def signed_sums(weights: Any, *, w_zero: int = 0) -> tuple[list[int], list[int]]:
    """The sums of the positive, and of the negative, terms of every row of ``weights`` [out, k] less ``w_zero``.

    >>> signed_sums([[1, -2], [3, 4]])
    ([1, 7], [-2, 0])
    """
    w, zero = _matrix(weights), _whole("w_zero", w_zero)
    reach = _reach(w, zero)
    if w.dtype.itemsize == 1 and reach * w.shape[1] < _EXACT:  # sums of magnitudes are whole floats
        wide, ones = w.astype(np.float32) - np.float32(zero), np.ones(w.shape[1], np.float32)
        total, size = wide @ ones, np.abs(wide) @ ones
        return ((size + total) / 2).astype(np.int64).tolist(), ((total - size) / 2).astype(np.int64).tolist()
    dtype: Any = np.int64 if reach * w.shape[1] + abs(zero) + reach < 1 << 62 else object
    plus: list[int] = []
    minus: list[int] = []
    for positive, negative in _halves(w, zero, dtype):
        plus += [int(p) for p in positive.sum(1).tolist()]
        minus += [int(n) for n in negative.sum(1).tolist()]
    return plus, minus


def range_of_sums(
    sums: tuple[list[int], list[int]], x_lo: int, x_hi: int, *, x_zero: int = 0, partial: bool = False
) -> tuple[list[int], list[int]]:
    """:func:`accumulator_range` (``partial``: :func:`prefix_range`) of rows with these :func:`signed_sums`."""
    lo, hi = x_lo - x_zero, x_hi - x_zero
    if partial:
        lo, hi = min(lo, 0), max(hi, 0)
    pairs = list(zip(*sums, strict=True))
    return [p * lo + n * hi for p, n in pairs], [p * hi + n * lo for p, n in pairs]


def _reach(w: Array, w_zero: int) -> int:
    """The largest magnitude of w - w_zero."""
    return max((abs(int(b) - w_zero) for b in (w.min(), w.max())), default=0) if w.size else 0


def _sums(w: Array, lo: int | Array, hi: int | Array, w_zero: int) -> tuple[list[int], list[int]]:
    """Sum over k of the smaller, and of the larger, of w * lo and w * hi; in int64 where that is exact."""
    if isinstance(lo, int) and isinstance(hi, int):
        return range_of_sums(signed_sums(w, w_zero=w_zero), lo, hi)
    least: list[int] = []
    most: list[int] = []
    reach, widest = _reach(w, w_zero), max((abs(int(x)) for b in (lo, hi) for x in b), default=0)  # type: ignore[union-attr]
    dtype: Any = np.int64 if 2 * reach * widest * w.shape[1] + abs(w_zero) + reach < 1 << 62 else object
    lo, hi = (np.asarray(b, object).astype(dtype) if widest < 1 << 62 else np.asarray(b, object) for b in (lo, hi))
    for positive, negative in _halves(w, w_zero, dtype):
        most += [int(v) for v in (positive @ hi + negative @ lo).tolist()]
        least += [int(v) for v in (positive @ lo + negative @ hi).tolist()]
    return least, most


def _halves(w: Array, w_zero: int, dtype: Any) -> Iterator[tuple[Array, Array]]:
    """The positive and the negative part of w - w_zero, some rows at a time."""
    rows = max(1, _CHUNK // max(1, w.shape[1]))
    for first in range(0, len(w), rows):
        part = w[first : first + rows].astype(dtype)
        part = part - w_zero if w_zero else part
        positive = np.maximum(part, 0)
        yield positive, part - positive


def _matrix(weights: Any) -> Array:
    """Integer weights as an array [out, k]; lists become Python ints, which no array type can round."""
    a: Array = weights.detach().cpu().numpy() if hasattr(weights, "detach") else weights
    if not isinstance(a, np.ndarray):
        try:
            a = np.array(a, dtype=object)
        except ValueError as e:
            raise InvalidInput(f"weights are an integer array [out, k]: {e}") from e
    if a.ndim != 2:
        raise InvalidInput(f"weights are an integer array [out, k], got {a.ndim} axes")
    if a.dtype == object:
        return np.array([[_whole("a weight", v) for v in row] for row in a], dtype=object).reshape(a.shape)
    if a.dtype.kind not in "iu":
        raise InvalidInput(f"weights must be integers, not {a.dtype}")
    return a


def _inputs(x_lo: Bound, x_hi: Bound, k: int, zero: int) -> tuple[int | Array, int | Array]:
    """Bounds less the zero point: two ints, or two arrays of Python ints of length k."""
    if np.ndim(x_lo) == 0 and np.ndim(x_hi) == 0:
        return _scalars("x", x_lo, x_hi, zero)
    bounds = []
    for name, b in (("x_lo", x_lo), ("x_hi", x_hi)):
        listed = [b] * k if np.ndim(b) == 0 else list(b)  # type: ignore[arg-type]
        if len(listed) != k:
            raise InvalidInput(f"{name} has {len(listed)} entries for {k} inputs")
        bounds.append(np.array([_whole(name, v) - _whole("x_zero", zero) for v in listed], dtype=object))
    if any(a > b for a, b in zip(*bounds, strict=True)):
        at = next(i for i, (a, b) in enumerate(zip(*bounds, strict=True)) if a > b)
        raise InvalidInput(f"bounds of input {at} need x_lo <= x_hi")
    return bounds[0], bounds[1]


def _scalars(name: str, lo: Any, hi: Any, zero: int) -> tuple[int, int]:
    lo, hi, zero = _whole(f"{name}_lo", lo), _whole(f"{name}_hi", hi), _whole(f"{name}_zero", zero)
    if lo > hi:
        raise InvalidInput(f"bounds need {name}_lo <= {name}_hi, got {lo} and {hi}")
    return lo - zero, hi - zero


def _corners(x: tuple[int, int], w: tuple[int, int]) -> tuple[int, int]:
    products = [a * b for a in x for b in w]
    return min(products), max(products)


def _saturates(register: str) -> bool:
    if register not in REGISTERS:
        raise InvalidInput(f"a register wraps or saturates ('wrap', 'saturate'), not {register!r}")
    return register == "saturate"


def _width(name: str, bits: Any) -> int:
    bits = _whole(name, bits)
    if not 1 <= bits <= 64:
        raise InvalidInput(f"{name} must be from 1 to 64, not {bits}")
    return int(bits)


def _whole(name: str, value: Any) -> int:
    if hasattr(value, "item") and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInput(f"{name} must be an integer, not {value!r}")
    return value


__all__ = [
    "REGISTERS", "Register", "Witness", "a2q_cap", "a2q_plus_cap", "accumulator_bits", "accumulator_range", "bits_for",
    "kept_terms", "prefix_range", "round_small_float", "safe_terms", "small_float_dot", "small_float_range",
    "type_bound", "witness",
]  # fmt: skip
