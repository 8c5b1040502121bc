"""Weights below 8 bits: several consecutive steps share a vector, each byte of it holding one weight of every step.

VNNI and usdot kernels move a weight to the top of its byte, w * 2^(8-bits), which takes a shift and a mask (the last
field: a mask only), and shift the finished sums right: exact as long as the scaled sum fits 32 bits. Kernels of 16-bit
products and of sdot need the weights themselves: they are stored counted from the smallest, and one subtraction gives
the sign back.
Source: references of the project, CPU kernels, section 3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.tvm.contract.plan import Plan
from bitwright.codegen.tvm.contract.spec import ContractSpec, Conv, Knobs
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec, const, shuffle
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import S8, S16, U8, U16

Array = NDArray[Any]


def refusal(spec: ContractSpec, knobs: Knobs) -> str:
    """Why no kernel unpacks these weights; the empty string if one does."""
    if knobs.bits == 8:
        return ""
    g = spec.geometry
    if knobs.bits not in (2, 4):
        return f"weights are stored in 2, 4 or 8 bits, not {knobs.bits}"
    if spec.element != "u8s8" or spec.right != "constant":
        return "only constant 8-bit weights are stored in fewer bits"
    if isinstance(g, Conv) and g.is_depthwise:
        return "depthwise kernels read their few weights as bytes"
    if knobs.panel:
        shared = spec.pattern is not None and spec.pattern.shared > 1
        return "kernels that compact activations unpack weights in registers only" if shared else ""
    if knobs.isa == "avx2" and not knobs.safe_pairs:
        return "AVX2 kernels unpack weights only where pairs of products are proven to fit 16 bits"
    if scaled(knobs) and spec.depth * max(spec.x_hi, 1) >= 1 << 24:
        return f"sums of {spec.depth} terms times {1 << (8 - knobs.bits)} can leave 32 bits"
    return ""


def scaled(knobs: Knobs) -> bool:
    """Whether sums come out 2^(8-bits) times too large."""
    return knobs.register_bits < 8 and knobs.isa in ("avx512-vnni", "avx-vnni", "neon-i8mm")


# --- the arrays --------------------------------------------------------------------------------------------------


def narrowed(plan: Plan, bits: int, biased: bool, steps: Array) -> Array:
    """[..., steps, quad] of s8 to [..., weight vectors, quad] of u8; raises for a weight that does not fit."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if steps.size and (steps.min() < low or steps.max() > high):
        raise InvalidInput(f"weights of {int(steps.min())} to {int(steps.max())} do not fit {bits} bits")
    where = _fields(plan)
    out = np.zeros((*steps.shape[:-2], plan.all_weight_vectors, steps.shape[-1]), np.uint8)
    for field in range(plan.fields):
        here = [n for n, (_, f) in enumerate(where) if f == field]
        code = (steps[..., here, :] - low if biased else steps[..., here, :] & (2 * high + 1)).astype(np.uint8)
        out[..., [where[n][0] for n in here], :] |= code << np.uint8(field * bits)
    return out


def widened(plan: Plan, bits: int, biased: bool, packed: Array) -> Array:
    """Inverse of :func:`narrowed`."""
    where = _fields(plan)
    sign, mask = 1 << (bits - 1), np.uint8((1 << bits) - 1)
    code = np.empty((*packed.shape[:-2], len(where), packed.shape[-1]), np.int8)
    for field in range(plan.fields):
        here = [n for n, (_, f) in enumerate(where) if f == field]
        code[..., here, :] = (packed[..., [where[n][0] for n in here], :] >> np.uint8(field * bits)) & mask
    return (code if biased else code ^ np.int8(sign)) - np.int8(sign)


def _fields(plan: Plan) -> list[tuple[int, int]]:
    """(weight vector, field) of every step of a run."""
    blocks = [plan.block] * plan.full + ([plan.tail] if plan.tail else [])
    out, first = [], 0
    for block in blocks:
        out += [(first + n // plan.fields, n % plan.fields) for n in range(len(block.steps))]
        first += plan.weight_vectors(block)
    return out


def unpack_panel(
    b: Builder, plan: Plan, runs: int, bits: int, packed: Pointer, at: Index, out: Pointer, n: int
) -> None:
    """Write the bytes of a panel that is stored from ``at`` on: every step's ``n`` weights, step after step."""
    steps, vectors = plan.steps, plan.all_weight_vectors

    def block(source: Index, first: Index, count: int) -> None:
        for i in range(count):
            vector, part = divmod(i, plan.fields)
            raw = b.load(packed, source + vector * n, n)
            b.store(out, first + i * n, as_bytes(raw, bits, part))

    with b.loop(runs, name="run") as r:
        source, first, size = b.index(at + r * (vectors * n)), b.index(r * (steps * n)), len(plan.block.steps)
        with b.loop(plan.full, name="k") as k:
            block(b.index(source + k * (plan.weight_vectors(plan.block) * n)), b.index(first + k * (size * n)), size)
        if plan.tail:
            done = plan.full * plan.weight_vectors(plan.block), plan.full * size
            block(source + done[0] * n, first + done[1] * n, len(plan.tail.steps))


# --- in a kernel -------------------------------------------------------------------------------------------------


def at_the_top(raw: Vec, bits: int, field: int) -> Vec:
    """Bytes of w * 2^(8-bits) out of packed bytes."""
    shift = 8 - bits * (field + 1)
    moved = (raw.bits(U16) << shift).bits(U8) if shift else raw
    return (moved & (256 - (1 << (8 - bits)))).bits(S8)


def as_bytes(raw: Vec, bits: int, field: int) -> Vec:
    """Bytes of w out of packed bytes that count from the smallest."""
    moved = (raw.bits(U16) >> (bits * field)).bits(U8) if field else raw
    return ((moved & ((1 << bits) - 1)) - (1 << (bits - 1))).bits(S8)


def as_words(raw: Vec, bits: int, field: int) -> Vec:
    """16-bit lanes of w out of packed bytes."""
    zero = const(0, U8, raw.lanes)
    words = shuffle([zero, raw], [n for i in range(raw.lanes) for n in (i, raw.lanes + i)]).bits(S16)
    shift = 8 - bits * (field + 1)
    return (words << shift if shift else words) >> (16 - bits)
