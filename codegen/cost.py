"""What a kernel should take: operations over the target's speed, bytes over its bandwidth, plus a call.

A roofline with three roofs, deliberately small: it answers "will it pay" before anything is compiled, and the report
shows it beside the measured time. Efficiencies are those the kernels of ``tvm/contract`` reach (about 0.9).
"""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node, Value
from bitwright.ir.target import Target
from bitwright.ir.types import F32, NM, TensorType
from bitwright.ir.work import macs

_EFFICIENCY = 0.9
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


def weight_bytes(t: TensorType, isa: str = "avx512-vnni") -> float:
    """Bytes of a weight as its kernel stores it: N:M weights carry their kept values and packed indices.

    8-bit weights take 2 to 8 bits an index with AVX-512 and a byte elsewhere, f32 ones 4 bits (a byte in scalar code).
    """
    dense = t.size * max(8, t.dtype.bits) / 8
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
    return kept * (max(8, t.dtype.bits) + index_bits) / 8


def cost_of(body: Graph, target: Target, *, generic: bool = False, sparse: bool = True) -> Cost:
    """The cost of one region on one core; ``sparse`` False prices N:M weights as dense ones."""
    operations = 2 * sum(macs(n, body) for n in body.nodes)
    nbytes = sum(_touched(v, body, target, sparse) for v in body.inputs)
    nbytes += sum(_plain_bytes(body.types[o]) for o in body.outputs)
    arithmetic, limit = 0.0, 0.0
    for node in body.nodes:
        seconds, floor = _node_seconds(node, body, target, sparse)
        arithmetic += seconds if not generic else max(seconds, _work(node, body) / _GENERIC)
        limit += floor
    bandwidth = target.cache_bandwidth if nbytes < target.l3_bytes // 2 else target.memory_bandwidth
    memory = nbytes / bandwidth
    return Cost(operations, nbytes, max(arithmetic, memory) + target.launch_seconds, max(limit, memory))


def _plain_bytes(t: TensorType) -> int:
    return t.size * max(1, t.dtype.bits // 8)


def _touched(v: Value, body: Graph, target: Target, sparse: bool) -> int:
    """Bytes of an input that the kernel reads: of a table only the rows that are gathered."""
    readers = [n for n in body.nodes if v.name in n.inputs]
    if readers and all(isinstance(n.op, ops.Gather) and n.inputs[0] == v.name for n in readers):
        return sum(_plain_bytes(n.type) for n in readers)
    if v.type.encoding is not None and sparse:
        return int(weight_bytes(v.type, target.isa))
    return _plain_bytes(v.type)


def _work(node: Node, body: Graph) -> int:
    return max(macs(node, body), node.type.size, *(body.types[x].size for x in node.inputs), 0)


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
