"""Run-time quantization of rows and linear layers with group scales: the reference against plain NumPy, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright.ir import ops
from bitwright.ir.infer import InferenceError, infer
from bitwright.ir.semantics import apply
from bitwright.ir.text import parse, show
from bitwright.ir.types import S8, U8, parse_type
from bitwright.ir.verify import verify


def quantized(rows: list[list[float]], op: ops.DynamicQuantize) -> tuple[list[list[int]], list[float]]:
    codes, scale = apply(op, torch.tensor(rows))
    return codes.tolist(), scale.reshape(-1).tolist()


def test_codes_reach_both_ends_and_rows_are_apart() -> None:
    codes, scale = quantized([[-2.0, 1.0, 0.0], [0.5, 0.25, 4e-3]], ops.DynamicQuantize(S8))
    assert codes == [[-127, 64, 0], [127, 64, 1]]
    np.testing.assert_allclose(scale, [2 / 127, 0.5 / 127], rtol=1e-7)
    assert quantized([[-2.0, 1.0, 0.0]], ops.DynamicQuantize(U8))[0] == [[1, 192, 128]]


def test_rows_without_a_scale() -> None:
    codes, scale = quantized(
        [[0.0, 0.0], [1e-40, 0.0], [float("inf"), 1.0], [float("nan"), 1.0]], ops.DynamicQuantize()
    )
    assert codes == [[0, 0]] * 4
    assert scale[0] == 0
    assert np.isnan(scale[2:]).all()


@pytest.mark.parametrize(("group", "zeros"), [(0, False), (4, False), (4, True), (3, True)])
def test_groups_against_dequantized_weights(group: int, zeros: bool) -> None:
    rng = np.random.default_rng(group)
    x, w = rng.integers(-127, 128, (2, 3, 10)).astype(np.int8), rng.integers(-8, 8, (5, 10)).astype(np.int8)
    count = -(-10 // group) if group else 1
    sx, sw = rng.random((2, 3, 1)).astype(np.float32), rng.random((5, count)).astype(np.float32)
    zero = rng.integers(-8, 8, (5, count)).astype(np.int8) if zeros else np.zeros((5, count), np.int8)
    where = np.arange(10) // (group or 10)
    real = (w.astype(np.float64) - zero[:, where]) * sw[:, where]
    operands = [torch.from_numpy(a) for a in (x, sx, w, sw, *([zero] if zeros else []))]
    (got,) = apply(ops.GroupLinear(group), *operands)
    np.testing.assert_allclose(got.numpy(), (x * sx.astype(np.float64)) @ real.T, rtol=1e-5, atol=1e-4)


def test_types_and_text() -> None:
    text = (
        "graph @g (%x: f32[b, 64], %s: bf16[8, 2]) -> (y = %y) level=integer {\n"
        "  %q, %d = dynamic_quantize(%x) : s8[b, 64]; f32[b, 1]\n"
        "  %w = constant {values=[" + ", ".join(["1"] * 512) + "]} : s4[8, 64]\n"
        "  %y = group_linear(%q, %d, %w, %s) {group=32} : f32[b, 8]\n}\n"
    )
    graph = parse(text)
    verify(graph, "integer")
    assert show(parse(show(graph))) == show(graph)
    assert [str(t) for t in infer(ops.DynamicQuantize(U8), [parse_type("f32[2, 3]")])] == ["u8[2, 3]", "f32[2, 1]"]


@pytest.mark.parametrize(
    ("op", "types"),
    [
        (ops.DynamicQuantize(), ["bf16[2, 4]"]),
        (ops.GroupLinear(2), ["s8[2, 4]", "f32[2, 1]", "s4[3, 4]", "f32[3, 1]"]),
        (ops.GroupLinear(2), ["s8[2, 4]", "f32[2]", "s4[3, 4]", "f32[3, 2]"]),
        (ops.GroupLinear(2), ["u8[2, 4]", "f32[2, 1]", "s4[3, 4]", "f32[3, 2]"]),
        (ops.GroupLinear(2), ["s8[2, 4]", "f32[2, 1]", "s16[3, 4]", "f32[3, 2]"]),
    ],
)
def test_misfits_are_named(op: ops.Op, types: list[str]) -> None:
    with pytest.raises(InferenceError, match=op.spelling):
        infer(op, [parse_type(t) for t in types])
