"""The kernel of the unbiased mask: the reference's bits, on every pattern, number format, axis and tail."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.tvm.adapter import Machine, build_object
from bitwright.codegen.tvm.generic import Generic
from bitwright.codegen.tvm.template import Config, Refused
from bitwright.ir import ops
from bitwright.ir.interpret import evaluate, to_numpy
from tests.codegen.kernel_batch import Array, Case, body_of, call, load

FLOATS = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
PATTERNS = [(2, 4, "optimal"), (2, 4, "two-draw"), (1, 2, "optimal"), (5, 8, "optimal"), (2, 7, "two-draw"),
            (3, 3, "optimal"), (1, 1, "optimal"), (24, 64, "optimal"), (2, 64, "two-draw")]  # fmt: skip
KINDS = ["normal", "zeros", "ties", "spread", "NaN", "infinite"]


def values(kind: str, shape: tuple[int, ...], dtype: Any, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    x: Array = rng.standard_normal(shape)
    match kind:
        case "zeros":
            x[np.abs(x) < 0.8] = -0.0
        case "ties":
            x = np.round(x)
        case "spread":
            x = np.sign(x) * np.exp(3 * x)
        case "NaN":
            x.reshape(-1)[:: x.size // 3] = np.nan
        case "infinite":
            x.reshape(-1)[:: x.size // 3] = -np.inf
    return x.astype(dtype)


def case(op: ops.UnbiasedMask, x: Array, draw: int, *after: ops.Op) -> Case:
    inputs = {"x": x, "draw": np.asarray(draw, np.int64)}
    chain: list[tuple[ops.Op, Any]] = [(op, ("x", "draw"))]
    chain += [(o, (f"v{k}",)) for k, o in enumerate(after)]
    return Case(f"{op} {x.dtype}{list(x.shape)} draw {draw}", body_of(*chain, inputs=inputs), inputs)


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


@pytest.mark.parametrize("target", ["x86-portable", "x86-avx512-vnni"])
def test_the_reference_bit_for_bit(target: str) -> None:
    cases: list[Case] = []
    add = cases.append
    for n, (keep, group, method) in enumerate(PATTERNS):
        for dtype, tail in ((FLOATS[n % 4], 0), (FLOATS[(n + 1) % 4], group // 2)):
            op = ops.UnbiasedMask(keep, group, -1, 7 * n, method)
            add(case(op, values("spread" if tail else "normal", (21, 2 * group + tail), dtype, n), (1 << 40) - 5 * n))
    for n, dtype in enumerate(FLOATS):
        add(case(ops.UnbiasedMask(seed=(1 << 63) + 5), values("normal", (99, 8), dtype, n), -n))
    for kind, method in itertools.product(KINDS, ("optimal", "two-draw")):
        if (kind, method) != ("infinite", "two-draw"):
            add(case(ops.UnbiasedMask(2, 4, 1, 5, method), values(kind, (40, 6), np.float32, 3), 11))
    for axis, shape in itertools.product(range(3), ((6, 8, 5), (4, 1, 10))):
        add(case(ops.UnbiasedMask(2, 4, axis), values("normal", shape, np.float32, axis), 3))
        add(case(ops.UnbiasedMask(2, 4, axis), values("normal", shape, np.float32, axis), 3, ops.Unary("relu")))
    add(case(ops.UnbiasedMask(2, 4, 0), values("normal", (6, 8), np.float32, 1), 3, ops.Transpose((1, 0))))
    add(case(ops.UnbiasedMask(2, 4), values("normal", (0, 8), np.float32, 1), 3))
    add(case(ops.UnbiasedMask(2, 4), values("normal", (3, 0), np.float32, 1), 3))
    add(case(ops.UnbiasedMask(2, 4), values("normal", (2000,), np.float32, 1), 3))
    failures = differing(cases, target)
    assert not failures, "\n".join(failures[:20])
