"""Requantization in 32-bit lanes: the chosen forms, their limits, and bit-exact kernels at the extremes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.codegen.tvm.contract_template import Contract, ContractConfig
from bitwright.codegen.tvm.dyadic import Form, form_of
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.target import Isa
from bitwright.ir.types import S32, U8
from tests.codegen.harness import ISAS, Kernel, graph_of, runnable, target

Array = np.ndarray[Any, Any]
_TOP = (1 << 31) - 1


def meant(x: int, m: int, e: int) -> int:
    return (x * m + (1 << (e - 1))) >> e


def computed(form: Form, x: int, m: int, e: int) -> int:
    """The form in unbounded integers; asserts that no intermediate leaves 32 bits."""
    if form.kind == "shift":
        steps = [x + (1 << (form.by - 1))]
        result = steps[0] >> form.by
    elif form.kind == "low":
        steps = [x * m, 1 << (e - 1), x * m + (1 << (e - 1))]
        result = steps[-1] >> e
    else:
        moved, by = x << form.by, e + form.by - 32
        steps = [moved, (moved * m) >> 32, ((moved * m) >> 32) + (1 << (by - 1))]
        result = steps[-1] >> by
    assert all(-(1 << 31) <= s < 1 << 31 for s in steps)
    return result


@settings(deadline=None, max_examples=400)
@given(
    st.integers(0, _TOP) | st.integers(0, 30).map(lambda k: 1 << k),
    st.integers(1, 62),
    st.integers(-(1 << 31), _TOP),
    st.integers(0, 31),
)
def test_every_form_is_exact_at_the_ends_of_its_range(m: int, e: int, x: int, bits: int) -> None:
    x >>= bits
    form = form_of(ops.Requantize(S32), np.array(m), np.array(e), (-abs(x), abs(x)))
    if form is not None:
        for v in (x, -x, abs(x) - 1 if x else 0, 0):
            if v < 1 << 31:
                assert computed(form, v, m, e) == meant(v, m, e)


def test_the_shortest_form_is_chosen() -> None:
    def chosen(m: list[int], e: list[int], most: int, op: ops.Requantize | None = None) -> Form | None:
        return form_of(op or ops.Requantize(U8, 3), np.array(m), np.array(e), (-most, most))

    assert chosen([1 << 30], [38], 1 << 30) == Form("shift", 8)
    assert chosen([1 << 20, 1 << 22], [28, 30], 1000) == Form("shift", 8)
    assert chosen([(1 << 21) + 1], [20], 255) == Form("low")
    assert chosen([(1 << 30) + 1], [40], _TOP) == Form("high")
    assert chosen([(1 << 30) + 1, _TOP], [31, 33], 1 << 20) == Form("high", 2)
    assert chosen([(1 << 30) + 1, _TOP], [31, 33], 1 << 29) is None  # no room to move the operand
    assert chosen([_TOP], [1], 1 << 20) is None
    assert chosen([(1 << 30) + 1], [40], 5, ops.Requantize(S32, 3)) is None  # the zero point could leave 32 bits
    assert chosen([1 << 30], [38], _TOP) == Form("high")  # rounding before the shift would wrap


def layer(zero: int, shape: tuple[int, int, int]) -> Graph:
    """An integer layer with bias, a residual of u8 on a finer grid, and the sum on the output's grid."""
    rows, cols, depth = shape

    def build(b: Any) -> str:
        acc = b.emit(ops.IntLinear(7), "x", "w")
        fine = b.emit(ops.Requantize(S32, 0, 1), b.emit(ops.Binary("add"), acc, "bias"), "m", "e")
        other = b.emit(ops.Binary("sub"), b.emit(ops.Cast(S32), "r"), "centre")
        total = b.emit(ops.Binary("add"), fine, b.emit(ops.Requantize(S32), other, "m2", "e2"))
        return str(b.emit(ops.Requantize(U8, zero), total, "m3", "e3"))

    return graph_of(
        build, x=f"u8[{rows}, {depth}]", w=f"s8[{cols}, {depth}]", bias=f"s32[1, {cols}]", m=f"s32[{cols}]",
        e=f"s32[{cols}]", r=f"u8[{rows}, {cols}]", centre="s32[]", m2="s32[]", e2="s32[]", m3="s32[]", e3="s32[]",
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("shape", "e", "tail", "kinds"),
    [
        ((5, 37, 19), 34, (1 << 30, 38), ["high", "low", "shift"]),
        ((9, 64, 64), 31, (1 << 30, 38), ["high", "low", "shift"]),
        ((3, 20, 12), 37, (1_300_000_001, 39), ["high", "low", "high"]),
        ((4, 33, 8), 12, (1 << 30, 38), ["low"]),  # huge factors stay in 64-bit lanes
    ],
)
def test_layers_are_bit_exact(
    shape: tuple[int, int, int], e: int, tail: tuple[int, int], kinds: list[str], isa: Isa
) -> None:
    if not runnable(isa):
        pytest.skip(f"no {isa} here")
    rng, (rows, cols, depth) = np.random.default_rng(3), shape
    w = rng.integers(-128, 128, (cols, depth)).astype(np.int8)
    w[0], w[1] = 127, -128
    given: dict[str, Array] = {
        "w": w, "bias": rng.integers(-4000, 4000, (1, cols)).astype(np.int32),
        "m": rng.integers(1 << 30, 1 << 31, cols).astype(np.int32),
        "e": (e + rng.integers(0, 3, cols)).astype(np.int32),
        "centre": np.array(136, np.int32), "m2": np.array((1 << 21) + 77777, np.int32), "e2": np.array(14, np.int32),
        "m3": np.array(tail[0], np.int32), "e3": np.array(tail[1], np.int32),
    }  # fmt: skip
    body = layer(11, shape)
    kernel = Kernel(Contract(), body, target(isa), given)
    config = kernel.config
    assert isinstance(config, ContractConfig)
    assert [form.kind for _, form in config.forms] == kinds
    for x in (rng.integers(0, 256, (rows, depth)), np.full((rows, depth), 255), np.zeros((rows, depth))):
        inputs = {"x": x.astype(np.uint8), "r": rng.integers(0, 256, (rows, cols)).astype(np.uint8), **given}
        ordered = [inputs[v.name] for v in body.inputs]
        want = to_numpy(evaluate(body, ordered)[0])
        np.testing.assert_array_equal(kernel(ordered)[0], want)
