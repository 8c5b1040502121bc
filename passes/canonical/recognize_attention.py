"""Attention, recognized in the matmuls, softmax and masks that exporters write for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.passes._match import made_by, scaled, uniform, used_once
from bitwright.passes._pass import Context, Pass
from bitwright.passes.canonical._attention import NEVER, is_triangle


@dataclass
class Found:
    """The pieces of one attention. ``turned``: the key arrives as [..., D, S]."""

    query: str
    key: str
    value: str
    scale: float
    turned: bool
    mask: str | None = None
    causal: bool = False


@dataclass(frozen=True)
class RecognizeAttention(Pass):
    """Replace softmax(q k^T * scale + mask) v by one attention operator; a constant causal mask becomes ``causal``.

    before:
        graph @g (%q: f32[2, 5, 8], %k: f32[2, 7, 8], %v: f32[2, 7, 4]) -> (y = %y) level=graph {
          %half = constant {values=[0.5]} : f32[]
          %kt = transpose(%k) {perm=[0, 2, 1]} : f32[2, 8, 7]
          %s = matmul(%q, %kt) : f32[2, 5, 7]
          %t = mul(%s, %half) : f32[2, 5, 7]
          %p = softmax(%t) : f32[2, 5, 7]
          %y = matmul(%p, %v) : f32[2, 5, 4]
        }
    after:
        graph @g (%q: f32[2, 5, 8], %k: f32[2, 7, 8], %v: f32[2, 7, 4]) -> (y = %y) level=graph {
          %y = attention(%q, %k, %v) {scale=0.5} : f32[2, 5, 4]
        }
    """

    name: ClassVar[str] = "recognize-attention"

    def run(self, graph: Graph, context: Context) -> Graph:
        def step(rw: Rewriter, node: Node) -> bool:
            found = _attention(graph, node)
            if found is None:
                return False
            if isinstance(found, str):
                context.refuse(self.name, node.output, found)
                return False
            query, key, value = rw.of(found.query, found.key, found.value)
            if found.turned:
                rank = rw.types[key].rank
                swap = ops.Transpose((*range(rank - 2), rank - 1, rank - 2))
                key = rw.emit(swap, key, name=f"{found.key}.turned", origin=node.origin)
            mask = rw.of(found.mask) if found.mask is not None else ()
            rw.keep_as(node, ops.Attention(found.scale, found.causal), (query, key, value, *mask))
            return True

        return rewrite(graph, step)[0]


def _attention(graph: Graph, node: Node) -> Found | str | None:
    """The attention a matmul completes, None when there is no softmax before it, else why it is none."""
    if not isinstance(node.op, ops.MatMul) or node.op.transpose_b:
        return None
    soft = made_by(graph, node.inputs[0], ops.Softmax)
    if soft is None or soft.op.log or soft.op.axis not in (-1, soft.type.rank - 1):  # type: ignore[attr-defined]
        return None
    if not used_once(graph, soft.output):
        return "others read the attention weights"
    scores, mask = _mask(graph, soft.inputs[0])
    found = _scores(graph, scores, node.inputs[1])
    if found is None:
        return "no matmul of query and key before the softmax"
    if mask is None:
        return found
    if isinstance(mask, str):
        return mask
    found.mask, found.causal = mask[0], mask[1]
    return found


def _scores(graph: Graph, scores: str, value: str) -> Found | None:
    """Follow scale factors to the product of query and key."""
    factor = 1.0
    scores, c = scaled(graph, scores)
    product = made_by(graph, scores, ops.MatMul)
    if product is None:
        return None
    factor *= c
    query, c = scaled(graph, product.inputs[0])
    factor *= c
    key, c = scaled(graph, product.inputs[1])
    factor *= c
    turned = not product.op.transpose_b  # type: ignore[attr-defined]
    flip = made_by(graph, key, ops.Transpose)
    if turned and flip is not None and flip.op.perm == _swap(flip.type.rank):  # type: ignore[attr-defined]
        key, c = scaled(graph, flip.inputs[0])
        factor, turned = factor * c, False
    if min(graph.types[x].rank for x in (query, key, value)) < 2:
        return None
    return Found(query, key, value, factor, turned)


def _swap(rank: int) -> tuple[int, ...]:
    return (*range(rank - 2), rank - 1, rank - 2)


def _mask(graph: Graph, scores: str) -> tuple[str, tuple[str | None, bool] | str | None]:
    """The scores before masking, and the mask: (value, causal), None without one, or why it cannot be used."""
    node = graph.producers.get(scores)
    if node is not None and isinstance(node.op, ops.Binary) and node.op.fn == "add":
        for a, b in (node.inputs, node.inputs[::-1]):
            if made_by(graph, scaled(graph, a)[0], ops.MatMul) is not None and graph.types[a] == node.type:
                return a, ((None, True) if is_triangle(graph, b, node.type.shape[-2:]) else (b, False))
    if node is not None and isinstance(node.op, ops.Where) and graph.types[node.inputs[1]] == node.type:
        lowest = uniform(graph, node.inputs[2])
        if lowest is None or not lowest <= NEVER:
            return node.inputs[1], "its mask puts a finite score in place of the masked ones"
        return node.inputs[1], (node.inputs[0], False)
    return scores, None
