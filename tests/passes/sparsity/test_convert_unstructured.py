"""convert-unstructured: the pattern follows from each layer's own zeros, what it costs is told, dense layers stay."""

from __future__ import annotations

import math
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
from bitwright.passes.sparsity.convert_unstructured import ConvertUnstructured

Read = Callable[..., Graph]
TEXT = """
    graph @g (%x: f32[2, 256]) -> (y = %y) level=graph {
      %w = weight {ref="fc.weight"} : f32[256, 256]
      %y = linear(%x, %w) : f32[2, 256]
    }
"""


def pruned(zeros: float, shape: tuple[int, ...] = (256, 256), seed: int = 0) -> np.ndarray[Any, Any]:
    """Normal weights of which the smallest share is zero, as global magnitude pruning leaves them."""
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return np.where(np.abs(w) > np.quantile(np.abs(w), zeros), w, np.float32(0))


def surplus(zeros: float, keep: int, group: int) -> float:
    """Share of the non-zeros that are too many in their group, when zeros are placed at random."""
    ways = [math.comb(group, n) * (1 - zeros) ** n * zeros ** (group - n) for n in range(group + 1)]
    return sum(w * max(0, n - keep) for n, w in enumerate(ways)) / (group * (1 - zeros))


@pytest.mark.parametrize(
    ("zeros", "group", "keep"),
    [
        (0.5, 8, 6), (0.6, 8, 5), (0.7, 8, 5), (0.75, 8, 4), (0.8, 8, 4), (0.85, 8, 3), (0.9, 8, 2),
        (0.6, 4, 3), (0.75, 4, 3), (0.8, 4, 2), (0.95, 4, 1), (0.75, 16, 7), (0.9, 16, 4),
    ],
)  # fmt: skip
def test_the_table_of_the_binomial_tail(read: Read, zeros: float, group: int, keep: int) -> None:
    """algorithms.md, section 1.5; groups of 16 by the same rule."""
    graph, context = read(TEXT, {"fc.weight": pruned(zeros)}), Context()
    p = ConvertUnstructured(group)
    after = p.run(graph, context)
    weight, before = after.constant("fc.weight"), graph.weights["fc.weight"].array
    assert isinstance(weight, np.ndarray)
    assert after.types["fc.weight"].encoding == NM(keep, group, 1)
    assert violation(weight, NM(keep, group, 1)) == ""
    ((name, place, facts),) = context.remarks
    assert (name, place, facts["pattern"]) == ("convert-unstructured", "fc", f"{keep}:{group}")
    assert facts["zero_fraction"] == pytest.approx(zeros, abs=1e-3)
    lost = 1 - np.abs(weight).sum() / np.abs(before).sum()
    assert facts["magnitude_lost"] == pytest.approx(lost, abs=1e-5)
    assert 0 < lost < surplus(zeros, keep, group)  # those that go are smaller than those that stay
    assert np.array_equal(weight[weight != 0], before[weight != 0])
    assert context.facts["dense"]["fc.weight.1"].array is before
    assert not p.run(after, Context()).changed_from(after)


def test_confidence_trades_density_for_loss(read: Read) -> None:
    graph = read(TEXT, {"fc.weight": pruned(0.8)})
    lost = {}
    for confidence in (0.5, 0.95, 0.999):
        context = Context()
        after = ConvertUnstructured(confidence=confidence).run(graph, context)
        encoding = after.types["fc.weight"].encoding
        assert isinstance(encoding, NM)
        lost[encoding.keep] = context.remarks[0][2]["magnitude_lost"]
    assert list(lost) == [1, 4, 6]
    assert lost[1] > lost[4] > lost[6]


def test_transposable_holds_along_both_axes(read: Read) -> None:
    graph, context = read(TEXT, {"fc.weight": pruned(0.8)}), Context()
    p = parse_pass("convert-unstructured{transposable=true}")
    after = p.run(graph, context)
    assert "nm<4:8, axis=1, transposable>" in str(after.types["fc.weight"])
    weight = after.constant("fc.weight")
    assert isinstance(weight, np.ndarray)
    assert violation(weight, NM(4, 8, 0)) == violation(weight, NM(4, 8, 1)) == ""
    rows = Context()
    ConvertUnstructured().run(graph, rows)
    assert context.remarks[0][2]["magnitude_lost"] > rows.remarks[0][2]["magnitude_lost"]
    assert not p.run(after, Context()).changed_from(after)


@pytest.mark.parametrize("zeros", [0.0, 0.1, 0.3])
def test_dense_layers_are_refused(read: Read, zeros: float) -> None:
    graph, context = read(TEXT, {"fc.weight": pruned(zeros)}), Context()
    assert not ConvertUnstructured().run(graph, context).changed_from(graph)
    assert context.refusals[0].reason == f"{zeros:.1%} zeros are too few for a pattern of 8"


def test_a_tighter_pattern_is_not_loosened_and_a_looser_one_is_replaced(read: Read) -> None:
    kept = np.tile(np.eye(4, dtype=np.float32)[:1], (256, 64))  # 1:4
    text = TEXT.replace("f32[256, 256]\n      %y", "f32[256, 256] nm<PATTERN, axis=1>\n      %y")
    graph, context = read(text.replace("PATTERN", "1:4"), {"fc.weight": kept}), Context()
    assert not ConvertUnstructured().run(graph, context).changed_from(graph)
    assert context.refusals[0].reason == "obeys 1:4 already, no looser than 4:8"
    for loose in ("7:8", "16:64"):
        after = ConvertUnstructured().run(read(text.replace("PATTERN", loose), {"fc.weight": kept}), Context())
        assert after.types["fc.weight"].encoding == NM(4, 8, 1)


def test_other_refusals_and_bad_options(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[1, 12]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[8, 12]
          %y = linear(%x, %w) : f32[1, 8]
        }
    """, {"fc.weight": np.eye(8, 12, dtype=np.float32)})  # fmt: skip
    context = Context()
    ConvertUnstructured().run(graph, context)
    assert context.refusals[0].reason == "12 inputs are not a multiple of 8"
    for text, why in (("group=5", "4, 8 or 16"), ("confidence=1.0", "between 0 and 1")):
        with pytest.raises(InvalidInput, match=why):
            parse_pass(f"convert-unstructured{{{text}}}")


@pytest.mark.parametrize("recipe", ["convert-unstructured", "convert-unstructured, int8"])
def test_converted_layers_reach_sparse_kernels(recipe: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)).eval()
    for i, layer in enumerate((model[0], model[2])):
        layer.weight.data = torch.from_numpy(pruned(0.9, (64, 64), i))
    x = torch.randn(8, 64)
    report = bw.compile(model, example_inputs=(x,), recipe=recipe, calibration=[(x,)]).report
    rows = [row for row in report.layers if row.formats.w]
    assert [row.pattern for row in rows] == ["nm<2:8, axis=1>"] * 2
    assert all("2:8" in row.reason for row in rows)
    assert all(any("magnitude_lost" in n for n in row.notes) for row in rows)
