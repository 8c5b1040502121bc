"""Quantization by products: exactly the codes of the division, for scales it takes; others are refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from bitwright.codegen.tvm.quantize import Quantizer, parts_of
from bitwright.codegen.tvm.template import Refused, canonical
from bitwright.ir import ops
from bitwright.ir.graph import Graph
from bitwright.ir.target import Isa, Target
from bitwright.ir.types import F32, parse_dtype
from tests.codegen import harness as h

RNG = np.random.default_rng(11)


def body_of(size: int, dtype: str = "u8") -> Graph:
    kind = parse_dtype(dtype)
    return h.graph_of(lambda b: b.emit(ops.Quantize(kind), "x", "s", "z"), x=f"f32[{size}]", s="f32[]", z=f"{dtype}[]")


def near_ties(scale: np.float32, count: int) -> h.Array:
    """The floats next to every (n + 1/2) * scale, five on each side, and what is not finite or does not fit."""
    ties = ((np.arange(-count, count) + 0.5) * np.float64(scale)).astype(np.float32)
    steps = np.arange(-5, 6, dtype=np.int32)
    around = (ties.view(np.int32)[:, None] + steps).view(np.float32).reshape(-1)
    odd = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-44, -1e-44, 0.0, -0.0, 1024 * scale, -1024 * scale, 1e9, -1e9]
    return np.concatenate([around, np.array(odd, np.float32), RNG.normal(size=977).astype(np.float32) * scale * 90])


@pytest.mark.parametrize("isa", ["avx512-vnni", "avx2"])
def test_codes_beside_every_tie(isa: Isa) -> None:
    if not h.runnable(isa):
        pytest.skip(f"this machine has no {isa}")
    scales = RNG.uniform(1, 2, 10).astype(np.float32) * 2.0 ** RNG.integers(-20, 20, 10).astype(np.float32)
    # significands as near to a multiple of 2^15 as is taken
    edge = [np.float32((1 << 23) + (n << 15) + d) for n in (1, 77, 200) for d in (5, -5)]
    for number, scale in enumerate([*scales, *edge, np.float32(0.125)]):
        scale = np.float32(scale)
        x = near_ties(scale, 300)
        zero = np.array((0, 255, 128, 7)[number % 4], np.uint8)
        body = body_of(x.size)
        constants: dict[str, h.Array] = {"s": np.array(scale), "z": zero}
        inputs: list[h.Array] = [x, *constants.values()]
        (got,) = h.Kernel(Quantizer(), body, h.target(isa), constants)(inputs)
        (want,) = h.expected(body, inputs)
        np.testing.assert_array_equal(got, want, err_msg=float(scale).hex())


@pytest.mark.parametrize("size", [1, 7, 16, 63, 64, 65, 6528, 6529, 13057])
def test_sizes_and_few_bits(size: int) -> None:
    for isa in ("avx512-vnni", "avx2"):
        if not h.runnable(isa):
            continue
        body = body_of(size, "u4")
        inputs: list[h.Array] = [
            RNG.normal(size=size).astype(np.float32),
            np.array(0.21, np.float32),
            np.array(3, np.uint8),
        ]
        constants: dict[str, h.Array] = {"s": inputs[1], "z": inputs[2]}
        kernel = h.Kernel(Quantizer(), body, h.target(isa), constants)
        for ranges in (1, 3):
            np.testing.assert_array_equal(kernel(inputs, ranges)[0], h.expected(body, inputs)[0])


def test_parts_add_up_to_the_inverse() -> None:
    for scale in RNG.uniform(0.001, 4, 200).astype(np.float32):
        parts = parts_of(float(scale))
        if parts is None:
            continue
        exact = 1 / Fraction(float(scale))
        assert abs((Fraction(parts[0]) + Fraction(parts[1]) - exact) / exact) <= Fraction(1, 1 << 47)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), -1.0, 2.0**-70, 2.0**70, 1.0 + 2.0**-23])
def test_odd_scales_are_divided_by(scale: float) -> None:
    assert parts_of(float(np.float32(scale))) is None
    body = canonical(body_of(100))
    constants: dict[str, h.Array] = {"i1": np.array(scale, np.float32), "i2": np.array(0, np.uint8)}
    refused = Quantizer().configure(body, constants, h.target())
    assert isinstance(refused, Refused)
    assert "division" in refused.reason


def test_refusals() -> None:
    body, on = canonical(body_of(100)), h.target()
    one: dict[str, h.Array] = {"i1": np.array(0.3, np.float32), "i2": np.array(0, np.uint8)}
    cases: list[tuple[Graph, dict[str, h.Array], Target, str]] = [
        (body, {"i1": one["i1"]}, on, "not one constant"),
        (body, one, h.target("portable"), "AVX2"),
        (canonical(body_of(100, "s8")), {"i1": one["i1"], "i2": np.array(0, np.int8)}, on, "unsigned"),
        (canonical(h.graph_of(lambda b: b.emit(ops.Unary("relu"), "x"), x="f32[9]")), {}, on, "alone"),
    ]
    for graph, constants, target, why in cases:
        refused = Quantizer().configure(graph, constants, target)
        assert isinstance(refused, Refused)
        assert why in refused.reason


def test_verify_tells_another_scale() -> None:
    body, on = canonical(body_of(100)), h.target()
    constants: dict[str, h.Array] = {"i1": np.array(0.3, np.float32), "i2": np.array(1, np.uint8)}
    config = Quantizer().configure(body, constants, on)
    assert not isinstance(config, Refused)
    packed = Quantizer().pack(body, config, constants)
    assert Quantizer().verify(body, config, constants, packed) == ""
    assert packed[0].dtype == F32.numpy
    packed[0][1] *= 2
    assert "inverse" in Quantizer().verify(body, config, constants, packed)
