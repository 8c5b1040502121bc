"""The chip with 12-bit sums: the bits of the small-float operators, and an error for sums of any other kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright.codegen.devices import library
from bitwright.codegen.devices.schema import parse_device
from bitwright.codegen.devices.simulate import schedule, simulate
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.errors import Unsupported
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.small_float import format_of, round_small_float, small_float_dot, small_float_range
from bitwright.ir.types import TensorType, parse_dtype
from tests.test_devices import captured

Array = np.ndarray[Any, Any]
SUMS = "small-float-sums{product=f4m7b12 acc=f4m7b10 chunk=16}"
RECIPE = f"observe-ranges, quantize-floats{{x=f4m3 sums=f4m7b10}}, {SUMS}"
INSTRUCTIONS = {"f4m3": "mac12", "f5m2": "mac12.wide"}
DEVICE = library.find_device("m7e4")


def layer(op: ops.Op, w: Array, rows: int, dtype: str = "f32") -> Graph:
    """A kernel-level graph of one linear layer."""
    kind = parse_dtype(dtype)
    b, inner = Builder("layer", "kernel"), Builder("body", "integer")
    xt, wt = TensorType(kind, (rows, w.shape[1])), TensorType(kind, w.shape)
    given, ref = b.input("x", xt), b.weight("w", w, wt)
    inner.input("x", xt)
    inner.input("w", wt)
    body = inner.finish([inner.emit(op, "x", "w", name="y")])
    return b.finish([b.emit_all(ops.Region(body, "contraction"), given, ref, names=("y",))[0]])


def codes(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Values of a format, from the smallest to some that let sums overflow."""
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-9, 5, shape)
    return np.asarray(round_small_float(x.astype(np.float32), *format_of(parse_dtype(dtype)), "nearest"))


@pytest.mark.parametrize("dtype", INSTRUCTIONS)
@pytest.mark.parametrize("k", [1, 15, 16, 17, 100, 257])
def test_random_contractions_have_the_references_bits(k: int, dtype: str) -> None:
    """500 rows by 7 outputs at six lengths and two formats: 4 x 10^4 contractions, from underflow to overflow."""
    rng = np.random.default_rng(k)
    w, x = codes(rng, (7, k), dtype), codes(rng, (500, k), dtype)
    x[0], x[1] = 0, small_float_range(*format_of(parse_dtype(dtype)))[1]
    graph = layer(ops.SmallLinear(), w, 500, dtype)
    made = schedule(graph, DEVICE)
    assert made.layers[0].steps == 500 * -(-k // 16)
    assert made.layers[0].instruction == INSTRUCTIONS[dtype]
    assert made.layers[0].weight_bytes == 7 * k
    (got,) = simulate(made, [x])
    (expected,) = (to_numpy(t) for t in evaluate(graph, [x]))
    assert got.tobytes() == expected.tobytes()
    slow = small_float_dot(x[:, None], w, (4, 7, 12), (4, 7, 10), 16)
    assert np.array_equal(got, slow)
    if k > 16:
        assert not np.array_equal(got, x @ w.T)  # sums in 12 bits are others than sums in f32


def test_a_product_of_two_codes_is_exact_where_it_is_in_range() -> None:
    """The 4-bit significands of E4M3 make products of 8 bits, which is what M7E4 has."""
    every = np.array([(1 + m / 8) * 2.0**e for m in range(8) for e in range(-5, 2)], np.float32)
    products = np.multiply.outer(every.astype(np.float64), every)
    inside = (products >= 2.0**-12) & (products < 16)
    rounded = small_float_dot(every[:, None, None], every[None, :, None], (4, 7, 12), (5, 12, 15), 1)
    assert inside.mean() > 0.9
    assert np.array_equal(rounded[inside], products[inside])


@pytest.mark.parametrize("dtype", INSTRUCTIONS)
def test_the_digits_network(dtype: str) -> None:
    graph, example = captured("digits")
    recipe = RECIPE.replace("f4m3", dtype)
    done = bw.simulate(graph, "m7e4", list(example), recipe=recipe, calibration=[example])
    assert done.identical
    assert INSTRUCTIONS[dtype] in {x.instruction for x in done.schedule.layers}
    exact = np.concatenate([to_numpy(t).ravel() for t in evaluate(graph, list(example))])
    got = np.concatenate([a.ravel() for a in done.outputs])
    noise = float(np.square(got - exact).sum() / np.square(exact).sum())
    assert 0 < noise < 10**-2.0  # 20 dB
    program = bw.compile(graph, target="x86-portable", recipe=recipe, calibration=[example])
    assert np.asarray(program(*example)).tobytes() == done.outputs[0].tobytes()


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("float", r"mac12: sums in small floats, which this layer does not"),
        ("small-float-sums{acc=f4m7b10 chunk=32}", r"mac12: another product and chunk of small-float sums"),
        ("small-float-sums{acc=f5m6b14}", r"mac12: another product and acc of small-float sums"),
        ("small-float-sums{rounding=nearest}", r"mac12: another rounding of small-float sums"),
    ],
)
def test_other_sums_are_refused_with_the_recipe_that_cures(recipe: str, reason: str) -> None:
    graph, example = captured("digits")
    with pytest.raises(Unsupported, match=reason) as error:
        bw.simulate(graph, "m7e4", recipe=recipe, calibration=[example])
    assert RECIPE in str(error.value)


def test_sums_of_f32_operands_are_refused() -> None:
    graph, example = captured("digits")
    with pytest.raises(Unsupported, match="mac12: takes x in f4m3, this is f32") as error:
        bw.simulate(graph, "m7e4", recipe=SUMS, calibration=[example])
    assert RECIPE in str(error.value)


def test_operands_in_another_format_are_refused() -> None:
    with pytest.raises(Unsupported, match="mac12: takes x in f4m3, this is f16"):
        schedule(layer(ops.SmallLinear(), np.ones((2, 8), np.float16), 3, "f16"), DEVICE)


def test_a_vector_unit_takes_what_it_is_declared_to_take() -> None:
    graph = layer(ops.Linear(), np.ones((2, 8), np.float32), 3)
    with pytest.raises(Unsupported, match="small-float-sums"):
        schedule(graph, DEVICE)
    slow = parse_device(library.text_of("m7e4").replace("contractions = false", "contractions = true"))
    assert schedule(graph, slow).layers[0].instruction == "vector"
