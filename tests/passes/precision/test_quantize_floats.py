"""quantize-floats: formats and scales in the graph, refusals, errors, and the bits of compiled programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright.frontends.mlir.write import to_mlir
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput, Unsupported
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.small_float import format_of, round_small_float
from bitwright.ir.types import parse_dtype
from bitwright.ir.verify import verify
from bitwright.passes import Context, parse_passes, run_pipeline
from bitwright.passes.precision.quantize_floats import QuantizeFloats, small
from tests.conftest import read_graph

NETWORK = """
graph @g (%x: f32[2, 3, 6, 6], %q: f32[2, 5, 8]) -> (y = %y, m = %m) level=graph {
  %w1 = weight {ref="c1.weight"} : f32[8, 3, 3, 3]
  %b1 = weight {ref="c1.bias"} : f32[8]
  %w2 = weight {ref="fc.weight"} : f32[5, 8]
  %b2 = weight {ref="fc.bias"} : f32[5]
  %h = conv(%x, %w1, %b1) {padding=[1, 1, 1, 1]} : f32[2, 8, 6, 6]
  %r = relu(%h) : f32[2, 8, 6, 6]
  %p = reduce_mean(%r) {axes=[2, 3], keepdim=false} : f32[2, 8]
  %y = linear(%p, %w2, %b2) : f32[2, 5]
  %m = matmul(%q, %q) {transpose_b=true} : f32[2, 5, 5]
}
"""
SUMS = "small-float-sums{product=f4m7b12 acc=f4m7b10 chunk=16}"


def data(graph: Graph, seed: int = 0) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(v.type.static_shape).astype(np.float32) for v in graph.inputs)


def ran(passes: str) -> tuple[Graph, Context]:
    graph = read_graph(NETWORK)
    context = Context(calibration=[data(graph)])
    after, _ = run_pipeline(graph, parse_passes(f"observe-ranges, {passes}"), context, crash_dir=None)
    verify(after)
    return after, context


@pytest.mark.parametrize("name", ["f4m3", "f5m2", "f4m3b11", "f3m4"])
def test_values_are_rounded_to_the_next_one(name: str) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(4000) * 2.0 ** rng.integers(-30, 20, 4000)).astype(np.float32)
    x[:4] = [np.inf, -np.inf, 0, -0.0]
    graph = read_graph(f"""
        graph @g (%x: f32[4000]) -> (y = %y, c = %c) level=graph {{
          %s = constant {{values=[0.25]}} : f32[]
          %q = quantize(%x, %s) {{dtype={name}}} : {name}[4000]
          %y = dequantize(%q, %s) : f32[4000]
          %c = cast(%x) {{dtype={name}}} : {name}[4000]
        }}
    """)
    y, c = (to_numpy(t) for t in evaluate(graph, [x]))
    f = format_of(parse_dtype(name))
    assert np.array_equal(y, round_small_float(x * 4, *f, "nearest") / 4)
    assert np.array_equal(c, round_small_float(x, *f, "nearest"))
    (nan, _) = (to_numpy(t) for t in evaluate(graph, [np.full(4000, np.nan, np.float32)]))
    assert not nan.any()
    for target in ("x86-avx2", "x86-portable"):
        got = bw.compile(graph, target=target)(x)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got, (y, c), strict=True))


def test_every_operand_has_a_code_for_its_largest_value() -> None:
    after, context = ran("quantize-floats{x=f4m3 w=f5m2}")
    assert [place for name, place, _ in context.remarks if name == "quantize-floats"] == ["c1", "fc", "m"]
    for n in after.nodes:
        if isinstance(n.op, ops.Conv | ops.Linear | ops.MatMul):
            kinds = [after.types[after.producers[v].inputs[0]].dtype for v in n.inputs[:2]]
            assert list(map(str, kinds)) == ["f4m3", "f5m2"]
    scales = {n.output: n.op.values[0] for n in after.nodes if isinstance(n.op, ops.Constant)}
    assert all(np.log2(float(s)) % 1 == 0 for s in scales.values())
    x = data(after)[0]
    assert 240 < np.abs(x).max() / float(scales["x.scale"]) <= 480


def test_sums_are_in_reach() -> None:
    """With ``sums`` the results, in codes, are at most half of what the sums hold."""
    graph, context = ran("quantize-floats{sums=f4m7b10}")
    for name, place, facts in context.remarks:
        if name == "quantize-floats":
            value = {"c1": "h", "fc": "y", "m": "m"}[place]
            most = max(map(abs, context.facts["ranges"][value]))
            assert most / (facts["x_scale"] * facts["w_scale"]) <= 63.75 / 2
    assert graph.producers["y"].op == ops.Linear()


def test_scales_and_bias_come_behind_small_float_sums() -> None:
    after, _ = ran(f"quantize-floats{{sums=f4m7b10}}, {SUMS}")
    small_ones = [n for n in after.nodes if isinstance(n.op, ops.SMALL_FLOAT)]
    assert [len(n.inputs) for n in small_ones] == [2, 2, 2]
    assert all(str(after.types[v].dtype) == "f4m3" for n in small_ones for v in n.inputs)
    assert all(str(n.type.dtype) == "f32" for n in small_ones)
    assert not any(isinstance(n.op, ops.Dequantize) for n in after.nodes)


@pytest.mark.parametrize("target", ["x86-avx2", "x86-portable"])
@pytest.mark.parametrize("passes", ["", f", {SUMS}"])
def test_programs_have_the_bits_of_the_reference(target: str, passes: str) -> None:
    graph = read_graph(NETWORK)
    recipe = f"observe-ranges, quantize-floats{{sums=f4m7b10}}{passes}"
    program = bw.compile(graph, target=target, recipe=recipe, calibration=[data(graph)])
    after, _ = ran(f"quantize-floats{{sums=f4m7b10}}{passes}")
    for got, want in zip(program(*data(graph, 1)), evaluate(after, data(graph, 1)), strict=True):
        if passes:  # the order of sums is part of the meaning
            assert np.asarray(got).tobytes() == to_numpy(want).tobytes()
        else:
            np.testing.assert_allclose(got, to_numpy(want), rtol=0, atol=0.05 * float(np.abs(to_numpy(want)).max()))


def test_what_is_left_alone(read: Callable[..., Graph]) -> None:
    graph = read("""
        graph @g (%x: f32[1, 4, 5, 5], %h: f16[2, 8], %v: f32[2, 8]) -> (a = %a, b = %b, c = %c) level=graph {
          %up.weight = weight {ref="up.weight"} : f32[4, 2, 3, 3]
          %half.weight = weight {ref="half.weight"} : f16[4, 8]
          %fc.weight = weight {ref="fc.weight"} : f32[4, 8]
          %a = conv_transpose(%x, %up.weight) : f32[1, 2, 7, 7]
          %b = linear(%h, %half.weight) : f16[2, 4]
          %c = linear(%v, %fc.weight) : f32[2, 4]
        }
    """)
    context = Context(facts={"ranges": {"x": (0.0, 1.0), "h": (0.0, 1.0), "v": (0.0, float("inf"))}})
    assert not QuantizeFloats().run(graph, context).changed_from(graph)
    told = {r.place: r.reason for r in context.refusals}
    assert "conv_transpose" in told["up"]
    assert told["half"] == "an operand is f16: cast the model to f32 first"
    assert told["fc"] == "no finite range was observed for %v"


def test_bad_options_and_missing_ranges() -> None:
    graph = read_graph(NETWORK)
    with pytest.raises(InvalidInput, match="run observe-ranges before it"):
        QuantizeFloats().run(graph, Context())
    with pytest.raises(InvalidInput, match=r"bf16 is no small float such as f4m3 \(E4M3\)"):
        small("bf16")


def test_formats_without_8_bit_floats_refuse() -> None:
    after, _ = ran("quantize-floats")
    with pytest.raises(Unsupported, match=r"a value of f4m3 .*no such number format"):
        to_mlir(after)
    with pytest.raises(Unsupported, match="ONNX has no format f4m3"):
        bw.to_onnx(after)
    graph = read_graph(NETWORK)
    with pytest.raises(Unsupported, match="C99 has no number format f4m3"):
        bw.compile_c(graph, recipe="observe-ranges, quantize-floats", calibration=[data(graph)])
