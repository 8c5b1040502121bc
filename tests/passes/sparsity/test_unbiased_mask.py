"""unbiased-mask: text before and after, refusals, its place in pipelines, and the compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.ir.interpret import evaluate
from bitwright.passes._pass import Context
from bitwright.passes.sparsity.masks import Pattern
from bitwright.passes.sparsity.unbiased_mask import UnbiasedMask

Read = Callable[..., bw.Graph]
LAYERS = """
    graph @g (%x: f32[3, 8], %draw: f32[4]) -> (y = %y, z = %draw) level=graph {
      %w = weight {ref="w"} : f32[6, 8]
      %v = weight {ref="v"} : f32[6, 4]
      %h = linear(%x, %w) : f32[3, 6]
      %r = relu(%h) : f32[3, 6]
      %y = matmul(%r, %v) : f32[3, 4]
    }
"""


def test_docstring(check: Any, example: Any) -> None:
    before, after = example(UnbiasedMask)
    check(UnbiasedMask(), before=before, after=after, tolerance=None)


def test_layers_have_seeds_of_their_own_and_one_draw(check: Any) -> None:
    check(
        UnbiasedMask(Pattern(1, 4), seed=1),
        before=LAYERS,
        after="""
            graph @g (%x: f32[3, 8], %draw: f32[4], %draw.1: s64[]) -> (y = %y, z = %draw) level=graph {
              %w = weight {ref="w"} : f32[6, 8]
              %v = weight {ref="v"} : f32[6, 4]
              %x.sparse = unbiased_mask(%x, %draw.1) {keep=1, seed=65536} : f32[3, 8]
              %h = linear(%x.sparse, %w) : f32[3, 6]
              %r = relu(%h) : f32[3, 6]
              %r.sparse = unbiased_mask(%r, %draw.1) {keep=1, seed=65537} : f32[3, 6]
              %y = matmul(%r.sparse, %v) : f32[3, 4]
            }
        """,
        tolerance=None,
    )


def test_a_second_pass_uses_the_same_draw_and_the_same_seeds(read: Read) -> None:
    graph, context = read(LAYERS), Context()
    once = UnbiasedMask().run(graph, context)
    twice = UnbiasedMask(only="v").run(UnbiasedMask(only="w").run(graph, context), context)
    assert twice == once or not twice.changed_from(once)
    assert [v.name for v in twice.inputs] == ["x", "draw", "draw.1"]


def test_convolutions_group_their_channels(check: Any) -> None:
    check(
        UnbiasedMask(method="two-draw"),
        before="""
            graph @g (%x: f32[1, 8, 5, 5]) -> (y = %y) level=graph {
              %w = weight {ref="w"} : f32[4, 8, 3, 3]
              %y = conv(%x, %w) : f32[1, 4, 3, 3]
            }
        """,
        after="""
            graph @g (%x: f32[1, 8, 5, 5], %draw: s64[]) -> (y = %y) level=graph {
              %w = weight {ref="w"} : f32[4, 8, 3, 3]
              %x.sparse = unbiased_mask(%x, %draw) {axis=1, method="two-draw"} : f32[1, 8, 5, 5]
              %y = conv(%x.sparse, %w) : f32[1, 4, 3, 3]
            }
        """,
        tolerance=None,
    )


@pytest.mark.parametrize(
    ("line", "inputs", "reason"),
    [
        ("%y = linear(%x, %w) : f32[b, 4]", "%x: f32[b, 8], %w: f32[4, 8]", "has a symbolic size"),
        ("%y = conv(%x, %w) {groups=2} : f32[1, 4, 5, 5]", "%x: f32[1, 4, 5, 5], %w: f32[4, 2, 1, 1]", "grouped conv"),
        ("%y = linear(%x, %w) : f32[2, 4]", "%x: f32[2, 1], %w: f32[4, 1]", "1 inputs: nothing is dropped"),
        ("%y = relu(%x) : f32[2]", "%x: f32[2]", "selects no contraction"),
        ("%y = linear(%c, %w) : f32[4]", "%w: f32[4, 8]", "first operand is constant"),
    ],
)
def test_refusals(read: Read, line: str, inputs: str, reason: str) -> None:
    constant = '%c = weight {ref="c"} : f32[8]\n  ' if "%c" in line else ""
    graph = read(f"graph @g ({inputs}) -> (y = %y) level=graph {{\n  {constant}{line}\n}}\n")
    context = Context()
    assert UnbiasedMask().run(graph, context) is graph
    assert reason in context.refusals[0].reason
    assert bool(context.refusals[0].cure) == ("symbolic" in reason)


def test_bad_options(read: Read) -> None:
    graph = read(LAYERS)
    with pytest.raises(bw.errors.InvalidInput, match="two-draw keeps 2 of a group, not 1"):
        UnbiasedMask(Pattern(1, 4), method="two-draw").run(graph, Context())
    with pytest.raises(bw.errors.InvalidInput, match="seed lies in"):
        UnbiasedMask(seed=-1).run(graph, Context())


class Mlp(nn.Module):
    """Two layers, the second with a ragged last group."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 10), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]


X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def test_the_mean_over_draws_is_the_dense_layer() -> None:
    torch.manual_seed(0)
    x, count = X[:, :10].contiguous(), 1500
    graph = bw.capture(nn.Linear(10, 4).eval(), (x,))
    masked, _ = bw.optimize(graph, "unbiased-mask")
    (dense,) = evaluate(graph, [x])
    got = torch.stack([evaluate(masked, [x, torch.tensor(d)])[0] for d in range(count)]).double()
    assert float(((got.mean(0) - dense).abs() / (got.std(0) / count**0.5)).max()) < 4.0


@pytest.mark.parametrize("recipe", ["unbiased-mask", "unbiased-mask{pattern=1:4 only=a}, int8"])
def test_the_program_draws_as_the_reference_does(recipe: str) -> None:
    x = X.numpy()
    graph = bw.capture(Mlp().eval(), (X,))
    program = bw.compile(graph, recipe=recipe, calibration=[x])
    assert program.input_names == ("x", "draw")
    lowered, report = bw.optimize(graph, recipe, calibration=[x])
    assert all(row.output_error is not None for row in report.rows if row.name == "unbiased-mask")
    results = []
    for draw in (0, 1, 1 << 40):
        got = program(x, np.int64(draw))
        (want,) = evaluate(lowered, [X, torch.tensor(draw)])
        np.testing.assert_allclose(got, want.numpy(), atol=0.05 if "int8" in recipe else 1e-5)
        assert np.array_equal(got, program(x, np.int64(draw)))
        results.append(got)
    assert not np.array_equal(results[0], results[1])
    compared = bw.verify(program, graph, (x, np.asarray(7)), calibration=[x])
    assert compared.rows
    assert all(row.error <= row.bound for row in compared.rows)
