"""What a kernel should take: operations over the target's speed, bytes over its bandwidth, plus a call.

A roofline with three roofs, deliberately small: it answers "will it pay" before anything is compiled, and the report
shows it beside the measured time. Efficiencies are those the kernels of ``tvm/contract`` reach (about 0.9).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node, Value
from bitwright.ir.target import Target
from bitwright.ir.types import F32, NM, DType, TensorType
from bitwright.ir.work import macs

_EFFICIENCY = 0.9
_PACKING_MAY_COST = 0.03
_FEW_ROWS = 2
"""With 16 registers, unpacking for more rows than this slows the kernel (benchmarks/lowbit.py)."""
_SPARSE_UNPACKED = 0.95
"""Speed of an N:M kernel of many rows that unpacks its weights, of one that reads bytes (the same)."""
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


def packs(body: Graph, target: Target) -> bool:
    """Whether weights below 8 bits are stored packed and unpacked in the kernel.

    They are what was asked for, so it may cost :data:`_PACKING_MAY_COST` of the time that a byte for each would take.
    """
    if all(b == 8 for b in _low_bits(body).values()):
        return False
    if target.isa != "avx512-vnni" and any(_reuse(n, body) > _FEW_ROWS for n in body.nodes if macs(n, body)):
        return False
    packed, bytes_ = (cost_of(body, target, packed=p).seconds for p in (True, False))
    return packed <= (1 + _PACKING_MAY_COST) * bytes_


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
    body: Graph, target: Target, *, generic: bool = False, sparse: bool = True, packed: bool | None = None
) -> Cost:
    """The cost of one region on one core; ``sparse`` False prices N:M weights as dense ones.

    ``packed``: whether weights below 8 bits are unpacked in the kernel (None: as :func:`packs` decides).
    """
    if packed is None:
        packed = not generic and packs(body, target)
    operations = 2 * sum(macs(n, body) for n in body.nodes)
    low = _low_bits(body) if packed else {}
    nbytes = sum(_touched(v, body, target, sparse, low) for v in body.inputs)
    nbytes += sum(_plain_bytes(body.types[o]) for o in body.outputs)
    arithmetic, limit = 0.0, 0.0
    for node in body.nodes:
        seconds, floor = _node_seconds(node, body, target, sparse, low)
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


def _node_seconds(node: Node, body: Graph, target: Target, sparse: bool, low: Mapping[str, int]) -> tuple[float, float]:
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
        rows, bits = _reuse(node, body), low.get(node.inputs[1], 8)
        sparse_rows = gain > 1 and rows > _FEW_ROWS  # selecting and unpacking compete for the same units
        lighter = 1.0 if sparse_rows else math.sqrt(8 / bits)
        reuse = min(1.0, (0.25 + rows / 16) * lighter) * (_SPARSE_UNPACKED if sparse_rows and bits < 8 else 1.0)
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
