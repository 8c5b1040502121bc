"""Every pointwise operator on every format against the reference, adversarial values included."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from bitwright.codegen.tvm.elementwise import Elementwise
from bitwright.codegen.tvm.pointwise import why_unsupported
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.infer import InferenceError
from bitwright.ir.types import U64, DType, TensorType, parse_dtype
from tests.codegen import harness as h

Array = np.ndarray[Any, Any]
N = 203
FLOATS = ("f32", "f16", "bf16", "f64")
INTEGERS = ("s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64", "bool")
TOLERANCE = {"f32": (2e-6, 1e-6), "f64": (1e-12, 1e-14), "f16": (2e-3, 1e-4), "bf16": (1.6e-2, 1e-3)}
SPECIAL = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -3.0, 20.0, 21.0, -20.0, 88.0]
EDGE = [
    1e-45,
    1e-39,
    -1e-39,
    1e30,
    -1e30,
    3e38,
    88.5,
    -104.0,
    100.0,
    -100.0,
    9000.0,
    -9000.0,
    2.0**31,
    2.0**33 + 2.0**12,
]


def values(dtype: DType, seed: int = 0, n: int = N) -> Array:
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dtype.is_float:
            special = SPECIAL + (EDGE if dtype.bits >= 32 else [])
            wide = rng.normal(size=n) * 4
            wide[: len(special)] = special
            return rng.permutation(wide).astype(dtype.numpy)
        info = (0, 1) if str(dtype) == "bool" else (np.iinfo(dtype.numpy).min, np.iinfo(dtype.numpy).max)
        out = rng.integers(
            info[0], info[1], size=n, endpoint=True, dtype=np.dtype("uint8") if info[1] == 1 else dtype.numpy
        )
        small = rng.integers(0, 9, size=n) + (0 if info[0] == 0 else -4)
        out = np.where(rng.random(n) < 0.5, small.astype(out.dtype), out)
        out[:4] = [info[0], info[1], 0, 1] if n >= 4 else out[:4]
        return rng.permutation(out).astype(dtype.numpy)


def bodies(op_list: Sequence[ops.Op], types: list[TensorType]) -> Any:
    """One body that computes every operator which these operand types allow."""
    b = Builder("body")
    names = [b.input(f"x{i}", t) for i, t in enumerate(types)]
    outs: list[str] = []
    for op in op_list:
        if why_unsupported(op, [t.dtype for t in types]):
            continue
        try:
            outs.append(b.emit(op, *names))
        except InferenceError:
            continue
    return b.finish(outs), outs


def check_all(op_list: Sequence[ops.Op], arrays: list[Array], types: list[TensorType], isa: Any) -> None:
    """Run all operators in one kernel; report every one that differs. Those the reference lacks are left out."""
    runs = []
    for op in op_list:
        body, outs = bodies([op], types)
        if not outs:
            continue
        try:
            runs.append((op, h.expected(body, arrays)[0]))
        except (RuntimeError, NotImplementedError):
            continue
    body, outs = bodies([op for op, _ in runs], types)
    got = h.run_template(Elementwise(), body, arrays, h.target(isa))
    assert len(got) == len(runs) > 0
    wrong = []
    for (op, want), have in zip(runs, got, strict=True):
        name = str(types[0].dtype)
        rtol, atol = TOLERANCE.get(name, (0.0, 0.0))
        try:
            h.compare(have, want, rtol, atol)
        except AssertionError:
            same = np.isclose(have.astype(float), want.astype(float), rtol, atol, equal_nan=True)
            bad = np.flatnonzero(~same)
            example = [([a[i] for a in arrays], have[i], want[i]) for i in bad[:2]]
            wrong.append(f"{op.spelling}: {have.dtype} {want.dtype} {example}")
    assert not wrong, "\n".join(wrong)


SOME = {"avx2": ("f32", "bf16", "s8", "s64", "u32"), "portable": ("f32", "f16", "s16", "s32", "u64", "bool")}
"""Formats on the lesser levels, to keep the run short; the first level has all."""


def isas(formats: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(isa, f, marks=pytest.mark.skipif(not h.runnable(isa), reason="not on this machine"))
        for isa in h.ISAS
        for f in formats
        if f in SOME.get(isa, formats)
    ]


PLAIN = [ops.Unary(fn) for fn in sorted(ops.UNARY)]
OTHERS: list[ops.Op] = [
    ops.Clamp(-1.5, 2.0), ops.Clamp(lo=0.0), ops.Clamp(hi=3.0), ops.LeakyRelu(0.1), ops.Elu(), ops.Elu(1.67, 1.05, 2.0),
    *(ops.Cast(parse_dtype(t)) for t in (*FLOATS, *INTEGERS) if t != "u64"),
]  # fmt: skip
BINARIES = [ops.Binary(fn) for fn in sorted(ops.BINARY)]


@pytest.mark.parametrize(("isa", "name"), isas(FLOATS))
def test_float_unary(isa: Any, name: str) -> None:
    dtype = parse_dtype(name)
    x, types = values(dtype), [TensorType(dtype, (N,))]
    circle = [ops.Unary(fn) for fn in ("sin", "cos", "tan", "gelu", "gelu_tanh")]  # torch: nan at infinity
    check_all([op for op in PLAIN + OTHERS if op not in circle], [x], types, isa)
    check_all([*circle, ops.Cast(U64)], [np.where(abs(x) < 1e4, abs(x), np.array(2.0, x.dtype))], types, isa)


@pytest.mark.parametrize("isa", [x for x in h.ISAS if h.runnable(x)])
def test_gelu_error(isa: Any) -> None:
    """The bounds that vecmath states, against f64; beyond the fitted range and at infinity it is relu."""
    x = np.concatenate(
        [np.linspace(-9, 9, 40001), [0.0, -0.0, 1e-30, -1e-30, 1e4, -1e30, 1e30, np.inf, -np.inf, np.nan]]
    )
    x = x.astype(np.float32)
    body, _ = bodies([ops.Unary("gelu"), ops.Unary("gelu_tanh")], [TensorType(parse_dtype("f32"), (len(x),))])
    got = h.run_template(Elementwise(), body, [x], h.target(isa))
    wide = x[:-3].astype(np.float64)
    erf = np.array([math.erf(v * math.sqrt(0.5)) for v in wide])
    tanh = np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    for have, cdf, bound in zip(got, (erf, tanh), (9e-7, 6e-7), strict=True):
        error = np.abs(have[:-3] - wide * 0.5 * (1 + cdf)) / np.maximum(1, np.abs(wide))
        assert error.max() < bound
        assert have[-3] == np.inf
        assert abs(have[-2]) < bound
        assert np.isnan(have[-1])


@pytest.mark.parametrize(("isa", "name"), isas(INTEGERS))
def test_integer_unary(isa: Any, name: str) -> None:
    dtype = parse_dtype(name)
    more = [ops.Saturate(parse_dtype(t)) for t in ("s8", "u8", "s16", "s32", "u4")]
    more.append(ops.Saturate(parse_dtype("s8"), -3, 5))
    others = [op for op in OTHERS if not isinstance(op, ops.Clamp)] + [ops.Clamp(1.0, 5.0), ops.Clamp(hi=3.0)]
    unary = PLAIN
    if name in ("u16", "u32", "u64"):  # torch lacks the others, and what stands in for them is wrong
        unary = [op for op in PLAIN if op.fn in ("neg", "abs", "square", "bitnot", "relu")]
    check_all([*unary, *others, *more], [values(dtype)], [TensorType(dtype, (N,))], isa)


@pytest.mark.parametrize(("isa", "name"), isas(FLOATS))
def test_float_binary(isa: Any, name: str) -> None:
    dtype = parse_dtype(name)
    x, y = values(dtype, 1, 1024), values(dtype, 2, 1024)
    if dtype.bits >= 32:  # torch's fmod gives NaN for a subnormal divisor
        y = np.where(abs(y) < 1e-30, y.dtype.type(0.75), y)
    check_all(BINARIES, [x, y], [TensorType(dtype, (1024,))] * 2, isa)


@pytest.mark.parametrize(("isa", "name"), isas(INTEGERS))
def test_integer_binary(isa: Any, name: str) -> None:
    dtype = parse_dtype(name)
    x, y = values(dtype, 1), values(dtype, 2)
    if name == "u64":  # the reference compares and divides through s64
        x = x >> np.uint64(1)
    if name in ("s32", "s64"):  # the reference itself traps on the smallest value over -1
        x[x == np.iinfo(x.dtype).min] += 1
    divisions = [op for op in BINARIES if op.fn in ("div", "floordiv", "mod", "fmod")]
    rest = [op for op in BINARIES if op not in divisions]
    types = [TensorType(dtype, (N,))] * 2
    check_all(rest, [x, y], types, isa)
    if name != "bool":
        check_all(divisions, [x, np.where(y == 0, 3, y).astype(y.dtype)], types, isa)
