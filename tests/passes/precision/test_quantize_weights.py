"""quantize-weights: formats in the graph, composition with masks and quantize-int8, errors told, compiled results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.driver import compile as compile_model
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate
from bitwright.ir.patterns import violation
from bitwright.ir.types import Unstructured
from bitwright.ir.verify import verify
from bitwright.passes import Context, parse_passes, run_pipeline
from bitwright.passes._measure import relative_rms
from bitwright.passes.precision._weight_codes import Inputs
from bitwright.passes.precision.quantize_weights import QuantizeWeights
from tests import digits_networks
from tests.conftest import read_graph

Read = Callable[..., Graph]
NETWORK = """
graph @g (%x: f32[2, 8, 6, 6]) -> (y = %y) level=graph {
  %w1 = weight {ref="c1.weight"} : f32[8, 8, 3, 3]
  %b1 = weight {ref="c1.bias"} : f32[8]
  %w2 = weight {ref="dw.weight"} : f32[8, 1, 3, 3]
  %w3 = weight {ref="c3.weight"} : f32[16, 8, 1, 1]
  %w4 = weight {ref="fc.weight"} : f32[5, 16]
  %h1 = conv(%x, %w1, %b1) {padding=[1, 1, 1, 1]} : f32[2, 8, 6, 6]
  %r1 = relu(%h1) : f32[2, 8, 6, 6]
  %h2 = conv(%r1, %w2) {padding=[1, 1, 1, 1], groups=8} : f32[2, 8, 6, 6]
  %h3 = conv(%h2, %w3) : f32[2, 16, 6, 6]
  %r3 = relu(%h3) : f32[2, 16, 6, 6]
  %m = reduce_mean(%r3) {axes=[2, 3], keepdim=false} : f32[2, 16]
  %y = linear(%m, %w4) : f32[2, 5]
}
"""
METHODS = ("nearest", "adaround", "adaquant", "gptq", "gpfq")


def batch(graph: Graph, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {v.name: rng.standard_normal(v.type.static_shape).astype(np.float32) for v in graph.inputs}


def ran(graph: Graph, passes: str, batches: int = 2) -> tuple[Graph, Context, float]:
    """The graph after the passes, the context, and the relative RMS change of the outputs."""
    context = Context(calibration=[batch(graph, i) for i in range(batches)])
    after, _ = run_pipeline(graph, parse_passes(passes), context, crash_dir=None)
    verify(after)
    return after, context, relative_rms(evaluate(after, batch(graph)), evaluate(graph, batch(graph)))


def low_weights(graph: Graph) -> dict[str, Any]:
    """Type and values of integer weights, by key without number."""
    return {
        n.op.ref.removesuffix(".1"): (n.type, graph.weights[n.op.ref].array)
        for n in graph.nodes
        if isinstance(n.op, ops.Weight) and n.type.dtype.is_integer
    }


@pytest.mark.parametrize("rounding", METHODS)
@pytest.mark.parametrize(
    ("options", "dtype", "within"),
    [
        ("bits=8", "s8", 0.02), ("bits=4", "s4", 0.3), ("bits=4 scale=pow2", "s4", 0.4), ("bits=3", "s3", 0.6),
        ("bits=6 symmetric=false", "u6", 0.05), ("bits=ternary", "ternary", 0.9), ("bits=2 symmetric=false", "u2", 0.9),
    ],
)  # fmt: skip
def test_every_format_and_rounding(read: Read, rounding: str, options: str, dtype: str, within: float) -> None:
    graph = read(NETWORK)
    more = " iterations=60" if rounding.startswith("ada") else ""
    after, context, error = ran(graph, f"quantize-weights{{{options} rounding={rounding}{more}}}")
    assert {k: str(t.dtype) for k, (t, _) in low_weights(after).items()} == dict.fromkeys(
        ("c1.weight", "dw.weight", "c3.weight", "fc.weight"), dtype
    )
    assert error < within
    assert context.refusals == []
    assert len(context.remarks) == 4
    for _, _, facts in context.remarks:
        assert facts["error"] <= facts["error_nearest"]
        assert (facts["format"], facts["rounding"]) == (dtype, rounding)
    if "pow2" in options:
        for n in after.nodes:
            if isinstance(n.op, ops.Dequantize):
                scale = np.asarray(after.constant(n.inputs[1]))
                assert (np.frexp(scale)[0] == 0.5).all()
    again = QuantizeWeights().run(after, context)
    assert not again.changed_from(after)
    assert {r.reason for r in context.refusals} == {"quantized already"}


def test_rounding_lowers_the_error_of_the_outputs(read: Read) -> None:
    graph = read(NETWORK)
    errors = {m: ran(graph, f"quantize-weights{{bits=4 rounding={m}}}", 8)[2] for m in ("nearest", "adaround", "gptq")}
    assert errors["adaround"] < 0.8 * errors["nearest"]
    assert errors["gptq"] < 0.9 * errors["nearest"]


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaquant"])
def test_groups(read: Read, rounding: str) -> None:
    text = """
        graph @g (%x: f32[40, 80]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[12, 80]
          %y = linear(%x, %w) : f32[40, 12]
        }
    """
    graph = read(text)
    passes = f"observe-ranges, quantize-weights{{bits=4 group=32 rounding={rounding} iterations=100}}, quantize-int8"
    after, context, error = ran(graph, passes)
    back = next(n for n in after.nodes if isinstance(n.op, ops.Dequantize))
    assert (back.op.axis, back.op.group) == (1, 32)  # type: ignore[attr-defined]
    assert after.types[back.inputs[1]].shape == (12, 3)
    assert error < 0.12
    assert [r.reason for r in context.refusals] == [
        "weight scales per 32 inputs: no integer kernel, activations stay float"
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(METHODS), st.sampled_from(["4", "8", "3", "ternary"]), st.booleans(), st.booleans(),
    st.sampled_from(["nm-mask{except=dw}", "transposable-mask{except=dw}", "nm-mask{pattern=1:4 except=dw}"]),
    st.integers(0, 99),
)  # fmt: skip
def test_masks_keep_each_zero(method: str, bits: str, sequential: bool, int8: bool, mask: str, seed: int) -> None:
    """N:M with every format and every rounding, before quantize-int8 or alone: each zero stays, the type keeps it."""
    graph = read_graph(NETWORK)
    masked, _, _ = ran(graph, mask, 1)
    zeros = {
        n.op.ref.removesuffix(".1"): graph_zeros(masked, n.op.ref) for n in masked.nodes if isinstance(n.op, ops.Weight)
    }
    options = f"bits={bits} rounding={method} sequential={str(sequential).lower()} seed={seed}"
    options += " iterations=20" if method.startswith("ada") else ""
    passes = f"quantize-weights{{{options}}}"
    after, _, _ = ran(masked, f"observe-ranges, {passes}, quantize-int8" if int8 else passes, 1)
    found = {n.op.ref.split(".weight")[0]: n for n in after.nodes if isinstance(n.op, ops.Weight) and n.type.rank > 1}
    for name in ("c1", "c3", "fc"):
        node = found[name]
        values = after.weights[node.op.ref].array  # type: ignore[attr-defined]
        assert node.type.dtype.bits == {"ternary": 2}.get(bits, int(bits) if bits.isdigit() else 0)
        assert node.type.encoding is not None
        assert violation(values, node.type.encoding) == ""
        assert (values[zeros[f"{name}.weight"]] == 0).all()


def graph_zeros(graph: Graph, ref: str) -> Any:
    return graph.weights[ref].array == 0


def test_sequential_layers_see_the_rounded_ones(read: Read) -> None:
    graph = read(NETWORK)
    parallel, sequential = (
        low_weights(ran(graph, f"quantize-weights{{bits=3 rounding=gptq sequential={s}}}")[0])
        for s in ("false", "true")
    )
    np.testing.assert_array_equal(parallel["c1.weight"][1], sequential["c1.weight"][1])
    assert any((parallel[k][1] != sequential[k][1]).any() for k in parallel)


def test_shared_weights_are_rounded_once(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[20, 8], %i: s64[2]) -> (a = %a, b = %b, c = %e) level=graph {
          %w = weight {ref="tied.weight"} : f32[8, 8]
          %a = linear(%x, %w) : f32[20, 8]
          %b = linear(%a, %w) : f32[20, 8]
          %e = gather(%w, %i) : f32[2, 8]
        }
    """)
    context = Context(calibration=[{**batch(graph), "i": np.array([0, 1])}])
    after = QuantizeWeights(bits="4", rounding="gptq").run(graph, context)
    verify(after)
    assert list(low_weights(after)) == ["tied.weight"]
    assert len(context.remarks) == 1


