"""fold-views: views of constants are computed, views of values are not."""

from __future__ import annotations

from typing import Any

from bitwright.passes.lowering.fold_views import FoldViews


def test_a_chain_of_views_becomes_one_constant(check: Any) -> None:
    check(
        FoldViews(),
        before="""
            graph @g (%x: f32[2, 3]) -> (y = %y) level=integer {
              %c = constant {values=[1.0, 2.0, 3.0]} : f32[3]
              %r = reshape(%c) {shape=[3, 1]} : f32[3, 1]
              %t = transpose(%r) {perm=[1, 0]} : f32[1, 3]
              %y = add(%x, %t) : f32[2, 3]
            }
        """,
        after="""
            graph @g (%x: f32[2, 3]) -> (y = %y) level=integer {
              %t = constant {values=[1.0, 2.0, 3.0]} : f32[1, 3]
              %y = add(%x, %t) : f32[2, 3]
            }
        """,
    )


def test_views_of_computed_values_stay(check: Any) -> None:
    text = """
        graph @g (%x: f32[2, 3]) -> (y = %t) level=integer {
          %t = transpose(%x) {perm=[1, 0]} : f32[3, 2]
        }
    """
    check(FoldViews(), before=text, after=text)
