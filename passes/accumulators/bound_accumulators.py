"""How wide the accumulator of every integer contraction must be, with the inputs that prove it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bitwright.ir import numerics, ops
from bitwright.ir.graph import Graph, Level, Node
from bitwright.ir.numerics import bits_for
from bitwright.ir.types import NM
from bitwright.ir.weights import Array
from bitwright.passes._pass import Context, Pass

_CONTRACTIONS = (ops.IntLinear, ops.IntMatMul, ops.IntConv)


@dataclass(frozen=True)
class BoundAccumulators(Pass):
    """Exact range and width of every integer accumulator, as a certificate by value name; the graph stays as it is.

    ``range``: smallest and largest final sum that any input of the proven bounds gives; ``bits`` for it (a register
    that wraps), ``partial_bits`` for every partial sum in any order (one that saturates), ``type_bits`` when only the
    formats are known; ``headroom``: bits of the accumulator that stay unused, partial sums included.

    before:
        graph @g (%x: u8[1, 4]) -> (y = %y) level=integer {
          %w = constant {values=[1, 2, -3, 4]} : s8[1, 4]
          %y = int_linear(%x, %w) {x_zero=8} : s32[1, 1]
        }
    after:
        graph @g (%x: u8[1, 4]) -> (y = %y) level=integer {
          %w = constant {values=[1, 2, -3, 4]} : s8[1, 4]
          %y = int_linear(%x, %w) {x_zero=8} : s32[1, 1]
        }
    """

    name: ClassVar[str] = "bound-accumulators"
    takes: ClassVar[Level] = "integer"
    gives: ClassVar[Level] = "integer"
    establishes: ClassVar[tuple[str, ...]] = ("certificates",)

    def run(self, graph: Graph, context: Context) -> Graph:
        found = context.facts.setdefault("certificates", {})
        for node in graph.nodes:
            if isinstance(node.op, _CONTRACTIONS):
                found[node.output] = certificate = certify(graph, node)
                context.remark(self.name, node.output, **_remark(certificate))
        return graph


def certify(graph: Graph, node: Node) -> dict[str, Any]:
    """The certificate of one integer contraction, as plain data."""
    op, (x, w) = node.op, node.inputs
    x_zero, w_zero = (op.a_zero, op.b_zero) if isinstance(op, ops.IntMatMul) else (op.x_zero, 0)  # type: ignore[attr-defined]
    x_lo, x_hi = proven_bounds(graph, x)
    narrowed = (x_lo, x_hi) != (graph.types[x].dtype.lo, graph.types[x].dtype.hi)
    if isinstance(op, ops.IntConv) and any(op.padding):  # padding adds nothing, as if x were its zero point
        x_lo, x_hi = min(x_lo, x_zero), max(x_hi, x_zero)
    axes, acc = _reduced(graph, node), op.acc.bits  # type: ignore[attr-defined]
    zeros = {"x_zero": x_zero, "w_zero": w_zero}
    sides = x_lo, x_hi, *_weight_bounds(graph, w, w_zero)
    safe = numerics.safe_terms(acc, *sides, **zeros)
    out: dict[str, Any] = {"acc_bits": acc, "x": [x_lo, x_hi], **zeros, "safe_terms": safe}
    terms = _terms(graph.types[w].shape, axes, graph.types[w].encoding if not w_zero else None)
    if terms is None:
        return out | {"proof": "none: the number of terms is not known yet", "terms": None}
    loose, partial = (numerics.type_bound(*sides, terms, **zeros, register=r) for r in numerics.REGISTERS)
    out |= {"terms": terms, "type_bits": bits_for(*partial)}
    out |= {"proof": "types", "range": [*loose], "partial_range": [*partial]}
    array = graph.constant(w)
    if isinstance(array, np.ndarray):
        kept = [i for i in range(array.ndim) if i not in axes]
        rows = array.transpose(*kept, *axes).reshape(-1, math.prod(array.shape[i] for i in axes))
        out |= _by_weights(rows, x_lo, x_hi, x_zero, w_zero) | {"proof": "weights"}
    out["proof"] += " and input range" if narrowed else ""
    out["bits"], out["partial_bits"] = bits_for(*out["range"]), bits_for(*out["partial_range"])
    return out | {"headroom": acc - out["partial_bits"]}


def _by_weights(rows: Array, x_lo: int, x_hi: int, x_zero: int, w_zero: int) -> dict[str, Any]:
    lo, hi = numerics.accumulator_range(rows, x_lo, x_hi, x_zero=x_zero, w_zero=w_zero)
    part_lo, part_hi = numerics.prefix_range(rows, x_lo, x_hi, x_zero=x_zero, w_zero=w_zero)
    at_high, at_low = hi.index(max(hi)), lo.index(min(lo))
    high = numerics.witness(rows[at_high], x_lo, x_hi, w_zero=w_zero).high
    low = numerics.witness(rows[at_low], x_lo, x_hi, w_zero=w_zero).low
    text = f"{at_high}:{high};{at_low}:{low}"
    return {
        "range": [min(lo), max(hi)], "partial_range": [min(part_lo), max(part_hi)], "rows": [at_low, at_high],
        "witness": hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
    }  # fmt: skip


def proven_bounds(graph: Graph, value: str) -> tuple[int, int]:
    """What an integer value can be: its format, or the bounds of the saturate that made it."""
    source, dtype = graph.producers.get(value), graph.types[value].dtype
    while source is not None and isinstance(source.op, (ops.Reshape, ops.Transpose)):
        source = graph.producers.get(source.inputs[0])
    if source is None or not isinstance(source.op, ops.Saturate):
        return dtype.lo, dtype.hi
    lo, hi = source.op.lo, source.op.hi
    return dtype.lo if lo is None else max(lo, dtype.lo), dtype.hi if hi is None else min(hi, dtype.hi)


def _weight_bounds(graph: Graph, w: str, w_zero: int) -> tuple[int, int]:
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


def _remark(c: dict[str, Any]) -> dict[str, Any]:
    """The certificate in words for the report."""
    if c["terms"] is None:
        return {"safe terms": c["safe_terms"], "accumulator bits": c["acc_bits"]}
    told = {"range": f"{c['range'][0]}..{c['range'][1]}", "bits by types": c["type_bits"], "bits": c["bits"]}
    told |= {"partial sums": c["partial_bits"], "headroom": c["headroom"], "proof": c["proof"]}
    return told | ({"witness": c["witness"]} if "witness" in c else {})
