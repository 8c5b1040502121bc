"""The binary core: bits of the reference and of the C back end's counted planes, no byte wasted at odd shapes."""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright.codegen.c.bitplanes import planes_of, words
from bitwright.codegen.c.toolchain import toolchain
from bitwright.codegen.devices import library
from bitwright.codegen.devices.simulate import schedule, simulate
from bitwright.ir.errors import Unsupported
from bitwright.ir.interpret import evaluate, to_numpy
from tests.test_devices import captured, layer

Array = np.ndarray[Any, Any]
DEVICE = library.find_device("bnn-riscv")
RECIPE = "observe-ranges, quantize-weights{bits=bipolar}, quantize-int8{bits=2}"


def counted(x: Array, w: Array, bits: int) -> Array:
    """x [n, k] by w [o, k] of -1 and 1 as the C back end does it: planes of x, words of signs, popcounts."""
    signs = words(planes_of(w.reshape(*w.shape, 1))[0], 32)
    total = np.zeros((len(x), len(w)), np.int64)
    for p in range(bits):
        plane = words(((x >> p) & 1).astype(bool), 32)
        total += (1 << p) * 2 * np.bitwise_count(plane[:, None] & signs).sum(2, dtype=np.int64)
    total -= x.sum(1, dtype=np.int64)[:, None]
    return total


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("k", [7, 32, 33, 65, 200])
def test_random_contractions_have_the_references_bits(bits: int, k: int) -> None:
    """400 rows by 7 outputs at five lengths and two widths: 2.8 x 10^4 contractions."""
    rng = np.random.default_rng(k)
    w = rng.choice([-1, 1], (7, k)).astype(np.int8)
    x = rng.integers(0, 1 << bits, (400, k)).astype(np.uint8)
    x[0], x[1], w[0], w[1] = 0, (1 << bits) - 1, 1, -1
    graph = layer(f"u{bits}", w, "bipolar", rows=400)
    made = schedule(graph, DEVICE)
    assert made.layers[0].instruction == f"count{bits}"
    assert made.layers[0].weight_bytes == ceil(7 * k / 8)  # not ceil(k / 32) words an output
    (got,) = simulate(made, [x])
    assert np.array_equal(got, to_numpy(evaluate(graph, [x])[0]))
    assert np.array_equal(got, counted(x, w, bits))


def test_a_network_has_the_bits_of_its_c() -> None:
    graph, example = captured("digits")
    done = bw.simulate(graph, "bnn-riscv", list(example), recipe=RECIPE, calibration=[example])
    assert done.identical
    assert {"count2"} <= {x.instruction for x in done.schedule.layers}
    program = bw.compile_c(graph, recipe=RECIPE, calibration=[example])
    assert any("1 bit a weight" in form for call in program.source.calls for form in call.forms)
    given, outputs = program.samples[0]
    again = simulate(done.schedule, list(given))
    assert all(np.array_equal(a, b) for a, b in zip(again, outputs, strict=True))
    host = toolchain("host")
    if not host.missing():
        assert program.self_test(host) == 0


@pytest.mark.parametrize(
    ("x", "w", "dtype", "reason"),
    [
        ("u4", 1, "bipolar", "count2: takes x in u2, this is u4"),
        ("u2", 0, "ternary", "count2: takes w in bipolar, this is ternary"),
        ("u2", 3, "s4", "count2: takes w in bipolar, this is s4"),
    ],
)
def test_what_is_not_binary_is_refused(x: str, w: int, dtype: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        schedule(layer(x, np.full((4, 8), w, np.int8), dtype), DEVICE)


def test_sums_that_can_overflow_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"count2: its s16 sums can overflow: 17 bits"):
        schedule(layer("u2", np.ones((1, 11000), np.int8), "bipolar"), DEVICE)
