"""What a kernel should take on one core: products at the target's speed, steps of other operators, bytes, a call.

It answers "will it pay" before anything is compiled, and the report shows it beside the measured time. Speeds are the
target's; what no data sheet says (``Target.costs``) is fitted to measured layers by ``benchmarks/predictions.py``,
which also shows how far predictions are from the time of every layer of some models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from bitwright.codegen.cost_gpu import gpu_seconds
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node, Value
from bitwright.ir.target import Target, unit_share
from bitwright.ir.types import NM, DType, TensorType, Unstructured
from bitwright.ir.work import macs

Unpacking = Literal["registers", "panel", "bytes"]
"""Weights below 8 bits: unpacked for every tile, once for the tiles of a task, or stored in bytes."""
_PACKING_MAY_COST = 1.03
_FEW_ROWS = {"avx-vnni": 2, "avx2": 1, "portable": 1}
"""Rows at which unpacking in registers is hidden by the loads; with 32 registers (AVX-512) it always is."""
_SPARSE_UNPACKED = {True: 0.93, False: 0.8}
"""Speed of an N:M kernel that unpacks its weights, of one that reads bytes, while memory does not limit it: with
AVX-512 for many rows, and others (benchmarks/lowbit.py)."""
_UNPACKED_L1, _UNPACKED_L2 = 6, 2
"""Weights unpacked per vector operation of 32 bits, into a panel that fits the first-level cache and into others."""
_SLOW = frozenset("exp log erf tanh sigmoid silu gelu gelu_tanh softplus mish pow sin cos div rsqrt sqrt".split())
_CONVERTS = (ops.Quantize, ops.Dequantize, ops.Requantize, ops.DynamicQuantize, ops.Cast)
_NORMS = (ops.LayerNorm, ops.RmsNorm, ops.GroupNorm)
_MOVES = (
    ops.Transpose, ops.Concat, ops.Slice, ops.Pad, ops.Tile, ops.Flip, ops.Expand, ops.Resize, ops.Gather,
    ops.GatherElements, ops.GatherNd, ops.ScatterElements, ops.ScatterNd,
)  # fmt: skip
_WEIGHTED = (
    ops.Linear, ops.IntLinear, ops.GroupLinear, ops.Conv, ops.IntConv, ops.ConvTranspose, ops.MatMul, ops.IntMatMul,
    *ops.SMALL_FLOAT,
)  # fmt: skip
_ADDRESS_BYTES = 2
"""Of the place of a stored unit of 32 bits in kernels with activations in lanes."""
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
    if isinstance(t.encoding, Unstructured):
        quad = max(1, 32 // max(8, t.dtype.bits))
        return t.size / quad * unit_share(t.encoding, quad) * (4 + _ADDRESS_BYTES)
    if not isinstance(t.encoding, NM):
        return dense
    if isa == "cuda":  # 2:4 stores half of the weights and two bits for each of them
        return t.size / 2 * (bits + 2) / 8 if t.encoding.within(2, 4) else dense
    kept = t.size * t.encoding.density
    if t.dtype.bits > 8:
        index_bits = 4 if isa.startswith("avx") else 8
    elif isa == "avx512-vnni":
        span = t.encoding.group * t.encoding.block
        index_bits = 2 if span <= 4 else 4 if span <= 16 else 8
    else:
        index_bits = 8
        if isa not in ("portable", "vector"):
            kept = max(kept, t.size / 4)  # at least one of every four is stored
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
    body: Graph, target: Target, *, generic: bool = False, sparse: bool = True, packed: Unpacking | None = None,
    working_set: int = 0,
) -> Cost:  # fmt: skip
    """The cost of one region on one core; ``sparse`` False prices N:M weights as dense ones.

    ``packed``: where weights below 8 bits are unpacked (None: as :func:`unpacking` decides). ``working_set``: bytes of
    weights that the whole program reads in a call; those that no cache keeps between calls come from memory.
    """
    if packed is None:
        packed = "bytes" if generic else "registers" if target.kind == "gpu" else unpacking(body, target)
    low = {} if packed == "bytes" else _low_bits(body)
    touched = {v.name: _touched(v, body, target, sparse, low) for v in body.inputs}
    weights = {_weight_of(n) for n in body.nodes if isinstance(n.op, _WEIGHTED)} & set(touched)
    streamed = sum(touched[w] for w in weights)
    moved = sum(touched.values()) - streamed + sum(_plain_bytes(body.types[o]) for o in body.outputs)
    if target.kind == "gpu":
        total, operations = streamed + moved, 2 * sum(macs(n, body) for n in body.nodes)
        return Cost(operations, total, *gpu_seconds(body, target, total, generic=generic, sparse=sparse))
    stream = streamed / _bandwidth(max(working_set, streamed), target)
    near = moved / _bandwidth(max(moved, target.l2_bytes), target)
    products, steps, limit = 0.0, 0.0, 0.0
    for node in body.nodes:
        if macs(node, body):
            seconds, floor = _product_seconds(node, body, target, sparse, generic)
            if low.get(_weight_of(node), 8) < 8:
                faster, more = _unpacking_seconds(node, body, target, packed)
                seconds = seconds / faster + more
            products += seconds
            limit += floor
        else:
            steps += _steps(node, body, target, generic) / target.vector_ops_per_second
    hidden = target.costs.cold * min(stream, products)
    arithmetic = max(products, stream) + hidden + steps
    slowest = arithmetic + near * (target.costs.moved if products else 1.0)
    total, operations = streamed + moved, 2 * sum(macs(n, body) for n in body.nodes)
    memory = total / (target.cache_bandwidth if total < target.l3_bytes // 2 else target.memory_bandwidth)
    return Cost(operations, total, slowest + target.launch_seconds, max(limit, memory))


def working_set(graph: Graph, target: Target) -> int:
    """Bytes of the weights that a program's contractions read in a call, as their kernels store them.

    Of a graph of any level, with static shapes; tables that are gathered from do not count.
    """
    total = 0
    for node in graph.nodes:
        if isinstance(node.op, ops.Region):
            total += working_set(node.op.body, target)
        elif isinstance(node.op, _WEIGHTED) and len(node.inputs) > 1:
            w = graph.types[_weight_of(node)]
            total += int(weight_bytes(w, target.isa)) if w.is_static else 0
    return total


def _bandwidth(nbytes: int, target: Target) -> float:
    """Of the smallest cache that keeps so many bytes beside others, which share the last one with other cores."""
    if nbytes < target.l2_bytes // 2:
        return target.cache_bandwidth * target.costs.near
    return target.cache_bandwidth if nbytes < target.l3_bytes // 4 else target.memory_bandwidth


def _weight_of(node: Node) -> str:
    """The right operand of a contraction."""
    at = 2 if isinstance(node.op, ops.GroupLinear) else 1
    return node.inputs[at] if len(node.inputs) > at else ""


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


def _unpacking_seconds(node: Node, body: Graph, target: Target, form: Unpacking) -> tuple[float, float]:
    """How much faster products become because their weights are fewer bytes, and the seconds of unpacking them."""
    w = body.types[_weight_of(node)]
    rows, depth = node.type.size / int(w.shape[0]), w.size / int(w.shape[0])
    few = rows <= _FEW_ROWS.get(target.isa, 2)
    wide = target.isa == "avx512-vnni"
    if isinstance(w.encoding, NM) and not (few and wide):
        return _SPARSE_UNPACKED[wide], 0.0
    if form == "panel":
        near = target.vector_bits // 8 * depth <= target.l1_bytes
        return 1.0, w.size / (target.vector_ops_per_second * (_UNPACKED_L1 if near else _UNPACKED_L2))
    if few or wide:
        full = _busy(rows, target)
        return min(1.0 / full, math.sqrt(8 / stored_bits(w.dtype))), 0.0
    return 1.0, w.size * rows / 2 / (target.vector_ops_per_second * _UNPACKED_L1)  # again for every two rows


def _busy(rows: float, target: Target) -> float:
    """Share of its speed that a product of few rows reaches: each weight is loaded for them alone."""
    return min(1.0, target.costs.few_rows + rows / 16)


def _product_seconds(node: Node, body: Graph, target: Target, sparse: bool, generic: bool) -> tuple[float, float]:
    """Expected seconds of one contraction's products with weights at hand, and the seconds at the target's peak."""
    count, op, costs = macs(node, body), node.op, target.costs
    if isinstance(op, ops.SMALL_FLOAT):
        return count * SMALL_FLOAT_SECONDS, 0.0
    x, w = body.types[node.inputs[0]], body.types[_weight_of(node)]
    narrow = (op.partial, op.every) if isinstance(op, ops.IntLinear | ops.IntConv) else (None, 0)
    rate = target.rate(target.activation if isinstance(op, ops.GroupLinear) else x.dtype, w.dtype, *narrow)
    if not rate or generic:
        return count * costs.generic / target.vector_ops_per_second, 2 * count / rate if rate else 0.0
    if isinstance(op, ops.Attention):
        return 2 * count / (rate * costs.attention), 2 * count / rate
    groups = getattr(op, "groups", 1)
    if groups > 1 and groups == w.shape[0]:
        each = costs.depthwise if w.dtype.bits > 8 else costs.depthwise_int
        return count * each / target.vector_ops_per_second, 2 * count / rate
    gain, ideal = 1.0, 1.0
    if isinstance(w.encoding, NM | Unstructured) and sparse:
        gain = max(1.0, target.gain(x.dtype, w.encoding))
        ideal = 1 / w.encoding.density if gain > 1 else 1.0
    rows, outputs, padding = _tiling(node, w, target)
    share = (costs.conv if isinstance(op, ops.Conv | ops.IntConv) else costs.linear) * _busy(rows, target)
    tiles = math.ceil(rows / 4) * math.ceil(outputs / (4 * target.vector_bits // 32)) * groups
    return 2 * count * padding / (rate * share * gain) + tiles * costs.tile, 2 * count / (rate * ideal)


def _tiling(node: Node, w: TensorType, target: Target) -> tuple[float, int, float]:
    """Rows that share each weight, outputs of a group, and products computed over those asked for: outputs fill whole
    vectors, and 8-bit products take inputs by four."""
    groups, lanes = getattr(node.op, "groups", 1), target.vector_bits // 32
    if isinstance(node.op, ops.MatMul | ops.IntMatMul):
        outputs, inputs = int(node.type.shape[-1]), 4
    else:
        outputs, inputs = int(w.shape[0]) // groups, int(w.shape[1])
    rows = node.type.size / (outputs * groups)
    padding = math.ceil(outputs / lanes) * lanes / outputs
    if w.dtype.bits <= 8:
        padding *= math.ceil(inputs / 4) * 4 / inputs
    return rows, outputs, padding


def _steps(node: Node, body: Graph, target: Target, generic: bool) -> float:
    """Vector steps of an operator without products, times the elements it takes or makes."""
    op, costs = node.op, target.costs
    if isinstance(op, ops.Weight | ops.Constant | ops.Reshape):
        return 0.0
    read = [body.types[x].size for x in node.inputs] if not isinstance(op, ops.Gather) else []
    elements = max([node.type.size, *read])
    if isinstance(op, ops.MaxPool | ops.AvgPool):
        each, elements = costs.pool * math.prod(op.kernel), node.type.size
    elif isinstance(op, ops.Softmax):
        each = costs.softmax
    elif isinstance(op, ops.Reduce):
        each = costs.reduce
    elif isinstance(op, _NORMS):
        each = costs.norm
    elif isinstance(op, _MOVES):
        each, elements = costs.move, node.type.size
    elif isinstance(op, _CONVERTS):
        each = costs.convert
    else:
        each = costs.slow if getattr(op, "fn", "") in _SLOW else costs.cheap
    return elements * (each + (costs.generic if generic else 0.0)) * max(1.0, node.type.dtype.bits / 32)
