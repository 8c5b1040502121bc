"""The verifier catches each kind of broken graph and quotes the place."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.ir.errors import VerifyError
from bitwright.ir.text import parse, show
from bitwright.ir.verify import verify
from bitwright.ir.weights import Array, Weights

HEAD = "graph @g (%x: f32[2, 4]) -> (y = %y) level={level} {{\n{body}\n}}\n"


def check(body: str, level: str = "graph", **weights: Array) -> None:
    verify(parse(HEAD.format(level=level, body=body), Weights(weights)))


@pytest.mark.parametrize(
    ("body", "level", "part"),
    [
        ("  %y = relu(%z) : f32[2, 4]", "graph", "before it is defined"),
        ("  %x = relu(%x) : f32[2, 4]\n  %y = relu(%x) : f32[2, 4]", "graph", "defined twice"),
        ("  %y = relu(%x) : f32[2, 5]", "graph", "declared"),
        ("  %y = relu(%x) : f16[2, 4]", "graph", "declared"),
        ("  %y = saturate(%x) {dtype=u8} : u8[2, 4]", "graph", "may not stand"),
        ("  %y = relu(%x) : f32[2, 4]", "kernel", "outside a region"),
        ("  %z = relu(%x) : f32[2, 4]", "graph", "output %y is not defined"),
        ("  %y = constant {values=[1.0]} : f32[2, 4]", "graph", "with 1 values"),
        ('  %w = weight {ref="w"} : f32[4, 4]\n  %y = relu(%x) : f32[2, 4]', "graph", "no 'w'"),
        ("  %y = relu(%x) : f32[2, 4] nm<2:4, axis=1>", "graph", "only weights carry"),
        ("  %y = linear(%x, %x, %x, %x) : f32[2, 4]", "graph", "takes 2 to 3 operands"),
    ],
)
def test_broken_graphs_are_refused(body: str, level: str, part: str) -> None:
    with pytest.raises(VerifyError, match=part):
        check(body, level)


LINEAR = '  %w = weight {{ref="w"}} : {type}\n  %y = linear(%x, %w) : f32[2, 4]'


THIRD = np.repeat(np.eye(1, 4, 2, dtype=np.float32), 4, 0)
"""Every row keeps its third entry: one of four along the rows, four of four along the columns."""


@pytest.mark.parametrize(
    ("type", "array", "part"),
    [
        ("f32[4, 4]", np.full((4, 4), np.nan, np.float32), "contains NaN"),
        ("f32[4, 4]", np.zeros((4, 5), np.float32), "declared f32"),
        ("f32[4, 4] nm<2:4, axis=1>", np.ones((4, 4), np.float32), "breaks its encoding"),
        ("f32[4, 4] nm<1:2, axis=0, shared=2>", np.eye(4, dtype=np.float32), "breaks its encoding"),
        ("f32[4, 4] nm<1:2, axis=1, block=2>", np.eye(4, dtype=np.float32)[:, [0, 2, 1, 3]] + THIRD, "breaks its enc"),
        ("f32[4, 4] nm<2:4, axis=1, transposable>", THIRD, "breaks its encoding"),
        ("f32[4, 4] unstructured<1 per 4, axis=1>", np.tri(4, dtype=np.float32), "at most 1 of 4"),
        ("f32[4, 4] codebook<2>", np.arange(16, dtype=np.float32).reshape(4, 4), "16 distinct values"),
    ],
)
def test_weights_are_checked_by_value(type: str, array: Array, part: str) -> None:
    with pytest.raises(VerifyError, match=part):
        check(LINEAR.format(type=type), w=array)


def test_narrow_integers_must_fit() -> None:
    body = '  %w = weight {ref="w"} : s4[4, 4]\n  %y = relu(%x) : f32[2, 4]'
    check(body, w=np.full((4, 4), 7, np.int8))
    with pytest.raises(VerifyError, match="outside s4"):
        check(body, w=np.full((4, 4), 8, np.int8))


@pytest.mark.parametrize(
    "encoding",
    [
        "nm<2:4, axis=1>", "nm<1:2, axis=1, shared=4>", "nm<2:2, axis=1, block=2>", "nm<4:4, axis=1, transposable>",
        "unstructured<2 per 4>", "unstructured<2 per 3, axis=1>", "codebook<3>", "block<4x1>",
    ],
)  # fmt: skip
def test_a_good_pattern_passes_and_survives_text(encoding: str) -> None:
    w = np.tile(np.array([1, 0, 2, 0], np.float32), (4, 1))
    body = LINEAR.format(type=f"f32[4, 4] {encoding}")
    check(body, w=w)
    graph = parse(HEAD.format(level="graph", body=body), Weights({"w": w}))
    assert str(graph.types["w"].encoding) == encoding
    again = parse(show(graph), graph.weights)
    assert again == graph
    verify(again)


def test_the_message_quotes_the_neighbourhood() -> None:
    with pytest.raises(VerifyError) as e:
        check("  %a = relu(%x) : f32[2, 4]\n  %y = relu(%a) : f32[9]")
    assert "> %y = relu" in str(e.value)
    assert "%a = relu" in str(e.value)
