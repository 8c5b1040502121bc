"""What a kernel should take on a GPU: tiles over multiprocessors at the tensor cores' rate, bytes, a launch.

Nothing of it was fitted to a device: rates are the data sheet's, the share of them that a tile reaches comes from the
bytes its operands take from shared memory, and how full the device is from counting blocks.
"""

from __future__ import annotations

import math

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.target import Target
from bitwright.ir.types import NM, DType, TensorType
from bitwright.ir.work import macs

PROCESSORS = {"sm_80": 108, "sm_90a": 132}
"""Multiprocessors of the devices that targets are named after."""
_TILES = (
    (256, 128, 0.9),
    (128, 128, 0.8),
    (128, 64, 0.65),
    (64, 64, 0.5),
    (64, 32, 0.32),
    (64, 16, 0.18),
    (64, 8, 0.1),
)
"""Outputs and rows of a block's tile, and the share of the tensor cores' rate that it reaches."""
_SPLITS = (1, 2, 4, 8, 16)
"""Blocks that share a sum."""
_MEMORY = 0.85
"""Share of the memory's bandwidth that a kernel reaches."""
_STEPS = 4.0
"""Operations of 32 bits an element of what follows or stands alone; exponentials and divisions take more."""
_SCALAR = 30.0
"""Operations of a product in the kernel of last resort."""
_SLOW = frozenset("exp log erf tanh sigmoid silu gelu gelu_tanh softplus mish pow sin cos div rsqrt sqrt".split())


def gpu_seconds(body: Graph, target: Target, nbytes: int, *, generic: bool, sparse: bool) -> tuple[float, float]:
    """Expected seconds of a region that moves ``nbytes``, and those that no kernel of this target could go below."""
    products, limit, steps = 0.0, 0.0, 0.0
    for node in body.nodes:
        if macs(node, body):
            expected, floor = _product(node, body, target, generic, sparse)
            products, limit = products + expected, limit + floor
        elif not isinstance(node.op, ops.Weight | ops.Constant | ops.Reshape):
            read = [body.types[x].size for x in node.inputs] if not isinstance(node.op, ops.Gather) else []
            each = 4 * _STEPS if getattr(node.op, "fn", "") in _SLOW or isinstance(node.op, ops.Softmax) else _STEPS
            steps += max([node.type.size, *read]) * (each + (_SCALAR if generic else 0.0))
    arithmetic = products + steps / target.vector_ops_per_second
    memory = nbytes / target.memory_bandwidth
    return max(arithmetic, memory / _MEMORY) + target.launch_seconds, max(limit, memory)


def _product(node: Node, body: Graph, target: Target, generic: bool, sparse: bool) -> tuple[float, float]:
    """Expected seconds of a contraction's products, and those at the peak."""
    count = macs(node, body)
    behind = 2 if isinstance(node.op, ops.GroupLinear) else 1
    x, w = body.types[node.inputs[0]], body.types[node.inputs[behind]] if len(node.inputs) > behind else node.type
    rate = target.rate(target.activation if isinstance(node.op, ops.GroupLinear) else x.dtype, _stored(w, target))
    if not rate or generic or isinstance(node.op, ops.SMALL_FLOAT):
        return count * _SCALAR / target.vector_ops_per_second, 2 * count / rate if rate else 0.0
    if isinstance(node.op, ops.Attention):
        return 2 * count / (rate * target.costs.attention), 2 * count / rate
    gain = target.sparse_gain(x.dtype, w.encoding) if isinstance(w.encoding, NM) and sparse else 0.0
    ideal = 2.0 if gain > 1 else 1.0
    outs, rows, batch, depth = _sizes(node, w, count)
    blocks = PROCESSORS.get(target.mcpu, 108)
    best = min(
        _waves(math.ceil(outs / a) * math.ceil(rows / b) * batch * s, blocks) * a * b * depth / s / share
        for a, b, share in _TILES
        for s in _SPLITS
        if depth / s >= 128 or s == 1
    )
    return 2 * best * blocks / (rate * max(gain, 1.0)), 2 * count / (rate * ideal)


def _stored(w: TensorType, target: Target) -> DType:
    """The format in which weights meet tensor cores: those below 8 bits as bytes."""
    return target.activation if w.dtype.is_integer and w.dtype.bits <= 8 else w.dtype


def _waves(tiles: float, blocks: int) -> float:
    """Turns of the whole device, as a share of full ones."""
    return math.ceil(tiles / blocks)


def _sizes(node: Node, w: TensorType, count: int) -> tuple[int, int, int, float]:
    """Outputs, rows, products side by side (batches or groups), terms of a sum."""
    groups = getattr(node.op, "groups", 1)
    if isinstance(node.op, ops.MatMul | ops.IntMatMul):
        outs = int(node.type.shape[-1])
        batch = max(1, math.prod(int(n) for n in w.shape[:-2]))
    else:
        outs, batch = int(w.shape[0]) // groups, groups
    rows = max(1, node.type.size // (outs * batch))
    return outs, rows, batch, count / (outs * rows * batch)
