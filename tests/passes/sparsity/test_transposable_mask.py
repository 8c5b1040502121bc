"""transposable-mask: rewrites on Linear and Conv, both axes, refusals, the kernel, every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import bitwright as bw
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.patterns import violation
from bitwright.ir.types import NM
from bitwright.passes import Context
from bitwright.passes._spec import parse_pass
from bitwright.passes.sparsity.masks import Pattern
from bitwright.passes.sparsity.transposable_mask import TransposableMask

Read = Callable[..., Graph]
LINEAR = """
    graph @g (%x: f32[2, 16]) -> (y = %y) level=graph {
      %w = weight {ref="fc.weight"} : f32[32, 16]
      %y = linear(%x, %w) : f32[2, 32]
    }
"""


def test_every_tap_of_a_convolution_holds_along_inputs_and_outputs(check: Any) -> None:
    after = check(
        TransposableMask(Pattern(2, 4)),
        before="""
            graph @g (%x: f32[1, 8, 5, 5]) -> (y = %y) level=graph {
              %w = weight {ref="conv1.weight"} : f32[12, 8, 3, 3]
              %y = conv(%x, %w) : f32[1, 12, 3, 3]
            }
        """,
        after="""
            graph @g (%x: f32[1, 8, 5, 5]) -> (y = %y) level=graph {
              %conv1.weight = weight {ref="conv1.weight.1"} : f32[12, 8, 3, 3] nm<2:4, axis=1, transposable>
              %y = conv(%x, %conv1.weight) : f32[1, 12, 3, 3]
            }
        """,
        tolerance=None,
    )
    (weight,) = (h.array for h in after.weights.values())
    taps = np.moveaxis(weight.reshape(12, 8, 9), -1, 0) != 0
    assert taps.reshape(9, 12, 2, 4).sum(-1).max() == 2
    assert taps.reshape(9, 3, 4, 8).sum(2).max() == 2


@pytest.mark.parametrize("method", ["fast", "exact", "greedy", "two-approx"])
def test_methods(read: Read, method: str) -> None:
    p = parse_pass(f"transposable-mask{{pattern=4:8 method={method}}}")
    context = Context()
    graph = read(LINEAR)
    after = p.run(graph, context)
    ((name, place, facts),) = context.remarks
    assert (name, place, facts["pattern"], facts["axis"]) == ("transposable-mask", "fc", "4:8", 1)
    assert 0.6 < facts["kept_magnitude"] < 0.85
    weight = after.weights["fc.weight.1"].array
    for axis in (0, 1):
        assert violation(weight, NM(4, 8, axis)) == ""
    before = graph.weights["fc.weight"].array
    assert np.array_equal(weight[weight != 0], before[weight != 0])
    assert not p.run(after, Context()).changed_from(after)


def test_matmul_lies_the_other_way_round(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="w"} : f32[8, 6]
          %y = matmul(%x, %w) : f32[2, 6]
        }
    """)
    after = TransposableMask().run(graph, Context())
    assert "nm<4:8, axis=0, transposable>" in str(after.nodes[0].type)
    (weight,) = (h.array for h in after.weights.values())
    assert (weight != 0).sum(1).max() <= 3  # six outputs keep their share of 4 of 8


def test_the_verifier_looks_along_both_axes() -> None:
    weight = np.zeros((4, 4, 3), np.float32)
    weight[:3, 0, 1] = 1.0  # three outputs keep the first input at one tap
    assert violation(weight, NM(2, 4, 1)) == ""
    assert "3 non-zeros" in violation(weight, NM(2, 4, 1, transposable=True))
    assert "3 non-zeros" in violation(np.moveaxis(weight, 0, 1), NM(2, 4, 0, transposable=True))
    assert "3 non-zeros" in violation(weight[..., 1], NM(2, 4, -1, transposable=True))


def test_refusals(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[1, 6]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[8, 6]
          %y = linear(%x, %w) : f32[1, 8]
        }
    """)
    context = Context()
    assert not TransposableMask().run(graph, context).changed_from(graph)
    assert context.refusals[0].reason == "6 inputs are not a multiple of 8"
    context = Context()
    TransposableMask(except_="fc").run(graph, context)
    assert "selects no contraction" in context.refusals[0].reason
    with pytest.raises(InvalidInput, match="method is one of fast, exact, greedy, two-approx, not 'best'"):
        parse_pass("transposable-mask{method=best}")


def test_infinity_is_named(read: Read) -> None:
    w = np.full((32, 16), np.inf, np.float32)
    with pytest.raises(InvalidInput, match=r"fc\.weight contains an infinity"):
        TransposableMask().run(read(LINEAR, {"fc.weight": w}), Context())


def test_the_mask_reaches_the_kernels() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.Flatten(), torch.nn.Linear(128, 64)).eval()
    x = torch.randn(2, 16, 4, 4)
    for recipe in ("transposable-mask{pattern=2:4 method=exact}", "transposable-mask{pattern=2:4}, int8"):
        report = bw.compile(model, example_inputs=(x,), recipe=recipe, calibration=[(x,)]).report
        patterns = [layer.pattern for layer in report.layers if layer.kernel == "contract"]
        assert patterns == ["nm<2:4, axis=1, transposable>"] * 2
