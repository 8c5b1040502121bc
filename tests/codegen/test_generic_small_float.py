"""Kernels of small-float sums: the reference's bits, on every format, geometry, number format and kind of data."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.tvm.adapter import Machine, build_object
from bitwright.codegen.tvm.generic import Generic
from bitwright.codegen.tvm.select import choose
from bitwright.codegen.tvm.template import Config, Refused
from bitwright.ir import ops
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.small_float import round_small_float
from bitwright.ir.types import small_float
from tests.codegen.kernel_batch import Array, Case, body_of, call, load

FORMATS: list[dict[str, Any]] = [
    {"product": small_float(4, 7, 12), "acc": small_float(4, 7, 10)},
    {"product": small_float(5, 10, 16), "acc": small_float(5, 10, 16)},
    {"product": small_float(5, 6, 16), "acc": small_float(5, 6, 16), "rounding": "nearest"},
    {"product": small_float(4, 3, 9), "acc": small_float(4, 3, 7), "chunk": 5},
    {"product": small_float(4, 9, 12), "acc": small_float(3, 2), "chunk": 1, "rounding": "nearest"},
    {"product": small_float(5, 23, 16), "acc": small_float(5, 24, 16), "chunk": 100},
]
KINDS = ["normal", "wide", "powers", "ties", "denormal", "zeros", "saturating", "infinite", "NaN"]


def values(kind: str, shape: tuple[int, ...], seed: int, dtype: Any = np.float32) -> Array:
    rng = np.random.default_rng(seed)
    x: Array = rng.standard_normal(shape)
    match kind:
        case "wide":
            x *= 2.0 ** rng.integers(-22, 8, shape)
        case "powers":
            x = np.sign(x) * 2.0 ** rng.integers(-9, 5, shape)
        case "ties":
            x = np.asarray(round_small_float(x, 4, 3, 10, "nearest"))
        case "denormal":
            x = np.where(rng.random(shape) < 0.5, x * 1e-42, x)
        case "zeros":
            x[np.abs(x) < 0.8] = -0.0
        case "saturating":
            x = np.abs(x) * 30
        case "infinite":
            x.reshape(-1)[:: x.size // 3] = -np.inf
        case "NaN":
            x.reshape(-1)[:: x.size // 2] = np.nan
    return x.astype(dtype)


def case(op: Any, label: str, *arrays: Array, after: tuple[ops.Op, ...] = ()) -> Case:
    inputs = dict(zip("xwb", arrays, strict=False))
    chain: list[tuple[ops.Op, Any]] = [(op, tuple(inputs))]
    chain += [(o, (f"v{k}",)) for k, o in enumerate(after)]
    return Case(f"{label} {op} {[a.shape for a in arrays]} {arrays[0].dtype}", body_of(*chain, inputs=inputs), inputs)


def differing(cases: list[Case], target: str) -> list[str]:
    """The cases whose kernel does not give the interpreter's bits (of a NaN: a NaN)."""
    machine, template = BUILTIN[target], Generic()
    configs: list[Config] = []
    for c in cases:
        config = template.configure(c.body, {}, machine)
        assert not isinstance(config, Refused), (c.label, config)
        configs.append(config)
    functions = [template.emit(c.body, k, f"k{i}") for i, (c, k) in enumerate(zip(cases, configs, strict=True))]
    library = load(build_object(functions, Machine(machine.mcpu)))
    found = []
    for i, (c, config) in enumerate(zip(cases, configs, strict=True)):
        got = call(config, template, c.body, c.inputs, library[f"k{i}"])[0]
        want = to_numpy(evaluate(c.body, c.inputs)[0])
        bits = f"u{want.dtype.itemsize}"
        same = (got.view(bits) == want.view(bits)) | (np.isnan(got) & np.isnan(want))
        if got.shape != want.shape or not same.all():
            found.append(f"{c.label}: {int((~same).sum())} of {same.size}, {got[~same][:3]} not {want[~same][:3]}")
    return found


def all_cases() -> list[Case]:
    cases = []
    for n, (f, kind) in enumerate(itertools.product(FORMATS, KINDS)):
        x, w = values(kind, (7, 37), n), values("normal" if n % 2 else kind, (5, 37), n + 1)
        cases.append(case(ops.SmallLinear(**f), kind, x, w, *([values("normal", (5,), n)] if n % 3 else [])))
    f = FORMATS[0]
    for dtype in (np.float16, ml_dtypes.bfloat16):
        arrays = [values("normal", s, 3, dtype) for s in ((2, 3, 20), (4, 20), (4,))]
        cases.append(case(ops.SmallLinear(**f), "narrow", *arrays))
        cases.append(case(ops.SmallLinear(**FORMATS[5]), "narrow", *arrays))
    for a, b, turned in (
        ((3, 4, 20), (3, 20, 6), False),
        ((2, 3, 4, 5), (3, 6, 5), True),
        ((3, 4, 17), (17, 2), False),
    ):
        cases.append(
            case(ops.SmallMatMul(**f, transpose_b=turned), "matmul", values("wide", a, 1), values("powers", b, 2))
        )
    geometries: tuple[dict[str, Any], ...] = (
        {"padding": (1, 1, 1, 1)}, {"stride": (2, 1), "padding": (0, 2, 1, 0)}, {}, 
        {"dilation": (2, 2), "padding": (2,) * 4},
    )  # fmt: skip
    for n, (g, last) in enumerate(itertools.product(geometries, (False, True))):
        x, w = values(KINDS[n], (2, 6, 7, 3) if last else (2, 3, 6, 7), n), values("normal", (4, 3, 3, 2), n)
        op = ops.SmallConv(**FORMATS[n % 5], **g, channels_last=last)
        cases.append(case(op, KINDS[n], x, w, *([] if last else [values("normal", (4,), n)][: n % 2 if n else 0])))
    cases.append(
        case(ops.SmallConv(**f, padding=(1, 1)), "one axis", values("NaN", (2, 3, 9), 1), values("wide", (4, 3, 3), 2))
    )
    cases.append(case(ops.SmallLinear(**f), "epilogue", *(values("wide", s, 5) for s in ((9, 33), (8, 33), (8,))),
                      after=(ops.Unary("relu"), ops.Clamp(0.0, 2.0))))  # fmt: skip
    cases.append(case(ops.SmallLinear(**f), "no terms", np.zeros((3, 0), np.float32), np.zeros((2, 0), np.float32)))
    return cases


@pytest.mark.parametrize("target", ["x86-portable", "x86-avx2", "x86-avx512-vnni"])
def test_the_reference_bit_for_bit(target: str) -> None:
    failures = differing(all_cases(), target)
    assert not failures, "\n".join(failures[:20])


def test_no_other_kernel_takes_them() -> None:
    for op, x, w in ((ops.SmallLinear(), (8, 32), (16, 32)), (ops.SmallConv(), (1, 8, 5, 5), (16, 8, 3, 3))):
        c = case(op, "chosen", values("normal", x, 0), values("normal", w, 1))
        made = choose(c.body, {"w": c.inputs["w"]}, BUILTIN["x86-avx512-vnni"])
        assert not isinstance(made, list)
        assert made.template == "generic"
        assert "small floats" in dict(made.refused)["contract"]
