"""Activations below 8 bits: held in bytes, run on the integer kernels, equal to the reference bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.targets.machine import cpu_flags
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.types import S8, U8
from bitwright.passes import Context, parse_passes, run_pipeline
from bitwright.passes.precision._assignment import Problem
from bitwright.passes.precision.assign_precision import AssignPrecision

Read = Callable[..., Graph]
ABLE = [n for n, t in BUILTIN.items() if set(t.features) <= {f.replace("avx_vnni", "avxvnni") for f in cpu_flags()}]

NET = """
graph @g (%x: f32[4, 8, 6, 6]) -> (y = %y) level=graph {
  %w1 = weight {ref="c1.weight"} : f32[16, 8, 3, 3]
  %b1 = weight {ref="c1.bias"} : f32[16]
  %w2 = weight {ref="c2.weight"} : f32[16, 16, 3, 3]
  %w3 = weight {ref="c3.weight"} : f32[16, 8, 1, 1]
  %w4 = weight {ref="fc.weight"} : f32[5, 16]
  %h1 = conv(%x, %w1, %b1) {padding=[1, 1, 1, 1]} : f32[4, 16, 6, 6]
  %r1 = relu(%h1) : f32[4, 16, 6, 6]
  %h2 = conv(%r1, %w2) {padding=[1, 1, 1, 1]} : f32[4, 16, 6, 6]
  %h3 = conv(%x, %w3) : f32[4, 16, 6, 6]
  %s = add(%h2, %h3) : f32[4, 16, 6, 6]
  %r2 = relu(%s) : f32[4, 16, 6, 6]
  %m = max_pool(%r2) {kernel=[2, 2], stride=[2, 2]} : f32[4, 16, 3, 3]
  %a = reduce_mean(%m) {axes=[2, 3], keepdim=true} : f32[4, 16, 1, 1]
  %f = reshape(%a) {shape=[4, 16]} : f32[4, 16]
  %y = linear(%f, %w4) : f32[4, 5]
}
"""


def data() -> list[tuple[np.ndarray[Any, Any], ...]]:
    return [(np.random.default_rng(i).standard_normal((4, 8, 6, 6)).astype(np.float32),) for i in range(3)]


def compiled(read: Read, recipe: str, target: Any) -> tuple[Any, Any]:
    """The program, and its comparison with the reference by layer."""
    graph = read(NET)
    program = bw.compile(graph, recipe=recipe, target=target, calibration=data())
    return program, bw.verify(program, graph, data()[1], calibration=data())


@pytest.mark.parametrize("target", ABLE)
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_kernels_compute_the_references_bits(read: Read, target: str, bits: int) -> None:
    recipe = f"observe-ranges{{also={bits}}}, quantize-weights{{bits=4}}, quantize-int8{{bits={bits}}}"
    program, compared = compiled(read, recipe, target)
    kernels = [x for x in program.report.layers if x.kernel == "contract"]
    assert {x.formats.x for x in kernels} == {f"u{bits}"}
    assert {x.formats.w for x in kernels} == {"s4"}
    assert all(r.error == 0 for r in compared.rows if r.layer != "y")
    assert compared.rows[-1].error < 1e-6
    traced = program.trace(*data()[1])
    assert int(traced["r1.q.last"].max()) == (1 << bits) - 1, "the fitted range clips"


def test_signed_activations_run_bit_exactly_too(read: Read) -> None:
    graph, target = read(NET), replace(BUILTIN[ABLE[0]], activation=S8)
    recipe = parse_passes("observe-ranges{also=4}, quantize-int8{bits=4}")
    quantized, _ = run_pipeline(graph, recipe, Context(target, data()))
    held = {n.inputs[0]: str(n.op.dtype) for n in quantized.nodes if isinstance(n.op, ops.Quantize)}
    assert held == {"x": "s4", "r1": "s4", "a": "s4", "h2": "s8", "r2": "s8"}  # the last two for the addition, the mean
    program = bw.compile(quantized, recipe="", target=BUILTIN[ABLE[0]])
    compared = bw.verify(program, quantized, data()[1])
    assert all(r.error == 0 for r in compared.rows if r.layer != "y")
    assert compared.rows[-1].error < 1e-6


def test_a_value_takes_the_most_bits_of_the_layers_that_read_it(read: Read) -> None:
    graph, context = read(NET), Context(calibration=data())
    after, _ = run_pipeline(graph, parse_passes("observe-ranges{also=4}"), context)
    from bitwright.passes.precision.quantize_int8 import QuantizeInt8

    bits = {"c1": 4, "c2": 4, "c3": 8, "fc": 2}
    after = QuantizeInt8().with_bits(after, context, bits.__getitem__)
    held = {n.inputs[0]: str(n.op.dtype) for n in after.nodes if isinstance(n.op, ops.Quantize)}
    assert held["x"] == "u8"  # c1 wants 4, c3 8
    assert held["r1"] == "u4"
    assert held["a"] == "u2"
    assert held["h2"] == held["r2"] == "u8"  # an addition and a mean read these, no layer


def test_fitted_ranges_beat_extremes(read: Read) -> None:
    errors = []
    for also in ("", "{also=3}"):
        graph, context = read(NET), Context(calibration=data())
        recipe = parse_passes(f"observe-ranges{also}, quantize-int8{{bits=3}}")
        _, report = run_pipeline(graph, recipe, context)
        errors.append(report.rows[-1].output_error or 0.0)
    assert 0 < errors[1] < errors[0]


def test_choices_with_low_activations_are_assigned(read: Read) -> None:
    graph, context = read(NET), Context(calibration=data())
    graph, _ = run_pipeline(graph, parse_passes("observe-ranges{also=4}"), context)
    p = AssignPrecision(budget="bitops=0.03", choices="s8|s8a4|s4a4")
    problem = Problem.of(graph, context, p)
    assert problem.costs[0] == [c.bit_operations(1) * problem.costs[0][0] / 64 for c in problem.choices]
    assert all(row[1] > row[0] for row in problem.losses)
    after, report = run_pipeline(graph, [p], Context(calibration=data(), facts=dict(context.facts)))
    told = {place: facts["choice"] for _, place, facts in report.remarks if "choice" in facts}
    assert "s4a4" in told.values()
    reads = {
        n.output: after.producers[after.producers[n.inputs[0]].inputs[0]] for n in after.nodes if n.op.name == "conv"
    }
    alone = reads["h2"]
    assert isinstance(alone.op, ops.Quantize)
    assert (alone.op.dtype == U8) == (told["c2"] == "s8")


def test_what_makes_no_sense_is_refused(read: Read) -> None:
    graph, context = read(NET), Context(calibration=data())
    for recipe, why in (
        ("observe-ranges{also=8}", "also lists widths"),
        ("observe-ranges{also=four}", "also lists widths"),
        ("observe-ranges, quantize-int8{bits=1}", "2 to 8 bits"),
        ("observe-ranges, assign-precision{choices=s4a9}", "is no choice"),
    ):
        with pytest.raises(InvalidInput, match=why):
            run_pipeline(graph, parse_passes(recipe), context)
