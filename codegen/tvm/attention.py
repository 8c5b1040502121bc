"""Attention in one kernel: tiles of queries against all keys, with nothing but a tile of scores in memory.

Queries run along the lanes of the scores, so that keys are read where they lie, one element at a time, and the
softmax needs no step across lanes; in the second product the value's columns are the lanes and the probabilities
are broadcast. Reshapes and transposes around the attention are strides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from bitwright.codegen.tvm.attention_bf16 import PairWriter, pair_scratch, why_not_pairs
from bitwright.codegen.tvm.attention_tile import Tile, TileWriter
from bitwright.codegen.tvm.attention_views import Attend, Operand, Unfit, attend_of
from bitwright.codegen.tvm.generic_eval import div, memory, unflatten
from bitwright.codegen.tvm.template import Config, Refused, Template, plain_args
from bitwright.codegen.tvm.tir import Builder, Index, minimum
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.types import BF16, F32
from bitwright.ir.weights import Array

LONG = 2048
"""From this many keys on, tiles are half as wide: the scores should stay in the second-level cache."""


@dataclass(frozen=True)
class AttentionConfig(Config):
    """``lanes`` of queries, ``vectors`` of them per tile; ``columns`` lanes of the value; its tile sizes.

    ``pairs``: products are of bf16, two at a time."""

    lanes: int = 4
    vectors: int = 2
    columns: int = 4
    registers: int = 16
    pairs: bool = False

    @property
    def tile_rows(self) -> int:
        return self.lanes * self.vectors


class AttentionTemplate(Template):
    """softmax(q k^T) v with views and pointwise operators around it."""

    name: ClassVar[str] = "attention"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes f32, f16 and bf16 operands behind views, any mask, causal, grouped keys."""
        try:
            a = attend_of(body)
        except Unfit as why:
            return Refused(str(why))
        most = target.vector_bits // 32
        lanes = min(most, max(4, 1 << (a.rows - 1).bit_length()))
        columns = min(most, max(4, 1 << (a.width - 1).bit_length()))
        registers = target.vector_registers
        limit = (4 if registers >= 32 else 2) // (2 if a.keys > LONG else 1)
        total = -(-a.rows // lanes)
        tiles = -(-total // limit)
        vectors = -(-total // tiles)
        config = AttentionConfig(
            tasks=math.prod(a.batch) * tiles, args=plain_args(body), isa=target.isa, mcpu=target.mcpu, lanes=lanes,
            vectors=vectors, columns=columns, registers=registers,
        )  # fmt: skip
        unpaired = why_not_pairs(body, a, target.features, lanes, columns)
        halves = body.types[a.q.name].dtype == BF16
        how = ", products of bf16" if not unpaired else f", bf16 as f32: {unpaired}" if halves else ""
        reason = f"{vectors * lanes} queries against {a.keys} keys at a time{how}"
        config = replace(config, pairs=not unpaired, reason=reason)
        places = scratch_plan(body, a, config)
        return replace(config, scratch_bytes=sum(places.values()))

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        """A task is a tile of queries of one head."""
        assert isinstance(config, AttentionConfig)
        a = attend_of(body)
        b = Builder(symbol)
        pointers = {v.name: b.param(f"x{i}", memory(v.type.dtype), v.type.size) for i, v in enumerate(body.inputs)}
        result = body.types[body.outputs[0]]
        pointers[""] = b.param("y", memory(result.dtype), result.size)
        scratch = b.scratch(config.scratch_bytes)
        parts, start = {}, 0
        for name, size in scratch_plan(body, a, config).items():
            parts[name] = b.view(scratch, F32, start)
            start += size
        kind = PairWriter if config.pairs else TileWriter
        writer = kind(b, body, a, config.isa, config.lanes, config.columns, config.registers, pointers, parts)
        writer.before()
        total = -(-a.rows // config.lanes)
        tiles = -(-total // config.vectors)
        base, extra = divmod(total, tiles)
        with b.loop(b.end, b.begin, name="task") as task:
            tile = b.index(task % tiles) if tiles > 1 else 0
            head = b.index(div(task, tiles)) if tiles > 1 else b.index(task)
            idx = tuple(b.index(i) for i in unflatten(head, a.batch)) if a.batch else ()
            bases = {key: offset(b, o, idx, a.op.kv_groups if key in "kv" else 1) for key, o in _operands(a)}
            row = b.index((tile * base + minimum(tile, extra)) * config.lanes)
            for vectors, when in ((base + 1, tile < extra), (base, tile >= extra)):
                if vectors == base + 1 and not extra:
                    continue
                with b.when(when if extra else True):
                    writer.tile(Tile(row, vectors, bases))
        return b.finish()


def _operands(a: Attend) -> list[tuple[str, Operand]]:
    found = [("q", a.q), ("k", a.k), ("v", a.v), ("out", a.out)]
    return [*found, ("mask", a.mask)] if a.mask else found


def offset(b: Builder, operand: Operand, idx: tuple[Index, ...], groups: int) -> Index:
    """Where the operand's matrix of this batch index starts."""
    total: Index = operand.offset
    for k, (i, stride) in enumerate(zip(idx, operand.batch, strict=True)):
        if stride:
            total = total + (div(i, groups) if k == len(idx) - 1 else i) * stride
    return b.index(total)


def scratch_plan(body: Graph, a: Attend, config: AttentionConfig) -> dict[str, int]:
    """Bytes of each part of the scratch: packed queries, scores, row sums, and copies of keys and values."""
    rows = config.tile_rows
    lanes, columns = config.lanes, config.columns
    if config.pairs:
        return {name: -(-(4 * n + 64) // 64) * 64 for name, n in pair_scratch(a, rows).items()}
    floats = {"q": a.depth * rows, "scores": a.keys * rows, "inverse": rows}
    if body.types[a.k.name].dtype != F32:
        floats["k"] = a.keys * (-(-a.depth // lanes) * lanes)
    if body.types[a.v.name].dtype != F32 or (a.v.col != 1 and a.width > 1):
        floats["v"] = a.keys * (-(-a.width // columns) * columns)
    return {name: -(-(4 * n + 64) // 64) * 64 for name, n in floats.items()}


__all__ = ["AttentionConfig", "AttentionTemplate"]
