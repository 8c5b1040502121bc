"""Gated XNOR: all pairs, random contractions, and that the gates at rest are the products that are zero."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from bitwright.codegen.devices import library
from bitwright.codegen.devices.gates import Activity, Gates, gxnor
from bitwright.codegen.devices.schema import parse_device
from bitwright.codegen.devices.simulate import schedule, simulate
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.errors import InvalidInput, Unsupported
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.types import TERNARY, TensorType
from bitwright.simulation import simulate_graph
from tests.conftest import read_graph
from tests.test_devices import layer

Array = np.ndarray[Any, Any]
TEXT = library.text_of("gxnor")
DEVICE = library.find_device("gxnor")
NETWORK = """
graph @g (%x: f32[4, 32]) -> (y = %y) level=graph {
  %w = weight {ref="fc.weight"} : ternary[16, 32]
  %ws = constant {values=[0.5]} : f32[]
  %wd = dequantize(%w, %ws) : f32[16, 32]
  %v = weight {ref="fc2.weight"} : ternary[10, 16]
  %vd = dequantize(%v, %ws) : f32[10, 16]
  %s = constant {values=[0.4]} : f32[]
  %z = constant {values=[0]} : ternary[]
  %q = quantize(%x, %s, %z) {dtype=ternary} : ternary[4, 32]
  %d = dequantize(%q, %s, %z) : f32[4, 32]
  %h = linear(%d, %wd) : f32[4, 16]
  %t = constant {values=[2.5]} : f32[]
  %hq = quantize(%h, %t, %z) {dtype=ternary} : ternary[4, 16]
  %hd = dequantize(%hq, %t, %z) : f32[4, 16]
  %y = linear(%hd, %vd) : f32[4, 10]
}
"""


def ternary(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(-1, 2, shape).astype(np.int8)


def test_all_pairs() -> None:
    for a, b in itertools.product((-1, 0, 1), repeat=2):
        sums, active = gxnor(np.array([[a]]), np.array([[b]]))
        assert (sums[0, 0], active[0, 0]) == (a * b, int(a * b != 0))


@pytest.mark.parametrize("k", [1, 7, 8, 9, 127, 128, 129, 300])
def test_random_contractions_have_the_references_bits(k: int) -> None:
    """600 rows by 11 outputs at eight lengths: more than 5 x 10^4 contractions; resting gates are products of zero."""
    rng = np.random.default_rng(k)
    w, x = ternary(rng, 11, k), ternary(rng, 600, k)
    x[0], x[1], w[0] = 0, 1, 1
    graph = layer("ternary", w, "ternary", rows=600)
    activity = Activity()
    (got,) = simulate(schedule(graph, DEVICE), [x], activity)
    assert np.array_equal(got, to_numpy(evaluate(graph, [x])[0]))
    products = x[:, None, :].astype(np.int64) * w
    assert np.array_equal(got, products.sum(2))
    assert activity.resting == int((products == 0).sum())
    assert activity.active == int((products != 0).sum())


def test_convolutions_rest_at_padding() -> None:
    rng = np.random.default_rng(0)
    w, x = ternary(rng, 5, 3, 3, 3), ternary(rng, 2, 6, 6, 3)
    op = ops.IntConv(padding=(1, 1, 1, 1), channels_last=True)
    b, inner = Builder("layer", "kernel"), Builder("body", "integer")
    xt, wt = TensorType(TERNARY, x.shape), TensorType(TERNARY, w.shape)
    refs = b.input("x", xt), b.weight("w", w, wt)
    inner.input("x", xt)
    inner.input("w", wt)
    body = inner.finish([inner.emit(op, "x", "w", name="y")])
    graph = b.finish([b.emit_all(ops.Region(body, "contraction"), *refs, names=("y",))[0]])
    activity = Activity()
    (got,) = simulate(schedule(graph, DEVICE), [x], activity)
    assert np.array_equal(got, to_numpy(evaluate(graph, [x])[0]))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    cut = np.stack([padded[:, r : r + 6, c : c + 6] for r in range(3) for c in range(3)], 3).reshape(-1, 27)
    flat = w.transpose(0, 2, 3, 1).reshape(5, -1)
    zeros = int((cut[:, None, :].astype(np.int64) * flat == 0).sum())
    assert activity.resting == zeros
    assert activity.active + activity.resting == 2 * 36 * 5 * 27


def network() -> Graph:
    rng = np.random.default_rng(1)
    return read_graph(NETWORK, {"fc.weight": ternary(rng, 16, 32), "fc2.weight": ternary(rng, 10, 16)})


def test_a_ternary_network_pays_for_products_that_are_not_zero() -> None:
    rng = np.random.default_rng(2)
    dense = rng.choice([-1.0, 1.0], (4, 32)).astype(np.float32)
    sparse = np.where(rng.random((4, 32)) < 0.8, 0, dense).astype(np.float32)
    runs = [simulate_graph(network(), DEVICE, "none", (), [x]) for x in (dense, sparse)]
    assert all(r.identical for r in runs)
    assert [r.activity.active + r.activity.resting for r in runs] == [4 * (16 * 32 + 10 * 16)] * 2
    gates = DEVICE.gates
    assert gates is not None
    for r in runs:
        expected = r.activity.active * 4e-15 + r.activity.resting * 1e-16
        assert r.energy - r.schedule.energy == pytest.approx(expected)
    assert runs[1].activity.active < 0.5 * runs[0].activity.active
    assert runs[1].energy < runs[0].energy


def test_energy_is_proportional_to_active_gates_where_resting_is_free() -> None:
    free = Gates(active="4 fJ", resting="0 fJ")  # type: ignore[arg-type]
    few, many = Activity(active=10, resting=90), Activity(active=20, resting=80)
    assert many.energy(free) == 2 * few.energy(free)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('active = "4 fJ"', 'active = "4 fB"', r"gx:2\d: options.gates.active: .* is not a quantity"),
        ("resting", "rests", r"options.gates.rests"),
        ("[options.gates]", "[options.gate]", r"no device has gate; options are words, gates, cells, tables"),
        ("%w: ternary", "%w: s4", r"gx:2\d: options.gates: gates multiply ternary by ternary, gxnor something else"),
    ],
)
def test_mistakes_are_told(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(InvalidInput, match=message):
        parse_device(TEXT.replace(old, new), "gx")


def test_what_is_not_ternary_is_refused() -> None:
    with pytest.raises(Unsupported, match="gxnor: takes x in ternary, this is u8"):
        schedule(layer("u8", np.ones((4, 8), np.int8), "ternary"), DEVICE)
    with pytest.raises(Unsupported, match="gxnor: takes w in ternary, this is s4"):
        schedule(layer("ternary", np.full((4, 8), 2, np.int8), "s4"), DEVICE)
    with pytest.raises(InvalidInput, match="gates take -1, 0 and 1, not 0 to 2"):
        gxnor(np.array([[0, 2]]), np.array([[1, 1]]))
