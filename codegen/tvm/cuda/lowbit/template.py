"""Kernel template: linear layers of 8-bit codes and low-bit or sparse weights.

With group scales for few and for many rows; with exact sums for few, where it reads fewer bytes than kernels of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from bitwright.codegen.tvm.contract_template import root_of
from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.config import CudaConfig
from bitwright.codegen.tvm.cuda.lowbit import packing
from bitwright.codegen.tvm.cuda.lowbit.emit import Kernel, Operands
from bitwright.codegen.tvm.cuda.lowbit.spec import SHARED, LowbitSpec, refusal
from bitwright.codegen.tvm.cuda.store import RowEpilogue
from bitwright.codegen.tvm.generic_eval import memory
from bitwright.codegen.tvm.pointwise import why_unsupported
from bitwright.codegen.tvm.template import Arg, Config, Refused, Template
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.target import Target
from bitwright.ir.types import BF16, F32, NM, S8, S32, U16, U32, DType
from bitwright.ir.weights import Array

_MULTIPROCESSORS = 132
FEW = 16
"""Rows up to which bytes decide, and no longer the tensor cores."""


@dataclass(frozen=True)
class LowbitConfig(CudaConfig):
    """The layer; ``others`` are the positions of the body's inputs that are not packed."""

    spec: LowbitSpec = None  # type: ignore[assignment]
    others: tuple[int, ...] = ()


