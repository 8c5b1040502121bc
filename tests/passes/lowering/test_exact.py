"""Contractions in s32 of shifted codes become integer contractions, to the last bit, or say why not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bitwright.ir import ops
from bitwright.ir.interpret import evaluate
from bitwright.ir.verify import verify
from bitwright.passes._pass import Context
from bitwright.passes.lowering.to_integer import LowerToInteger

LINEAR = """
    graph @g (%q: u8[b, 16], %z: u8[]) -> (y = %y) level=graph {
      %w = weight {ref="w"} : s32[6, 16]
      %bias = weight {ref="bias"} : s32[6]
      %c = cast(%q) : s32[b, 16]
      ZERO
      %x = sub(%c, %zero) : s32[b, 16]
      %y = linear(%x, %w, %bias) : s32[b, 6]
    }
"""
CONV = """
    graph @g (%q: u8[2, 4, 7, 8], %z: u8[]) -> (y = %y) level=graph {
      %w = weight {ref="w"} : s8[6, 2, 3, 2]
      %wide = cast(%w) : s32[6, 2, 3, 2]
      %c = cast(%q) : s32[2, 4, 7, 8]
      ZERO
      %x = sub(%c, %zero) : s32[2, 4, 7, 8]
      %y = conv(%x, %wide) {stride=[2, 1], padding=PADDING, dilation=[1, 1], groups=2} : s32[2, 6, SIZE]
    }
"""
ZEROS = {"known": "%zero = constant {values=[7]} : s32[]", "at run time": "%zero = cast(%z) : s32[]"}
SHAPES = {"padded": ("[1, 0, 1, 1]", "4, 8"), "plain": ("[0, 0, 0, 0]", "3, 7")}


def lowered(read: Callable[..., object], text: str, top: int) -> tuple[Context, set[type[ops.Op]]]:
    """Lower a graph with weights up to ``top`` and compare the integers it gives."""
    rng = np.random.default_rng(0)
    shapes = {"w": (6, 16), "bias": (6,)} if "linear" in text else {"w": (6, 2, 3, 2)}
    kind = np.int32 if "linear" in text else np.int8
    weights = {k: rng.integers(-top, top + 1, s).astype(kind) for k, s in shapes.items()}
    graph = read(text, weights)
    context = Context()
    done = LowerToInteger().run(graph, context)  # type: ignore[arg-type]
    verify(done)
    shape = (3, 16) if "linear" in text else (2, 4, 7, 8)
    for zero in (0, 7, 200):
        inputs = [rng.integers(0, 256, shape).astype(np.uint8), np.array(zero, np.uint8)]
        assert (evaluate(done, inputs)[0] == evaluate(graph, inputs)[0]).all()  # type: ignore[arg-type]
    return context, {type(n.op) for n in done.nodes}


@pytest.mark.parametrize("zero", ZEROS)
def test_linear(read: Callable[..., object], zero: str) -> None:
    context, found = lowered(read, LINEAR.replace("ZERO", ZEROS[zero]), 127)
    assert ops.IntLinear in found
    assert ops.Linear not in found
    assert not context.refusals


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zero", ZEROS)
def test_conv(read: Callable[..., object], zero: str, shape: str) -> None:
    padding, size = SHAPES[shape]
    text = CONV.replace("ZERO", ZEROS[zero]).replace("PADDING", padding).replace("SIZE", size)
    _, found = lowered(read, text, 127)
    assert ops.IntConv in found
    assert ops.Conv not in found


def test_wide_weights_are_refused(read: Callable[..., object]) -> None:
    context, found = lowered(read, LINEAR.replace("ZERO", ZEROS["known"]), 255)
    assert ops.Linear in found
    assert [r.reason for r in context.refusals] == [
        "stays s32: the weights less their zero point are not constants that fit s8"
    ]
