"""bound-accumulators: certificates are exact, their inputs attain them, and every integer program shows them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import bitwright as bw
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.numerics import bits_for, witness
from bitwright.passes import Context
from bitwright.passes.accumulators.bound_accumulators import BoundAccumulators

Read = Callable[..., Graph]
RNG = np.random.default_rng(0)


def certificates(graph: Graph) -> dict[str, dict[str, Any]]:
    context = Context()
    assert BoundAccumulators().run(graph, context) is graph
    assert {place for _, place, _ in context.remarks} == set(context.facts["certificates"])
    assert context.refusals == []
    return dict(context.facts["certificates"])


def test_witnesses_attain_the_range_in_the_interpreter(read: Read) -> None:
    graph = read("""
        graph @g (%x: u8[1, 4, 3, 3], %v: s8[1, 7]) -> (c = %c, l = %l) level=integer {
          %w = weight {ref="w"} : s8[8, 4, 3, 3]
          %u = weight {ref="u"} : s4[5, 7]
          %c = int_conv(%x, %w) {x_zero=7} : s32[1, 8, 1, 1]
          %l = int_linear(%v, %u) {x_zero=-3} : s32[1, 5]
        }
    """)
    found = certificates(graph)
    for side in (0, 1):
        x = {}
        for value, weight, lo, hi in (("x", "w", 0, 255), ("v", "u", -128, 127)):
            row = graph.weights[weight].array[found["c" if value == "x" else "l"]["rows"][side]].reshape(-1)
            t = graph.types[value]
            x[value] = np.array(witness(row, lo, hi)[1 - side], t.dtype.numpy).reshape(t.static_shape)
        for name, got in zip(("c", "l"), evaluate(graph, x), strict=True):
            extreme = int(got.min() if side == 0 else got.max())
            assert extreme == found[name]["range"][side]
    for name in found:
        c = found[name]
        assert c["bits"] == bits_for(*c["range"]) <= c["partial_bits"] <= c["type_bits"]
        assert c["headroom"] == 32 - c["partial_bits"]
        assert c["kind"] == "weights"


def test_no_input_leaves_the_range(read: Read) -> None:
    graph = read("""
        graph @g (%x: u8[200, 6], %a: s8[3, 4, 9], %b: s8[3, 9, 5]) -> (y = %y, z = %z) level=integer {
          %w = weight {ref="w"} : s8[2, 6]
          %s = saturate(%x) {dtype=u8, lo=200, hi=203} : u8[200, 6]
          %r = reshape(%s) {shape=[200, 6]} : u8[200, 6]
          %y = int_linear(%r, %w) {x_zero=100} : s32[200, 2]
          %z = int_matmul(%a, %b) {a_zero=3, b_zero=-5} : s32[3, 4, 5]
        }
    """, {"w": np.array([[1, 2, -3, 4, 5, -6], [1] * 6], np.int8)})  # fmt: skip
    found = certificates(graph)
    assert found["y"]["x"] == [200, 203]
    assert found["y"]["kind"] == "weights+ranges"
    assert found["y"]["range"] == [100 * 1 + 200 + 400 + 500 - 309 - 618, 618]
    assert found["y"]["partial_range"] == [-9 * 103, 12 * 103]
    assert found["y"]["bits"] < found["y"]["partial_bits"] < found["y"]["type_bits"]
    assert found["z"]["kind"] == "type"
    assert found["z"]["range"] == [9 * -131 * 132, 9 * 124 * 132]
    x = {"x": RNG.integers(0, 256, (200, 6)).astype(np.uint8)}
    x |= {"a": np.full((3, 4, 9), -128, np.int8), "b": np.full((3, 9, 5), 127, np.int8)}
    y, z = evaluate(graph, x)
    assert found["y"]["range"][0] <= int(y.min())
    assert int(y.max()) <= found["y"]["range"][1]
    assert int(z.min()) == found["z"]["range"][0]


def test_padding_counts_as_nothing(read: Read) -> None:
    graph = read("""
        graph @g (%x: u8[1, 1, 2, 2]) -> (y = %y) level=integer {
          %w = constant {values=[1, 1, 1, 1, 1, 1, 1, 1, 1]} : s8[1, 1, 3, 3]
          %s = saturate(%x) {dtype=u8, lo=9, hi=10} : u8[1, 1, 2, 2]
          %y = int_conv(%s, %w) {padding=[1, 1, 1, 1], x_zero=5} : s32[1, 1, 2, 2]
        }
    """)
    assert certificates(graph)["y"]["range"] == [0, 45]


def test_patterns_and_unknown_sizes(read: Read) -> None:
    graph = read("""
        graph @g (%x: u8[b, 16], %a: u8[b, 4, s], %c: s8[b, s, 4]) -> (y = %y, z = %z) level=integer {
          %w = weight {ref="w"} : s8[3, 16] nm<1:4, axis=1>
          %y = int_linear(%x, %w) : s32[b, 3]
          %z = int_matmul(%a, %c) : s32[b, 4, 4]
        }
    """)
    found = certificates(graph)
    assert found["y"]["terms"] == 4
    assert found["y"]["type_bits"] == bits_for(-4 * 255 * 128, 4 * 255 * 127)
    assert found["z"]["terms"] is None
    assert found["z"]["safe_terms"] == 2**31 // (255 * 128)


def test_a_narrow_accumulator_shows_that_it_does_not_fit(read: Read) -> None:
    graph = read("""
        graph @g (%x: u8[1, 9]) -> (y = %y) level=integer {
          %w = constant {values=[127, 127, 127, 127, 127, 127, 127, 127, 127]} : s8[1, 9]
          %y = int_linear(%x, %w) {acc=s16} : s16[1, 1]
        }
    """)
    assert certificates(graph)["y"]["headroom"] == 16 - bits_for(0, 9 * 255 * 127)


def test_graphs_without_integers_have_none(read: Read) -> None:
    graph = read("graph @g (%x: f32[1]) -> (y = %y) level=integer {\n  %y = relu(%x) : f32[1]\n}")
    assert certificates(graph) == {}


def test_a_model_as_large_as_bert_base_takes_seconds(read: Read) -> None:
    sizes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    lines, weights, x = [], {}, {768: "x", 3072: "v"}
    made = {s: RNG.integers(-127, 128, s).astype(np.int8) for s in set(sizes)}
    for i, (out, k) in enumerate([*sizes * 12, (30522, 768)]):
        weights[f"w{i}"] = made[out, k] if (out, k) in made else np.zeros((out, k), np.int8)
        lines += [f'  %w{i} = weight {{ref="w{i}"}} : s8[{out}, {k}]']
        lines += [f"  %y{i} = int_linear(%{x[k]}, %w{i}) : s32[1, {out}]"]
    ports = ", ".join(f"y{i} = %y{i}" for i in range(len(weights)))
    head = f"graph @g (%x: u8[1, 768], %v: u8[1, 3072]) -> ({ports}) level=integer {{"
    graph = read("\n".join([head, *lines, "}"]), weights)
    began = time.perf_counter()
    found = certificates(graph)
    assert time.perf_counter() - began < 10
    assert len(found) == 73
    assert sum(w.size for w in weights.values()) > 108e6


@pytest.mark.parametrize("recipe", ["int8", "float"])
def test_the_report_of_a_program_shows_the_width(recipe: str) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    x = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    program = bw.compile(module, example_inputs=(torch.from_numpy(x),), recipe=recipe, calibration=[x], batch=8)
    notes = [n for layer in program.report.layers for n in layer.notes if n.startswith("bound-accumulators")]
    assert len(notes) == (2 if recipe == "int8" else 0)
    assert all("headroom" in n and "witness" in n for n in notes)


OBSERVED = """
    graph @g (%x: u8[3, 4]) -> (y = %y) level=integer {
      %w = constant {values=[1, 2, -3, 4]} : s8[1, 4]
      %y = int_linear(%x, %w) {x_zero=8} : s32[3, 1]
    }
