"""lower-to-integer: dyadic factors, what becomes integer, and results within one step of the float meaning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.text import show
from bitwright.ir.verify import verify
from bitwright.passes import Context
from bitwright.passes.lowering._dyadic import dyadic
from bitwright.passes.lowering._sink import sink_dequantize
from bitwright.passes.lowering.to_integer import LowerToInteger

Read = Callable[..., Graph]


@settings(deadline=None)
@given(st.floats(1e-25, 2.0**29))
def test_dyadic_is_as_close_as_31_bits_allow(factor: float) -> None:
    m, e = (int(v) for v in dyadic(np.array(factor)))
    assert 0 <= m < 1 << 31
    assert 1 <= e <= 62
    error = abs(Fraction(m, 1 << e) - Fraction(factor))
    assert error <= max(Fraction(factor) / (1 << 31), Fraction(1, 1 << 63))


def test_dyadic_at_the_edges() -> None:
    assert [int(v) for v in dyadic(np.array(1.0))] == [1 << 30, 30]
    assert [int(v) for v in dyadic(np.array(1.0 - 2.0**-40))] == [1 << 30, 30]  # rounds up to a power of two
    assert int(dyadic(np.array(0.0))[0]) == 0
    assert dyadic(np.array([0.5, 3.0]))[0].dtype == np.int32


HEAD = """
  %sx = constant {values=[0.02]} : f32[]
  %zx = constant {values=[131]} : u8[]
  %so = constant {values=[0.05]} : f32[]
  %zo = constant {values=[100]} : u8[]
"""


def lowered(read: Read, inputs: str, body: str, **weights: Any) -> tuple[Graph, Graph, Context]:
    outputs = "" if "%y =" not in body else "y = %y"
    graph = read(f"graph @g ({inputs}) -> ({outputs}) level=graph {{{HEAD}{body}\n}}", weights)
    context = Context()
    after = LowerToInteger().run(graph, context)
    verify(after, "integer")
    return graph, after, context


def ops_of(graph: Graph) -> Counter[str]:
    return Counter(n.op.spelling for n in graph.nodes if n.op.spelling not in ("weight", "constant"))


def steps_apart(a: Graph, b: Graph, seed: int = 0) -> int:
    """Largest difference of two graphs' integer outputs on random bytes."""
    rng = np.random.default_rng(seed)
    x = {
        v.name: rng.integers(v.type.dtype.lo, v.type.dtype.hi + 1, v.type.static_shape).astype(v.type.dtype.numpy)
        for v in a.inputs
    }
    pairs = zip(evaluate(a, x), evaluate(b, x), strict=True)
    return max(int(np.abs(to_numpy(p).astype(np.int64) - to_numpy(q).astype(np.int64)).max()) for p, q in pairs)


CONV = """
  %w = weight {ref="c.weight"} : s8[6, 4, 3, 3] nm<2:4, axis=1>
  %sw = constant {values=[0.01, 0.02, 0.003, 0.01, 0.05, 0.001]} : f32[6]
  %b = weight {ref="c.bias"} : f32[6]
  %x = dequantize(%q, %sx, %zx) : f32[2, 4, 5, 5]
  %wd = dequantize(%w, %sw) {axis=0} : f32[6, 4, 3, 3]
  %h = conv(%x, %wd, %b) {padding=[1, 1, 1, 1]} : f32[2, 6, 5, 5]
"""


def test_convolution_bias_and_relu(read: Read) -> None:
    body = CONV + "  %r = relu(%h) : f32[2, 6, 5, 5]\n  %y = quantize(%r, %so, %zo) {dtype=u8} : u8[2, 6, 5, 5]"
    graph, after, context = lowered(read, "%q: u8[2, 4, 5, 5]", body)
    assert ops_of(after) == {"int_conv": 1, "add": 1, "requantize": 1, "saturate": 1}
    assert "nm<2:4, axis=1>" in show(after)
    assert context.refusals == []
    assert steps_apart(graph, after) <= 1


