"""Structured N:M pruning of constant contraction weights by magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.patterns import kept_magnitude
from bitwright.ir.types import F32, NM
from bitwright.passes._layers import layer_of, selected, stem
from bitwright.passes._pass import Context, Pass
from bitwright.passes.sparsity.masks import Pattern, nm_mask_array

TWO_OF_FOUR = Pattern(2, 4)
PAYS = 1.05
"""An expected speed over dense below this is not worth a pattern."""


@dataclass(frozen=True)
class NMMask(Pass):
    """Keep the largest ``keep`` of every ``group`` weights along the reduction axis of Linear and Conv.

    before:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[4, 8]
          %y = linear(%x, %w) : f32[2, 4]
        }
    after:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %fc.weight = weight {ref="fc.weight.1"} : f32[4, 8] nm<2:4, axis=1>
          %y = linear(%x, %fc.weight) : f32[2, 4]
        }
    """

    name: ClassVar[str] = "nm-mask"
    lossy: ClassVar[bool] = True
    pattern: Pattern = TWO_OF_FOUR
    only: str = "*"
    except_: str = ""
    shared: int = 1
    block: int = 1
    skip_first: bool = False

    def run(self, graph: Graph, context: Context) -> Graph:
        made: dict[str, str] = {}
        layers = [n for n in graph.nodes if isinstance(n.op, (ops.Linear, ops.Conv, ops.MatMul, ops.ConvTranspose))]
        wanted = [n for n in layers if selected(self.only, self.except_, graph, n)]
        if not wanted:
            context.refuse(self.name, "model", f"only={self.only} except={self.except_} selects no contraction")
        chosen: set[str] = set()
        for n in wanted:
            why = (
                "first layer stays dense (skip_first)"
                if self.skip_first and n is layers[0]
                else self._why_not(graph, n)
            )
            if why:
                context.refuse(self.name, layer_of(graph, n), why)
            else:
                chosen.add(n.output)

        def step(rw: Rewriter, node: Node) -> bool:
            if node.output not in chosen:
                return False
            old = node.inputs[1]
            if old not in made:
                made[old] = self._masked(rw, node, context)
            rw.keep_as(node, node.op, (rw.of(node.inputs[0])[0], made[old], *rw.of(*node.inputs[2:])))
            return True

        after, _ = rewrite(graph, step)
        if made:
            self._check_gain(context)
        return after

    def _axis(self, node: Node) -> int:
        return 0 if isinstance(node.op, ops.MatMul) and not node.op.transpose_b else 1

    def _why_not(self, graph: Graph, node: Node) -> str:
        """Why a contraction cannot be masked, or the empty string."""
        weight = graph.producers.get(node.inputs[1])
        if weight is None or not isinstance(weight.op, ops.Weight):
            quantized = weight is not None and isinstance(weight.op, ops.Dequantize)
            return (
                "weight is quantized already: mask before quantizing"
                if quantized
                else "weight is computed, not constant"
            )
        if isinstance(node.op, ops.ConvTranspose):
            return "transposed convolution: no sparse kernel"
        if isinstance(node.op, ops.Conv) and node.op.groups != 1:
            depthwise = weight.type.shape[1] == 1
            return "depthwise convolution has no reduction over channels" if depthwise else "grouped convolution"
        if weight.type.rank < 2 or (isinstance(node.op, ops.MatMul) and weight.type.rank != 2):
            return f"weight of rank {weight.type.rank}"
        if weight.type.encoding == self._encoding(node):
            return ""
        size, span = weight.type.static_shape[self._axis(node)], self.pattern.group * self.block
        what = "input channels" if isinstance(node.op, ops.Conv) else "inputs"
        if size % span:
            return f"{size} {what} are not a multiple of {span}"
        if weight.type.static_shape[0] % self.shared:
            return f"{weight.type.static_shape[0]} outputs are not a multiple of shared={self.shared}"
        return ""

    def _encoding(self, node: Node) -> NM:
        return self.pattern.along(self._axis(node), self.shared, self.block)

    def _masked(self, rw: Rewriter, node: Node, context: Context) -> str:
        weight, encoding = rw.graph.producers[node.inputs[1]], self._encoding(node)
        assert isinstance(weight.op, ops.Weight)
        if weight.type.encoding == encoding:
            return rw.of(node.inputs[1])[0]
        handle, key = rw.graph.weights[weight.op.ref], stem(weight.op.ref)
        p = self.pattern
        mask = nm_mask_array(handle.array, p.keep, p.group, encoding.axis, self.shared, self.block, weight.op.ref)
        masked = np.where(mask, handle.array, np.zeros((), handle.array.dtype))
        kept = kept_magnitude(handle.array, masked)
        context.remark(
            self.name, layer_of(rw.graph, node), pattern=str(p), kept_magnitude=round(kept, 4), axis=encoding.axis
        )
        return rw.weight(key, masked, weight.type.with_encoding(encoding), name=key, origin=weight.origin)

    def _check_gain(self, context: Context) -> None:
        if context.target is None:
            return
        nm = self.pattern.along(1, self.shared, self.block)
        gains = {str(d): context.target.sparse_gain(d, nm) for d in (F32, context.target.activation)}
        if max(gains.values()) < PAYS:
            expected = ", ".join(f"{g:.2f}x for {d}" if g else f"no kernel for {d}" for d, g in gains.items())
            why = f"{self.pattern} does not pay on this target ({expected}); masks were applied as asked"
            context.refuse(self.name, f"target {context.target.name}", why, "choose a pattern the target lists")
