"""Grouped kernels at every instruction-set level: exact in a group, packed and back, codes at their ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.tvm.grouped import packing
from bitwright.codegen.tvm.grouped.dynamic import Dynamic
from bitwright.codegen.tvm.grouped.spec import GroupSpec
from bitwright.codegen.tvm.grouped.template import Grouped, GroupedConfig
from bitwright.codegen.tvm.template import Refused, canonical
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.target import Isa
from bitwright.ir.types import F32, S8, U8, DType, TensorType, parse_dtype
from tests.codegen.harness import Kernel, expected, runnable, target

Array = np.ndarray[Any, Any]
LEVELS: tuple[Isa, ...] = ("avx512-vnni", "avx-vnni", "avx2", "portable")


@dataclass(frozen=True)
class Case:
    rows: int
    outputs: int
    depth: int
    group: int
    weights: str
    scales: str = "bf16"
    zeros: bool = False
    relu: bool = False


CASES = (
    Case(1, 64, 128, 128, "s4"),
    Case(1, 70, 256, 64, "s4", "f32", relu=True),
    Case(1, 130, 77, 0, "bipolar", "f32"),
    Case(1, 64, 1000, 0, "s3", "f32"),
    Case(2, 40, 96, 32, "s8"),
    Case(3, 33, 200, 0, "ternary"),
    Case(4, 100, 96, 96, "ternary", relu=True),
    Case(5, 40, 100, 32, "u4", zeros=True),
    Case(9, 65, 130, 48, "s4", "f32", zeros=True),
    Case(16, 96, 320, 32, "s2"),
    Case(19, 31, 64, 16, "s2", "f32"),
)


def body_of(it: Case) -> Graph:
    b, d = Builder("body"), parse_dtype(it.weights)
    count = -(-it.depth // it.group) if it.group else 1
    operands = [
        b.input("x", TensorType(S8, (it.rows, it.depth))), b.input("xs", TensorType(F32, (it.rows, 1))),
        b.input("w", TensorType(d, (it.outputs, it.depth))),
        b.input("s", TensorType(parse_dtype(it.scales), (it.outputs, count))),
    ]  # fmt: skip
    if it.zeros:
        operands.append(b.input("z", TensorType(d, (it.outputs, count))))
    y = b.emit(ops.GroupLinear(it.group), *operands)
    if it.relu:
        bias = b.input("bias", TensorType(F32, (it.outputs,)))
        y = b.emit(ops.Unary("relu"), b.emit(ops.Binary("add"), y, bias))
    return b.finish([y])


def data_of(it: Case, body: Graph) -> dict[str, Array]:
    """Random operands; the first row and the first and last output are at the ends of their formats."""
    rng, d = np.random.default_rng(it.depth), parse_dtype(it.weights)
    w = rng.choice([-1, 1] if it.weights == "bipolar" else np.arange(d.lo, d.hi + 1), (it.outputs, it.depth))
    w[0], w[-1] = d.lo, d.hi
    x = rng.integers(-127, 128, (it.rows, it.depth))
    x[0], x[-1, ::2] = 127, -128
    shape = body.types["s"].static_shape
    found: dict[str, Array] = {
        "x": x.astype(np.int8), "xs": rng.random((it.rows, 1)).astype(np.float32), "w": w.astype(d.numpy),
        "s": (0.001 + 0.01 * rng.random(shape)).astype(np.float32), "bias": rng.random(it.outputs).astype(np.float32),
        "z": rng.integers(d.lo, d.hi + 1, shape).astype(d.numpy),
    }  # fmt: skip
    if it.scales == "bf16":
        found["s"] = found["s"].astype(ml_dtypes.bfloat16)
    return {v.name: found[v.name] for v in body.inputs}


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("it", CASES, ids=str)
def test_against_the_reference(it: Case, isa: Isa) -> None:
    """A scale of one and codes at both ends: what a group adds is exact; scales cost at most rounding in f32."""
    if not runnable(isa):
        pytest.skip(f"this machine has no {isa}")
    body = body_of(it)
    data = data_of(it, body)
    kernel = Kernel(Grouped(), body, target(isa), {n: data[n] for n in ("w", "s", "z") if n in data})
    inputs = [data[v.name] for v in body.inputs]
    got, want = kernel(inputs)[0], expected(body, inputs)[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(np.abs(want).max()))
    exact = GroupSums(it, data)
    held = {n: data[n] for n in ("w", "z") if n in data} | {"s": np.ones_like(data["s"])}
    ones = [held.get(n, np.ones_like(data[n]) if n == "xs" else data[n]) for n in (v.name for v in body.inputs)]
    if not it.relu and exact.largest < 1 << 24:  # integers that f32 holds
        plain = Kernel(Grouped(), body, target(isa), held)
        np.testing.assert_array_equal(plain(ones)[0], exact.total)


class GroupSums:
    """What scales of one give."""

    def __init__(self, it: Case, data: dict[str, Array]) -> None:
        where = np.arange(it.depth) // (it.group or it.depth)
        zero = data["z"].astype(np.int64)[:, where] if it.zeros else 0
        w = data["w"].astype(np.int64) - zero
        self.total = data["x"].astype(np.int64) @ w.T
        self.largest = int((np.abs(data["x"].astype(np.int64)) @ np.abs(w).T).max())


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("it", CASES, ids=str)
def test_packed_weights_unpack(it: Case, isa: Isa) -> None:
    body = canonical(body_of(it))
    names = dict(zip((v.name for v in body.inputs), (v.name for v in body_of(it).inputs), strict=True))
    data = data_of(it, body_of(it))
    constants = {n: data[o] for n, o in names.items() if o in ("w", "s", "z")}
    template = Grouped()
    config = template.configure(body, constants, target(isa))
    assert isinstance(config, GroupedConfig)
    packed = template.pack(body, config, constants)
    assert template.verify(body, config, constants, packed) == ""
    assert packed[0].nbytes == config.spec.panels * config.spec.panel * config.spec.padded * config.spec.bits // 8
    packed[0][3] ^= 1
    assert "do not unpack" in template.verify(body, config, constants, packed)
    packed[0][3] ^= 1
    packed[1][0] += packed[1].dtype.type(1)
    assert "scales" in template.verify(body, config, constants, packed)


def test_wrong_sizes_and_values_are_refused() -> None:
    spec = GroupSpec(1, 16, 64, 0, 4, -8, False, False, "avx512-vnni")
    with pytest.raises(InvalidInput, match="fit 4 bits"):
        packing.pack(spec, np.full((16, 64), 8, np.int8))
    with pytest.raises(InvalidInput, match="packed weights have"):
        packing.unpack(spec, np.zeros(7, np.uint8))


@pytest.mark.parametrize(
    ("it", "why"), [(Case(1, 16, 66, 33, "s4"), "multiples of 16"), (Case(1, 16, 1 << 20, 0, "s8"), "32 bits")]
)
def test_refusals(it: Case, why: str) -> None:
    body = body_of(it)
    constants = {n: np.zeros(body.types[n].static_shape, np.int8) for n in ("w", "s")}
    made = Grouped().configure(body, constants, target())
    assert isinstance(made, Refused)
    assert why in made.reason


def test_computed_weights_are_refused() -> None:
    made = Grouped().configure(body_of(CASES[0]), {}, target())
    assert isinstance(made, Refused)
    assert "computed" in made.reason


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", [S8, U8], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 77), (40, 1000), (2, 3, 5)], ids=str)
def test_codes_of_rows_are_exact(shape: tuple[int, ...], dtype: DType, isa: Isa) -> None:
    """Rows of all magnitudes, of zeros, and with NaN and infinities."""
    if not runnable(isa):
        pytest.skip(f"this machine has no {isa}")
    b = Builder("body")
    body = b.finish(b.emit_all(ops.DynamicQuantize(dtype), b.input("x", TensorType(F32, shape))))
    rng = np.random.default_rng(shape[-1])
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-36, 36, (*shape[:-1], 1))
    x = x.astype(np.float32)
    if shape[0] == 40:
        x[3, 7], x[4, 999], x[5], x[6], x[7, 0] = np.nan, np.inf, 0, 1e-39, -np.inf
    for got, want in zip(Kernel(Dynamic(), body, target(isa))([x]), expected(body, [x]), strict=True):
        np.testing.assert_array_equal(got, want)