def test_clamp_bounds_land_on_the_grid(read: Read) -> None:
    body = CONV + "  %r = clamp(%h) {lo=-0.5, hi=1.0} : f32[2, 6, 5, 5]\n"
    body += "  %y = quantize(%r, %so, %zo) {dtype=u8} : u8[2, 6, 5, 5]"
    graph, after, _ = lowered(read, "%q: u8[2, 4, 5, 5]", body)
    assert (after.nodes[-1].op.lo, after.nodes[-1].op.hi) == (90, 120)  # type: ignore[attr-defined]
    assert steps_apart(graph, after) <= 1


def test_a_float_reader_gets_the_scaled_accumulator(read: Read) -> None:
    body = CONV + "  %y = gelu(%h) : f32[2, 6, 5, 5]"
    graph, after, _ = lowered(read, "%q: u8[2, 4, 5, 5]", body)
    assert ops_of(after) == {"int_conv": 1, "dequantize": 1, "add": 1, "gelu": 1}
    x = [np.random.default_rng(0).integers(0, 256, (2, 4, 5, 5)).astype(np.uint8)]
    np.testing.assert_allclose(evaluate(graph, x)[0], evaluate(after, x)[0], rtol=1e-5, atol=1e-5)


LINEAR = """
  %w = weight {ref="fc.weight"} : s8[6, 16]
  %sw = constant {values=[0.01]} : f32[]
  %x = dequantize(%q, %sx, %zx) : f32[3, 16]
  %wd = dequantize(%w, %sw) : f32[6, 16]
  %h = linear(%x, %wd) : f32[3, 6]
"""


def test_residual_of_an_accumulator_and_a_tensor(read: Read) -> None:
    body = LINEAR + "  %d = dequantize(%p, %sx, %zx) : f32[3, 6]\n  %a = add(%h, %d) : f32[3, 6]\n"
    body += "  %r = relu(%a) : f32[3, 6]\n  %y = quantize(%r, %so, %zo) {dtype=u8} : u8[3, 6]"
    graph, after, _ = lowered(read, "%q: u8[3, 16], %p: u8[3, 6]", body)
    assert ops_of(after) == {"int_linear": 1, "requantize": 3, "cast": 1, "sub": 1, "add": 1, "saturate": 1}
    assert max(steps_apart(graph, after, s) for s in range(5)) <= 1


def test_sums_round_less_than_branches_would(read: Read) -> None:
    """Two tensors whose sum the output step divides unevenly: the fine grid keeps the error of one rounding."""
    body = """
      %a = dequantize(%p, %sx, %zx) : f32[64, 64]
      %b = dequantize(%q, %sx, %zx) : f32[64, 64]
      %s = add(%a, %b) : f32[64, 64]
      %y = quantize(%s, %so, %zo) {dtype=u8} : u8[64, 64]
    """
    graph, after, _ = lowered(read, "%p: u8[64, 64], %q: u8[64, 64]", body)
    x = [np.random.default_rng(i).integers(0, 256, (64, 64)).astype(np.uint8) for i in range(2)]
    same = np.mean(to_numpy(evaluate(graph, x)[0]) == to_numpy(evaluate(after, x)[0]))
    assert steps_apart(graph, after) <= 1
    assert same > 0.98


def test_global_mean_is_a_sum_with_the_count_folded(read: Read) -> None:
    body = "  %x = dequantize(%q, %sx, %zx) : f32[2, 4, 5, 5]\n  %m = reduce_mean(%x) {axes=[2, 3]} : f32[2, 4]\n"
    body += "  %y = quantize(%m, %so, %zo) {dtype=u8} : u8[2, 4]"
    graph, after, _ = lowered(read, "%q: u8[2, 4, 5, 5]", body)
    assert ops_of(after) == {"cast": 1, "sub": 1, "reduce_sum": 1, "requantize": 1}
    assert steps_apart(graph, after) <= 1


def test_average_pooling_is_a_depthwise_convolution_with_ones(read: Read) -> None:
    body = "  %x = dequantize(%q, %sx, %zx) : f32[2, 4, 6, 6]\n"
    body += "  %m = avg_pool(%x) {kernel=[3, 3], stride=[2, 2], padding=[1, 1, 1, 1]} : f32[2, 4, 3, 3]\n"
    body += "  %y = quantize(%m, %so, %zo) {dtype=u8} : u8[2, 4, 3, 3]"
    graph, after, _ = lowered(read, "%q: u8[2, 4, 6, 6]", body)
    assert ops_of(after) == {"int_conv": 1, "requantize": 1}
    assert steps_apart(graph, after) <= 1


