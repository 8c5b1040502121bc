"""Sizes as polynomials in named symbols: what the partial evaluator computes with instead of numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from bitwright.ir import ops
from bitwright.ir.types import Dim, DType
from bitwright.ir.weights import Array

Number = int | float | bool | Fraction
Term = tuple[tuple[str, ...], Fraction]


class Unknown(ArithmeticError):
    """The value depends on a symbol in a way a polynomial cannot say; the evaluator gives up on it."""


@dataclass(frozen=True, slots=True)
class Poly:
    """A polynomial with rational coefficients; symbols are sizes, so each is at least 1.

    >>> b, s = Poly.of("b"), Poly.of("s")
    >>> str(to_dim(multiply(multiply(12, b), s))), add(b, negate(b)), to_dim(exact_div(Poly.of("12*b"), 4))
    ('12*b*s', 0, '3*b')
    """

    terms: tuple[Term, ...]

    @staticmethod
    def of(dim: Dim) -> Number | Poly:
        """The polynomial of a shape entry (an int stays an int)."""
        if isinstance(dim, int):
            return dim
        factor, names = 1, []
        for part in dim.split("*"):
            if part.isdigit():
                factor *= int(part)
            else:
                names.append(part)
        return Poly(((tuple(sorted(names)), Fraction(factor)),))

    @property
    def sign(self) -> int | None:
        """1 or -1 when it is that for all sizes >= 1, else None."""
        signs = {c > 0 for _, c in self.terms if _}
        constant = next((c for names, c in self.terms if not names), Fraction(0))
        if signs == {True} and constant + sum(c for n, c in self.terms if n) > 0:
            return 1
        if signs == {False} and constant + sum(c for n, c in self.terms if n) < 0:
            return -1
        return None


Entry = Number | Poly


def _terms(x: Entry) -> dict[tuple[str, ...], Fraction]:
    return dict(x.terms) if isinstance(x, Poly) else {(): Fraction(x)}


def _poly(terms: dict[tuple[str, ...], Fraction]) -> Entry:
    kept = {n: c for n, c in terms.items() if c}
    if not kept:
        return 0
    if set(kept) == {()}:
        c = kept[()]
        return int(c) if c.denominator == 1 else float(c)
    return Poly(tuple(sorted(kept.items())))


def add(a: Entry, b: Entry) -> Entry:
    terms = _terms(a)
    for n, c in _terms(b).items():
        terms[n] = terms.get(n, Fraction(0)) + c
    return _poly(terms)


def negate(a: Entry) -> Entry:
    return _poly({n: -c for n, c in _terms(a).items()})


def multiply(a: Entry, b: Entry) -> Entry:
    out: dict[tuple[str, ...], Fraction] = {}
    for n, c in _terms(a).items():
        for m, d in _terms(b).items():
            key = tuple(sorted(n + m))
            out[key] = out.get(key, Fraction(0)) + c * d
    return _poly(out)


def divide(a: Entry, b: Entry) -> Entry:
    """The quotient as a polynomial; :class:`Unknown` when there is none."""
    if isinstance(b, Poly):
        if len(b.terms) != 1:
            if isinstance(a, Poly) and a == b:
                return 1
            raise Unknown
        names, factor = b.terms[0]
    else:
        names, factor = (), Fraction(b)
    if not factor:
        raise Unknown
    out: dict[tuple[str, ...], Fraction] = {}
    for n, c in _terms(a).items():
        rest = list(n)
        for s in names:
            if s not in rest:
                raise Unknown
            rest.remove(s)
        out[tuple(rest)] = c / factor
    return _poly(out)


def exact_div(a: Entry, b: Entry) -> Entry:
    """The quotient when it is whole for every size; :class:`Unknown` otherwise."""
    return whole(divide(a, b))


def whole(a: Entry) -> Entry:
    """``a`` if it is a whole number for every size; :class:`Unknown` otherwise."""
    if any(c.denominator != 1 for c in _terms(a).values()):
        raise Unknown
    return a


def compare(a: Entry, b: Entry) -> int:
    """-1, 0 or 1; :class:`Unknown` when it depends on the sizes."""
    d = add(a, negate(b))
    if isinstance(d, Poly):
        if d.sign is None:
            raise Unknown
        return d.sign
    return (d > 0) - (d < 0)


def to_dim(x: Entry) -> Dim:
    """A shape entry; :class:`Unknown` for sums and negative or fractional values."""
    if not isinstance(x, Poly):
        if x != int(x):
            raise Unknown
        return int(x)
    if len(x.terms) != 1 or x.terms[0][1].denominator != 1 or x.terms[0][1] < 0:
        raise Unknown
    names, factor = x.terms[0]
    return "*".join(([str(factor)] if factor != 1 else []) + list(names))


def product(dims: Iterable[Entry]) -> Entry:
    out: Entry = 1
    for d in dims:
        out = multiply(out, d)
    return out


# --- operators on arrays of entries -------------------------------------------------------------------------


def _object(fn: Any, *xs: Array) -> Array:
    out = np.frompyfunc(fn, len(xs), 1)(*xs)
    return np.asarray(out, dtype=object)


def _logical(fn: str) -> Any:
    return {
        "eq": lambda a, b: compare(a, b) == 0, "ne": lambda a, b: compare(a, b) != 0,
        "lt": lambda a, b: compare(a, b) < 0, "le": lambda a, b: compare(a, b) <= 0,
        "gt": lambda a, b: compare(a, b) > 0, "ge": lambda a, b: compare(a, b) >= 0,
        "and": lambda a, b: bool(a) and bool(b), "or": lambda a, b: bool(a) or bool(b),
    }[fn]  # fmt: skip


def _binary(fn: str, floating: bool) -> Any:
    if fn in ("eq", "ne", "lt", "le", "gt", "ge", "and", "or"):
        return _logical(fn)
    table = {
        "add": add, "sub": lambda a, b: add(a, negate(b)), "mul": multiply,
        "div": divide if floating else exact_div, "floordiv": exact_div,
        "min": lambda a, b: a if compare(a, b) <= 0 else b, "max": lambda a, b: a if compare(a, b) >= 0 else b,
        "mod": lambda a, b: multiply(0, exact_div(a, b)), "fmod": lambda a, b: multiply(0, exact_div(a, b)),
    }  # fmt: skip
    if fn not in table:
        raise Unknown
    return table[fn]


def _absolute(a: Entry) -> Entry:
    return a if compare(a, 0) >= 0 else negate(a)


_UNARY = {
    "neg": negate, "abs": _absolute, "floor": whole, "ceil": whole, "round": whole, "trunc": whole,
    "not": lambda a: not a, "sign": lambda a: compare(a, 0), "relu": lambda a: a if compare(a, 0) >= 0 else 0,
}  # fmt: skip


def _reduce(op: ops.Reduce, x: Array) -> Array:
    step = {"sum": add, "prod": multiply, "max": lambda a, b: a if compare(a, b) >= 0 else b,
            "min": lambda a, b: a if compare(a, b) <= 0 else b}.get(op.fn)  # fmt: skip
    if step is None:
        raise Unknown
    axes = sorted((a % x.ndim for a in op.axes), reverse=True) if x.ndim else []
    for axis in axes:
        out = np.frompyfunc(step, 2, 1).reduce(x, axis=axis, keepdims=op.keepdim)
        x = np.asarray(out, dtype=object)
    return x


def _slice(op: ops.Slice, x: Array) -> Array:
    at = [slice(None)] * x.ndim
    at[op.axis] = slice(op.start, op.stop, op.step)
    return x[tuple(at)]


def _cast(dtype: DType, x: Array) -> Array:
    if dtype.is_float:
        return x
    if dtype.is_integer and dtype.bits >= 32:
        return _object(lambda a: whole(a) if isinstance(a, Poly) else int(a), x)
    raise Unknown


def _moved(op: ops.Op, xs: list[Array]) -> Array:
    """Operators that move entries without computing."""
    x = xs[0]
    match op:
        case ops.Reshape(shape=shape) if all(isinstance(d, int) for d in shape):
            return x.reshape(shape)
        case ops.Expand(shape=shape) if all(isinstance(d, int) for d in shape):
            return np.broadcast_to(x, shape)  # type: ignore[arg-type]
        case ops.Transpose(perm=perm):
            return x.transpose(perm)
        case ops.Concat(axis=axis):
            return np.concatenate(xs, axis)
        case ops.Slice():
            return _slice(op, x)
        case ops.Flip(axes=axes):
            return np.flip(x, axes)
        case ops.Tile(repeats=repeats):
            return np.tile(x, repeats)
        case ops.Gather(axis=axis) if not any(isinstance(e, Poly) for e in xs[1].flat):
            return np.take(x, xs[1].astype(np.int64), axis)
    raise Unknown


def evaluate(op: ops.Op, xs: list[Array], dtypes: list[DType]) -> Array:
    """One IR operator on arrays of entries; :class:`Unknown` when it cannot be said."""
    match op:
        case ops.Unary(fn=fn) if fn in _UNARY:
            return _object(_UNARY[fn], xs[0])
        case ops.Binary(fn=fn):
            return _object(_binary(fn, dtypes[0].is_float), *xs)
        case ops.Where():
            if any(isinstance(e, Poly) for e in xs[0].flat):
                raise Unknown
            return _object(lambda c, a, b: a if c else b, *xs)
        case ops.Cast(dtype=dtype):
            return _cast(dtype, xs[0])
        case ops.Reduce():
            return _reduce(op, xs[0])
    return _moved(op, xs)
