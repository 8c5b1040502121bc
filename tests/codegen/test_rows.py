"""Row kernels against the interpreter: softmax, norms and reductions, with every kind of operand around them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.tvm.rows import Rows
from bitwright.codegen.tvm.template import Refused
from bitwright.ir import ops
from bitwright.ir.types import BF16, F16, F32, S8, U8
from tests.codegen.kernel_batch import Array, Batch, Case, body_of

TARGETS = ["x86-avx512-vnni", "x86-avx2", "x86-portable"]
RNG = np.random.default_rng(7)
REDUCTIONS = "sum mean max min prod l1 l2 sumsq logsum logsumexp".split()
ADD, SUB, MUL = ops.Binary("add"), ops.Binary("sub"), ops.Binary("mul")


def normal(*shape: int, dtype: Any = np.float32) -> Array:
    return RNG.standard_normal(shape).astype(np.float32).astype(dtype)


def special(a: Array) -> Array:
    """NaN, infinities and huge values in the first rows."""
    a[0, 0], a[1, 0], a[2, -1], a[3, 1:3] = np.nan, np.inf, -np.inf, 3e38
    a[4] = -np.inf
    return a


class Cases(list[Case]):
    def add_case(self, label: str, inputs: dict[str, Array], *chain: tuple[ops.Op, Any], **options: Any) -> None:
        self.append(Case(label, body_of(*chain, inputs=inputs), inputs, **options))


def plain_cases(c: Cases) -> None:
    for n in (1, 2, 7, 33, 64, 197, 768):
        x, g, h = normal(5, n), normal(n), normal(n)
        c.add_case(f"softmax {n}", {"x": x * 10}, (ops.Softmax(), ("x",)))
        c.add_case(f"layer norm {n}", {"x": x, "g": g, "h": h}, (ops.LayerNorm(), ("x", "g", "h")))
        c.add_case(f"rms norm {n}", {"x": x, "g": g}, (ops.RmsNorm(), ("x", "g")))
        c.add_case(f"log softmax {n}", {"x": x * 10}, (ops.Softmax(log=True), ("x",)))
        c.add_case(f"mean {n}", {"x": x}, (ops.Reduce("mean", (-1,)), ("x",)))
    c.add_case("offset", {"x": normal(3, 100) + 1e4}, (ops.LayerNorm(), ("x",)), rtol=2e-2, atol=2e-2)
    c.add_case("constant row", {"x": np.full((3, 100), 3.25, np.float32)}, (ops.LayerNorm(), ("x",)))
    c.add_case("axes 2", {"x": normal(3, 4, 5), "g": normal(4, 5)}, (ops.LayerNorm(2), ("x", "g")))
    c.add_case("all axes", {"x": normal(4, 5)}, (ops.RmsNorm(2), ("x",)))
    c.add_case("softmax axis 1 of [3, 9, 1]", {"x": normal(3, 9, 1)}, (ops.Softmax(1), ("x",)))
    c.add_case("many rows", {"x": normal(2000, 20)}, (ops.Softmax(), ("x",)))


def special_cases(c: Cases) -> None:
    x = special(normal(7, 37))
    for op in (ops.Softmax(), ops.Softmax(log=True), ops.LayerNorm(), ops.RmsNorm()):
        c.add_case(f"special {op}", {"x": x}, (op, ("x",)))
    for fn in ("sum", "max", "min", "l1", "logsumexp"):
        c.add_case(f"special {fn}", {"x": x}, (ops.Reduce(fn, (1,)), ("x",)))


def reduce_cases(c: Cases) -> None:
    x = normal(3, 4, 5, 7)
    for fn in REDUCTIONS:
        positive = np.abs(x) + np.float32(0.5) if fn == "logsum" else x
        c.add_case(fn, {"x": positive}, (ops.Reduce(fn, (2, 3)), ("x",)), atol=1e-4)
        half = (positive / 4).astype(np.float16)
        c.add_case(f"{fn} f16", {"x": half}, (ops.Reduce(fn, (-1,), True), ("x",)), rtol=8e-3, atol=8e-3)
    c.add_case("every axis", {"x": x}, (ops.Reduce("sum", (0, 1, 2, 3)), ("x",)), atol=1e-4)
    c.add_case("size 1 axes", {"x": normal(1, 4, 1, 6, 1)}, (ops.Reduce("sum", (0, 3)), ("x",)))
    c.add_case("axis of one", {"x": normal(4, 1)}, (ops.Reduce("max", (1,)), ("x",)))
    centre = (ops.Reduce("mean", (1,), True), ("x",)), (SUB, ("x", "v0"))
    c.add_case("back to columns", {"x": normal(4, 23)}, *centre)
    after = (ops.Reduce("mean", (1, 2)), ("x",)), (ADD, ("v0", "a")), (ops.Quantize(U8, axis=0), ("v1", "s", "z"))
    inputs: dict[str, Array] = {"x": normal(6, 3, 5), "a": normal(6), "s": np.abs(normal(6)) * 0.01 + 0.01}
    inputs["z"] = np.arange(6).astype(np.uint8) + 100
    c.add_case("per row epilogue", inputs, *after, steps=1)


def fused_cases(c: Cases) -> None:
    scores, mask = normal(2, 3, 5, 21), normal(2, 1, 1, 21)
    add, soft = (ADD, ("x", "m")), (ops.Softmax(), ("v0",))
    c.add_case("mask", {"x": scores, "m": mask}, add, soft)
    c.add_case("mask of one head", {"x": scores, "m": normal(3, 1, 21)}, add, soft)
    c.add_case("mask per query", {"x": scores, "m": normal(1, 5, 21)}, add, soft)
    c.add_case("per row", {"x": scores, "m": normal(2, 1, 5, 1)}, (MUL, ("x", "m")), soft)
    c.add_case("scalar", {"x": scores, "m": normal()}, (MUL, ("x", "m")), soft)
    c.add_case("scalar of rank", {"x": scores, "m": normal(1, 1)}, (MUL, ("x", "m")), soft)
    bools = RNG.integers(0, 2, (2, 1, 5, 21)).astype(bool)
    chosen = (ops.Where(), ("m", "x", "f")), soft
    masked: dict[str, Array] = {"x": scores, "m": bools, "f": np.array(-1e9, np.float32)}
    c.add_case("where", masked, *chosen)
    wide = {"x": scores, "m": RNG.integers(0, 2, (5, 21)).astype(np.int64)}
    c.add_case("s64 operand", wide, (ops.Cast(F32), ("m",)), (MUL, ("v0", "x")), (ops.Softmax(), ("v1",)))
    x, g = normal(9, 50), normal(50)
    s, z = np.array(0.03, np.float32), np.array(120, np.uint8)
    norm = (ops.LayerNorm(), ("v0", "g", "g"))
    c.add_case("residual", {"x": x, "y": normal(9, 50), "g": g}, (ADD, ("x", "y")), norm)
    both = (ADD, ("x", "y")), norm, (ADD, ("v0", "v1")), (ops.Unary("gelu"), ("v2",))
    c.add_case("residual used twice", {"x": x, "y": normal(9, 50), "g": g}, *both)
    c.add_case("softmax used twice", {"x": x, "m": g}, add, soft, (MUL, ("v0", "v1")))
    quantized: dict[str, Array] = {"x": RNG.integers(0, 255, (9, 50)).astype(np.uint8), "g": g, "s": s, "z": z}
    chain = (ops.Dequantize(), ("x", "s", "z")), norm, (ops.Quantize(U8), ("v1", "s", "z"))
    c.add_case("u8 in, u8 out", quantized, *chain, steps=1)
    scales = np.abs(normal(50)) * 0.1 + 0.01
    per = (ops.LayerNorm(), ("x", "g")), (ops.Quantize(S8, axis=1), ("v0", "t"))
    c.add_case("scale per column", {"x": x, "g": g, "t": scales}, *per, steps=1)
    per = (ops.LayerNorm(), ("x", "g")), (ops.Quantize(S8, axis=0), ("v0", "t"))
    c.add_case("scale per row", {"x": x, "g": g, "t": scales[:9].copy()}, *per, steps=1)
    acc: dict[str, Array] = {"x": RNG.integers(-9999, 9999, (9, 50)).astype(np.int32), "t": scales * np.float32(1e-2)}
    c.add_case("s32 in", acc, (ops.Dequantize(axis=1), ("x", "t")), (ops.Softmax(), ("v0",)))
    c.add_case("bool out", {"x": x, "g": g}, (ops.Softmax(), ("x",)), (ops.Binary("lt"), ("v0", "g")))


def half_cases(c: Cases) -> None:
    for kind, dtype in ((np.float16, F16), (ml_dtypes.bfloat16, BF16)):
        x, g = normal(5, 43, dtype=kind), normal(43, dtype=kind)
        c.add_case(f"softmax {dtype}", {"x": x}, (ops.Softmax(), ("x",)))
        c.add_case(f"layer norm {dtype}", {"x": x, "g": g}, (ADD, ("x", "g")), (ops.LayerNorm(), ("v0", "g", "g")))
        c.add_case(f"to f32 {dtype}", {"x": x, "g": g}, (ops.RmsNorm(), ("x", "g")), (ops.Cast(F32), ("v0",)))
        c.add_case(f"from f32 {dtype}", {"x": normal(5, 43)}, (ops.Softmax(), ("x",)), (ops.Cast(dtype), ("v0",)))


@pytest.mark.parametrize("target", TARGETS)
def test_matches_interpreter(target: str) -> None:
    cases = Cases()
    special_cases(cases)
    reduce_cases(cases)
    fused_cases(cases)
    half_cases(cases)
    plain_cases(cases)
    turn = TARGETS.index(target)  # the narrower targets share the cases
    assert Batch(Rows(), target, cases[turn - 1 :: 2] if turn else cases).run() == []


def test_refusals() -> None:
    x = normal(3, 4, 5)
    refused: list[tuple[dict[str, Array], tuple[tuple[ops.Op, Any], ...], str]] = [
        ({"x": x}, ((ops.Reduce("sum", (1,)), ("x",)),), "trailing"),
        ({"x": x}, ((ops.Softmax(0), ("x",)),), "trailing"),
        ({"x": x}, ((ops.Unary("exp"), ("x",)),), "not one row operator"),
        ({"x": x}, ((ops.Softmax(), ("x",)), (ops.Softmax(), ("v0",))), "not one row operator"),
        ({"x": x.astype(np.float64)}, ((ops.Softmax(), ("x",)),), "f64"),
        ({"x": x, "y": normal(5)}, ((ops.Reduce("max", (0, 1, 2)), ("x",)), (ADD, ("v0", "y"))), "broadcast"),
        ({"x": x, "g": normal(5)}, ((ops.LayerNorm(2), ("x", "g")),), "inside a row"),
        ({"x": x.astype(np.int32)}, ((ops.Reduce("sum", (2,)), ("x",)),), "s32"),
        ({"x": x[:, :, :0]}, ((ops.Reduce("sum", (2,)), ("x",)),), "nothing"),
    ]
    for inputs, chain, reason in refused:
        answer = Rows().configure(body_of(*chain, inputs=inputs), {}, BUILTIN[TARGETS[0]])
        assert isinstance(answer, Refused), chain
        assert reason in answer.reason, chain
