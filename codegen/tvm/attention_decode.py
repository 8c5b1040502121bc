"""Attention of a single query, as a decoder's step has it: dot products along the keys' rows, nothing is transposed.

A task is one query head. Scores of as many keys as a vector has lanes are summed across at once; then the softmax over
one row, then the values weighted and added. Keys and values are read once from where the caches put them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bitwright.codegen.tvm.attention import offset
from bitwright.codegen.tvm.attention_views import Attend, Operand, Unfit, attend_of
from bitwright.codegen.tvm.contract.runtime_right import transpose
from bitwright.codegen.tvm.generic_eval import memory, unflatten
from bitwright.codegen.tvm.template import Config, Refused, Template, plain_args
from bitwright.codegen.tvm.tir import (
    Builder,
    Index,
    Pointer,
    Register,
    Vec,
    const,
    constants,
    fma,
)
from bitwright.codegen.tvm.vecmath import INF, VecMath
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.types import BOOL, F32, S32
from bitwright.ir.weights import Array

SUMS = 8
"""Independent sums: fused multiply-adds take four cycles, and two start in each."""


@dataclass(frozen=True)
class DecodeConfig(Config):
    """``lanes`` of f32."""

    lanes: int = 4


class Decode(Template):
    """softmax(q k^T) v with one row of queries, keys and values in rows."""

    name: ClassVar[str] = "decode"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        """Takes f32 operands whose rows are whole vectors, and a mask of f32 or bool along the keys."""
        try:
            a = attend_of(body)
        except Unfit as why:
            return Refused(str(why))
        lanes = target.vector_bits // 32
        if a.rows != 1 or a.op.causal or a.after:
            return Refused("not a single query by itself")
        if any(body.types[o.name].dtype != F32 for o in (a.q, a.k, a.v)):
            return Refused("operands other than f32")
        if any(o.col != 1 for o in (a.q, a.k, a.v, a.out)) or a.depth % lanes or a.width % lanes:
            return Refused(f"rows are not whole vectors of {lanes}")
        if a.mask is not None and (a.mask.col != 1 or body.types[a.mask.name].dtype not in (F32, BOOL)):
            return Refused("a mask that is not along the keys")
        return DecodeConfig(
            tasks=math.prod(a.batch), scratch_bytes=_padded(a, lanes) * 4 + 64, args=plain_args(body), isa=target.isa,
            mcpu=target.mcpu, reason=f"one query against {a.keys} keys, {lanes} at a time", lanes=lanes,
        )  # fmt: skip

    def emit(self, body: Graph, config: Config, symbol: str) -> Any:
        assert isinstance(config, DecodeConfig)
        a, b = attend_of(body), Builder(symbol)
        pointers = {v.name: b.param(f"x{i}", memory(v.type.dtype), v.type.size) for i, v in enumerate(body.inputs)}
        result = body.types[body.outputs[0]]
        out = b.param("y", memory(result.dtype), result.size)
        scores = b.view(b.scratch(config.scratch_bytes), F32)
        head = _Head(b, a, config.isa, config.lanes, pointers, out, scores, body)
        with b.loop(b.end, b.begin, name="task") as task:
            head.run(tuple(b.index(i) for i in unflatten(b.index(task), a.batch)) if a.batch else ())
        return b.finish()


def _padded(a: Attend, lanes: int) -> int:
    return -(-a.keys // lanes) * lanes


@dataclass(frozen=True)
class _Head:
    b: Builder
    a: Attend
    isa: str
    lanes: int
    pointers: Mapping[str, Pointer]
    out: Pointer
    scores: Pointer
    body: Graph

    def run(self, idx: tuple[Index, ...]) -> None:
        b, a = self.b, self.a
        groups = a.op.kv_groups
        q, k, v, out = (offset(b, o, idx, g) for o, g in ((a.q, 1), (a.k, groups), (a.v, groups), (a.out, 1)))
        mask = offset(b, a.mask, idx, 1) if a.mask is not None else 0
        top = self._scores(q, k, mask)
        total = self._powers(top)
        self._values(v, out, b.let(const(1.0, F32) / total))

    def _load(self, operand: Operand, at: Index) -> Vec:
        return self.b.load(self.pointers[operand.name], at, self.lanes)

    def _mac(self, acc: Vec, x: Vec, y: Vec) -> Vec:
        return acc + x * y if self.isa == "portable" else fma(x, y, acc)

    def _scores(self, q: Index, k: Index, mask: Index) -> Vec:
        """Scaled and masked scores of all keys into scratch, -inf behind the last; their largest."""
        b, a, lanes = self.b, self.a, self.lanes
        query = [b.let(self._load(a.q, q + d) * a.op.scale) for d in range(0, a.depth, lanes)]
        top = b.register(F32, lanes, const(-INF, F32, lanes), "top")
        whole, rest = divmod(a.keys, lanes)
        with b.loop(whole, name="block") as n:
            self._block(query, k, mask, b.index(n * lanes), lanes, top)
        if rest:
            self._block(query, k, mask, whole * lanes, rest, top)
        return self._across(top.get(), lambda x, y: x.max(y))

    def _block(self, query: list[Vec], k: Index, mask: Index, key: Index, valid: int, top: Register) -> None:
        b, a, lanes = self.b, self.a, self.lanes
        sums = []
        for j in range(lanes):
            row = b.index(k + (key + min(j, valid - 1)) * a.k.row)
            total = query[0] * self._load(a.k, row)
            for i, part in enumerate(query[1:], 1):
                total = self._mac(total, part, self._load(a.k, row + i * lanes))
            sums.append(b.let(total))
        lines = transpose(sums, b.let)
        while len(lines) > 1:
            lines = [b.let(x + y) for x, y in zip(lines[::2], lines[1::2], strict=True)]
        score = self._masked(lines[0], mask, key)
        if valid < lanes:
            score = constants(range(lanes), S32).lt(valid).select(b.let(score), const(-INF, F32, lanes))
        score = b.let(score)
        b.store(self.scores, key, score)
        top.set(score.max(top.get()))

    def _masked(self, score: Vec, mask: Index, key: Index) -> Vec:
        if self.a.mask is None:
            return score
        m = self._load(self.a.mask, mask + key)
        if self.body.types[self.a.mask.name].dtype == BOOL:
            return self.b.let(m.cast(S32)).ne(0).select(score, const(-INF, F32, self.lanes))
        return score + m

    def _powers(self, top: Vec) -> Vec:
        """Scores to exp(score - top); their sum."""
        b, lanes, m = self.b, self.lanes, VecMath(self.b, self.isa)
        best = b.let(top).spread(lanes)
        total = b.register(F32, lanes, const(0.0, F32, lanes), "total")
        with b.loop(_padded(self.a, lanes) // lanes, name="s") as s:
            e = b.let(m.exp(b.let(b.load(self.scores, s * lanes, lanes) - best)))
            b.store(self.scores, s * lanes, e)
            total.set(total.get() + e)
        return self._across(total.get(), lambda x, y: x + y)

    def _across(self, value: Vec, step: Any) -> Vec:
        value = self.b.let(value)
        while value.lanes > 2:
            half = value.lanes // 2
            value = self.b.let(step(value.part(0, half), value.part(half, half)))
        found: Vec = self.b.let(step(value.shuffle([0]), value.shuffle([1])))
        return found

    def _values(self, v: Index, out: Index, inverse: Vec) -> None:
        b, a, lanes = self.b, self.a, self.lanes
        for first in range(0, a.width // lanes, SUMS):
            vectors = min(SUMS, a.width // lanes - first)
            apart = max(1, min(SUMS // vectors, a.keys))
            zero = const(0.0, F32, lanes)
            acc = [[b.register(F32, lanes, zero, "acc") for _ in range(vectors)] for _ in range(apart)]

            def add(key: Index, into: list[Register], first: int = first) -> None:
                p = b.let(b.load(self.scores, key)).spread(lanes)
                row = b.index(v + key * a.v.row)
                for j, r in enumerate(into):
                    r.set(self._mac(r.get(), p, self._load(a.v, row + (first + j) * lanes)))

            with b.loop(a.keys // apart, name="s") as s:
                for i in range(apart):
                    add(b.index(s * apart + i), acc[i])
            for i in range(a.keys % apart):
                add(a.keys // apart * apart + i, acc[i])
            for j in range(vectors):
                total = acc[0][j].get()
                for more in acc[1:]:
                    total = total + more[j].get()
                b.store(self.out, out + (first + j) * lanes, b.let(total * inverse.spread(lanes)))


__all__ = ["Decode", "DecodeConfig"]
