"""What is known about the accumulator of one integer contraction, as plain data: ranges, widths, witness inputs."""

from __future__ import annotations

import base64
import hashlib
import math
from typing import Any

import numpy as np

from bitwright.ir import numerics, ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.numerics import bits_for
from bitwright.ir.types import NM
from bitwright.ir.weights import Array

CONTRACTIONS = (ops.IntLinear, ops.IntMatMul, ops.IntConv)
Bounds = tuple[int, int]
Sums = tuple[list[int], list[int]]


def certify(graph: Graph, node: Node, observed: Bounds | None = None, *, trust: bool = False) -> dict[str, Any]:
    """The certificate of one integer contraction.

    ``observed``: the smallest and largest input code that calibration met; it is only told beside the proof, unless
    ``trust`` makes it the bound (kind ``calibrated``).
    """
    op, (x, w) = node.op, node.inputs
    x_zero, w_zero = (op.a_zero, op.b_zero) if isinstance(op, ops.IntMatMul) else (op.x_zero, 0)  # type: ignore[attr-defined]
    proven, whole = proven_bounds(graph, x), (graph.types[x].dtype.lo, graph.types[x].dtype.hi)
    used = observed if trust and observed is not None else proven
    used, whole = _padded(op, used, x_zero), _padded(op, whole, x_zero)
    axes, acc = _reduced(graph, node), op.acc.bits  # type: ignore[attr-defined]
    zeros = {"x_zero": x_zero, "w_zero": w_zero}
    sides = (*used, *_weight_bounds(graph, w, w_zero))
    out: dict[str, Any] = {
        "acc_bits": acc, "on_overflow": "wrap", "x": [*used], **zeros, "w": [*sides[2:]],
        "safe_terms": numerics.safe_terms(acc, *sides, **zeros),
    }  # fmt: skip
    kind = "calibrated" if trust and observed is not None else "type"
    terms = _terms(graph.types[w].shape, axes, graph.types[w].encoding if not w_zero else None)
    out |= {"kind": kind, "terms": terms}
    if terms is None:
        return out
    loose, partial = (numerics.type_bound(*sides, terms, **zeros, register=r) for r in numerics.REGISTERS)
    by_type = numerics.type_bound(*whole, *sides[2:], terms, **zeros, register="saturate")
    out |= {"type_bits": bits_for(*by_type), "range": [*loose], "partial_range": [*partial]}
    array = graph.constant(w)
    if isinstance(array, np.ndarray):
        rows = rows_of(array, axes)
        sums = numerics.signed_sums(rows, w_zero=w_zero)
        out |= _by_weights(rows, sums, *used, x_zero, w_zero) | {"digest": digest_of(array)}
        narrowed = used != whole
        out["weight_bits"] = _bits(_by_weights(rows, sums, *whole, x_zero, w_zero)) if narrowed else _bits(out)
        if kind == "type":
            out["kind"] = "weights+ranges" if narrowed else "weights"
        if observed is not None and not trust:
            seen = _by_weights(rows, sums, *_padded(op, observed, x_zero), x_zero, w_zero)
            out |= {"observed": [*observed], "observed_bits": _bits(seen)}
    if used != whole:
        out["range_bits"] = _bits(out)
    out["bits"], out["partial_bits"] = bits_for(*out["range"]), _bits(out)
    return out | {"headroom": acc - out["partial_bits"]}


def rows_of(array: Array, axes: tuple[int, ...]) -> Array:
    """Weights as [sums, terms]."""
    kept = [i for i in range(array.ndim) if i not in axes]
    return array.transpose(*kept, *axes).reshape(-1, math.prod(array.shape[i] for i in axes))


def digest_of(array: Array) -> str:
    """Digest of the integer weights in their logical order, as int8 bytes where they fit, else as int64."""
    plain = np.ascontiguousarray(array, np.int8 if array.dtype.itemsize == 1 else np.int64)
    return hashlib.blake2b(plain.reshape(-1).view(np.uint8).data, digest_size=16).hexdigest()


