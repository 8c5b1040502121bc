"""The look-up engine: tables instead of products, the reference's bits, costs of filling, what has no codebook."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright.codegen.devices import library
from bitwright.codegen.devices.schema import parse_device
from bitwright.codegen.devices.simulate import schedule, simulate
from bitwright.codegen.devices.tables import Codebooks, Tables, books, look_up, places
from bitwright.ir.errors import InvalidInput, Unsupported
from bitwright.ir.interpret import evaluate, to_numpy
from tests.test_devices import captured, layer

Array = np.ndarray[Any, Any]
TEXT = library.text_of("lut")
DEVICE = library.find_device("lut")
TABLES = Tables(entries=16, digit="4 bits")  # type: ignore[arg-type]


def weights(rng: np.random.Generator, outputs: int, terms: int, few: int = 16) -> Array:
    """Rows of at most ``few`` different values."""
    return np.stack([rng.choice(rng.integers(-127, 128, few), terms) for _ in range(outputs)]).astype(np.int8)


@pytest.mark.parametrize("x", ["u8", "u4", "u1"])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 300])
def test_random_contractions_have_the_references_bits(k: int, x: str) -> None:
    """500 rows by 11 outputs at five lengths and three formats: 8 x 10^4 contractions."""
    rng = np.random.default_rng(k)
    w = weights(rng, 11, k)
    most = (1 << int(x[1:])) - 1
    data = rng.integers(0, most + 1, (500, k)).astype(np.uint8)
    data[0], data[1] = 0, most
    w[0], w[1] = 127, -127
    graph = layer(x, w, "s8", rows=500)
    made = schedule(graph, DEVICE)
    assert made.layers[0].instruction == ("look2" if x == "u8" else "look1")
    (got,) = simulate(made, [data])
    assert np.array_equal(got, to_numpy(evaluate(graph, [data])[0]))
    assert np.array_equal(got, data.astype(np.int64) @ w.T.astype(np.int64))


def test_outputs_with_common_values_share_a_codebook() -> None:
    rng = np.random.default_rng(0)
    a, b = np.arange(-8, 8), np.arange(20, 36)
    w = np.stack([rng.choice(a, 200), rng.choice(b, 200), rng.choice(a, 200), rng.choice(a[:3], 200)]).astype(np.int8)
    made = books(w, TABLES)
    assert isinstance(made, Codebooks)
    assert sorted(made.outputs) == [(0, 2, 3), (1,)]
    for rows, values, stored in zip(made.outputs, made.values, places(w, made), strict=True):
        assert np.array_equal(values[stored], w[list(rows)])
    assert made.stored_bytes(200, TABLES, 8) == 4 * 200 / 2 + 2 * 16


@pytest.mark.parametrize("digit", [1, 3, 4, 8])
def test_digits_of_any_width(digit: int) -> None:
    rng = np.random.default_rng(digit)
    tables = Tables(entries=16, digit=f"{digit} bits")  # type: ignore[arg-type]
    x, w = rng.integers(0, 256, (7, 40)), weights(rng, 5, 40).astype(np.int64)
    made = books(w, tables)
    assert isinstance(made, Codebooks)
    assert np.array_equal(look_up(x, w, made, tables, 8), x @ w.T)
    assert tables.digits(8) == -(-8 // digit)


@pytest.mark.parametrize(
    "recipe",
    [
        "codebook-weights, observe-ranges, quantize-int8",
        "codebook-weights{entries=8 groups=2}, observe-ranges, quantize-int8{bits=4}",
        "observe-ranges, quantize-weights{bits=4}, quantize-int8",
        "nm-mask{pattern=2:4}, codebook-weights, observe-ranges, quantize-int8",
    ],
)
@pytest.mark.parametrize("name", ["digits", "mobilenet_v2"])
def test_models_have_the_references_bits(name: str, recipe: str) -> None:
    graph, example = captured(name)
    done = bw.simulate(graph, "lut", list(example), recipe=recipe, calibration=[example])
    assert done.identical
    assert {x.instruction for x in done.schedule.layers} <= {"look1", "look2", "vector"}


def test_tables_are_filled_once_for_a_codebook() -> None:
    rng = np.random.default_rng(0)
    one = rng.choice(np.arange(-8, 8), (16, 64)).astype(np.int8)
    one[0, :16] = np.arange(-8, 8)
    two = one.copy()
    two[8:] += 40
    few, more = (schedule(layer("u8", w, "s8"), DEVICE) for w in (one, two))
    assert more.cycles - few.cycles == 256 * 0.25
    assert "1 tables" in few.layers[0].reason
    assert "2 tables" in more.layers[0].reason
    assert more.layers[0].energy > few.layers[0].energy


def test_weights_without_a_codebook_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"17 different weights, a table has 16 \(codebook-weights makes them few\)"):
        schedule(layer("u8", np.arange(17, dtype=np.int8)[None], "s8"), DEVICE)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("entries = 16", "entries = 1", r"lut:2\d: options.tables.entries: .*greater than or equal to 2"),
        ('digit = "4 bits"', 'digit = "4 B"', r"lut:2\d: options.tables.digit: .* is not a quantity"),
        ("fill_cycles", "fil_cycles", r"options.tables.fil_cycles"),
        ("%x: u8[b, 32]", "%x: s8[b, 32]", r"digits are those of unsigned activations, look2 takes others"),
    ],
)
def test_mistakes_are_told(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(InvalidInput, match=message):
        parse_device(TEXT.replace(old, new, 1), "lut")