def test_rescaling_and_layout(read: Read) -> None:
    body = "  %x = dequantize(%q, %sx, %zx) : f32[2, 6]\n  %t = transpose(%x) {perm=[1, 0]} : f32[6, 2]\n"
    body += "  %y = quantize(%t, %so, %zo) {dtype=u8} : u8[6, 2]"
    graph, after, _ = lowered(read, "%q: u8[2, 6]", body)
    assert [n.op.spelling for n in after.nodes if n.op.arity != (0, 0)] == ["transpose", "cast", "sub", "requantize"]
    assert steps_apart(graph, after) <= 1


def test_matmul_of_two_activations(read: Read) -> None:
    body = """
      %a = dequantize(%p, %sx, %zx) : f32[2, 3, 8]
      %b = dequantize(%q, %so, %zo) : f32[2, 5, 8]
      %h = matmul(%a, %b) {transpose_b=true} : f32[2, 3, 5]
      %s = constant {values=[0.5]} : f32[]
      %y = quantize(%h, %s, %zo) {dtype=u8} : u8[2, 3, 5]
    """
    graph, after, _ = lowered(read, "%p: u8[2, 3, 8], %q: u8[2, 5, 8]", body)
    assert ops_of(after) == {"int_matmul": 1, "requantize": 1}
    assert steps_apart(graph, after) <= 1


def test_unsigned_weights_of_other_tools_are_shifted(read: Read) -> None:
    body = """
      %w = weight {ref="fc.weight"} : u8[6, 16]
      %sw = constant {values=[0.01]} : f32[]
      %zw = constant {values=[128]} : u8[]
      %x = dequantize(%q, %sx, %zx) : f32[3, 16]
      %wd = dequantize(%w, %sw, %zw) : f32[6, 16]
      %h = linear(%x, %wd) : f32[3, 6]
      %y = quantize(%h, %so, %zo) {dtype=u8} : u8[3, 6]
    """
    graph, after, _ = lowered(read, "%q: u8[3, 16]", body)
    assert ops_of(after) == {"int_linear": 1, "requantize": 1}
    assert "s8[6, 16]" in show(after)
    assert steps_apart(graph, after) <= 1


@pytest.mark.parametrize(
    ("weight", "extra", "reason"),
    [
        ("u8[6, 16]", "%zw = constant {values=[3]} : u8[]\n", "weight minus its zero point does not fit s8"),
        ("s16[6, 16]", "", "weight of s16"),
    ],
)
def test_weights_that_stay_float(read: Read, weight: str, extra: str, reason: str) -> None:
    zero = ", %zw" if extra else ""
    body = f"""
      %w = weight {{ref="fc.weight"}} : {weight}
      %sw = constant {{values=[0.01]}} : f32[]
      {extra}
      %x = dequantize(%q, %sx, %zx) : f32[3, 16]
      %wd = dequantize(%w, %sw{zero}) : f32[6, 16]
      %y = linear(%x, %wd) : f32[3, 6]
    """
    rng = np.random.default_rng(0)
    values = {
        "fc.weight": rng.integers(0, 256, (6, 16)).astype(
            weight.split("[")[0].replace("u8", "uint8").replace("s16", "int16")
        )
    }
    graph, after, context = lowered(read, "%q: u8[3, 16]", body, **values)
    assert reason in context.refusals[0].reason
    assert ops_of(after)["linear"] == 1
    assert ops_of(after) == {**ops_of(graph), "dequantize": 1}  # the weight's was done once and for all


def test_weight_only_and_activation_only_stay_float(read: Read) -> None:
    body = LINEAR.replace("linear(%x, %wd)", "linear(%x, %u)") + "  %g = linear(%v, %wd) : f32[3, 6]\n"
    body += "  %y = add(%h, %g) : f32[3, 6]"
    _, after, context = lowered(read, "%q: u8[3, 16], %v: f32[3, 16], %u: f32[6, 16]", body)
    assert [r.reason for r in context.refusals] == [
        "stays float: the weight is not a dequantized constant",
        "stays float: the activation is not quantized per tensor",
    ]
    assert ops_of(after) == {"dequantize": 1, "linear": 2, "add": 1}  # the weight became f32