def test_without_data_nearest_only(read: Read) -> None:
    context = Context()
    after = QuantizeWeights(bits="4").run(read(NETWORK), context)
    assert len(low_weights(after)) == 4
    assert all(0 < facts["weight_error"] < 0.05 for _, _, facts in context.remarks)
    with pytest.raises(InvalidInput, match=r"quantize-weights\{rounding=gptq\} needs calibration data"):
        QuantizeWeights(bits="4", rounding="gptq").run(read(NETWORK), Context())


def test_refusals(read: Read) -> None:
    text = """
        graph @g (%x: f32[1, 4, 3, 3], %h: f16[1, 4], %u: f32[4, 3], %v: f32[3, 8]) -> (a = %a, b = %b, c = %c, d = %d, e = %e) level=graph {
          %w = weight {ref="up.weight"} : f32[4, 2, 2, 2]
          %s = weight {ref="half.weight"} : f16[3, 4]
          %m = weight {ref="masked.weight"} : f32[2, 8] nm<2:4, axis=1>
          %a = conv_transpose(%x, %w) : f32[1, 2, 4, 4]
          %b = linear(%h, %s) : f16[1, 3]
          %c = linear(%x, %u) : f32[1, 4, 3, 4]
          %d = matmul(%u, %v) : f32[4, 8]
          %e = linear(%v, %m) : f32[3, 2]
        }
    """  # noqa: E501
    masked = np.array([[1, 2, 0, 0, 0, 3, 0, 4]] * 2, np.float32)
    graph, context = read(text, {"masked.weight": masked}), Context()
    assert not QuantizeWeights(bits="bipolar", except_="c").run(graph, context).changed_from(graph)
    assert {r.place: r.reason for r in context.refusals} == {
        "up": "transposed convolution: its weight has no scale per output",
        "half": "weight is f16: cast the model to f32 first",
        "d": "matmul: its weight has no scale per output",
        "masked": "bipolar codes have no zero, and the weight is masked",
    }
    context = Context()
    QuantizeWeights(symmetric=False, only="masked|c").run(graph, context)
    assert [r.reason for r in context.refusals] == [
        "weight is computed, not constant",
        "a zero point would hide the zeros of the mask",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "9"}, "bits is 2 to 8"), ({"bits": "half"}, "bits is 2 to 8"), ({"group": 8}, "group is 0"),
        ({"bits": "ternary", "symmetric": False}, "ternary is symmetric"), ({"iterations": -1}, "at least 0"),
        ({"bits": "bipolar", "rounding": "adaround"}, "cannot round up or down"),
    ],
)  # fmt: skip
def test_bad_options(read: Read, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        QuantizeWeights(**options).run(read(NETWORK), Context())


def test_nan_inputs_are_named(read: Read) -> None:
    bad = {"x": np.full((2, 8, 6, 6), np.nan, np.float32)}
    with pytest.raises(InvalidInput, match="%x, the input of c1, has NaN in calibration batch 0"):
        QuantizeWeights(bits="4", rounding="gptq").run(read(NETWORK), Context(calibration=[bad]))


@pytest.mark.parametrize(
    ("options", "x", "w"),
    [
        ("bits=4", "u8", "s4"), ("bits=3", "u8", "s3"), ("bits=ternary", "u8", "ternary"), ("bits=8", "u8", "s8"),
        ("bits=bipolar", "u8", "bipolar"), ("bits=4 symmetric=false", "u8", "s8"), ("bits=4 group=32", "f32", "f32"),
    ],
)  # fmt: skip
def test_compiled_results(read: Read, options: str, x: str, w: str, tmp_path: Path) -> None:
    """Per-channel codes run on integer kernels under their own format; every result is that of the interpreter."""
    graph = read(NETWORK)
    passes = f"observe-ranges, quantize-weights{{{options}}}, quantize-int8"
    program = compile_model(graph, recipe=passes, calibration=[batch(graph)], cache_dir=tmp_path)
    layers = [layer for layer in program.report.layers if layer.formats.w]
    assert {(layer.formats.x, layer.formats.w) for layer in layers} == {(x, w)}
    assert len(layers) == 4
    (want,) = evaluate(ran(graph, passes, 1)[0], batch(graph))
    got = np.asarray(program(*batch(graph).values()))
    assert np.abs(got - want.numpy()).max() < (1e-4 if x == "f32" else 0.05) * float(want.abs().max())


def test_digits_at_4_bits() -> None:
    """A trained network keeps its accuracy with 4-bit weights; the layers' errors are well below nearest rounding's."""
    graph = digits_networks.captured(digits_networks.trained("depthwise"))
    context = Context(calibration=digits_networks.data().batches(4, 64))
    passes = "fold-constants, simplify, fold-batch-norm, observe-ranges, quantize-weights{bits=4 rounding=gptq}"
    after, _ = run_pipeline(graph, parse_passes(f"{passes}, quantize-int8"), context, crash_dir=None)
    assert digits_networks.accuracy(after) >= digits_networks.accuracy(graph) - 1.5
    facts = [f for name, _, f in context.remarks if name == "quantize-weights"]
    assert len(facts) == 8
    assert np.mean([f["error"] / f["error_nearest"] for f in facts]) < 0.6


def test_encoding_of_plain_zeros_survives(read: Read) -> None:
    """Zeros without a mask type stay zero as well."""
    w = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    w[:, ::3] = 0.0
    after, _, _ = ran(read(NETWORK, {"fc.weight": w}), "quantize-weights{bits=4 rounding=gptq}")
    assert (low_weights(after)["fc.weight"][1][:, ::3] == 0).all()
    assert not isinstance(low_weights(after)["fc.weight"][0].encoding, Unstructured)


@pytest.mark.parametrize("options", ["bits=4 group=32", "bits=3", "bits=4 symmetric=false"])
def test_weights_of_float_layers_are_dequantized_beforehand(read: Read, options: str, tmp_path: Path) -> None:
    """Without integer activations the codes become f32 weights at lowering, and a float kernel reads them."""
    graph = read(NETWORK)
    passes = f"quantize-weights{{{options}}}"
    program = compile_model(graph, recipe=passes, calibration=[batch(graph)], cache_dir=tmp_path)
    layers = [layer for layer in program.report.layers if layer.formats.w]
    assert [layer.kernel for layer in layers if layer.op.startswith(("conv", "linear"))] == ["contract"] * 4
    (want,) = evaluate(ran(graph, passes, 1)[0], batch(graph))
    got = np.asarray(program(*batch(graph).values()))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)


