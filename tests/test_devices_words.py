"""Words of weights of several widths: patterns as data, covers, packing and back, bits and counts of the simulation."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bitwright as bw
from bitwright import cli
from bitwright.codegen.devices import library
from bitwright.codegen.devices.schema import Device, parse_device
from bitwright.codegen.devices.simulate import schedule, simulate
from bitwright.codegen.devices.words import Words, area_of, cover, pack, plan, unpack
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.errors import InvalidInput, Unsupported
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.types import S32, TensorType, parse_dtype
from tests.test_devices import captured, layer

Array = np.ndarray[Any, Any]
TEXT = library.text_of("simd124")
DEVICE = library.find_device("simd124")
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def mixed(rng: np.random.Generator, shape: tuple[int, ...], zeros: bool = True) -> Array:
    """Codes whose outputs need 4, 2 or 1 bits, in any order."""
    w = rng.integers(-8, 8, shape)
    w[:, ...] = np.where(w == 0, 1, w) if not zeros else w
    kind = rng.integers(0, 3, shape[0])
    w[kind == 1] = rng.integers(-2, 2, w[kind == 1].shape)
    w[kind == 2] = rng.choice([-1, 1], w[kind == 2].shape)
    return w.astype(np.int8)


def planned(weight: Array, groups: int = 1, device: Device = DEVICE) -> Words:
    found = plan(weight, groups, device)
    assert isinstance(found, Words)
    return found


# --- patterns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lanes = { mac4 = 4 }", "lanes = { mac4 = 5 }", r"simd:38: .*lanes: its lanes take 80 bits, the word has 64"),
        ("lanes = { mac2 = 8 }", "lanes = { mac3 = 8 }", r"simd:42: .*no instruction is called mac3; there are mac4"),
        ("lanes = { mac2 = 8 }", "lanes = { mac2 = 0 }", r"simd:42: .*greater than or equal to 1"),
        ('name = "two-one"', 'name = "two"', r"two patterns are called two"),
        ('"mixed"]', '"mixt"]', r"simd:\d+: options.words.active: no pattern is called mixt; there are four, two"),
        ('"mixed"]', '"mixed", "heavy"]', r"active: 5 patterns, the device holds 4 different ones"),
        ('["four", "two", "one", "mixed"]', '["two", "one"]', r"none has lanes of mac4, the widest"),
        ('size = "64 bits"', 'size = "64 B"', r"simd:\d+: options.words.size: .* is not a quantity"),
        ("held = 4", "hold = 4", r"options.words.hold: Extra inputs"),
        ("%x: u8[b, 4], %w: s2", "%x: u4[b, 4], %w: s2", r"instructions of one word have the same terms, x and sums"),
        ("(%x: u8[b, 4], %w: s2[o, 4], %acc", "(%x: u8[b, 4], %w: s2[o, 4] nm<1:4, axis=1>, %acc",
         r"take running sums \(%acc\) and no mask"),
    ],
)  # fmt: skip
def test_mistakes_in_patterns_are_told(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(InvalidInput, match=message):
        parse_device(TEXT.replace(old, new, 1), "simd")


def test_a_cover_is_the_smallest() -> None:
    """Against all counts of up to so many words, for random needs."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        lanes = (*(tuple(int(v) for v in rng.integers(0, 4, 3)) for _ in range(3)), (4, 0, 0))
        needs = tuple(int(v) for v in rng.integers(0, 7, 3))
        goal = np.cumsum(needs)
        best = min(
            sum(c)
            for c in itertools.product(range(6), repeat=4)
            if (np.cumsum(np.asarray(c) @ np.asarray(lanes)) >= goal).all()
        )
        found = cover(needs, lanes)
        assert found is not None
        assert sum(found) == best
        assert (np.cumsum(np.asarray(found) @ np.asarray(lanes)) >= goal).all()


def test_many_outputs_are_covered_in_equal_parts() -> None:
    lanes = ((4, 0, 0), (0, 8, 0), (0, 0, 16), (1, 4, 4))
    found = cover((700, 1100, 2300), lanes)
    assert found is not None
    assert (np.cumsum(np.asarray(found) @ np.asarray(lanes)) >= np.cumsum((700, 1100, 2300))).all()
    assert sum(found) <= 1.15 * (700 / 4 + 1100 / 8 + 2300 / 16)


def test_area_grows_with_lanes_and_with_places() -> None:
    assert area_of(DEVICE, ["four"]) == 64 * 8 + 4 * 32
    assert area_of(DEVICE, ["two"]) == 64 * 8 + 8 * 32
    assert area_of(DEVICE, ["four", "two"]) > area_of(DEVICE, ["two"])
    assert area_of(DEVICE, ["four", "two", "one", "mixed"]) > area_of(DEVICE, ["four", "two", "one"])


def test_patterns_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bitwright", "targets", "show", "simd124"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    told = capsys.readouterr().out
    assert "words: size 64 bits, held 4" in told
    assert "1 mac4, 4 mac2, 4 mac1" in told


# --- packing -------------------------------------------------------------------------------------------------