def test_a_bias_beyond_32_bits_stays_float(read: Read) -> None:
    body = (
        LINEAR.replace("linear(%x, %wd)", "linear(%x, %wd, %b)") + "  %y = quantize(%h, %so, %zo) {dtype=u8} : u8[3, 6]"
    )
    body = "  %b = constant {values=[1e6, 1.0, 1.0, 1.0, 1.0, 1.0]} : f32[6]\n" + body
    graph, after, _ = lowered(read, "%q: u8[3, 16]", body)
    assert ops_of(after) == {"int_linear": 1, "dequantize": 1, "add": 1, "quantize": 1}
    assert steps_apart(graph, after) <= 1


def test_a_float_graph_only_changes_its_level(read: Read) -> None:
    graph, after, _ = lowered(read, "%x: f32[2, 2]", "  %y = exp(%x) : f32[2, 2]")
    assert after.level == "integer"
    assert [n.op for n in after.nodes] == [n.op for n in graph.drop_dead().nodes]


def test_dequantize_sinks_only_when_parameters_agree(read: Read) -> None:
    text = f"""
        graph @g (%p: u8[2, 3], %q: u8[2, 3]) -> (a = %a, b = %b) level=graph {{{HEAD}
          %x = dequantize(%p, %sx, %zx) : f32[2, 3]
          %u = dequantize(%q, %sx, %zx) : f32[2, 3]
          %v = dequantize(%q, %so, %zx) : f32[2, 3]
          %a = concat(%x, %u) : f32[4, 3]
          %b = concat(%x, %v) : f32[4, 3]
        }}
    """
    after = sink_dequantize(read(text))
    assert {str(n.type) for n in after.nodes if n.op.spelling == "concat"} == {"u8[4, 3]", "f32[4, 3]"}
    verify(after)


@st.composite
def layers(draw: st.DrawFn) -> tuple[str, int]:
    """A random quantized convolution with bias, relu and residual or not, as text, and a seed."""
    channels, out = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    scale, zero = draw(st.floats(0.01, 0.3)), draw(st.integers(0, 255))
    lines = [
        f"%s = constant {{values=[{scale}]}} : f32[]", f"%z = constant {{values=[{zero}]}} : u8[]",
        f'%w = weight {{ref="w"}} : s8[{out}, {channels}, 1, 1]', "%sw = constant {values=[0.004]} : f32[]",
        f'%b = weight {{ref="b"}} : f32[{out}]',
        f"%x = dequantize(%q, %s, %z) : f32[1, {channels}, 3, 3]",
        f"%d = dequantize(%w, %sw) : f32[{out}, {channels}, 1, 1]",
        f"%h = conv(%x, %d, %b) : f32[1, {out}, 3, 3]",
    ]  # fmt: skip
    value = "h"
    if draw(st.booleans()):
        lines.append(f"%r = relu(%{value}) : f32[1, {out}, 3, 3]")
        value = "r"
    if out == channels and draw(st.booleans()):
        lines.append(f"%a = add(%{value}, %x) : f32[1, {out}, 3, 3]")
        value = "a"
    lines += ["%t = constant {values=[0.05]} : f32[]", "%u = constant {values=[128]} : u8[]"]
    lines += [f"%y = quantize(%{value}, %t, %u) {{dtype=u8}} : u8[1, {out}, 3, 3]"]
    body = "\n  ".join(lines)
    return f"graph @g (%q: u8[1, {channels}, 3, 3]) -> (y = %y) level=graph {{\n  {body}\n}}", draw(
        st.integers(0, 1000)
    )


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=layers())
def test_one_layer_is_within_one_step(read: Read, case: tuple[str, int]) -> None:
    text, seed = case
    graph = read(text)
    after = LowerToInteger().run(graph, Context())
    verify(after, "integer")
    assert not {"conv", "dequantize", "quantize"} & set(ops_of(after))
    assert steps_apart(graph, after, seed) <= 1
