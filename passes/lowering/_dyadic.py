"""Dyadic arithmetic: a real factor as a multiplier of up to 31 bits and a shift, and what integer terms are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import S32, DType, TensorType
from bitwright.ir.weights import Array

SAFE = 1 << 30
"""Bound on every s32 intermediate: the sum of two still fits."""
FEW_BITS = 11
"""Multipliers may lose bits down to this many when the products then fit 32 bits, which takes kernels half the time:
the error is at most 2^-11 of a value, an eighth of what 8 bits leave of a weight."""


def dyadic(factor: Array, bits: int = 31) -> tuple[Array, Array]:
    """m and e with factor ~ m / 2^e, m of ``bits`` bits where e allows (1 <= e <= 62); relative error below 2^-bits.

    >>> [int(v) for v in (*dyadic(np.array(0.5)), *dyadic(np.array(3.0)))]
    [1073741824, 31, 1610612736, 29]
    """
    factor = factor.astype(np.float64)
    e = np.minimum(bits - np.frexp(factor)[1].astype(np.int64), 62)  # below 2^-31 the multiplier loses digits
    m = np.floor(np.ldexp(factor, e) + 0.5).astype(np.int64)
    e, m = np.where(m == 1 << bits, e - 1, e), np.where(m == 1 << bits, 1 << (bits - 1), m)
    return m.astype(np.int32), e.astype(np.int32)


def bits_for(bound: float, factor: Array) -> int:
    """How many bits a multiplier shall have: so few that products and rounding fit 32 bits, if enough are left.

    >>> bits_for(255.0, np.array(2.0)), bits_for(1e5, np.array(0.001)), bits_for(1e6, np.array(0.001))
    (22, 14, 11)
    """
    positive = factor[factor > 0]
    if not math.isfinite(bound) or positive.size == 0:
        return 31
    small, large = (int(np.frexp(f)[1]) for f in (positive.min(), positive.max()))
    for bits in range(22, FEW_BITS - 1, -1):
        if bits > large and bound * (1 << bits) + 2.0 ** (bits - small - 1) < 1 << 31:
            return bits
    return 31


@dataclass(frozen=True)
class Term:
    """An integer tensor that means ``value * scale`` (``zero`` to subtract first), and a bound on |value - zero|."""

    value: str
    scale: Array
    """f64: a scalar, or one entry per index of ``axis``."""
    bound: float
    axis: int | None = None
    zero: int = 0
    bias: Array | None = None
    """f64, in units of the real value, one entry per index of ``axis``."""
    lo: float = -math.inf
    hi: float = math.inf
    """Clamp on the real value after the bias."""

    def clamped(self, lo: float, hi: float) -> Term:
        """The term behind one more relu or clamp."""
        low, high = min(max(self.lo, lo), hi), min(max(self.hi, lo), hi)
        return Term(self.value, self.scale, self.bound, self.axis, self.zero, self.bias, low, high)

    @property
    def reach(self) -> float:
        """Bound on |value * scale| before clamping, bias included."""
        bias = 0.0 if self.bias is None else float(np.abs(self.bias).max(initial=0.0))
        return self.bound * float(np.max(self.scale, initial=0.0)) + bias


@dataclass(frozen=True)
class Grid:
    """Where integers land: format, step and zero point."""

    dtype: DType
    step: float
    zero: int = 0

    def index(self, real: float) -> int:
        """The nearest grid point of a real number, within the format."""
        return int(min(max(round(real / self.step) + self.zero, self.dtype.lo), self.dtype.hi))


class Emitter:
    """Writes integer arithmetic into a builder."""

    def __init__(self, builder: Builder) -> None:
        self.b = builder

    def integers(self, values: Array, stem: str, origin: str) -> str:
        """An s32 constant."""
        a = np.asarray(values)
        return self.b.constant(a.astype(np.int32), TensorType(S32, a.shape), name=stem, origin=origin)

    def biased(self, t: Term, stem: str, origin: str) -> str | None:
        """The term's integers with bias added and zero subtracted, as s32; None when that does not fit."""
        value = t.value
        if t.zero:
            value = self.b.emit(ops.Cast(S32), value, name=f"{stem}.wide", origin=origin)
            zero = self.integers(np.array(t.zero), f"{stem}.zero", origin)
            value = self.b.emit(ops.Binary("sub"), value, zero, name=f"{stem}.centred", origin=origin)
        if t.bias is not None and np.any(t.bias):
            units = np.round(t.bias / t.scale)
            if not np.isfinite(units).all() or float(np.abs(units).max()) + t.bound >= SAFE:
                return None
            shape = self.b.types[t.value].shape
            assert t.axis is not None
            column = units.reshape(-1, *[1] * (len(shape) - 1 - t.axis))
            bias = self.integers(column, f"{stem}.bias", origin)
            value = self.b.emit(ops.Binary("add"), value, bias, name=f"{stem}.biased", origin=origin)
        return value

    def requantize(
        self, value: str, factor: Array, axis: int | None, to: Grid, name: str, origin: str, bound: float = math.inf
    ) -> str | None:
        """value * factor on a grid; None when the factor is not below 2^30. ``bound``: the largest magnitude."""
        factor = np.asarray(factor, np.float64)
        if not np.isfinite(factor).all() or float(factor.max(initial=0.0)) >= SAFE:
            return None
        (m, e), stem = dyadic(factor, bits_for(bound, factor)), name.removesuffix(".free")
        multiplier = self.integers(m, f"{stem}.multiplier", origin)
        shift = self.integers(e, f"{stem}.shift", origin)
        op = ops.Requantize(to.dtype, to.zero, axis if factor.ndim else None)
        return self.b.emit(op, value, multiplier, shift, name=name, origin=origin)

    def bounds(self, lo: float, hi: float, to: Grid) -> tuple[int | None, int | None]:
        """Real bounds on a grid; None where the format holds them already."""
        low, high = (None if math.isinf(v) else to.index(v) for v in (lo, hi))
        return None if low == to.dtype.lo else low, None if high == to.dtype.hi else high

    def land(
        self,
        value: str,
        factor: Array,
        axis: int | None,
        to: Grid,
        limits: tuple[float, float],
        name: str,
        origin: str,
        bound: float = math.inf,
    ) -> str | None:
        """:meth:`requantize`, then the clamp to real bounds if the format leaves any to do."""
        low, high = self.bounds(*limits, to)
        if low is None and high is None:
            return self.requantize(value, factor, axis, to, name, origin, bound)
        free = self.requantize(value, factor, axis, to, f"{name}.free", origin, bound)
        return None if free is None else self.b.emit(ops.Saturate(to.dtype, low, high), free, name=name, origin=origin)

    def put(self, t: Term, to: Grid, name: str, origin: str) -> str | None:
        """A term on a grid: bias, rescale, clamp."""
        start = self.biased(t, name, origin)
        if start is None:
            return None
        bound = t.bound if t.bias is None else t.bound + float(np.abs(t.bias / t.scale).max(initial=0.0)) + 1.0
        return self.land(start, t.scale / to.step, t.axis, to, (t.lo, t.hi), name, origin, bound)


def scalar_quantization(graph: Graph, node: Node) -> tuple[float, int] | None:
    """Scale and zero point of a per-tensor quantize or dequantize with constant parameters, or None."""
    op = node.op
    assert isinstance(op, (ops.Quantize, ops.Dequantize))
    arrays = [graph.constant(x) for x in node.inputs[1:]]
    if op.group or any(a is None for a in arrays):
        return None
    sizes = [np.asarray(a) for a in arrays]
    if any(a.size != 1 for a in sizes) or not float(sizes[0].reshape(-1)[0]) > 0:
        return None
    return float(sizes[0].reshape(-1)[0]), int(sizes[1].reshape(-1)[0]) if len(sizes) > 1 else 0