class CudaLowbit(Template):
    """group_linear, or int_linear of few rows, with constant weights and a pointwise epilogue."""

    name: ClassVar[str] = "cuda_lowbit"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes weights of up to 8 bits in groups of multiples of 16, or with one scale an output."""
        root = root_of(body)
        if root is None or not isinstance(root.op, ops.GroupLinear | ops.IntLinear):
            return Refused("no linear layer of codes")
        if why := _operands(body, root, constants):
            return Refused(why)
        spec = _spec(body, root, constants)
        if why := refusal(spec):
            return Refused(why)
        if spec.exact and (spec.rows > FEW or (spec.bits == 8 and not spec.sparse and not spec.kept[0])):
            return Refused("8-bit weights without a pattern, or many rows: tensor-core kernels of bytes take them")
        spec = _spread(spec)
        packed = set(_weights(root))
        others = tuple(i for i, v in enumerate(body.inputs) if v.name not in packed)
        count = 1 + spec.offsets if spec.exact else 2 + spec.zeros
        args = [*(Arg("input", i) for i in others), *(Arg("packed", i) for i in range(count))]
        return LowbitConfig(
            args=(*args, *(Arg("output", i) for i in range(len(body.outputs)))), mcpu=target.mcpu, spec=spec,
            threads=32 * spec.warps_k * spec.warps_o, grid=spec.blocks, others=others, reason=_reason(spec),
        )  # fmt: skip

    def pack(self, body: Graph, config: Config, constants: Mapping[str, Array]) -> list[Array]:
        assert isinstance(config, LowbitConfig)
        return [packing.pack(config.spec, _codes(body, constants)), *_beside(body, config.spec, constants)]

    def verify(self, body: Graph, config: Config, constants: Mapping[str, Array], packed: list[Array]) -> str:
        assert isinstance(config, LowbitConfig)
        if not np.array_equal(packing.unpack(config.spec, packed[0]), _codes(body, constants)):
            return "the packed weights do not unpack to the weights"
        want = _beside(body, config.spec, constants)
        same = all(np.array_equal(a, b) for a, b in zip(want, packed[1:], strict=True))
        return "" if same else "packed scales or zero points differ"

    def kernel_body(self, body: Graph) -> Graph:
        """The body without the size of the group, which the spec knows."""
        root = root_of(body)
        assert root is not None
        if not isinstance(root.op, ops.GroupLinear):
            return body
        plain = replace(root, op=ops.GroupLinear())
        return replace(body, nodes=tuple(plain if n is root else n for n in body.nodes))

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        assert isinstance(config, LowbitConfig)
        root, spec = root_of(body), config.spec
        assert root is not None
        b = CudaBuilder(symbol, grid=config.grid, threads=config.threads)
        inputs = {}
        for i in config.others:
            t = body.inputs[i].type
            inputs[body.inputs[i].name] = b.param(f"x{i}", memory(t.dtype), t.size)
        weights = b.param("weights", U32, spec.weight_words)
        each = spec.tiles * 16 * spec.groups
        scales = b.param("scales", F32 if spec.wide_scales else U16, each) if not spec.exact else None
        zeros = b.param("zeros", S8, each) if spec.zeros else None
        offsets = b.param("offsets", S32, each) if spec.offsets else None
        types = [body.types[o] for o in body.outputs]
        outputs = [b.param(f"y{i}", memory(t.dtype), t.size) for i, t in enumerate(types)]
        x_scale = inputs[root.inputs[1]] if not spec.exact else None
        operands = Operands(inputs[root.inputs[0]], weights, x_scale, scales, zeros, offsets)
        epilogue = RowEpilogue(b, body, root, inputs, outputs)
        Kernel(b, spec, operands).run(epilogue, body, root)
        return b.finish()


def _weights(root: Node) -> tuple[str, ...]:
    """The operands that are packed: codes, and scales and zero points if there are any."""
    return root.inputs[2:] if isinstance(root.op, ops.GroupLinear) else root.inputs[1:]


def _operands(body: Graph, root: Node, constants: Mapping[str, Array]) -> str:
    """Why the operands do not fit, or the empty string."""
    inputs = {v.name for v in body.inputs}
    op = root.op
    if isinstance(op, ops.IntLinear) and (op.acc != S32 or body.types[root.inputs[1]].dtype.lo >= 0):
        return "sums other than s32, or unsigned weights"
    if any(x not in constants for x in _weights(root)):
        return "weights or their scales are computed"
    if any(x not in inputs for x in root.inputs):
        return "an operand is a literal or computed in the same kernel"
    if not all(t.is_static for t in body.types.values()):
        return "symbolic sizes"
    rest = [n for n in body.nodes if n is not root and not isinstance(n.op, ops.Constant)]
    if any(x in n.inputs for n in rest for x in _weights(root)):
        return "the weights are used behind the product, too"
    if any(body.types[o].shape != root.type.shape for o in body.outputs):
        return "a result has another shape than the product"
    for n in rest:
        if why := why_unsupported(n.op, [body.types[x].dtype for x in n.inputs]):
            return f"epilogue: {why}"
    return ""


def _spec(body: Graph, root: Node, constants: Mapping[str, Array]) -> LowbitSpec:
    x, w = body.types[root.inputs[0]], body.types[_weights(root)[0]]
    outputs, depth = w.static_shape
    codes, rows = _codes(body, constants), math.prod(x.static_shape[:-1])
    if isinstance(root.op, ops.GroupLinear):
        zero = _zeros(body, constants)
        group = root.op.group if root.op.group < depth else 0
        wide = body.types[root.inputs[3]].dtype != BF16
        spec = LowbitSpec(rows, outputs, depth, group, _bits(w.dtype), wide, zero is not None, False)
    else:
        assert isinstance(root.op, ops.IntLinear)
        spec = LowbitSpec(
            rows, outputs, depth, 0, _bits(w.dtype), False, False, False, exact=True, unsigned=x.dtype.lo >= 0,
            offsets=root.op.x_zero != 0,
        )  # fmt: skip
    if not isinstance(w.encoding, NM) or spec.zeros:
        return spec
    stored = [spec]
    if spec.bits > 2 and _most(codes, 4) <= 2:
        stored.append(replace(spec, sparse=True))
    if spec.rows <= FEW:
        stored += [
            replace(spec, bits=4 if spec.bits == 3 else spec.bits, kept=(_most(codes, m), m)) for m in (4, 8, 16)
        ]
    return min((s for s in stored if _sensible(s)), key=lambda s: s.stored_bytes)


def _most(codes: Array, group: int) -> int:
    """The most that is not zero of ``group`` consecutive inputs; at least 1."""
    padded = np.pad(codes != 0, ((0, 0), (0, -codes.shape[1] % group)))
    return max(1, int(padded.reshape(codes.shape[0], -1, group).sum(-1).max()))


def _sensible(spec: LowbitSpec) -> bool:
    """Whether a stored pattern has a kernel: groups within a lane, whole words, at most a quarter."""
    n, m = spec.kept
    if not n:
        return True
    return n in (1, 2) and 4 * n <= m and 4 * m <= spec.piece and min(spec.streams) >= 1 and not refusal(spec)


def _bits(dtype: DType) -> int:
    """Bits of a stored code, around its middle."""
    middle = _middle(dtype)
    return next(b for b in (2, 3, 4, 8) if -(1 << (b - 1)) <= dtype.lo - middle and dtype.hi - middle < 1 << (b - 1))


def _middle(dtype: DType) -> int:
    """What is taken off codes to make them signed."""
    return 1 << (dtype.bits - 1) if dtype.lo >= 0 else 0


def _codes(body: Graph, constants: Mapping[str, Array]) -> Array:
    """Codes as signed ones, s8[outputs, depth]."""
    root = root_of(body)
    assert root is not None
    name = _weights(root)[0]
    return (constants[name].astype(np.int16) - _middle(body.types[name].dtype)).astype(np.int8)


def _zeros(body: Graph, constants: Mapping[str, Array]) -> Array | None:
    """Zero points of the signed codes, s8[outputs, groups], or None."""
    root = root_of(body)
    assert root is not None
    middle = _middle(body.types[root.inputs[2]].dtype)
    if len(root.inputs) > 4:
        return (constants[root.inputs[4]].astype(np.int16) - middle).astype(np.int8)
    return np.full(constants[root.inputs[3]].shape, -middle, np.int8) if middle else None


def _beside(body: Graph, spec: LowbitSpec, constants: Mapping[str, Array]) -> list[Array]:
    """What is packed beside the codes: scales and zero points, or what a zero point of the activations takes off."""
    root = root_of(body)
    assert root is not None
    if isinstance(root.op, ops.IntLinear):
        total = np.zeros(spec.tiles * 16, np.int64)
        total[: spec.outputs] = -root.op.x_zero * _codes(body, constants).sum(1, dtype=np.int64)
        return [total.astype(np.int32)] if spec.offsets else []
    zero = _zeros(body, constants)
    out = [packing.pack_groups(spec, _plain(constants[root.inputs[3]]))]
    return [*out, *([packing.pack_groups(spec, zero)] if zero is not None else [])]


def _plain(scale: Array) -> Array:
    """Scales as the kernel's memory declares them."""
    return scale.view(np.uint16) if scale.dtype.itemsize == 2 else scale


def _spread(spec: LowbitSpec) -> LowbitSpec:
    """How many warps share a tile's inputs, and how many tiles a block has: few rows are split over the inputs."""
    room = max(1, SHARED // (4 * spec.stage_words))
    if spec.rows <= FEW:
        most = 16 if spec.tiles < _MULTIPROCESSORS else 8
        return replace(spec, warps_k=max(1, min(most, spec.turns, room)))
    if spec.rows <= 64:
        return replace(spec, warps_k=max(1, min(4, spec.turns, room // 2)), warps_o=2)
    return replace(spec, warps_o=4)


def _reason(spec: LowbitSpec) -> str:
    n, m = spec.kept if spec.kept[0] else (2, 4)
    pattern = f", {n} of {m} stored with their places" if spec.sparse or spec.kept[0] else ""
    group = "exact sums" if spec.exact else f"group {spec.group}" if spec.group else "one group"
    return (
        f"{spec.bits}-bit weights{pattern}, {group}: {spec.stored_bytes / spec.floor_bytes:.2f} of the bytes of codes, "
        f"places and scales; {8 * spec.columns} rows at once, inputs split between {spec.warps_k} warps"
    )


__all__ = ["CudaLowbit", "LowbitConfig"]
