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
from bitwright.ir.types import TensorType, parse_dtype
from tests.test_devices import captured

Array = np.ndarray[Any, Any]
RECIPE = "small-float-sums{product=f4m7b12 acc=f4m7b10 chunk=16}"
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


@pytest.mark.parametrize("k", [1, 15, 16, 17, 100, 257])
def test_random_contractions_have_the_references_bits(k: int) -> None:
    """500 rows by 7 outputs at six lengths: 2 x 10^4 contractions, from underflow to the largest sum."""
    rng = np.random.default_rng(k)
    w = (rng.standard_normal((7, k)) * 2.0 ** rng.integers(-9, 5, (7, k))).astype(np.float32)
    x = (rng.standard_normal((500, k)) * 2.0 ** rng.integers(-9, 5, (500, k))).astype(np.float32)
    x[0], x[1] = 0, 1e6
    graph = layer(ops.SmallLinear(), w, 500)
    made = schedule(graph, DEVICE)
    assert made.layers[0].steps == 500 * -(-k // 16)
    (got,) = simulate(made, [x])
    (expected,) = (to_numpy(t) for t in evaluate(graph, [x]))
    assert np.array_equal(got, expected)
    if k > 16:
        assert not np.array_equal(got, x @ w.T)  # sums in 12 bits are others than sums in f32


def test_the_digits_network() -> None:
    graph, example = captured("digits")
    done = bw.simulate(graph, "m7e4", recipe=RECIPE, calibration=[example])
    assert done.identical
    assert "mac12" in {x.instruction for x in done.schedule.layers}
    exact = [to_numpy(t) for t in evaluate(graph, list(example))]
    assert any(not np.array_equal(a, b) for a, b in zip(done.outputs, exact, strict=True))


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


def test_operands_in_another_format_are_refused() -> None:
    with pytest.raises(Unsupported, match="mac12: takes x in f32, this is f16"):
        schedule(layer(ops.SmallLinear(), np.ones((2, 8), np.float16), 3, "f16"), DEVICE)


def test_a_vector_unit_takes_what_it_is_declared_to_take() -> None:
    graph = layer(ops.Linear(), np.ones((2, 8), np.float32), 3)
    with pytest.raises(Unsupported, match="small-float-sums"):
        schedule(graph, DEVICE)
    slow = parse_device(library.text_of("m7e4").replace("contractions = false", "contractions = true"))
    assert schedule(graph, slow).layers[0].instruction == "vector"
