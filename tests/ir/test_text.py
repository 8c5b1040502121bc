"""The text form: a fixed point over the corpus, and errors that name the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.text import parse, show
from bitwright.ir.verify import verify
from bitwright.passes._instruments import random_weights

CORPUS = sorted((Path(__file__).parent.parent / "corpus").glob("*.bw-ir"))


def load(path: Path) -> Graph:
    text = path.read_text()
    return parse(text, random_weights(parse(text)))


@pytest.mark.parametrize("path", CORPUS, ids=lambda p: p.stem)
def test_text_is_a_fixed_point(path: Path) -> None:
    graph = load(path)
    assert show(graph) == path.read_text()
    assert parse(show(graph), graph.weights) == graph


@pytest.mark.parametrize("path", CORPUS, ids=lambda p: p.stem)
def test_the_corpus_verifies(path: Path) -> None:
    verify(load(path))


def test_origins_survive() -> None:
    graph = load(CORPUS[[p.stem for p in CORPUS].index("mlp")])
    assert [n.origin for n in graph.nodes][-1] == "fc2, model.py:43"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "ends before"),
        ("graph @g () -> () level=graph {", "ends before"),
        ("grph @g () -> () level=graph {\n}", "line 1"),
        ("graph @g () -> () level=grph {\n}", "did you mean 'graph'"),
        ("graph @g () -> () level=graph {\n  %x = \n}", "line 2"),
        ("graph @g (%x: f32[2]) -> (y = %y) level=graph {\n  %y = rleu(%x) : f32[2]\n}", "did you mean 'relu'"),
        (
            "graph @g (%x: f32[2]) -> (y = %y) level=graph {\n  %y = clamp(%x) {low=0.0} : f32[2]\n}",
            "no attribute 'low'",
        ),
        ("graph @g (%x: f32[2]) -> (y = %y) level=graph {\n  %y = relu(%x) : q7[2]\n}", "not a number format"),
        ("graph @g (%x: f32[2]) -> (y = %x) level=graph {\n}\nmore", "after the graph"),
        ("graph @g (%x: f32[2]) -> (y = %y) level=graph {\n  %y = flip(%x) {axes=[0} : f32[2]\n}", "line 2"),
    ],
)
def test_malformed_text_names_the_line(text: str, part: str) -> None:
    with pytest.raises(InvalidInput, match=part.replace("[", r"\[")):
        parse(text)
