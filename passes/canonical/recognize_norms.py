"""Layer norm and RMS norm, recognized in the arithmetic that exporters write for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import TensorType
from bitwright.passes._match import array
from bitwright.passes._pass import Context, Pass
from bitwright.passes.canonical._norm_forms import Norm, factors, statistics, tail


@dataclass(frozen=True)
class RecognizeNorms(Pass):
    """Replace mean, square, rsqrt and their products by layer_norm and rms_norm; expects simplify before it.

    before:
        graph @g (%x: f32[2, 4]) -> (y = %y) level=graph {
          %eps = constant {values=[0.01]} : f32[]
          %w = constant {values=[1.0, 2.0, 3.0, 4.0]} : f32[4]
          %s = square(%x) : f32[2, 4]
          %m = reduce_mean(%s) {axes=[-1], keepdim=true} : f32[2, 1]
          %a = add(%m, %eps) : f32[2, 1]
          %r = rsqrt(%a) : f32[2, 1]
          %n = mul(%x, %r) : f32[2, 4]
          %y = mul(%w, %n) : f32[2, 4]
        }
    after:
        graph @g (%x: f32[2, 4]) -> (y = %y) level=graph {
          %y.scale = constant {values=[1.0, 2.0, 3.0, 4.0]} : f32[4]
          %y = rms_norm(%x, %y.scale) {eps=0.009999999776482582} : f32[2, 4]
        }
    """

    name: ClassVar[str] = "recognize-norms"

    def run(self, graph: Graph, context: Context) -> Graph:
        def step(rw: Rewriter, node: Node) -> bool:
            norm = _norm(graph, node)
            if norm is None:
                return False
            inputs = [rw.of(norm.x)[0]]
            scale = norm.scale
            if norm.bias is not None and scale is None:
                scale = np.ones_like(norm.bias)
            for values, word in ((scale, "scale"), (norm.bias, "bias")):
                if values is not None:
                    t = TensorType(node.type.dtype, values.shape)
                    inputs.append(rw.constant(values, t, name=f"{node.output}.{word}", origin=node.origin))
            rw.keep_as(node, norm.op, inputs)
            return True

        return rewrite(graph, step)[0]


def _norm(graph: Graph, node: Node) -> Norm | None:
    """The norm a node completes, or None."""
    if not isinstance(node.op, ops.Binary) or node.op.fn not in ("add", "mul", "div") or not node.type.dtype.is_float:
        return None
    if node.op.fn != "add":
        return _product(graph, node)
    for value, other in (node.inputs, node.inputs[::-1]):
        inner = graph.producers.get(value)
        if inner is None or not isinstance(inner.op, ops.Binary) or inner.op.fn == "add":
            continue
        found = _product(graph, inner)
        if found is not None and isinstance(found.op, ops.LayerNorm) and graph.types[value] == node.type:
            bias = tail(graph, array(graph, other), node, found.op.axes)
            if bias is not None:
                return Norm(found.op, found.x, found.scale, bias)
    return None


def _product(graph: Graph, node: Node) -> Norm | None:
    """x * rsqrt(mean(square(x)) + eps) with constant factors anywhere in the product."""
    plain: list[str] = []
    roots: list[str] = []
    factors(graph, node.output, plain, roots, 4)
    constants = [a for a in (array(graph, f) for f in plain) if a is not None]
    computed = [f for f in plain if not graph.is_constant(f)]
    if len(roots) != 1 or len(computed) != 1 or graph.types[computed[0]] != node.type:
        return None
    found = statistics(graph, roots[0], computed[0])
    if found is None or not constants:
        return found
    scale = tail(graph, np.asarray(np.prod(np.broadcast_arrays(*constants), axis=0)), node, found.op.axes)
    return None if scale is None else Norm(found.op, found.x, scale)
