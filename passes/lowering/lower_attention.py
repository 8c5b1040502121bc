"""Attention on operands of half precision, where the target multiplies those faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Level, Node
from bitwright.ir.types import F32, DType
from bitwright.passes._pass import Context, Pass
from bitwright.passes.lowering.lower_contractions import HALVES

_VIEWS: tuple[type[ops.Op], ...] = (ops.Reshape, ops.Transpose, ops.Slice, ops.Expand)
_FEWEST = 9
"""Fewer queries or columns than this fill no vector of a kernel for pairs of halves."""


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Round query, key and value to bf16 or f16 where they are made (to the nearest, ties to even); results become f32
    again.

    Products of halves are exact in f32 and summed there; kernels may cut the probabilities to the format as well, each
    of them then being off by 2^-7 (bf16) at most. An attention stays f32, with the reason, if the target has no
    products of the format.

    before:
        graph @g (%q: f32[1, 16, 32], %k: f32[1, 16, 32], %v: f32[1, 16, 32]) -> (y = %y) level=integer {
          %qh = reshape(%q) {shape=[1, 16, 2, 16]} : f32[1, 16, 2, 16]
          %kh = reshape(%k) {shape=[1, 16, 2, 16]} : f32[1, 16, 2, 16]
          %vh = reshape(%v) {shape=[1, 16, 2, 16]} : f32[1, 16, 2, 16]
          %qt = transpose(%qh) {perm=[0, 2, 1, 3]} : f32[1, 2, 16, 16]
          %kt = transpose(%kh) {perm=[0, 2, 1, 3]} : f32[1, 2, 16, 16]
          %vt = transpose(%vh) {perm=[0, 2, 1, 3]} : f32[1, 2, 16, 16]
          %y = attention(%qt, %kt, %vt) {scale=0.25} : f32[1, 2, 16, 16]
        }
    after:
        graph @g (%q: f32[1, 16, 32], %k: f32[1, 16, 32], %v: f32[1, 16, 32]) -> (y = %y) level=integer {
          %q.half = cast(%q) {dtype=bf16} : bf16[1, 16, 32]
          %qh.half = reshape(%q.half) {shape=[1, 16, 2, 16]} : bf16[1, 16, 2, 16]
          %qt.half = transpose(%qh.half) {perm=[0, 2, 1, 3]} : bf16[1, 2, 16, 16]
          %k.half = cast(%k) {dtype=bf16} : bf16[1, 16, 32]
          %kh.half = reshape(%k.half) {shape=[1, 16, 2, 16]} : bf16[1, 16, 2, 16]
          %kt.half = transpose(%kh.half) {perm=[0, 2, 1, 3]} : bf16[1, 2, 16, 16]
          %v.half = cast(%v) {dtype=bf16} : bf16[1, 16, 32]
          %vh.half = reshape(%v.half) {shape=[1, 16, 2, 16]} : bf16[1, 16, 2, 16]
          %vt.half = transpose(%vh.half) {perm=[0, 2, 1, 3]} : bf16[1, 2, 16, 16]
          %y.half = attention(%qt.half, %kt.half, %vt.half) {scale=0.25} : bf16[1, 2, 16, 16]
          %y = cast(%y.half) {dtype=f32} : f32[1, 2, 16, 16]
        }
    """

    name: ClassVar[str] = "lower-attention"
    takes: ClassVar[Level] = "integer"
    gives: ClassVar[Level] = "integer"
    lossy: ClassVar[bool] = True
    format: Literal["bf16", "f16"] = "bf16"

    def run(self, graph: Graph, context: Context) -> Graph:
        halves: dict[str, str] = {}
        kind = HALVES[self.format]

        def half(rw: Rewriter, name: str) -> str:
            """The rounded form of an old value: views of a rounded value are views of its rounding."""
            if name not in halves:
                maker = graph.producers.get(name)
                if maker is not None and isinstance(maker.op, _VIEWS):
                    inner = half(rw, maker.inputs[0])
                    halves[name] = rw.emit(maker.op, inner, name=f"{name}.half", origin=maker.origin)
                else:
                    halves[name] = rw.emit(ops.Cast(kind), rw.of(name)[0], name=f"{name}.half")
            return halves[name]

        def step(rw: Rewriter, node: Node) -> bool:
            if not isinstance(node.op, ops.Attention) or graph.types[node.inputs[0]].dtype != F32:
                return False
            if why := _why_not(graph, node, context, kind):
                context.refuse(self.name, node.output, f"stays f32: {why}")
                return False
            inputs = [half(rw, x) for x in node.inputs[:3]] + list(rw.of(*node.inputs[3:]))
            rw.free(node)
            found = rw.emit(node.op, *inputs, name=f"{node.output}.half", origin=node.origin)
            rw.replace(node, rw.emit(ops.Cast(F32), found, name=node.output, origin=node.origin))
            context.remark(self.name, node.output, format=self.format)
            return True

        return rewrite(graph, step)[0]


def _why_not(graph: Graph, node: Node, context: Context, half: DType) -> str:
    if context.target is not None and not context.target.rate(half, half):
        return f"{context.target.name} has no products of {half}"
    if context.target is not None and context.target.kind == "gpu":
        return ""  # its kernels fill up what is missing
    depth, (rows, columns) = graph.types[node.inputs[0]].shape[-1], node.type.shape[-2:]
    if isinstance(depth, int) and depth % 2:
        return f"a depth of {depth} has no pairs"
    few = [n for n in (rows, columns) if isinstance(n, int) and n < _FEWEST]
    return f"only {few[0]} queries or columns" if few else ""


__all__ = ["LowerAttention"]
