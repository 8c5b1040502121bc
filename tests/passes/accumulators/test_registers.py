"""Narrow registers: sums by hand, against plain loops, and exact where they fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.passes.accumulators.registers import evaluate_in_registers, saturating_sums

RNG = np.random.default_rng(0)
TEXT = """
    graph @g (%x: u8[b, 6, 5, 5], %q: u8[b, 40]) -> (y = %y, z = %z, l = %l) level=integer {
      %c = weight {ref="c"} : s8[4, 6, 3, 3]
      %d = weight {ref="d"} : s8[6, 2, 3, 3]
      %w = weight {ref="w"} : s8[7, 40]
      %y = int_conv(%x, %c) {padding=[1, 1, 1, 1], x_zero=9} : s32[b, 4, 5, 5]
      %z = int_conv(%x, %d) {groups=3, stride=[2, 2]} : s32[b, 6, 2, 2]
      %l = int_linear(%q, %w) {x_zero=100} : s32[b, 7]
    }
"""


def model(read: Callable[..., Graph]) -> tuple[Graph, list[Any]]:
    weights = {n: RNG.integers(-127, 128, s).astype(np.int8) for n, s in
               (("c", (4, 6, 3, 3)), ("d", (6, 2, 3, 3)), ("w", (7, 40)))}  # fmt: skip
    return read(TEXT, weights), [RNG.integers(0, 256, s).astype(np.uint8) for s in ((3, 6, 5, 5), (3, 40))]


def by_hand(x: Any, w: Any, zero: int, bits: int) -> int:
    lo, hi = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    now = min(max(-zero * int(w.sum()), lo), hi)
    for a, b in zip(x.tolist(), w.tolist(), strict=True):
        now = min(max(now + a * b, lo), hi)
    return now


def test_by_hand(read: Callable[..., Graph]) -> None:
    graph, (x, q) = model(read)
    c, d, w = (np.asarray(graph.weights[n].array).astype(np.int64) for n in "cdw")
    for bits in (12, 16, 22):
        y, z, linear = (to_numpy(t) for t in evaluate_in_registers(graph, [x, q], bits))
        for n, o in ((0, 0), (2, 6), (1, 3)):
            assert linear[n, o] == by_hand(q[n].astype(int), w[o], 100, bits)
        padded = np.pad(x.astype(int), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=9)
        for n, o, i, j in ((0, 0, 0, 0), (2, 3, 4, 2), (1, 1, 2, 2)):
            taken = padded[n, :, i : i + 3, j : j + 3].transpose(1, 2, 0).ravel()
            assert y[n, o, i, j] == by_hand(taken, c[o].transpose(1, 2, 0).ravel(), 9, bits)
            group = x.astype(int)[n, 2 * (o // 2) : 2 * (o // 2) + 2, :3, 2:5].transpose(1, 2, 0).ravel()
            assert z[n, o, 0, 1] == by_hand(group, d[o].transpose(1, 2, 0).ravel(), 0, bits)


def test_wrapping_keeps_the_low_bits(read: Callable[..., Graph]) -> None:
    graph, inputs = model(read)
    exact = evaluate(graph, inputs)
    for bits in (8, 16, 31, 64):
        for got, want in zip(evaluate_in_registers(graph, inputs, bits, "wrap"), exact, strict=True):
            off = got.long() - want.long()
            assert not bool((off % (1 << min(bits, 62))).any())
            assert int(got.min()) >= -(1 << (bits - 1))
            assert int(got.max()) < 1 << (bits - 1)
    for register in ("wrap", "saturate"):
        for got, want in zip(evaluate_in_registers(graph, inputs, 32, register), exact, strict=True):
            assert torch.equal(got, want)
    named = {"x": inputs[0], "q": inputs[1]}
    assert torch.equal(evaluate_in_registers(graph, named, 32)[0], exact[0])


def test_many_rows_and_few() -> None:
    x, w = torch.randint(-100, 100, (5000, 9)).double(), torch.randint(-127, 128, (300, 9)).double()
    got = saturating_sums(x, w, 0, 14)
    some = saturating_sums(x[4990:], w, 0, 14)
    assert torch.equal(got[4990:], some)
    assert float(got.abs().max()) <= 8192
    assert saturating_sums(x[:0], w, 0, 14).shape == (0, 300)


@pytest.mark.parametrize(("bits", "register"), [(1, "wrap"), (65, "wrap"), (0, "saturate"), (16, "clip")])
def test_bad_input(bits: int, register: Any, read: Callable[..., Graph]) -> None:
    graph, inputs = model(read)
    with pytest.raises(InvalidInput, match="2 to 64 bits"):
        evaluate_in_registers(graph, inputs, bits, register)