@QUICK
@given(st.integers(0, 1 << 30), st.integers(1, 70), st.integers(1, 40), st.sampled_from([1, 3]))
def test_packing_and_back(seed: int, outputs: int, terms: int, groups: int) -> None:
    weight = mixed(np.random.default_rng(seed), (outputs * groups, terms))
    words = planned(weight, groups)
    data, ids = packed = pack(weight, words)
    assert data.shape == (words.count, -(-terms // 4), 8)
    assert ids.shape == data.shape[:2]
    assert np.array_equal(unpack(packed, words, terms), weight)
    held = sorted(i for _, rows in words.runs() for i in rows)
    assert held == list(range(outputs * groups))  # each output once


def test_the_pattern_id_is_what_unpacking_reads() -> None:
    rng = np.random.default_rng(3)
    weight = np.concatenate([rng.integers(-8, 8, (4, 8)), rng.choice([-1, 1], (16, 8))]).astype(np.int8)
    words = planned(weight)
    data, ids = pack(weight, words)
    assert not np.array_equal(unpack((data, ids[::-1]), words, 8), weight)


def test_equal_widths_lie_together() -> None:
    weight = mixed(np.random.default_rng(5), (30, 8))
    words = planned(weight)
    need = [
        0 if np.abs(r * 2 + 1).max() > 3 else 2 if (np.abs(r) == 1).all() else 1 for r in weight[list(words.order[0])]
    ]
    assert need == sorted(need)


def test_bytes_are_the_words_with_their_ids() -> None:
    weight = np.random.default_rng(0).choice([-1, 1], (32, 16)).astype(np.int8)
    made = schedule(layer("u8", weight, "s4"), DEVICE)
    assert made.weight_bytes == 2 * 4 * (64 + 2) / 8  # 32 outputs by 16, 16 terms by 4
    assert made.layers[0].steps == 3 * 2 * 4


# --- bits ----------------------------------------------------------------------------------------------------


@QUICK
@given(st.integers(0, 1 << 30))
def test_random_contractions_have_the_references_bits(seed: int) -> None:
    """40 times 500 rows by up to 40 outputs: more than 10^5 contractions."""
    rng = np.random.default_rng(seed)
    weight = mixed(rng, (int(rng.integers(1, 40)), int(rng.integers(1, 60))))
    graph = layer("u8", weight, "s4", rows=500)
    x = rng.integers(0, 256, (500, weight.shape[1])).astype(np.uint8)
    x[0], x[1] = 0, 255
    (got,) = simulate(schedule(graph, DEVICE), [x])
    assert np.array_equal(got, to_numpy(evaluate(graph, [x])[0]))
    assert np.array_equal(got, x.astype(np.int64) @ weight.T.astype(np.int64))


@pytest.mark.parametrize(("groups", "last"), [(1, True), (1, False), (4, True), (2, False)])
def test_convolutions_have_the_references_bits(groups: int, last: bool) -> None:
    rng = np.random.default_rng(groups)
    weight = mixed(rng, (12, 8 // groups, 3, 3))
    op = ops.IntConv(padding=(1, 1, 1, 1), stride=(2, 1), groups=groups, channels_last=last, x_zero=7, acc=S32)
    graph = conv_layer(op, weight, (2, 6, 5, 8) if last else (2, 8, 6, 5))
    x = rng.integers(0, 256, graph.inputs[0].type.static_shape).astype(np.uint8)
    (got,) = simulate(schedule(graph, DEVICE), [x])
    assert np.array_equal(got, to_numpy(evaluate(graph, [x])[0]))


def conv_layer(op: ops.IntConv, weight: Array, shape: tuple[int, ...]) -> Graph:
    b, inner = Builder("layer", "kernel"), Builder("body", "integer")
    xt, wt = TensorType(parse_dtype("u8"), shape), TensorType(parse_dtype("s4"), weight.shape)
    refs = b.input("x", xt), b.weight("w", weight, wt)
    inner.input("x", xt)
    inner.input("w", wt)
    body = inner.finish([inner.emit(op, "x", "w", name="y")])
    return b.finish([b.emit_all(ops.Region(body, "contraction"), *refs, names=("y",))[0]])


@pytest.mark.parametrize("name", ["digits", "mobilenet_v2"])
def test_models_of_4_bit_weights_have_the_references_bits(name: str) -> None:
    graph, example = captured(name)
    recipe = "observe-ranges, quantize-weights{bits=4}, quantize-int8"
    assert bw.simulate(graph, "simd124", recipe=recipe, calibration=[example]).identical


# --- refusals ------------------------------------------------------------------------------------------------


def test_codes_that_no_lane_holds_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"codes from -100 to 8, the widest lanes hold s4"):
        schedule(layer("u8", np.array([[-100, 8]], np.int8), "s8"), DEVICE)


def test_activations_of_another_format_are_refused() -> None:
    with pytest.raises(Unsupported, match="mac4: takes x in u8, this is s8"):
        schedule(layer("s8", np.ones((4, 8), np.int8), "s4"), DEVICE)


def test_sums_that_can_overflow_are_refused() -> None:
    sums = "%a = cast(%acc) {dtype=s32} : s32[b, o]\n  %s = add(%a, %p) : s32[b, o]\n"
    saturating = f"{sums}  %y = saturate(%s) {{dtype=s16}} : s16[b, o]"
    text = TEXT.replace("%acc: s32", "%acc: s16").replace("%y = add(%acc, %p) : s32[b, o]", saturating)
    with pytest.raises(Unsupported, match=r"mac4: its s16 sums can overflow"):
        schedule(layer("u8", np.full((4, 64), 7, np.int8), "s4"), parse_device(text))


def test_computed_weights_are_refused() -> None:
    b, inner = Builder("layer", "kernel"), Builder("body", "integer")
    types = {"x": TensorType(parse_dtype("u8"), (3, 8)), "w": TensorType(parse_dtype("s4"), (4, 8))}
    for name, t in types.items():
        b.input(name, t)
        inner.input(name, t)
    body = inner.finish([inner.emit(ops.IntLinear(), "x", "w", name="y")])
    graph = b.finish([b.emit_all(ops.Region(body, "contraction"), "x", "w", names=("y",))[0]])
    with pytest.raises(Unsupported, match="words hold constant weights of linear layers"):
        schedule(graph, DEVICE)
