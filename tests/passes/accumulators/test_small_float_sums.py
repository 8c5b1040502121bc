"""small-float-sums: which layers, which formats, and the same bits from the compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.types import small_float
from bitwright.passes import Context
from bitwright.passes._spec import parse_pass
from bitwright.passes.accumulators.small_float_sums import SmallFloatSums, formats
from bitwright.passes.pipelines import CANONICAL


def test_linear_layers_and_convolutions(check: Any) -> None:
    context = Context()
    check(
        SmallFloatSums(acc="f5m6b14", chunk=4),
        before="""
            graph @g (%x: f32[1, 2, 5, 5], %q: f32[3, 4]) -> (y = %y, z = %z, m = %m) level=graph {
              %cw = weight {ref="conv.weight"} : f32[4, 2, 3, 3]
              %fc.weight = weight {ref="fc.weight"} : f32[2, 4]
              %fc.bias = weight {ref="fc.bias"} : f32[2]
              %y = conv(%x, %cw) {padding=[1, 1, 1, 1]} : f32[1, 4, 5, 5]
              %z = linear(%q, %fc.weight, %fc.bias) : f32[3, 2]
              %m = matmul(%q, %q) {transpose_b=true} : f32[3, 3]
            }
        """,
        after="""
            graph @g (%x: f32[1, 2, 5, 5], %q: f32[3, 4]) -> (y = %y, z = %z, m = %m) level=graph {
              %cw = weight {ref="conv.weight"} : f32[4, 2, 3, 3]
              %fc.weight = weight {ref="fc.weight"} : f32[2, 4]
              %fc.bias = weight {ref="fc.bias"} : f32[2]
              %y = small_conv(%x, %cw) {product=f5m6b15, acc=f5m6b14, chunk=4, padding=[1, 1, 1, 1]} : f32[1, 4, 5, 5]
              %z = small_linear(%q, %fc.weight, %fc.bias) {product=f5m6b15, acc=f5m6b14, chunk=4} : f32[3, 2]
              %m = small_matmul(%q, %q) {product=f5m6b15, acc=f5m6b14, chunk=4, transpose_b=true} : f32[3, 3]
            }
        """,
        context=context,
        tolerance=None,
    )
    assert [place for _, place, _ in context.remarks] == ["conv", "fc", "m"]
    facts = context.remarks[0][2]
    assert facts["terms"] == 18
    assert facts["acc_smallest"] == 2.0**-14
    assert facts["product_largest"] == 2.0**16 * (2 - 2.0**-6)


def test_what_keeps_its_sums(read: Callable[..., Graph]) -> None:
    graph = read(
        """
        graph @g (%x: f32[1, 4, 5, 5], %q: u8[2, 8], %d: f64[2, 8], %v: f32[8]) -> (a, b, c, e, f) level=integer {
          %grouped.weight = weight {ref="grouped.weight"} : f32[4, 1, 3, 3]
          %up.weight = weight {ref="up.weight"} : f32[4, 2, 3, 3]
          %int.weight = weight {ref="int.weight"} : s8[4, 8]
          %wide.weight = weight {ref="wide.weight"} : f64[4, 8]
          %left.weight = weight {ref="left.weight"} : f32[8, 3]
          %a = conv(%x, %grouped.weight) {groups=4} : f32[1, 4, 3, 3]
          %b = conv_transpose(%x, %up.weight) : f32[1, 2, 7, 7]
          %c = int_linear(%q, %int.weight) : s32[2, 4]
          %e = linear(%d, %wide.weight) : f64[2, 4]
          %f = matmul(%v, %left.weight) : f32[3]
        }
    """.replace("(a, b, c, e, f)", "(a = %a, b = %b, c = %c, e = %e, f = %f)")
    )
    context = Context()
    out = SmallFloatSums().run(graph, context)
    assert not out.changed_from(graph)
    reasons = {r.place: r.reason for r in context.refusals}
    assert list(reasons) == ["grouped", "up", "int", "wide", "left"]
    for place, word in (
        ("grouped", "4 groups"),
        ("up", "conv_transpose"),
        ("int", "integer"),
        ("wide", "f64"),
        ("left", "vector"),
    ):
        assert word in reasons[place]
    context = Context()
    assert not SmallFloatSums(only="nothing").run(graph, context).changed_from(graph)
    assert context.refusals == []


def test_the_rule_of_biases() -> None:
    assert formats("", "", 16) == (small_float(4, 7, 12), small_float(4, 7, 10))
    assert formats("f4m7b10", "f4m7b12", 64) == (small_float(4, 7, 12), small_float(4, 7, 10))
    assert formats("f5m10b16", "", 1)[0] == small_float(5, 10, 16)
    assert formats("", "f4m3", 256) == (small_float(4, 3), small_float(4, 3, 3))
    assert (
        str(parse_pass("small-float-sums{acc=f4m3b5 rounding=nearest}"))
        == "small-float-sums{acc=f4m3b5 rounding=nearest}"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acc": "s16"}, "no floating-point format"), ({"acc": "f0m7b10"}, "exponent 0"), ({"chunk": 0}, "chunk"),
        ({"acc": "f9m7b200"}, "f64 cannot hold"), ({"acc": "m7e4"}, "not a number format"),
        ({"product": "f4m40b12"}, "f64 cannot hold"), ({"rounding": "up"}, "rounding"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str, read: Callable[..., Graph]) -> None:
    graph = read("graph @g (%x: f32[1]) -> (y = %y) level=graph {\n  %y = relu(%x) : f32[1]\n}")
    with pytest.raises(InvalidInput, match=message):
        SmallFloatSums(**options).run(graph, Context())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, bias=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).amax((2, 3)))
        return y


def test_a_compiled_network_has_the_bits_of_the_reference() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 7)
    graph = bw.capture(Net().eval(), (x,))
    lowered, _ = bw.optimize(graph, f"{CANONICAL}, small-float-sums{{acc=f4m7b10}}", target="host")
    assert sum(isinstance(n.op, ops.SMALL_FLOAT) for n in lowered.nodes) == 3
    want = to_numpy(evaluate(lowered, [x.numpy()])[0])
    program = bw.compile(graph, recipe="small-float-sums{acc=f4m7b10}", target="host")
    np.testing.assert_array_equal(np.asarray(program(x.numpy())), want)
    assert 0 < np.abs(want - to_numpy(evaluate(graph, [x.numpy()])[0])).max() < 0.2