"""


def test_observed_codes_are_told_and_prove_nothing(read: Read) -> None:
    graph = read(OBSERVED)
    context = Context(calibration=[(np.array([[9, 4, 6, 5]] * 3, np.uint8),)])
    BoundAccumulators(ranges="observed").run(graph, context)
    calibrated = context.facts["certificates"]["y"]
    assert calibrated["kind"] == "calibrated"
    assert calibrated["x"] == [4, 9]
    assert calibrated["range"] == [7 * -4 - 3, 7 + 12]
    BoundAccumulators().run(graph, context)
    proven = context.facts["certificates"]["y"]
    assert proven["kind"] == "weights"
    assert proven["x"] == [0, 255]
    assert proven["observed"] == [4, 9]
    assert proven["observed_bits"] < proven["partial_bits"]
    assert proven["range"] == [7 * -8 - 3 * 247, 7 * 247 + 24]


def test_the_kernels_register_is_inside_the_certificate(read: Read) -> None:
    """Kernels start from -zero * sum(w) and add code by code: any order, every prefix."""
    graph = read(OBSERVED.replace("x_zero=8", "x_zero=100"))
    c = certificates(graph)["y"]
    w = np.array([1, 2, -3, 4])
    worst = [-100 * int(w.sum()) + s for s in (int((w * (w < 0)).sum()) * 255, int((w * (w > 0)).sum()) * 255)]
    assert c["register_range"] == worst
    order = RNG.permuted(np.tile(np.arange(4), (2000, 1)), axis=1)
    x = RNG.choice([0, 255], (2000, 4))
    path = -100 * w.sum() + (w[order] * np.take_along_axis(x, order, 1)).cumsum(1)
    assert worst[0] <= path.min()
    assert path.max() <= worst[1]


def test_observed_needs_calibration(read: Read) -> None:
    with pytest.raises(InvalidInput, match="calibration data"):
        BoundAccumulators(ranges="observed").run(read(OBSERVED), Context())
