"""Unbiased stochastic N:M masks on the activations that contractions read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node, Value
from bitwright.ir.types import S64, TensorType
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._pass import Batch, Context, Pass
from bitwright.passes.sparsity.masks import Pattern

TWO_OF_FOUR = Pattern(2, 4)
DRAW = TensorType(S64, ())


@dataclass(frozen=True)
class UnbiasedMask(Pass):
    """Keep ``keep`` of every ``group`` activations along the reduction axis of a layer, at random and unbiased.

    The graph gets one more input, ``draw``: each number is another draw, the same number gives the same bits, and the
    mean over draws is the result without masks (of a linear layer). Layers differ in their seed, which is ``seed`` *
    65536 + the layer's place in the graph. ``two-draw`` (keep 2) is at most twice the least variance, which is
    ``optimal``. For gradients, put the pass on a graph whose contraction reads them. Source: arXiv 2203.10991.

    before:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="w"} : f32[4, 8]
          %y = linear(%x, %w) : f32[2, 4]
        }
    after:
        graph @g (%x: f32[2, 8], %draw: s64[]) -> (y = %y) level=graph {
          %w = weight {ref="w"} : f32[4, 8]
          %x.sparse = unbiased_mask(%x, %draw) : f32[2, 8]
          %y = linear(%x.sparse, %w) : f32[2, 4]
        }
    """

    name: ClassVar[str] = "unbiased-mask"
    lossy: ClassVar[bool] = True
    pattern: Pattern = TWO_OF_FOUR
    method: Literal["optimal", "two-draw"] = "optimal"
    only: str = "*"
    except_: str = ""
    seed: int = 0

    def run(self, graph: Graph, context: Context) -> Graph:
        if self.method == "two-draw" and self.pattern.keep != 2:
            raise InvalidInput(f"two-draw keeps 2 of a group, not {self.pattern.keep}")
        if not 0 <= self.seed < 1 << 47:
            raise InvalidInput(f"seed lies in [0, 2^47), not {self.seed}")
        layers = [n for n in graph.nodes if isinstance(n.op, ops.CONTRACTION)]
        chosen: dict[str, int] = {}
        for place, n in enumerate(layers):
            if not selected(self.only, self.except_, graph, n):
                continue
            if why := self._why_not(graph, n):
                cure = (
                    "fix the size: compile with sizes=..., or capture without dynamic_batch"
                    if "symbolic" in why
                    else ""
                )
                context.refuse(self.name, layer_of(graph, n), why, cure)
            elif not _masked(graph, n):
                chosen[n.output] = (self.seed << 16) + place
        if not any(selected(self.only, self.except_, graph, n) for n in layers):
            context.refuse(self.name, "model", f"only={self.only} except={self.except_} selects no contraction")
        return self._insert(graph, context, chosen) if chosen else graph

    def _insert(self, graph: Graph, context: Context, chosen: dict[str, int]) -> Graph:
        draw = next((n.inputs[1] for n in graph.nodes if isinstance(n.op, ops.UnbiasedMask)), "")
        if not draw:
            draw = _free_name(graph, "draw")
            graph = replace(graph, inputs=(*graph.inputs, Value(draw, DRAW)))
            context.calibration = [_with_draw(b, draw, i) for i, b in enumerate(context.calibration)]

        def step(rw: Rewriter, node: Node) -> bool:
            if node.output not in chosen:
                return False
            op = ops.UnbiasedMask(self.pattern.keep, self.pattern.group, _axis(node), chosen[node.output], self.method)
            x, *rest = rw.of(*node.inputs)
            sparse = rw.emit(op, x, rw.of(draw)[0], name=f"{node.inputs[0]}.sparse", origin=node.origin)
            rw.keep_as(node, node.op, (sparse, *rest))
            context.remark(self.name, layer_of(graph, node), pattern=str(self.pattern), seed=op.seed)
            return True

        return rewrite(graph, step)[0]

    def _why_not(self, graph: Graph, node: Node) -> str:
        """Why a contraction's activation cannot be masked, or the empty string."""
        if node.op.spelling.startswith("int_") or not graph.types[node.inputs[0]].dtype.is_float:
            return "its activation is quantized already: mask before quantizing"
        if graph.is_constant(node.inputs[0]):
            return "its first operand is constant: mask weights with nm-mask"
        if isinstance(node.op, ops.Conv) and node.op.groups != 1:
            return "grouped convolution: groups of channels would mix"
        x = graph.types[node.inputs[0]]
        if not x.is_static:
            return f"{x} has a symbolic size: rows that are computed apart would get the same random numbers"
        size = x.static_shape[_axis(node)]
        return f"{size} inputs: nothing is dropped" if not size or self._all_kept(size) else ""

    def _all_kept(self, size: int) -> bool:
        p = self.pattern
        return p.keep == p.group or (size < p.group and -(-p.keep * size // p.group) >= size)


def _axis(node: Node) -> int:
    """The axis of the first operand that a contraction sums over: channels of a convolution."""
    return 1 if isinstance(node.op, (ops.Conv, ops.ConvTranspose)) else -1


def _masked(graph: Graph, node: Node) -> bool:
    source = graph.producers.get(node.inputs[0])
    return source is not None and isinstance(source.op, ops.UnbiasedMask)


def _free_name(graph: Graph, name: str) -> str:
    taken = {*graph.types, *(v.name for v in graph.inputs)}
    return next(n for n in (name, *(f"{name}.{i}" for i in range(1, len(taken) + 2))) if n not in taken)


def _with_draw(batch: Batch, name: str, number: int) -> Batch:
    """Calibration batches of the old graph also fit the new one: each has a draw of its own."""
    draw = np.asarray(number, np.int64)
    return {**batch, name: draw} if isinstance(batch, dict) else (*batch, draw)
