"""Compute transposes and reshapes of constants at compile time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.passes._pass import Context, Pass


@dataclass(frozen=True)
class FoldViews(Pass):
    """A transposed or reshaped constant is a constant (layout passes leave such nodes behind).

    before:
        graph @g (%x: f32[2, 3]) -> (y = %y) level=integer {
          %c = constant {values=[1.0, 2.0, 3.0]} : f32[3, 1]
          %t = transpose(%c) {perm=[1, 0]} : f32[1, 3]
          %y = add(%x, %t) : f32[2, 3]
        }
    after:
        graph @g (%x: f32[2, 3]) -> (y = %y) level=integer {
          %t = constant {values=[1.0, 2.0, 3.0]} : f32[1, 3]
          %y = add(%x, %t) : f32[2, 3]
        }
    """

    name = "fold-views"
    takes = "integer"
    gives = "integer"

    def run(self, graph: Graph, context: Context) -> Graph:
        return rewrite(graph, _fold)[0]


def _fold(rw: Rewriter, node: Node) -> bool | None:
    if not isinstance(node.op, (ops.Transpose, ops.Reshape)) or not node.type.is_static:
        return None
    array = rw.value_of(rw.moved[node.inputs[0]])
    if array is None:
        return None
    if isinstance(node.op, ops.Transpose):
        array = array.transpose(node.op.perm)
    result = np.ascontiguousarray(array.reshape(node.type.static_shape))
    rw.free(node)
    rw.replace(node, rw.constant(result, node.type, name=node.output, origin=node.origin))
    return True
