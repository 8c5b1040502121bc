"""common-subexpressions: same operator, same operands, same types: one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bitwright.ir.graph import Graph
from bitwright.passes import Context
from bitwright.passes.canonical.common_subexpressions import CommonSubexpressions


def test_merges_through_chains_and_equal_weights(check: Any) -> None:
    same = np.arange(12, dtype=np.float32).reshape(3, 4)
    check(
        CommonSubexpressions(),
        before="""
            graph @g (%x: f32[2, 4]) -> (y = %y) level=graph {
              %w = weight {ref="w"} : f32[3, 4]
              %v = weight {ref="v"} : f32[3, 4]
              %a = linear(%x, %w) : f32[2, 3]
              %b = linear(%x, %v) : f32[2, 3]
              %c = relu(%a) : f32[2, 3]
              %d = relu(%b) : f32[2, 3]
              %y = sub(%c, %d) : f32[2, 3]
            }
        """,
        after="""
            graph @g (%x: f32[2, 4]) -> (y = %y) level=graph {
              %w = weight {ref="w"} : f32[3, 4]
              %a = linear(%x, %w) : f32[2, 3]
              %c = relu(%a) : f32[2, 3]
              %y = sub(%c, %c) : f32[2, 3]
            }
        """,
        weights={"w": same, "v": same.copy()},
    )


def test_what_differs_stays(read: Callable[..., Graph]) -> None:
    graph = read("""
        graph @g (%x: f32[1]) -> (a = %a, b = %b, c = %c, d = %d, e = %e) level=graph {
          %zero = constant {values=[0.0]} : f32[1]
          %minus = constant {values=[-0.0]} : f32[1]
          %a = div(%x, %zero) : f32[1]
          %b = div(%x, %minus) : f32[1]
          %c = clamp(%x) {lo=0.0} : f32[1]
          %d = clamp(%x) {lo=1.0} : f32[1]
          %e = div(%zero, %x) : f32[1]
        }
    """)
    assert not CommonSubexpressions().run(graph, Context()).changed_from(graph)
