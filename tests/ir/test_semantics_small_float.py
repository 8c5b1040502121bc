"""Small-float sums as operators: the bits of the definition in numpy, the error table, gradients, what does not fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.infer import InferenceError, infer
from bitwright.ir.semantics import apply
from bitwright.ir.semantics_small_float import Sums, dots, patches, sums_of
from bitwright.ir.small_float import Format, format_of, round_small_float, small_float_dot, sums_fit
from bitwright.ir.text import parse, show
from bitwright.ir.types import F32, F64, S8, TensorType, small_float

PRODUCT, ACC = (4, 7, 12), (4, 7, 10)
PAIRS: list[tuple[Format, Format]] = [
    (PRODUCT, ACC), ((5, 10, 16), (5, 10, 16)), ((5, 6, 16), (5, 6, 16)), ((4, 3, 9), (4, 3, 7)), 
    ((4, 9, 12), (4, 2, 10)), ((3, 2, 3), (4, 9, 10)), ((5, 23, 16), (5, 24, 20)),
]  # fmt: skip
ERRORS = {  # terms: M10E5, M7E4 floor, M7E4 nearest, M7E4 in one chunk, M6E5
    64: (0.0025, 0.0197, 0.0049, 0.051, 0.039),
    576: (0.0081, 0.062, 0.0084, 0.342, 0.119),
    2304: (0.029, 0.200, 0.015, 0.740, 0.352),
}


def data(kind: str, rows: int, k: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k))
    match kind:
        case "wide":
            x = x * 2.0 ** rng.integers(-20, 8, x.shape)
        case "powers":
            x = np.sign(x) * 2.0 ** rng.integers(-8, 5, x.shape)
        case "fp8":
            x = np.asarray(round_small_float(x, 4, 3, 10, "nearest"))
        case "zeros and infinities":
            x[:, ::3] = 0
            x[0, 0], x[1, 1], x[2, 2:] = np.inf, -np.inf, 1e-42
    return torch.from_numpy(x.astype(np.float32))


@pytest.mark.parametrize("kind", ["normal", "wide", "powers", "fp8", "zeros and infinities"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_bits_of_the_definition(pair: tuple[Format, Format], kind: str) -> None:
    x, w = data(kind, 33, 70, 0), data(kind, 21, 70, 1)
    for rounding, chunk in (("floor", 16), ("nearest", 16), ("floor", 1), ("nearest", 100)):
        want = small_float_dot(x.numpy()[:, None], w.numpy(), *pair, chunk, rounding)  # type: ignore[arg-type]
        got = dots(x, w, Sums(*pair, chunk, rounding))
        np.testing.assert_array_equal(got.numpy().astype(np.float64), want.astype(np.float64))
        np.testing.assert_array_equal(dots(w, x, Sums(*pair, chunk, rounding)).T.numpy(), got.numpy())


def test_where_f32_is_enough_it_emulates_the_sums() -> None:
    assert Sums(PRODUCT, ACC).dtype == torch.float32
    assert Sums((5, 10, 16), (5, 10, 16)).dtype == torch.float64  # 31 between the exponents
    assert sums_fit(PRODUCT, ACC, 24)
    assert not sums_fit((5, 25, 16), ACC)
    # a sum that f32 would round up to the accumulator it came from
    p = (5, 7, 16)
    x, w = torch.tensor([[32768.0, -(2.0**-16)]]), torch.ones(1, 2)
    assert float(dots(x, w, Sums(p, p))) == 32768 - 128 == float(small_float_dot(x[0], w[0], p, p))


@pytest.mark.parametrize("k", ERRORS)
def test_error_table(k: int) -> None:
    rng = np.random.default_rng(k)
    x = torch.from_numpy(np.maximum(rng.standard_normal((50, k)), 0).astype(np.float32))
    w = torch.from_numpy((rng.standard_normal((40, k)) * math.sqrt(2 / k)).astype(np.float32))
    want = x.double() @ w.double().T

    def error(p: Format, a: Format, chunk: int = 16, rounding: str = "floor") -> float:
        off = dots(x, w, Sums(p, a, chunk, rounding)).double() - want
        return math.sqrt(float(off.square().mean() / want.square().mean()))

    m10e5, m6e5 = (5, 10, 16), (5, 6, 16)
    got = (
        error(m10e5, m10e5), error(PRODUCT, ACC), error(PRODUCT, ACC, rounding="nearest"),
        error(PRODUCT, ACC, chunk=k), error(m6e5, m6e5),
    )  # fmt: skip
    assert got == pytest.approx(ERRORS[k], rel=0.12)
    assert got[0] < got[1] < got[4]


def test_convolutions_count_taps_then_channels() -> None:
    x, w = data("normal", 2 * 5, 6 * 7, 0).reshape(2, 5, 6, 7), data("normal", 4, 5 * 6, 1).reshape(4, 5, 3, 2)
    op = ops.SmallConv(stride=(2, 1), padding=(1, 0, 0, 1), dilation=(1, 2))
    (got,) = apply(op, x, w)
    padded = torch.nn.functional.pad(x, (0, 1, 1, 0))
    for n, o, i, j in ((0, 0, 0, 0), (1, 3, 1, 2), (0, 2, 2, 5)):
        taken = padded[n, :, 2 * i : 2 * i + 3, j : j + 4 : 2]  # [C, 3, 2]
        a, b = taken.permute(1, 2, 0).flatten(), w[o].permute(1, 2, 0).flatten()
        assert float(got[n, o, i, j]) == float(small_float_dot(a, b, PRODUCT, ACC))
    (plain,) = apply(ops.Conv(op.stride, op.padding, op.dilation), x, w)
    assert got.shape == plain.shape
    assert float((got - plain).abs().max()) < 0.5
    (last,) = apply(ops.SmallConv(stride=(2, 1), padding=(1, 0, 0, 1), dilation=(1, 2), channels_last=True),
                    x.permute(0, 2, 3, 1), w)  # fmt: skip
    assert torch.equal(last.permute(0, 3, 1, 2), got)
    assert torch.equal(patches(x, (1, 1), (), (), ()), x.permute(0, 2, 3, 1))


def test_bias_number_formats_and_nan() -> None:
    x, w, bias = data("normal", 3, 40, 0), data("normal", 5, 40, 1), torch.arange(5.0) / 3
    (bare,), (with_bias,) = apply(ops.SmallLinear(), x, w), apply(ops.SmallLinear(), x, w, bias)
    assert torch.equal(with_bias, bare + bias)
    for dtype in (torch.float16, torch.bfloat16):
        assert apply(ops.SmallLinear(), x.to(dtype), w.to(dtype))[0].dtype == dtype
    x[1, 3] = w[2, 0] = float("nan")
    (spoilt,) = apply(ops.SmallLinear(), x, w)
    assert bool(spoilt[1].isnan().all())
    assert bool(spoilt[:, 2].isnan().all())
    assert int(spoilt.isnan().sum()) == 5 + 3 - 1
    assert torch.equal(spoilt[0, :2], bare[0, :2])


def test_matmul_broadcasts() -> None:
    a, b = data("normal", 6, 40, 0).reshape(2, 1, 3, 40), data("normal", 40, 20, 1).reshape(5, 40, 4)
    (got,) = apply(ops.SmallMatMul(), a, b)
    (turned,) = apply(ops.SmallMatMul(transpose_b=True), a, b.transpose(-1, -2))
    assert got.shape == (2, 5, 3, 4)
    assert torch.equal(got, turned)
    assert torch.equal(got[1, 2], apply(ops.SmallLinear(), a[1, 0], b[2].T)[0])
    assert torch.equal(apply(ops.SmallMatMul(), a, b[0])[0][:, 0], got[:, 0])


def test_the_gradient_is_that_of_exact_sums() -> None:
    x, w = data("normal", 3, 40, 0).requires_grad_(), data("normal", 5, 40, 1).requires_grad_()
    g = data("normal", 3, 5, 2)
    apply(ops.SmallLinear(), x, w)[0].backward(g)  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert w.grad is not None
    torch.testing.assert_close(x.grad, g @ w.detach())
    torch.testing.assert_close(w.grad, g.T @ x.detach())


def test_text_and_types() -> None:
    text = (
        "graph @g (%x: f32[b, 8]) -> (y = %y) level=graph {\n"
        '  %w = weight {ref="w"} : f32[4, 8]\n'
        '  %y = small_linear(%x, %w) {product=f5m6b16, acc=f5m6b14, rounding="nearest"} : f32[b, 4]\n}\n'
    )
    assert show(parse(text)) == text
    op = parse(text).nodes[1].op
    assert sums_of(op) == Sums((5, 6, 16), (5, 6, 14), 16, "nearest")
    assert format_of(small_float(4, 3)) == (4, 3, 7)


BAD: list[tuple[Any, Any, str]] = [
    (ops.SmallLinear(chunk=0), F32, "chunk"),
    (ops.SmallLinear(rounding="up"), F32, "rounding"),
    (ops.SmallLinear(acc=S8), F32, "floating-point format"),
    (ops.SmallLinear(acc=small_float(0, 7, 10)), F32, "exponent 0"),
    (ops.SmallLinear(acc=small_float(12, 7, 10)), F32, "more than f64 can hold"),
    (ops.SmallLinear(acc=small_float(8, 7, 127)), F32, "f64 cannot hold sums"),
    (ops.SmallLinear(product=small_float(4, 30, 12)), F32, "f64 cannot hold sums"),
    (ops.SmallLinear(), S8, "f32, f16 or bf16"),
    (ops.SmallLinear(), F64, "f32, f16 or bf16"),
]


@pytest.mark.parametrize(("op", "dtype", "message"), BAD)
def test_what_does_not_fit(op: Any, dtype: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        infer(op, [TensorType(dtype, (2, 8)), TensorType(dtype, (3, 8))])
    assert infer(ops.SmallLinear(), [TensorType(F32, ("b", 8)), TensorType(F32, (3, 8))])[0].shape == ("b", 3)
    for shapes in (((2, 8), (3, 7)), ((2, 8), (8,))):
        with pytest.raises(InferenceError):
            infer(ops.SmallLinear(), [TensorType(F32, s) for s in shapes])
    with pytest.raises(InferenceError):
        infer(ops.SmallConv(), [TensorType(F32, s) for s in ((1, 4, 5, 5), (3, 2, 3, 3))])
    with pytest.raises(InferenceError):
        infer(ops.SmallConv(), [TensorType(F32, s) for s in ((1, 4, 2, 5), (3, 4, 3, 3))])
