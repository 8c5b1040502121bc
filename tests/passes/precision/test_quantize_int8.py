"""quantize-int8: where quantize and dequantize stand, what is refused, how far outputs move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.patterns import violation
from bitwright.ir.types import F32, NM, S8, U8
from bitwright.ir.verify import verify
from bitwright.passes import Context, parse_passes, run_pipeline
from bitwright.passes._measure import relative_rms
from bitwright.passes.precision._qdq import parameters, quantize_weight
from bitwright.passes.precision.quantize_int8 import QuantizeInt8

Read = Callable[..., Graph]


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.sampled_from([U8, S8]))
def test_zero_is_exact_and_the_range_is_covered(a: float, b: float, dtype: Any) -> None:
    lo, hi = sorted((a, b))
    scale, zero = parameters(lo, hi, dtype)
    assert dtype.lo <= zero <= dtype.hi
    assert scale > 0
    assert (dtype.lo - zero) * scale <= min(lo, 0.0) + 0.51 * scale
    assert (dtype.hi - zero) * scale >= max(hi, 0.0) - 0.51 * scale


def test_weights_keep_their_zeros_and_lose_half_a_step() -> None:
    w = np.random.default_rng(0).standard_normal((5, 3, 2, 2)).astype(np.float32)
    w[0] = 0.0
    w[:, 1] = 0.0
    q, scale = quantize_weight(w)
    assert q.min() >= -127
    assert (q[:, 1] == 0).all()
    assert scale[0] == 1.0
    assert (np.abs(w - q * scale.reshape(-1, 1, 1, 1)) <= 0.5001 * scale.reshape(-1, 1, 1, 1)).all()
    assert (np.abs(q[1:]).reshape(4, -1).max(1) == 127).all()


RESIDUAL = """
graph @g (%x: f32[2, 4, 6, 6]) -> (y = %y) level=graph {
  %w1 = weight {ref="c1.weight"} : f32[8, 4, 3, 3]
  %b1 = weight {ref="c1.bias"} : f32[8]
  %w2 = weight {ref="c2.weight"} : f32[8, 8, 3, 3] nm<2:4, axis=1>
  %w3 = weight {ref="c3.weight"} : f32[8, 4, 1, 1]
  %w4 = weight {ref="fc.weight"} : f32[5, 8]
  %h1 = conv(%x, %w1, %b1) {padding=[1, 1, 1, 1]} : f32[2, 8, 6, 6]
  %r1 = relu(%h1) : f32[2, 8, 6, 6]
  %h2 = conv(%r1, %w2) {padding=[1, 1, 1, 1]} : f32[2, 8, 6, 6]
  %h3 = conv(%x, %w3) : f32[2, 8, 6, 6]
  %s = add(%h2, %h3) : f32[2, 8, 6, 6]
  %r2 = relu(%s) : f32[2, 8, 6, 6]
  %m = max_pool(%r2) {kernel=[2, 2], stride=[2, 2]} : f32[2, 8, 3, 3]
  %a = reduce_mean(%m) {axes=[2, 3], keepdim=true} : f32[2, 8, 1, 1]
  %f = reshape(%a) {shape=[2, 8]} : f32[2, 8]
  %y = linear(%f, %w4) : f32[2, 5]
}
"""


def quantized(read: Read, text: str, options: str = "") -> tuple[Graph, Graph, Context, float]:
    """(graph, quantized graph, context, relative RMS error on the calibration batch)."""
    graph = read(text)
    rng = np.random.default_rng(0)
    batch = {v.name: rng.standard_normal(v.type.static_shape).astype(np.float32) for v in graph.inputs}
    context = Context(calibration=[batch])
    after, _ = run_pipeline(graph, parse_passes(f"observe-ranges, quantize-int8{options}"), context)
    verify(after)
    return graph, after, context, relative_rms(evaluate(after, batch), evaluate(graph, batch))


def shape_of(graph: Graph) -> Counter[str]:
    return Counter(n.op.spelling for n in graph.nodes if n.op.spelling not in ("weight", "constant"))


def test_a_residual_network_stays_in_8_bits(read: Read) -> None:
    _, after, context, error = quantized(read, RESIDUAL)
    assert context.refusals == []
    assert error < 0.03
    held = [n.inputs[0] for n in after.nodes if n.op.spelling == "quantize"]
    assert held == ["x", "r1", "h2", "r2", "a"]  # h3, made last, stays an accumulator inside the addition
    pool = next(n for n in after.nodes if n.op.spelling == "max_pool")
    assert str(pool.type) == "u8[2, 8, 3, 3]"
    view = next(n for n in after.nodes if n.op.spelling == "reshape")
    assert str(view.type) == "u8[2, 8]"


def test_masks_survive_on_the_low_bit_weight(read: Read) -> None:
    _, after, _, _ = quantized(read, RESIDUAL)
    masked = [n for n in after.nodes if isinstance(n.type.encoding, NM)]
    assert [str(n.type) for n in masked] == ["s8[8, 8, 3, 3] nm<2:4, axis=1>"]
    assert violation(after.weights[masked[0].op.ref].array, masked[0].type.encoding) == ""  # type: ignore[attr-defined, arg-type]


def test_float_readers_keep_the_float_value(read: Read) -> None:
    _, after, _, error = quantized(read, """
        graph @g (%x: f32[2, 8]) -> (y = %y, n = %n) level=graph {
          %w = weight {ref="fc.weight"} : f32[8, 8]
          %n = layer_norm(%x) : f32[2, 8]
          %h = linear(%n, %w) : f32[2, 8]
          %y = add(%h, %n) : f32[2, 8]
        }
    """)  # fmt: skip
    assert error < 0.02
    last = after.nodes[-1]
    assert (last.op.spelling, last.inputs[1]) == ("add", "n")
    assert shape_of(after)["quantize"] == 1


def test_shared_layout_parameters(read: Read) -> None:
    """Operands of a concatenation share the union of their ranges; a transpose moves bytes."""
    _, after, _, error = quantized(read, """
        graph @g (%x: f32[2, 4, 3, 3]) -> (y = %y) level=graph {
          %w1 = weight {ref="a.weight"} : f32[4, 4, 1, 1]
          %w2 = weight {ref="b.weight"} : f32[8, 4, 1, 1]
          %w3 = weight {ref="fc.weight"} : f32[5, 12]
          %a = conv(%x, %w1) : f32[2, 4, 3, 3]
          %b = conv(%x, %w2) : f32[2, 8, 3, 3]
          %c = concat(%a, %b) {axis=1} : f32[2, 12, 3, 3]
          %t = transpose(%c) {perm=[0, 2, 3, 1]} : f32[2, 3, 3, 12]
          %y = linear(%t, %w3) : f32[2, 3, 3, 5]
        }
    """)  # fmt: skip
    assert error < 0.03
    types = {n.op.spelling: str(n.type) for n in after.nodes}
    assert types["concat"] == "u8[2, 12, 3, 3]"
    assert types["transpose"] == "u8[2, 3, 3, 12]"
    a, b = (n.inputs[1:] for n in after.nodes if n.op.spelling == "quantize" and n.inputs[0] in ("a", "b"))
    assert [after.constant(x) for x in a] == [after.constant(x) for x in b]


def test_padding_uses_the_zero_point(read: Read) -> None:
    _, after, _, error = quantized(read, """
        graph @g (%x: f32[2, 4, 3, 3]) -> (y = %y) level=graph {
          %w = weight {ref="a.weight"} : f32[4, 4, 1, 1]
          %h = conv(%x, %w) : f32[2, 4, 3, 3]
          %p = pad(%h) {padding=[0, 0, 0, 0, 0, 4, 0, 0]} : f32[2, 8, 3, 3]
          %w2 = weight {ref="b.weight"} : f32[4, 8, 1, 1]
          %y = conv(%p, %w2) : f32[2, 4, 3, 3]
        }
    """)  # fmt: skip
    assert error < 0.03
    pad = next(n for n in after.nodes if n.op.spelling == "pad")
    back = after.users[pad.output][0]
    assert pad.op.value == float(np.asarray(after.constant(back.inputs[2])))  # type: ignore[attr-defined]
    assert pad.op.value > 0  # type: ignore[attr-defined]


def test_matmul_of_activations_is_an_option(read: Read) -> None:
    text = """
        graph @g (%q: f32[2, 4, 8], %k: f32[2, 8, 4]) -> (y = %y) level=graph {
          %y = matmul(%q, %k) : f32[2, 4, 4]
        }
    """
    _, after, context, _ = quantized(read, text)
    assert shape_of(after) == {"matmul": 1}
    assert "matmul=true quantizes it" in context.refusals[0].reason
    _, after, _, error = quantized(read, text, "{matmul=true}")
    assert shape_of(after) == {"quantize": 2, "dequantize": 2, "matmul": 1}
    assert error < 0.03


@pytest.mark.parametrize(
    ("options", "float_layers"),
    [("{only=c*}", ["fc"]), ("{except=c2}", ["c2"]), ("{first=false}", ["c1"]), ("{last=false}", ["fc"])],
)
def test_layers_can_be_left_out(read: Read, options: str, float_layers: list[str]) -> None:
    _, after, _, _ = quantized(read, RESIDUAL, options)
    weights = [n.op.ref for n in after.nodes if n.op.name == "weight" and n.type.dtype == F32]  # type: ignore[attr-defined]
    assert [w.removesuffix(".weight") for w in weights if w.endswith(".weight")] == float_layers


def test_refusals(read: Read) -> None:
    text = """
        graph @g (%x: f32[1, 4, 3, 3], %h: f16[1, 4], %u: f32[4, 3]) -> (a = %a, b = %b, c = %c) level=graph {
          %w = weight {ref="up.weight"} : f32[4, 2, 2, 2]
          %v = weight {ref="half.weight"} : f16[3, 4]
          %a = conv_transpose(%x, %w) : f32[1, 2, 4, 4]
          %b = linear(%h, %v) : f16[1, 3]
          %c = linear(%x, %u) : f32[1, 4, 3, 4]
        }
    """
    context = Context(facts={"ranges": {}})
    graph = read(text)
    assert not QuantizeInt8().run(graph, context).changed_from(graph)
    assert {r.place: r.reason for r in context.refusals} == {
        "up": "transposed convolution: no integer kernel",
        "half": "operands are f16: cast the model to f32 first",
        "c": "weight is computed, not constant",
    }


def test_ranges_that_are_missing_or_infinite(read: Read) -> None:
    text = """
        graph @g (%x: f32[1, 4]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[2, 4]
          %y = linear(%x, %w) : f32[1, 2]
        }
    """
    context = Context(facts={"ranges": {"x": (-1.0, float("inf"))}})
    QuantizeInt8().run(read(text), context)
    assert context.refusals[0].reason == "no finite range was observed for %x"
    with pytest.raises(InvalidInput, match="observe-ranges"):
        QuantizeInt8().run(read(text), Context())


def test_second_run_changes_nothing(read: Read) -> None:
    _, after, context, _ = quantized(read, RESIDUAL)
    assert not QuantizeInt8().run(after, context).changed_from(after)
