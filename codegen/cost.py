"""What a kernel should take: operations over the target's speed, bytes over its bandwidth, plus a call.

A roofline with three roofs, deliberately small: it answers "will it pay" before anything is compiled, and the report
shows it beside the measured time. Efficiencies are those the kernels of ``tvm/contract`` reach (about 0.9).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node, Value
from bitwright.ir.target import Target
from bitwright.ir.types import F32, NM, DType, TensorType
from bitwright.ir.work import macs

Unpacking = Literal["registers", "panel", "bytes"]
"""Weights below 8 bits: unpacked for every tile, once for the tiles of a task, or stored in bytes."""
_EFFICIENCY = 0.9
_PACKING_MAY_COST = 1.03
_FEW_ROWS = {"avx-vnni": 2, "avx2": 1, "portable": 1}
"""Rows at which unpacking in registers is hidden by the loads; with 32 registers (AVX-512) it always is."""
_SPARSE_UNPACKED = {True: 0.93, False: 0.8}
"""Speed of an N:M kernel that unpacks its weights, of one that reads bytes, while memory does not limit it: with
AVX-512 for many rows, and others (benchmarks/lowbit.py)."""
_UNPACKED_L1, _UNPACKED_L2 = 6, 2
"""Weights unpacked per vector operation of 32 bits, into a panel that fits the first-level cache and into others."""
_SLOW = frozenset("exp log erf tanh sigmoid silu gelu gelu_tanh softplus mish pow sin cos div rsqrt sqrt".split())
_SLOW_STEPS = 12
_GENERIC = 1.5e9
"""Scalar element steps per second of kernels that are not vectorised."""
SMALL_FLOAT_SECONDS = 8e-9
"""Of one emulated product and sum."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one region: multiply-adds counted as two operations (dense), bytes moved, predicted seconds and the seconds
    that no kernel of this target could go below (``limit``)."""

    operations: int
    bytes: int
    seconds: float
    limit: float


def stored_bits(dtype: DType) -> int:
    """Bits that a weight of this format takes in a packed kernel: the next of 2, 4 and 8 that holds its values.

    >>> from bitwright.ir.types import parse_dtype
    >>> [stored_bits(parse_dtype(t)) for t in ("ternary", "bipolar", "s2", "s3", "s4", "s5", "s8")]
    [2, 2, 2, 4, 4, 8, 8]
    """
    if not dtype.is_integer or dtype.bits > 8:
        return dtype.bits
    return next((b for b in (2, 4) if -(1 << (b - 1)) <= dtype.lo and dtype.hi < 1 << (b - 1)), 8)


def weight_bytes(t: TensorType, isa: str = "avx512-vnni", packed: bool = True) -> float:
    """Bytes of a weight as its kernel stores it: N:M weights carry their kept values and packed indices.

    8-bit weights take 2 to 8 bits an index with AVX-512 and a byte elsewhere, f32 ones 4 bits (a byte in scalar code).
    ``packed``: weights below 8 bits are unpacked in the kernel; otherwise they take a byte.
    """
    bits = stored_bits(t.dtype) if packed else max(8, t.dtype.bits)
    dense = t.size * bits / 8
    if not isinstance(t.encoding, NM):
        return dense
    kept = t.size * t.encoding.density
    if t.dtype.bits > 8:
        index_bits = 8 if isa == "portable" else 4
    elif isa == "avx512-vnni":
        span = t.encoding.group * t.encoding.block
        index_bits = 2 if span <= 4 else 4 if span <= 16 else 8
    else:
        index_bits = 8
        kept = max(kept, t.size / 4) if isa != "portable" else kept  # at least one of every four is stored
    return kept * (bits + index_bits) / 8


def unpacking(body: Graph, target: Target) -> Unpacking:
    """Where the kernel unpacks weights below 8 bits, or that they take a byte each.

    Packed weights are what was asked for, so they may cost 3 % of the time that bytes would take.
    """
    if all(b == 8 for b in _low_bits(body).values()):
        return "bytes"
    seconds = {form: cost_of(body, target, packed=form).seconds for form in get_args(Unpacking)}
    best: Unpacking = "panel" if seconds["panel"] < seconds["registers"] else "registers"
    return best if seconds[best] <= _PACKING_MAY_COST * seconds["bytes"] else "bytes"


def _low_bits(body: Graph) -> dict[str, int]:
    """Bits that every weight of an integer contraction takes if it is packed, by value."""
    out = {}
    for node in body.nodes:
        if isinstance(node.op, ops.IntLinear | ops.IntConv):
            w, groups = body.types[node.inputs[1]], getattr(node.op, "groups", 1)
            depthwise = groups > 1 and groups == w.shape[0]
            out[node.inputs[1]] = 8 if depthwise else stored_bits(w.dtype)
    return out


def cost_of(
    body: Graph, target: Target, *, generic: bool = False, sparse: bool = True, packed: Unpacking | None = None
) -> Cost:
    """The cost of one region on one core; ``sparse`` False prices N:M weights as dense ones.

    ``packed``: where weights below 8 bits are unpacked (None: as :func:`unpacking` decides).
    """
    if packed is None:
        packed = "bytes" if generic else unpacking(body, target)
    operations = 2 * sum(macs(n, body) for n in body.nodes)
    low = {} if packed == "bytes" else _low_bits(body)
    nbytes = sum(_touched(v, body, target, sparse, low) for v in body.inputs)
    nbytes += sum(_plain_bytes(body.types[o]) for o in body.outputs)
    arithmetic, limit = 0.0, 0.0
    for node in body.nodes:
        seconds, floor = _node_seconds(node, body, target, sparse)
        if low.get(node.inputs[1] if len(node.inputs) > 1 else "", 8) < 8:
            faster, more = _unpacking_seconds(node, body, target, packed)
            seconds = seconds / faster + more
        arithmetic += seconds if not generic else max(seconds, _work(node, body) / _GENERIC)
        limit += floor
    bandwidth = target.cache_bandwidth if nbytes < target.l3_bytes // 2 else target.memory_bandwidth
    memory = nbytes / bandwidth
    return Cost(operations, nbytes, max(arithmetic, memory) + target.launch_seconds, max(limit, memory))


def _plain_bytes(t: TensorType) -> int:
    return t.size * max(1, t.dtype.bits // 8)


def _touched(v: Value, body: Graph, target: Target, sparse: bool, low: Mapping[str, int]) -> int:
    """Bytes of an input that the kernel reads: of a table only the rows that are gathered."""
    readers = [n for n in body.nodes if v.name in n.inputs]
    if readers and all(isinstance(n.op, ops.Gather) and n.inputs[0] == v.name for n in readers):
        return sum(_plain_bytes(n.type) for n in readers)
    if v.type.encoding is not None and sparse:
        return int(weight_bytes(v.type, target.isa, v.name in low))
    if v.name in low:
        return v.type.size * low[v.name] // 8
    return _plain_bytes(v.type)


def _work(node: Node, body: Graph) -> int:
    return max(macs(node, body), node.type.size, *(body.types[x].size for x in node.inputs), 0)


def _unpacking_seconds(node: Node, body: Graph, target: Target, form: Unpacking) -> tuple[float, float]:
    """How much faster products become because their weights are fewer bytes, and the seconds of unpacking them."""
    w = body.types[node.inputs[1]]
    rows, depth = node.type.size / int(w.shape[0]), w.size / int(w.shape[0])
    few = rows <= _FEW_ROWS.get(target.isa, 2)
    wide = target.isa == "avx512-vnni"
    if isinstance(w.encoding, NM) and not (few and wide):
        return _SPARSE_UNPACKED[wide], 0.0
    if form == "panel":
        near = target.vector_bits // 8 * depth <= target.l1_bytes
        return 1.0, w.size / (target.vector_ops_per_second * (_UNPACKED_L1 if near else _UNPACKED_L2))
    if few or wide:
        full = min(1.0, 0.25 + _reuse(node, body) / 16)
        return min(1.0 / full, math.sqrt(8 / stored_bits(w.dtype))), 0.0
    return 1.0, w.size * rows / 2 / (target.vector_ops_per_second * _UNPACKED_L1)  # again for every two rows


def _node_seconds(node: Node, body: Graph, target: Target, sparse: bool) -> tuple[float, float]:
    """Expected seconds of one node's arithmetic, and the seconds at the target's peak."""
    count = macs(node, body)
    if count:
        x, w = body.types[node.inputs[0]], body.types[node.inputs[1]]
        op = node.op
        narrow = (op.partial, op.every) if isinstance(op, ops.IntLinear | ops.IntConv) else (None, 0)
        rate = target.rate(x.dtype, w.dtype, *narrow)
        if isinstance(op, ops.SMALL_FLOAT):
            return count * SMALL_FLOAT_SECONDS, 0.0
        if not rate:
            return 2 * count / (2 * _GENERIC), 0.0
        gain, ideal = 1.0, 1.0
        if isinstance(w.encoding, NM) and sparse:
            gain = max(1.0, target.sparse_gain(x.dtype, w.encoding))
            ideal = w.encoding.group / w.encoding.keep if gain > 1 else 1.0
        reuse = min(1.0, 0.25 + _reuse(node, body) / 16)
        return 2 * count / (rate * _EFFICIENCY * gain * reuse), 2 * count / (rate * ideal)
    if isinstance(node.op, (ops.Weight, ops.Constant)):
        return 0.0, 0.0
    steps = _SLOW_STEPS if getattr(node.op, "fn", "") in _SLOW or isinstance(node.op, ops.Softmax) else 1
    if isinstance(node.op, (ops.LayerNorm, ops.RmsNorm, ops.GroupNorm)):
        steps = 6
    read = () if isinstance(node.op, ops.Gather) else node.inputs
    elements = max([node.type.size, *(body.types[x].size for x in read)])
    wide = target.vector_ops_per_second * 32 / max(32, node.type.dtype.bits if node.type.dtype != F32 else 32)
    return elements * steps / wide, 0.0


def _reuse(node: Node, body: Graph) -> float:
    """Rows that share each weight: matrix-vector products cannot reach the arithmetic peak."""
    if isinstance(node.op, (ops.Linear, ops.IntLinear)):
        return node.type.size / max(1, int(node.type.shape[-1]))
    return 16.0
