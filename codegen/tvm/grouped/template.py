"""Kernel templates: linear layers with group scales, and the quantization of activations at run time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bitwright.codegen.cost import stored_bits
from bitwright.codegen.tvm.contract_template import root_of
from bitwright.codegen.tvm.epilogue import PointwiseEpilogue
from bitwright.codegen.tvm.grouped import packing
from bitwright.codegen.tvm.grouped.emit import emit
from bitwright.codegen.tvm.grouped.spec import GroupSpec, refusal
from bitwright.codegen.tvm.template import Arg, Config, Refused, Template
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.types import BF16, NM, DType
from bitwright.ir.weights import Array


@dataclass(frozen=True)
class GroupedConfig(Config):
    """The layer; positions of weights, scales and zero points (-1: none) among the body's inputs."""

    spec: GroupSpec = None  # type: ignore[assignment]
    weight: int = -1
    scale: int = -1
    zero: int = -1


class Grouped(Template):
    """group_linear with constant weights and a pointwise epilogue."""

    name = "grouped"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes weights of up to 8 bits in groups of multiples of 16, or with one scale an output."""
        root = root_of(body)
        if root is None or not isinstance(root.op, ops.GroupLinear):
            return Refused("no linear layer with group scales")
        if target.kind != "cpu":
            return Refused("grouped kernels are for CPUs")
        if any(x not in constants for x in root.inputs[2:]):
            return Refused("weights or their scales are computed")
        position = {v.name: i for i, v in enumerate(body.inputs)}
        if any(x not in position for x in root.inputs):
            return Refused("an operand is a literal")
        x, w = (body.types[root.inputs[i]] for i in (0, 2))
        outputs, depth = w.static_shape
        group = root.op.group if root.op.group < depth else 0
        spec = GroupSpec(
            math.prod(x.static_shape[:-1]), outputs, depth, group, _bits(w.dtype), w.dtype.lo,
            body.types[root.inputs[3]].dtype != BF16, len(root.inputs) > 4, target.isa,
        )  # fmt: skip
        if why := refusal(spec):
            return Refused(why)
        epilogue = PointwiseEpilogue(body, root, target.isa)
        if why := epilogue.refusal():
            return Refused(f"epilogue: {why}")
        at = [position[n] for n in root.inputs]
        args = [Arg("input", at[0]), Arg("input", at[1])]
        args += [Arg("packed", i) for i in range(3 if spec.zeros else 2)]
        args += [Arg("input", i) for i in epilogue.operands] + [Arg("output", 0)]
        tall, vectors = spec.tile
        scales = f"{'f32' if spec.wide_scales else 'bf16'} scales"
        reason = (
            f"{w.dtype} {f'group {group}' if group else 'one group'}, {scales}, activations s8 per row; "
            f"{spec.bits}-bit weights unpacked in the kernel, tiles of {tall} rows x {vectors * spec.lanes} outputs"
        )
        if isinstance(w.encoding, NM):
            reason = f"runs dense: patterns have kernels for one scale an output (group=0); {reason}"
        return GroupedConfig(
            tasks=spec.panels, scratch_bytes=spec.scratch_bytes, args=tuple(args), isa=target.isa, mcpu=target.mcpu,
            reason=reason, spec=spec, weight=at[2], scale=at[3], zero=at[4] if spec.zeros else -1,
        )  # fmt: skip

    def pack(self, body: Graph, config: Config, constants: Mapping[str, Array]) -> list[Array]:
        assert isinstance(config, GroupedConfig)
        weight, scale, *zero = _constants(body, config, constants)
        out = [packing.pack(config.spec, weight), packing.pack_scales(config.spec, scale)]
        return [*out, *(packing.pack_zeros(config.spec, z) for z in zero)]

    def verify(self, body: Graph, config: Config, constants: Mapping[str, Array], packed: list[Array]) -> str:
        assert isinstance(config, GroupedConfig)
        weight, *rest = _constants(body, config, constants)
        if not np.array_equal(packing.unpack(config.spec, packed[0]), weight):
            return "the packed weights do not unpack to the weights"
        want = [packing.pack_scales(config.spec, rest[0]), *(packing.pack_zeros(config.spec, z) for z in rest[1:])]
        same = all(np.array_equal(a, b) for a, b in zip(want, packed[1:], strict=True))
        return "" if same else "packed scales or zero points differ"

    def kernel_body(self, body: Graph) -> Graph:
        """The body without the size of the group, which the layout knows."""
        root = root_of(body)
        assert root is not None
        plain = replace(root, op=ops.GroupLinear())
        return replace(body, nodes=tuple(plain if n is root else n for n in body.nodes))

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        assert isinstance(config, GroupedConfig)
        root = root_of(body)
        assert root is not None
        return emit(config.spec, PointwiseEpilogue(body, root, config.isa), symbol)


def _bits(dtype: DType) -> int:
    """Bits that a weight takes, signed or not."""
    return stored_bits(dtype) if dtype.lo < 0 else next(b for b in (2, 4, 8) if dtype.bits <= b)


def _constants(body: Graph, config: GroupedConfig, constants: Mapping[str, Array]) -> list[Array]:
    places = [i for i in (config.weight, config.scale, config.zero) if i >= 0]
    return [constants[body.inputs[i].name] for i in places]