def _bits(c: dict[str, Any]) -> int:
    """Width for every partial sum, those of the kernel's own order included."""
    ranges = [c["partial_range"], *([c["register_range"]] if "register_range" in c else [])]
    return max(bits_for(*r) for r in ranges)


def _by_weights(rows: Array, sums: Sums, x_lo: int, x_hi: int, x_zero: int, w_zero: int) -> dict[str, Any]:
    """Ranges over all rows, and the inputs of the two rows that reach furthest: one bit for each term."""
    lo, hi = numerics.range_of_sums(sums, x_lo, x_hi, x_zero=x_zero)
    part = numerics.range_of_sums(sums, x_lo, x_hi, x_zero=x_zero, partial=True)
    # kernels start from -x_zero * sum(w) and add products of the codes as they are
    codes = numerics.range_of_sums(sums, x_lo, x_hi, partial=True)
    start = [-x_zero * (p + n) for p, n in zip(*sums, strict=True)]
    at_high, at_low = hi.index(max(hi)), lo.index(min(lo))
    return {
        "range": [min(lo), max(hi)], "partial_range": [min(part[0]), max(part[1])], "rows": [at_low, at_high],
        "register_range": [min(map(sum, zip(start, codes[0], strict=True))),
                           max(map(sum, zip(start, codes[1], strict=True)))],
        "high": packed_bits(_centred(rows[at_high], w_zero) > 0),
        "low": packed_bits(_centred(rows[at_low], w_zero) < 0),
    }  # fmt: skip


def packed_bits(up: Array) -> str:
    """One bit for each term (set: the input takes its upper bound), eight to a byte, first bit highest, in base64."""
    return base64.b64encode(np.packbits(np.asarray(up, bool)).tobytes()).decode()


def _centred(row: Array, w_zero: int) -> Array:
    wide: Array = row.astype(object) if row.dtype.itemsize > 4 else row.astype(np.int64)
    return wide - w_zero


def proven_bounds(graph: Graph, value: str) -> Bounds:
    """What an integer value can be: its format, or the bounds of the saturate that made it."""
    source, dtype = graph.producers.get(value), graph.types[value].dtype
    while source is not None and isinstance(source.op, (ops.Reshape, ops.Transpose)):
        source = graph.producers.get(source.inputs[0])
    if source is None or not isinstance(source.op, ops.Saturate):
        return dtype.lo, dtype.hi
    lo, hi = source.op.lo, source.op.hi
    return dtype.lo if lo is None else max(lo, dtype.lo), dtype.hi if hi is None else min(hi, dtype.hi)


def _padded(op: ops.Op, bounds: Bounds, zero: int) -> Bounds:
    """Padding adds nothing, as if x were its zero point there."""
    if isinstance(op, ops.IntConv) and any(op.padding):
        return min(bounds[0], zero), max(bounds[1], zero)
    return bounds


def _weight_bounds(graph: Graph, w: str, w_zero: int) -> Bounds:
    """Bounds of the weights by format; a pattern's dropped weights are zeros."""
    lo, hi = proven_bounds(graph, w)
    return (min(lo, 0), max(hi, 0)) if graph.types[w].encoding is not None and not w_zero else (lo, hi)


def _reduced(graph: Graph, node: Node) -> tuple[int, ...]:
    """Axes of the second operand that the contraction sums over."""
    rank = graph.types[node.inputs[1]].rank
    if isinstance(node.op, ops.IntMatMul):
        return (rank - 1 if node.op.transpose_b or rank == 1 else rank - 2,)
    return tuple(range(1, rank))


def _terms(shape: tuple[Any, ...], axes: tuple[int, ...], encoding: object) -> int | None:
    """How many products one sum can have that are not zero; None while a size is symbolic."""
    if not all(isinstance(shape[i], int) for i in axes):
        return None
    sizes = {i: int(shape[i]) for i in axes}
    if isinstance(encoding, NM) and (axis := encoding.axis % len(shape)) in sizes:
        sizes[axis] = numerics.kept_terms(sizes[axis], encoding)
    return math.prod(sizes.values())
