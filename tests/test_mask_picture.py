"""The picture of a mask: what it says, where it is drawn, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.mask_picture import draw_mask, lowered


def graph(recipe: str) -> Graph:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    captured = bw.capture(net.eval(), (torch.randn(1, 8, 8, 8),))
    return bw.optimize(captured, recipe)[0]


def pixels(path: Path) -> np.ndarray[Any, Any]:
    from matplotlib.image import imread

    return np.asarray(imread(path))


def test_a_mask_becomes_a_png(tmp_path: Path) -> None:
    said = draw_mask(graph("nm-mask{pattern=2:4}"), "0", tmp_path / "mask.png")
    assert said == "0: nm<2:4, axis=1>, 576 of 1,152 weights (50.0%)"
    picture = pixels(tmp_path / "mask.png")
    assert picture.shape[0] > 500
    assert picture.std() > 0.1
    dense = draw_mask(graph("simplify"), "3", tmp_path / "dense.png")
    assert "dense, 5,760 of 5,760 weights (100.0%)" in dense
    assert not np.array_equal(picture, pixels(tmp_path / "dense.png"))


def test_a_convolution_is_drawn_with_inputs_innermost() -> None:
    g = graph("simplify")
    node = next(n for n in g.nodes if n.op.spelling == "conv")
    weight = np.asarray(g.constant(node.inputs[1]))
    flat = lowered(node, weight)
    assert flat.shape == (16, 72)
    assert np.array_equal(flat[:, 8:16], weight[:, :, 0, 1])


def test_unknown_layers_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no layer is called 'x'.*the model has 0, 3"):
        draw_mask(graph("simplify"), "x", tmp_path / "x.png")
    with pytest.raises(InvalidInput, match="cannot write"):
        draw_mask(graph("simplify"), "0", tmp_path / "missing" / "x.png")
