"""Signed activation codes become unsigned ones, to the last bit, and only where everybody who reads them can follow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.types import S8, U8
from bitwright.ir.verify import verify
from bitwright.passes.lowering._unsigned import unsigned_codes

HEAD = """
    graph @g (%x: f32[2, 4, 6, 6]) -> (y = %y) level=graph {
      %s = constant {values=[0.05]} : f32[]
      %z = constant {values=[-3]} : s8[]
      %q = quantize(%x, %s, %z) {dtype=s8} : s8[2, 4, 6, 6]
      %p = max_pool(%q) {kernel=[2, 2], stride=[2, 2], padding=[1, 1, 1, 1]} : s8[2, 4, 4, 4]
"""
MOVED = (
    HEAD
    + """
      %c = concat(%p, %p) {axis=1} : s8[2, 8, 4, 4]
      %d = dequantize(%c, %s, %z) : f32[2, 8, 4, 4]
      %y = relu(%d) : f32[2, 8, 4, 4]
    }
"""
)
COMPUTED_WITH = (
    HEAD
    + """
      %d = dequantize(%p, %s, %z) : f32[2, 4, 4, 4]
      %a = abs(%p) : s8[2, 4, 4, 4]
      %f = cast(%a) {dtype=f32} : f32[2, 4, 4, 4]
      %y = add(%d, %f) : f32[2, 4, 4, 4]
    }
"""
)
GIVEN_OUT = (
    HEAD.replace("%y)", "%y, q = %p)")
    + """
      %y = dequantize(%p, %s, %z) : f32[2, 4, 4, 4]
    }
"""
)
SYMMETRIC_BY_CHANNEL = """
    graph @g (%x: f32[2, 4]) -> (y = %y) level=graph {
      %s = constant {values=[0.05, 0.1, 0.01, 0.02]} : f32[4]
      %q = quantize(%x, %s) {dtype=s8, axis=1} : s8[2, 4]
      %y = dequantize(%q, %s) {axis=1} : f32[2, 4]
    }
"""


def codes(graph: Graph) -> set[str]:
    return {str(n.type.dtype) for n in graph.nodes if n.type.rank > 1 and n.type.dtype.is_integer}


@pytest.mark.parametrize("text", [MOVED, SYMMETRIC_BY_CHANNEL])
def test_codes_move_by_128_and_the_reals_stay(read: Callable[..., Graph], text: str) -> None:
    graph = read(text)
    done = unsigned_codes(graph, U8)
    verify(done)
    assert codes(done) == {"u8"}
    x = np.random.default_rng(0).standard_normal(graph.inputs[0].type.static_shape).astype(np.float32) * 5
    assert (evaluate(done, [x])[0] == evaluate(graph, [x])[0]).all()
    assert unsigned_codes(done, U8) is done


@pytest.mark.parametrize("text", [COMPUTED_WITH, GIVEN_OUT])
def test_codes_that_others_read_stay(read: Callable[..., Graph], text: str) -> None:
    graph = read(text)
    assert unsigned_codes(graph, U8) is graph


def test_targets_with_signed_instructions_keep_signed_codes(read: Callable[..., Graph]) -> None:
    graph = read(MOVED)
    assert unsigned_codes(graph, S8) is graph
