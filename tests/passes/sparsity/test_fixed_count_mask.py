"""fixed-count-mask: as many weights in every run, of every output and tap; short axes; the text form; refusals."""

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
from bitwright.ir.types import Unstructured
from bitwright.passes import Context
from bitwright.passes._spec import parse_pass
from bitwright.passes.sparsity.fixed_count_mask import FixedCountMask

Read = Callable[..., Graph]


def test_runs_of_a_convolution_lie_along_the_inputs_of_each_tap(check: Any) -> None:
    after = check(
        FixedCountMask(count=3, per=8),
        before="""
            graph @g (%x: f32[1, 20, 5, 5]) -> (y = %y) level=graph {
              %w = weight {ref="conv1.weight"} : f32[6, 20, 3, 3]
              %y = conv(%x, %w) : f32[1, 6, 3, 3]
            }
        """,
        after="""
            graph @g (%x: f32[1, 20, 5, 5]) -> (y = %y) level=graph {
              %conv1.weight = weight {ref="conv1.weight.1"} : f32[6, 20, 3, 3] unstructured<3 per 8, axis=1>
              %y = conv(%x, %conv1.weight) : f32[1, 6, 3, 3]
            }
        """,
        tolerance=None,
    )
    (weight,) = (h.array for h in after.weights.values())
    kept = weight != 0
    assert (kept[:, :8].sum(1) == 3).all()
    assert (kept[:, 8:16].sum(1) == 3).all()
    assert (kept[:, 16:].sum(1) == 2).all()  # four of eight inputs keep their share of three, rounded up


TWO = """
    graph @g (%x: f32[2, 300]) -> (y = %y) level=graph {
      %w = weight {ref="wide.weight"} : f32[24, 300]
      %v = weight {ref="short.weight"} : f32[8, 24]
      %h = linear(%x, %w) : f32[2, 24]
      %y = linear(%h, %v) : f32[2, 8]
    }
"""


def test_density_and_axes_shorter_than_a_run(read: Read) -> None:
    graph, context = read(TWO), Context()
    p = parse_pass("fixed-count-mask{density=0.1 per=256}")
    after = p.run(graph, context)
    types = {n.output: str(n.type) for n in after.nodes if n.op.name == "weight"}
    assert types == {
        "wide.weight": "f32[24, 300] unstructured<26 per 256, axis=1>",
        "short.weight": "f32[8, 24] unstructured<3 per 24, axis=1>",
    }
    told = {place: facts for _, place, facts in context.remarks}
    assert (told["wide"]["pattern"], told["short"]["pattern"]) == ("26 per 256", "3 per 24")
    assert 0.2 < told["wide"]["kept_magnitude"] <= told["wide"]["kept_unstructured"] < 0.35
    assert set(context.facts["dense"]) == {"wide.weight.1", "short.weight.1"}
    assert not p.run(after, Context()).changed_from(after)


def test_blocks_are_kept_together(read: Read) -> None:
    after = FixedCountMask(count=2, per=8, block=4, only="wide").run(read(TWO), Context())
    assert "unstructured<2 per 8, axis=1, block=4>" in str(after.types["wide.weight"])
    weight = after.constant("wide.weight")
    assert isinstance(weight, np.ndarray)
    blocks = (weight != 0).reshape(24, 75, 4)
    assert (blocks.all(-1) == blocks.any(-1)).all()
    assert violation(weight, Unstructured(2, 8, 1, 4)) == ""


def test_matmul_lies_the_other_way_round(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="w"} : f32[8, 6]
          %y = matmul(%x, %w) : f32[2, 6]
        }
    """)
    after = FixedCountMask(count=3, per=8).run(graph, Context())
    (weight,) = (h.array for h in after.weights.values())
    assert ((weight != 0).sum(0) == 3).all()
    from bitwright.passes.canonical.simplify import Simplify

    turned = Simplify().run(after, Context())
    assert any("f32[6, 8] unstructured<3 per 8, axis=1>" in str(n.type) for n in turned.nodes)


def test_refused(read: Read) -> None:
    context = Context()
    graph = read(TWO)
    assert not FixedCountMask(density=1.0).run(graph, context).changed_from(graph)
    assert [r.reason for r in context.refusals] == [
        "64 of 64 are kept: nothing to prune",
        "24 of 24 are kept: nothing to prune",
    ]
    for text, why in (
        ("count=9 per=8", "1 <= count <= per, got 9 per 8"),
        ("count=-1 per=8", "keeps nothing"),
        ("per=0", "keeps nothing"),
        ("density=0.0", "above 0"),
        ("density=1.5", "at most 1"),
        ("block=0", "block is at least 1"),
    ):
        with pytest.raises(InvalidInput, match=why):
            parse_pass(f"fixed-count-mask{{{text}}}")


@pytest.mark.parametrize("recipe", ["fixed-count-mask{count=4 per=32}", "fixed-count-mask{count=4 per=32}, int8"])
@pytest.mark.parametrize("batch", [2, 32])
def test_compiled_layers_gain_with_many_rows(batch: int, recipe: str) -> None:
    torch.manual_seed(0)
    conv, linear = torch.nn.Conv2d(32, 16, 3), torch.nn.Linear(64, 24)
    model = torch.nn.Sequential(conv, torch.nn.Flatten(), linear).eval()
    x = torch.randn(batch, 32, 4, 4)
    program = bw.compile(model, example_inputs=(x,), recipe=recipe, calibration=[(x,)])
    rows = [row for row in program.report.layers if row.formats.w]
    assert [row.pattern for row in rows] == ["unstructured<4 per 32, axis=1>"] * 2
    if batch == 2:
        assert all(row.reason == "runs dense: no kernel for unstructured<4 per 32, axis=1>" for row in rows)
        assert all(any("rows do not fill the" in note for note in row.notes) for row in rows)
    else:
        assert all("activations in lanes" in row.reason for row in rows)
    for weight in (conv.weight, linear.weight):
        weight.data = torch.from_numpy(np.moveaxis(masked(weight.detach().numpy()), -1, 1).copy())
    want = model(x).detach().numpy()
    assert np.abs(program(x) - want).max() < (0.03 if "int8" in recipe else 1e-5) * np.ptp(want)


def masked(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The 4 largest of every 32 inputs, input axis last, by sorting."""
    w = np.moveaxis(weight, 1, -1)
    runs = w.reshape(-1, 32)
    order = np.argsort(-np.abs(runs), axis=1, kind="stable")[:, :4]
    out = np.zeros_like(runs)
    np.put_along_axis(out, order, np.take_along_axis(runs, order, 1), 1)
    return out.reshape(w.shape)