def test_rows_kept_of_images_are_from_every_column() -> None:
    """Every fourth row of an 8 x 8 image would be from two columns of it alone."""
    graph = read_graph("""
        graph @g (%x: f32[1024, 4]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[2, 4]
          %y = linear(%x, %w) : f32[1024, 2]
        }
    """)
    rows = torch.arange(64.0).repeat(16)[:, None].expand(-1, 4)
    kept = Inputs(1, keep=256)
    kept.add(graph, graph.producers["y"], rows, 0, 1)
    columns = kept.sample()[0, :, 0] % 8
    assert kept.filled == 256
    assert all(10 < int((columns == c).sum()) < 60 for c in range(8))


def test_adaquant_begins_where_gptq_ended(read: Read) -> None:
    graph = read("""
        graph @g (%x: f32[256, 16]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[24, 16]
          %y = linear(%x, %w) : f32[256, 24]
        }
    """)
    rng = np.random.default_rng(0)
    batch = (rng.standard_normal((256, 16)) @ rng.standard_normal((16, 16)) + 2).astype(np.float32)
    errors = {}
    for rounding in ("gptq", "adaquant"):
        context = Context(calibration=[(batch,)])
        QuantizeWeights(bits="4", rounding=rounding, iterations=1).run(graph, context)
        errors[rounding] = context.remarks[-1][2]["error"]
    assert errors["adaquant"] <= errors["gptq"] * 1.001 < 0.8 * context.remarks[-1][2]["error_nearest"]


def test_weights_so_small_that_they_are_literals(read: Read) -> None:
    """Passes write constants of up to 64 elements as literals, as folding a batch norm into a small layer does."""
    graph = read("""
        graph @g (%x: f32[3, 2]) -> (y = %y) level=graph {
          %w = constant {values=[0.5, -1.0, 0.25, 2.0]} : f32[2, 2]
          %y = linear(%x, %w) : f32[3, 2]
        }
    """)
    after, context, error = ran(graph, "quantize-weights{bits=4}")
    assert not context.refusals
    assert {str(n.type.dtype) for n in after.nodes if n.type.rank == 2 and after.is_constant(n.output)} == {"s4"}
    assert 0 < error < 0.2
