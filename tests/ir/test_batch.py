"""Which graphs may be computed a few rows at a time."""

from __future__ import annotations

import pytest

from bitwright.ir.batch import why_not_separable
from bitwright.ir.text import parse

HEAD = "graph @g (%x: f32[b, 4, 6]) -> (y = %y) level=graph {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("body", "separable"),
    [
        ("  %y = relu(%x) : f32[b, 4, 6]", True),
        ("  %y = softmax(%x) {axis=1} : f32[b, 4, 6]", True),
        ("  %y = softmax(%x) {axis=0} : f32[b, 4, 6]", False),
        ('  %y = reshape(%x) {shape=["4*b", 6]} : f32[4*b, 6]', True),
        ("  %y = transpose(%x) {perm=[0, 2, 1]} : f32[b, 6, 4]", True),
        ("  %y = transpose(%x) {perm=[1, 0, 2]} : f32[4, b, 6]", False),
        ("  %y = reduce_sum(%x) {axes=[1]} : f32[b, 6]", True),
        ("  %y = reduce_sum(%x) {axes=[0]} : f32[4, 6]", False),
        ("  %y = concat(%x, %x) {axis=0} : f32[2*b, 4, 6]", False),
        ("  %y = concat(%x, %x) {axis=1} : f32[b, 8, 6]", True),
        ("  %y = matmul(%x, %x) {transpose_b=true} : f32[b, 4, 4]", True),
        ("  %y = flip(%x) {axes=[0]} : f32[b, 4, 6]", False),
        ("  %y = topk(%x) {k=2} : f32[b, 4, 2]", True),
    ],
)
def test_rules(body: str, separable: bool) -> None:
    text = HEAD.format(body=body)
    if "topk" in body:
        text = text.replace("%y = topk", "%y, %i = topk").replace("f32[b, 4, 2]", "f32[b, 4, 2]; s64[b, 4, 2]")
    assert (why_not_separable(parse(text), "b") == "") == separable
