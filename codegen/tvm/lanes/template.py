"""The template of sparse contractions that run with activations in lanes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from bitwright.codegen.tuning.space import Point, Space
from bitwright.codegen.tvm import contract
from bitwright.codegen.tvm.contract.spec import ContractSpec
from bitwright.codegen.tvm.contract_template import Contract, ContractConfig, epilogue_of, initial, root_of
from bitwright.codegen.tvm.lanes.choose import default_knobs, filled, knobs_of, refusal, sharings
from bitwright.codegen.tvm.lanes.emit import emit, memory_of
from bitwright.codegen.tvm.lanes.packing import kept_of, pack, units_of, unpack
from bitwright.codegen.tvm.lanes.spec import LanesKnobs, Shape
from bitwright.codegen.tvm.lanes.words import words_of
from bitwright.codegen.tvm.template import Arg, Config, Refused
from bitwright.ir.graph import Graph
from bitwright.ir.patterns import violation
from bitwright.ir.target import Target
from bitwright.ir.types import NM, Encoding, TensorType, Unstructured
from bitwright.ir.weights import Array

PAYS = 1.05
"""A kernel whose expected gain is below this is left to the dense one."""


@dataclass(frozen=True)
class LanesConfig(ContractConfig):
    """``tile``: the knobs of the kernel; ``spec`` is the dense contraction, ``knobs`` are unused."""

    tile: LanesKnobs = None  # type: ignore[assignment]


class Lanes(Contract):
    """Sparse weights that select whole units of activations: blocks of 4, patterns shared by outputs, or none."""

    name = "lanes"

    def at(self, body: Graph, constants: Mapping[str, Array], target: Target, point: Point) -> Config | Refused:
        root = root_of(body)
        if root is None or (encoding := body.types[root.inputs[1]].encoding) is None:
            return Refused("no contraction with sparse weights")
        weight = constants.get(root.inputs[1])
        if not isinstance(encoding, NM | Unstructured) or weight is None:
            return Refused(f"no constant weights of a pattern: {encoding}")
        dense = super().at(_without(body, root.inputs[1]), constants, target, {})
        if not isinstance(dense, ContractConfig):
            return dense
        spec = dense.spec
        if why := refusal(spec, target.isa):
            return Refused(why)
        if point.get("shared", 1) not in sharings(encoding):
            return Refused(f"{encoding} lets no {point['shared']} outputs share entries")
        gain, shared, kept = _best(spec, weight, encoding, target, point)
        share, other = _share(kept), 1.0
        if isinstance(encoding, NM) and not contract.supports(_with(spec, encoding), target.isa):
            other = max(1.0, target.sparse_gain(spec.input_dtype, encoding))
        if gain < max(PAYS, other) and not point:
            return Refused(_loses(body.types[root.inputs[1]], share, gain, other, target))
        safe = spec.element == "u8s8" and target.isa == "avx2" and contract.pairs_are_safe(spec, weight)
        tile = default_knobs(spec, target.isa, kept, shared, encoding, safe_pairs=safe, point=point)
        words = words_of(epilogue_of(body, dense))
        return _config(dense, tile, words, _reason(encoding, spec, tile, share, gain))

    def space(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Space:
        config, root = self.configure(body, constants, target), root_of(body)
        if not isinstance(config, LanesConfig) or root is None:
            return Space()
        return knobs_of(config.spec, config.tile, sharings(body.types[root.inputs[1]].encoding))

    def pack(self, body: Graph, config: Config, constants: Mapping[str, Array]) -> list[Array]:
        assert isinstance(config, LanesConfig)
        weight = constants[body.inputs[config.weight].name]
        init = [initial(config, weight, body, constants)] if config.spec.init else []
        return [*pack(config.spec, config.tile, weight), *init]

    def emit(self, body: Graph, config: Config, symbol: str) -> object:
        assert isinstance(config, LanesConfig)
        return emit(config.spec, config.tile, epilogue_of(body, config), symbol).primfunc

    def verify(self, body: Graph, config: Config, constants: Mapping[str, Array], packed: list[Array]) -> str:
        assert isinstance(config, LanesConfig)
        weight = constants[body.inputs[config.weight].name]
        again = unpack(config.spec, config.tile, packed)
        if not np.array_equal(again, weight):
            return "the packed weights do not unpack to the weights"
        if config.tile.safe_pairs and not contract.pairs_are_safe(config.spec, again):
            return "these weights can saturate pmaddubsw"
        pattern = body.inputs[config.weight].type.encoding
        return violation(again, pattern) if pattern else ""


def _best(
    spec: ContractSpec, weight: Array, encoding: NM | Unstructured, target: Target, point: Point
) -> tuple[float, int, Array]:
    """The expected gain of the best number of outputs that share entries (or that of the point), that number, and the
    units they keep."""
    units, found = units_of(spec, weight), []
    for n in sharings(encoding):
        if n != point.get("shared", n):
            continue
        kept = kept_of(units, n)
        found.append((filled(spec, target.isa) * target.lanes_gain(spec.input_dtype, _share(kept), n), n, kept))
    return max(found, key=lambda choice: (choice[0], -choice[1]))


def _share(kept: Array) -> float:
    return float(np.count_nonzero(kept)) / max(1, kept.size)


def _without(body: Graph, weight: str) -> Graph:
    """The body as if the weight had no pattern."""
    inputs = tuple(replace(v, type=v.type.with_encoding(None)) if v.name == weight else v for v in body.inputs)
    return replace(body, inputs=inputs)


def _with(spec: ContractSpec, nm: NM) -> ContractSpec:
    return replace(spec, pattern=NM(nm.keep, nm.group, 1, block=nm.block))


def _config(dense: ContractConfig, tile: LanesKnobs, words: tuple[int, ...] | None, reason: str) -> LanesConfig:
    """The dense kernel's decisions with this kernel's tasks, scratch memory and streams."""
    shape = Shape(dense.spec, tile)
    kept = {f.name: getattr(dense, f.name) for f in fields(dense)}
    packed = 2 + shape.pointers + dense.spec.init
    args = [a for a in dense.args if a.kind != "packed"]
    streams = [Arg("packed", i) for i in range(packed)]
    kept |= {
        "tasks": shape.row_blocks * shape.output_blocks, "scratch_bytes": memory_of(shape, words).size,
        "args": (args[0], *streams, *args[1:]), "reason": reason, "knobs": None, "tile": tile,
    }  # fmt: skip
    return LanesConfig(**kept)


def _reason(encoding: Encoding, spec: ContractSpec, tile: LanesKnobs, share: float, gain: float) -> str:
    """What runs, for the report."""
    unit = "blocks of 4" if spec.element == "u8s8" else "weights"
    shared = f" shared by {tile.shared} outputs" if tile.shared > 1 else ""
    form = "a fixed count" if tile.counts else "row pointers"
    return f"{share:.1%} of {unit}{shared}, activations in lanes, {form}, expected {gain:.2g}x over dense ({encoding})"


def _loses(weight: TensorType, share: float, gain: float, other: float, target: Target) -> str:
    """Why the kernel does not pay."""
    faster = f"the {weight.encoding} kernel is expected to gain {other:.2g}x" if other > 1 else "dense is as fast"
    return f"{share:.1%} of the units are stored, {gain:.2f}x over dense on {target.name}: {faster}"
