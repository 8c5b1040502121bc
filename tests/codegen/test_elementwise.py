"""Element-wise kernels: broadcasting, quantization, several results, tails, in-place, task ranges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.tvm.elementwise import Elementwise
from bitwright.codegen.tvm.template import Refused, canonical
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.types import BF16, F16, F32, S8, S32, U8, TensorType, parse_dtype, parse_type
from tests.codegen import harness as h

RNG = np.random.default_rng(7)


def array(text: str) -> Any:
    t = parse_type(text)
    if t.dtype.is_float:
        return (RNG.normal(size=t.static_shape) * 3).astype(t.dtype.numpy)
    return RNG.integers(t.dtype.lo, t.dtype.hi, size=t.static_shape, endpoint=True).astype(t.dtype.numpy)


def check(build: Callable[[Builder], Any], *types: str, arrays: list[Any] | None = None, isa: Any = None) -> None:
    body = h.graph_of(build, **{f"x{i}": t for i, t in enumerate(types)})
    inputs = arrays or [array(t) for t in types]
    for level in [isa] if isa else h.ISAS:
        if h.runnable(level):
            h.check(Elementwise(), body, inputs, level)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ("f32[]", "f32[]"), ("f32[1]", "f32[1, 1]"), ("f32[5]", "f32[]"), ("f32[2, 3, 37]", "f32[37]"),
        ("f32[2, 3, 37]", "f32[3, 1]"), ("f32[2, 1, 37]", "f32[5, 1]"), ("f32[4, 3, 7, 7]", "f32[1, 3, 1, 1]"),
        ("f32[1, 64]", "f32[9, 1]"), ("f32[3, 3]", "f32[3]"), ("f32[2, 8, 5, 16]", "f32[8, 1, 16]"),
        ("f32[40000]", "f32[40000]"), ("f32[3, 20011]", "f32[20011]"), ("f32[20011]", "f32[2, 1]"),
    ],
)  # fmt: skip
def test_broadcast(x: str, y: str) -> None:
    check(lambda b: b.emit(ops.Binary("sub"), "x0", b.emit(ops.Unary("relu"), "x1")), x, y)


def test_several_results_and_literals() -> None:
    def build(b: Builder) -> list[str]:
        bias = b.constant([0.5, -1.0, 2.0, 3.0, 4.0], TensorType(F32, (5,)))
        half = b.constant(0.5, TensorType(F32, ()))
        s = b.emit(ops.Binary("add"), "x0", bias)
        t = b.emit(ops.Binary("mul"), s, half)
        return [s, t, b.emit(ops.Binary("gt"), t, "x1")]

    check(build, "f32[7, 5]", "f32[7, 1]")


def specials() -> Any:
    x = (RNG.normal(size=(6, 35)) * 40).astype(np.float32)
    x[0, :12] = [np.nan, np.inf, -np.inf, 0.5, 1.5, 2.5, -0.5, -1.5, 3e38, -3e38, 1e-40, 2.0**31]
    x[1] = np.arange(35) * 0.25 + 0.125  # ties of x / 0.25
    return x


@pytest.mark.parametrize("dtype", ["u8", "s8", "s4", "u4", "s16", "u16", "s32", "u32", "ternary"])
def test_quantize(dtype: str) -> None:
    kind = parse_dtype(dtype)
    for axis, shape in ((None, "[]"), (1, "[35]"), (0, "[6]")):
        count = {"[]": (), "[35]": (35,), "[6]": (6,)}[shape]
        scale = np.full(count, 0.25, np.float32) if axis is None else RNG.uniform(0.01, 2, count).astype(np.float32)
        zero = np.array(RNG.integers(max(kind.lo, -5), min(kind.hi, 5), count, endpoint=True), kind.numpy)
        check(
            lambda b, axis=axis: b.emit(ops.Quantize(kind, axis), "x0", "x1", "x2"),  # type: ignore[misc]
            "f32[6, 35]", f"f32{shape}", f"{dtype}{shape}", arrays=[specials(), scale, zero], isa="avx512-vnni",
        )  # fmt: skip
    check(lambda b: b.emit(ops.Quantize(kind), "x0", "x1"), "f32[6, 35]", "f32[]",
          arrays=[specials(), np.float32(0.3)])  # fmt: skip


def test_quantize_groups() -> None:
    for shape, axis, group, scales in (
        ("[6, 96]", 1, 32, "[6, 3]"),
        ("[6, 30]", -1, 5, "[6, 6]"),
        ("[8, 9]", 0, 4, "[2, 9]"),
    ):
        q, s = f"s4{shape}", f"f32{scales}"
        check(lambda b, a=axis, g=group: b.emit(ops.Dequantize(a, g), "x0", "x1"), q, s)  # type: ignore[misc]
        check(
            lambda b, a=axis, g=group: b.emit(ops.Quantize(S8, a, g), "x0", "x1"),  # type: ignore[misc]
            f"f32{shape}", s, arrays=[array(f"f32{shape}"), abs(array(s)) + 0.1],
        )  # fmt: skip


@pytest.mark.parametrize("q", ["s8", "u8", "s16", "s32"])
def test_dequantize(q: str) -> None:
    check(lambda b: b.emit(ops.Dequantize(1), "x0", "x1", "x2"), f"{q}[5, 33]", "f32[33]", f"{q}[33]")
    check(lambda b: b.emit(ops.Dequantize(), "x0", "x1"), f"{q}[5, 33]", "f32[]")


@pytest.mark.parametrize("dtype", [S8, U8, S32])
def test_requantize(dtype: Any) -> None:
    acc = array("s32[5, 77]")
    acc[0, :6] = [-(2**31), 2**31 - 1, 0, 1, -1, 12345]
    for axis, shape in ((None, ()), (1, (77,)), (0, (5,))):
        m = np.array(RNG.integers(1, 2**31, shape), np.int32)
        e = np.array(RNG.integers(1, 63, shape) if axis != 0 else [1, 31, 32, 40, 62], np.int32)
        text = ", ".join(map(str, shape))
        for zero in (0,) if dtype == S8 else (3,):
            check(
                lambda b, z=zero, a=axis: b.emit(ops.Requantize(dtype, z, a), "x0", "x1", "x2"),  # type: ignore[misc]
                "s32[5, 77]", f"s32[{text}]", f"s32[{text}]", arrays=[acc, m, e],
            )  # fmt: skip


def test_requantize_stays_in_vectors() -> None:
    from bitwright.codegen.tvm.adapter import assembly

    body = canonical(
        h.graph_of(
            lambda b: b.emit(ops.Requantize(S8, 0, 1), "x0", "x1", "x2"),
            x0="s32[64, 256]",
            x1="s32[256]",
            x2="s32[256]",
        )
    )
    template = Elementwise()
    for isa in ("avx512-vnni", "avx2"):
        config = template.configure(body, {}, h.target(isa))
        assert not isinstance(config, Refused)
        text = assembly(template.emit(body, config, "k"), isa)
        assert "vpmuldq" in text
        assert "vpextrq" not in text


def test_exact_chain() -> None:
    """Multiply, add, round: one fused multiply-add would move a result by one."""

    def build(b: Builder) -> str:
        y = b.emit(ops.Binary("add"), b.emit(ops.Binary("mul"), b.emit(ops.Cast(F32), "x0"), "x1"), "x2")
        return b.emit(ops.Quantize(U8), b.emit(ops.Unary("relu"), y), "x3", "x4")

    n = 20000
    x = [RNG.integers(-3000, 3000, (3, n)).astype(np.int32), RNG.integers(1, 999, n).astype(np.float32) / 1000]
    x += [RNG.integers(-999, 999, n).astype(np.float32) / 100, np.array(0.5, np.float32), np.array(3, np.uint8)]
    check(build, f"s32[3, {n}]", f"f32[{n}]", f"f32[{n}]", "f32[]", "u8[]", arrays=x)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_half_chain(dtype: Any) -> None:
    def build(b: Builder) -> list[str]:
        y = b.emit(ops.Unary("gelu"), b.emit(ops.Binary("add"), "x0", "x1"))
        return [b.emit(ops.Cast(F32), y), b.emit(ops.Where(), b.emit(ops.Binary("lt"), "x0", "x1"), y, "x0")]

    body = h.graph_of(build, x0=f"{dtype}[9, 45]", x1=f"{dtype}[45]")
    inputs = [array(f"{dtype}[9, 45]"), array(f"{dtype}[45]")]
    step = 1e-3 if dtype == F16 else 1e-2
    for isa in h.ISAS:
        if h.runnable(isa):
            h.check(Elementwise(), body, inputs, isa, rtol=step, atol=step)
    assert np.dtype(ml_dtypes.bfloat16) == BF16.numpy


def test_in_place() -> None:
    body = canonical(h.graph_of(lambda b: b.emit(ops.Binary("mul"), "x0", "x1"), x0="f32[6, 50]", x1="f32[50]"))
    config = Elementwise().configure(body, {}, h.target())
    assert not isinstance(config, Refused)
    assert config.inplace == ((0, 0),)
    kernel = h.Kernel(Elementwise(), body, h.target())
    x, y = array("f32[6, 50]"), array("f32[50]")
    args, _, hold = kernel.bind([x, y])
    kernel.call(0, kernel.config.tasks, args[0], args[1], args[0])
    np.testing.assert_allclose(hold[0][1], x * y, rtol=1e-6)


def test_refusals() -> None:
    body = h.graph_of(lambda b: b.emit(ops.Softmax(), "x0"), x0="f32[4, 4]")
    assert isinstance(Elementwise().configure(body, {}, h.target()), Refused)
    body = h.graph_of(
        lambda b: [b.emit(ops.Unary("exp"), "x0"), b.emit(ops.Unary("exp"), "x1")], x0="f32[4]", x1="f32[5]"
    )
    assert isinstance(Elementwise().configure(body, {}, h.target()), Refused)
    body = h.graph_of(lambda b: b.emit(ops.Unary("exp"), "x0"), x0="f32[0, 4]")
    assert isinstance(Elementwise().configure(body, {}, h.target()), Refused)
