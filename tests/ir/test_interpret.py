"""The reference interpreter: inputs checked, integers exact, regions mean their bodies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.errors import InvalidInput
from bitwright.ir.interpret import bind_symbols, evaluate, to_numpy, to_torch
from bitwright.ir.types import BF16, S8, U8, parse_type


def test_linear_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 5)).astype(np.float32)
    b = Builder()
    y = b.emit(ops.Linear(), b.input("x", parse_type("f32[n, 5]")), b.weight("w", w))
    x = rng.standard_normal((4, 5)).astype(np.float32)
    (got,) = evaluate(b.finish([y]), [x])
    np.testing.assert_allclose(got, x @ w.T, rtol=1e-6)


def test_integer_contractions_are_exact_at_the_extremes() -> None:
    w = np.full((2, 4096), -128, np.int8)
    b = Builder(level="integer")
    y = b.emit(ops.IntLinear(x_zero=0), b.input("x", parse_type("u8[1, 4096]")), b.weight("w", w))
    (got,) = evaluate(b.finish([y]), [np.full((1, 4096), 255, np.uint8)])
    assert got.tolist() == [[-128 * 255 * 4096] * 2]


def test_padding_of_an_integer_convolution_contributes_nothing() -> None:
    w = np.ones((1, 1, 3, 3), np.int8)
    b = Builder(level="integer")
    x = b.input("x", parse_type("u8[1, 1, 1, 1]"))
    y = b.emit(ops.IntConv(padding=(1, 1, 1, 1), x_zero=5), x, b.weight("w", w))
    (got,) = evaluate(b.finish([y]), [np.full((1, 1, 1, 1), 9, np.uint8)])
    assert got.item() == 4


def test_requantize_rounds_half_up_and_saturates() -> None:
    acc = np.array([-3, -2, -1, 0, 1, 2, 3, 10**9], np.int32)
    b = Builder(level="integer")
    x = b.input("x", parse_type("s32[8]"))
    m, e = b.constant(np.int32(1 << 30)), b.constant(np.int32(31))
    y = b.emit(ops.Requantize(S8, 0), x, m, e)
    (got,) = evaluate(b.finish([y]), [acc])
    assert got.tolist() == [-1, -1, 0, 0, 1, 1, 2, 127]


def test_bf16_travels() -> None:
    a = np.array([1.5, -2.25], BF16.numpy)
    assert to_torch(a).dtype == torch.bfloat16
    np.testing.assert_array_equal(to_numpy(to_torch(a)), a)


def test_wrong_inputs_name_the_input() -> None:
    b = Builder()
    y = b.emit(ops.Unary("relu"), b.input("pixels", parse_type("f32[b, 3]")))
    g = b.finish([y])
    for bad in ([np.zeros((2, 4), np.float32)], [np.zeros((2, 3))], []):
        with pytest.raises(InvalidInput, match="pixels"):
            evaluate(g, bad)
    assert bind_symbols(g, [(7, 3)]) == {"b": 7}


def test_quantize_saturates_and_maps_nan_to_zero() -> None:
    b = Builder()
    x = b.input("x", parse_type("f32[5]"))
    q = b.emit(ops.Quantize(U8), x, b.constant(np.float32(0.5)), b.constant(np.uint8(10)))
    (got,) = evaluate(b.finish([q]), [np.array([0, 0.25, 0.75, 1e9, -1e9], np.float32)])
    assert got.tolist() == [10, 10, 12, 255, 0]
