"""Layers of run-time codes at the integer level: which operator they become, with the same meaning, and on kernels."""

from __future__ import annotations

import numpy as np
import pytest

import bitwright as bw
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.types import BF16, F32, TensorType, parse_dtype, parse_type
from bitwright.ir.verify import verify
from bitwright.passes import Context, run_pipeline
from bitwright.passes.lowering.to_integer import LowerToInteger
from bitwright.passes.pipelines import standard


def model(rows: str = "3", bias: bool = True) -> Graph:
    """Two layers, relu between them."""
    rng, b = np.random.default_rng(0), Builder()
    x = b.input("x", parse_type(f"f32[{rows}, 96]"))
    h = b.emit(ops.Linear(), x, b.weight("a.weight", rng.standard_normal((64, 96)).astype(np.float32)))
    more = [b.weight("b.bias", rng.standard_normal(40).astype(np.float32))] if bias else []
    w = b.weight("b.weight", rng.standard_normal((40, 64)).astype(np.float32))
    return b.finish([b.emit(ops.Linear(), b.emit(ops.Unary("relu"), h), w, *more)], ["y"])


@pytest.mark.parametrize(
    ("recipe", "operator", "kernel"),
    [
        ("weight-only{group=32}", ops.GroupLinear, "grouped"),
        ("weight-only{bits=2 group=32 scales=f32}", ops.GroupLinear, "grouped"),
        ("weight-only{bits=ternary group=0}", ops.GroupLinear, "grouped"),
        ("weight-only{bits=4 group=64 symmetric=false}", ops.GroupLinear, "grouped"),
        ("weight-only{bits=8 group=48}", ops.GroupLinear, "grouped"),
        ("weight-only{bits=8 group=0}", ops.IntLinear, "contract"),
        ("nm-mask{pattern=2:4}, weight-only{group=0}", ops.IntLinear, "contract"),
        ("nm-mask{pattern=2:4}, weight-only{group=32}", ops.GroupLinear, "grouped"),
    ],
)
@pytest.mark.parametrize("target", ["x86-avx512-vnni", "x86-avx2", "x86-portable"])
def test_the_integer_form_means_the_same(recipe: str, operator: type[ops.Op], kernel: str, target: str) -> None:
    graph = model()
    pipeline = standard(recipe)
    before, _ = run_pipeline(graph, [p for p in pipeline.passes if not isinstance(p, LowerToInteger)], Context())
    after, report = run_pipeline(graph, pipeline, Context())
    verify(after, "integer")
    assert [type(n.op) for n in after.nodes if isinstance(n.op, ops.CONTRACTION)] == [operator] * 2
    assert not [r for r in report.refusals if "float" in r.reason]
    x = np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)
    want = to_numpy(evaluate(before, [x])[0])
    np.testing.assert_allclose(to_numpy(evaluate(after, [x])[0]), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    program = bw.compile(graph, target=target, recipe=recipe)
    assert [r.kernel for r in program.report.layers if r.weight] == [kernel] * 2
    np.testing.assert_allclose(program(x), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_codes_are_made_once_and_the_batch_stays_open() -> None:
    b = Builder()
    x = b.input("x", parse_type("f32[b, 64]"))
    rng = np.random.default_rng(0)
    ends = [
        b.emit(ops.Linear(), x, b.weight(f"{n}.weight", rng.standard_normal((32, 64)).astype(np.float32)))
        for n in ("q", "k", "v")
    ]
    program = bw.compile(b.finish(ends), recipe="weight-only{group=32}")
    assert [r.kernel for r in program.report.layers].count("dynamic") == 1
    assert "s4 group 32, bf16 scales, activations s8 per row" in program.report.layers[1].reason
    data = rng.standard_normal((7, 64)).astype(np.float32)
    several = program(data)
    for i in range(7):
        for one, all_rows in zip(program(data[i : i + 1]), several, strict=True):
            np.testing.assert_array_equal(one[0], all_rows[i])


def layer(zero: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], scale: str = "bf16") -> Graph:
    b = Builder()
    x = b.input("x", parse_type("f32[2, 64]"))
    rng = np.random.default_rng(0)
    w = b.weight("fc.weight", rng.integers(0, 16, (8, 64)).astype(np.uint8), parse_type("u4[8, 64]"))
    values = rng.random((8, 2)).astype(np.float32)
    if scale == "bf16":
        values = values.astype(BF16.numpy).astype(np.float32)
    s = b.weight("s", values)
    z = b.weight("z", zero, TensorType(parse_dtype("u4"), (8, 2)))
    real = b.emit(ops.Dequantize(1, 32), w, s, z)
    codes, rows = b.emit_all(ops.DynamicQuantize(), x)
    y = b.emit(ops.Linear(), b.emit(ops.Binary("mul"), b.emit(ops.Cast(F32), codes), rows), real)
    return b.finish([y])


def test_zero_points_in_the_middle_vanish_and_others_stay() -> None:
    def found(graph: Graph) -> tuple[int, str, str]:
        after = LowerToInteger().run(graph, Context())
        n = next(n for n in after.nodes if isinstance(n.op, ops.GroupLinear))
        return len(n.inputs), str(after.types[n.inputs[2]].dtype), str(after.types[n.inputs[3]].dtype)

    assert found(layer(np.full((8, 2), 8, np.uint8))) == (4, "s4", "bf16")
    assert found(layer(np.arange(16, dtype=np.uint8).reshape(8, 2))) == (5, "u4", "bf16")
    assert found(layer(np.full((8, 2), 8, np.uint8), "f32")) == (4, "s4", "f32")


def test_a_pattern_with_group_scales_runs_dense_and_says_so() -> None:
    program = bw.compile(model(), recipe="nm-mask{pattern=2:4}, weight-only{group=32}")
    assert all(r.reason.startswith("runs dense: patterns have") for r in program.report.layers if r.weight)


def test_groups_that_no_kernel_takes_stay_float_and_say_so() -> None:
    program = bw.compile(model(), recipe="weight-only{group=40}")
    reasons = [r.reason for r in program.report.refusals if r.place == "a"]
    assert any("multiples of 16" in r for r in reasons)
    assert {r.formats.w for r in program.report.layers if r.weight} == {"f32"}
