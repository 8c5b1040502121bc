"""Wanda scores: norms of what reaches each weight, per input and tap; masks by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.passes import Context
from bitwright.passes._spec import parse_pass
from bitwright.passes.sparsity._inputs import Moments, input_norms, lowered, raised, rows
from bitwright.passes.sparsity.masks import nm_mask_array
from bitwright.passes.sparsity.nm_mask import NMMask

Read = Callable[..., Graph]


def test_norms_are_those_of_the_inputs_of_each_layer(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[b, 8]) -> (y = %z) level=graph {
          %w1 = weight {ref="fc1.weight"} : f32[12, 8]
          %h = linear(%x, %w1) : f32[b, 12]
          %r = relu(%h) : f32[b, 12]
          %w2 = weight {ref="fc2.weight"} : f32[12, 8]
          %y = matmul(%r, %w2) : f32[b, 8]
          %z = linear(%y, %w1) : f32[b, 12]
        }
    """)
    rng = np.random.default_rng(0)
    data = [[rng.standard_normal((n, 8)).astype(np.float32)] for n in (5, 7)]
    nodes = [n for n in graph.nodes if n.op.name in ("linear", "matmul")]
    norms = input_norms(graph, nodes, Context(calibration=data))
    x = np.concatenate([b[0] for b in data]).astype(np.float64)
    w1, w2 = (graph.weights[f"fc{i}.weight"].array for i in (1, 2))
    r = np.maximum(x @ w1.T, 0)
    y = r @ w2
    np.testing.assert_allclose(norms["w1"], np.sqrt((x**2).sum(0) + (y**2).sum(0)), rtol=1e-5)  # read twice
    np.testing.assert_allclose(norms["w2"], np.sqrt((r**2).sum(0))[:, None], rtol=1e-5)
    after = parse_pass("nm-mask{score=wanda only=fc2}").run(graph, Context(calibration=data))
    got = next(after.weights[k].array for k in after.used_weights() if k not in graph.weights)
    np.testing.assert_array_equal(got != 0, nm_mask_array(np.abs(w2) * norms["w2"], 2, 4, 0))


def test_of_a_convolution_each_tap_has_its_norm(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[b, 4, 3, 3]) -> (y = %y) level=graph {
          %w = weight {ref="conv.weight"} : f32[4, 4, 3, 3]
          %y = conv(%x, %w) {padding=[1, 1, 1, 1]} : f32[b, 4, 3, 3]
        }
    """)
    x = np.random.default_rng(0).standard_normal((5, 4, 3, 3)).astype(np.float32)
    (norms,) = input_norms(graph, list(graph.nodes[1:]), Context(calibration=[[x]])).values()
    assert norms.shape == (1, 4, 3, 3)
    patches = torch.nn.functional.unfold(torch.from_numpy(x).double(), 3, padding=1)
    want = patches.square().sum((0, 2)).sqrt().reshape(1, 4, 3, 3).numpy()
    np.testing.assert_allclose(norms, want, rtol=1e-9)
    assert norms[0, 0, 1, 1] > norms[0, 0, 0, 0]  # a corner tap often meets the padding


@pytest.mark.parametrize("spec", ["nm-mask{pattern=1:4 score=wanda}", "transposable-mask{pattern=1:4 score=wanda}",
                                  "fixed-count-mask{count=1 per=4 score=wanda}"])  # fmt: skip
def test_a_small_weight_on_a_loud_input_is_kept(read: Read, spec: str) -> None:
    graph = read("""
        graph @g (%x: f32[b, 4]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[4, 4]
          %y = linear(%x, %w) : f32[b, 4]
        }
    """, {"fc.weight": np.array([[5, 4, 3, 2]] * 4, np.float32)})  # fmt: skip
    x = np.array([[0.1, 0.1, 1.0, 0.0]], np.float32)
    p, context = parse_pass(spec), Context(calibration=[[x]])
    after = p.run(graph, context)
    (kept,) = (h.array != 0 for h in after.weights.values())
    assert kept[:, 2].any()
    assert kept.sum(1).tolist() == [1] * 4
    if not spec.startswith("transposable"):
        assert kept[:, 2].all()
    assert context.remarks[0][2]["score"] == "wanda"
    assert not p.run(after, context).changed_from(after)


def test_calibration_data_is_needed(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[b, 4]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[4, 4]
          %y = linear(%x, %w) : f32[b, 4]
        }
    """)
    with pytest.raises(InvalidInput, match=r"nm-mask\{score=wanda\} needs calibration data.*--calibrate"):
        NMMask(score="wanda").run(graph, Context())
    empty: list[Any] = [[np.zeros((0, 4), np.float32)]]
    assert NMMask(score="wanda").run(graph, Context(calibration=empty)).changed_from(graph)  # all norms are zero


@pytest.mark.parametrize("space", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
def test_patches_times_the_lowered_weight_are_the_convolution(space: int, last: bool) -> None:
    from bitwright.ir import ops
    from bitwright.ir.semantics import apply

    g = torch.Generator().manual_seed(space)
    kernel, sides = (3, 2, 1)[:space], (7, 6, 5)[:space]
    op = ops.Conv((2, 1, 1)[:space], (1, 0, 2)[:space] + (2, 1, 0)[:space], (1, 2, 1)[:space], 1, last)
    x = torch.randn(2, 4, *sides, generator=g)
    w = torch.randn(6, 4, *kernel, generator=g)
    x = x.movedim(1, -1) if last else x
    (want,) = apply(op, x, w)
    want = want if last else want.movedim(1, -1)
    matrix = torch.cat(list(rows(op, x, kernel)))
    assert matrix.dtype == torch.float64
    low = lowered(op, w.numpy())
    torch.testing.assert_close((matrix @ low.T).float(), want.reshape(-1, 6), rtol=1e-4, atol=1e-4)
    assert np.array_equal(raised(op, low, w.numpy()), w.numpy())


def test_pieces_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright.ir import ops
    from bitwright.passes.sparsity import _inputs

    x = torch.randn(50, 3, 8, generator=torch.Generator().manual_seed(0))
    whole, pieces = Moments.empty(8), Moments.empty(8)
    whole.add(x.reshape(-1, 8).double())
    monkeypatch.setattr(_inputs, "CHUNK", 100)
    parts = list(rows(ops.Linear(), x))
    assert max(map(len, parts)) == 12
    for part in parts:
        pieces.add(part)
    assert pieces.rows == whole.rows == 150
    torch.testing.assert_close(pieces.gram, whole.gram)
    torch.testing.assert_close(pieces.centred().diagonal() / 150, x.reshape(-1, 8).double().var(0, correction=0))
