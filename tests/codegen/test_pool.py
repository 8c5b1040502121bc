"""Pooling kernels against the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.tvm.pool import Pool
from bitwright.codegen.tvm.template import Refused
from bitwright.ir import ops
from bitwright.ir.types import F32, S32, U8
from tests.codegen.kernel_batch import Array, Batch, Case, body_of

TARGETS = ["x86-avx512-vnni", "x86-avx2", "x86-portable"]
SCALE, ZERO = np.float32(0.1).reshape(()), np.uint8(9).reshape(())


class Maker:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(4)
        self.cases: list[Case] = []

    def array(self, *shape: int, dtype: Any = np.float32, special: bool = False) -> Array:
        if np.dtype(dtype).kind in "iu":
            info = np.iinfo(dtype)
            return self.rng.integers(max(info.min, -(2**15)), min(info.max, 2**15), shape).astype(dtype)
        a = self.rng.standard_normal(shape).astype(dtype)
        if special:
            for value in (np.nan, np.inf, -np.inf):
                a.reshape(-1)[self.rng.integers(0, a.size, 3)] = value
        return a

    def chain(self, *nodes: tuple[ops.Op, Any], steps: int = 0, **inputs: Any) -> None:
        label = " ".join(str(op) for op, _ in nodes) + str({k: (str(a.dtype), a.shape) for k, a in inputs.items()})
        self.cases.append(Case(label, body_of(*nodes, inputs=inputs), inputs, steps=steps))


def windows(m: Maker) -> None:
    for dtype in (np.float32, np.float64, np.uint8, np.int8, np.int32):
        for channels in (1, 16, 70):
            x = m.array(2, 9, 8, channels, dtype=dtype)
            m.chain((ops.MaxPool((3, 3), (2, 2), (1, 1, 1, 1), (), True), "x"), x=x)
            m.chain((ops.MaxPool((2, 2), (2, 2), (), (), True), "x"), x=x)
    m.chain((ops.MaxPool((3, 2), (1, 2), (2, 1, 3, 2), (2, 3), True), "x"), x=m.array(1, 9, 8, 20, special=True))
    m.chain((ops.MaxPool((5, 5), (1, 1), (2, 2, 2, 2), (), True), "x"), x=m.array(1, 6, 3, 20, special=True))
    m.chain((ops.MaxPool((3,), (2,), (1, 1), (), True), "x"), x=m.array(2, 9, 20))
    m.chain((ops.MaxPool((2, 2, 2), (1, 2, 1), (0, 1, 0, 1, 0, 1), (), True), "x"), x=m.array(1, 4, 5, 3, 6))
    for count in (False, True):
        for padding, extra in (((), ()), ((1, 1, 1, 1), ()), ((0, 1, 1, 0), (1, 0))):
            m.chain((ops.AvgPool((3, 3), (2, 2), padding, extra, count, True), "x"), x=m.array(2, 8, 9, 37))
    m.chain((ops.AvgPool((7, 7), (), (), (), True, True), "x"), x=m.array(2, 7, 7, 33))
    m.chain((ops.AvgPool((2, 2, 2), (2, 2, 2), (), (), True, True), "x"), x=m.array(1, 4, 5, 6, 9))


def middles(m: Maker) -> None:
    for fn in ("sum", "mean", "max", "min"):
        for channels in (1, 16, 100, 130):
            m.chain((ops.Reduce(fn, (1, 2)), "x"), x=m.array(3, 5, 6, channels))
        m.chain((ops.Reduce(fn, (1, 2), True), "x"), x=m.array(3, 20, 10, 40, dtype=np.float64))
        m.chain((ops.Reduce(fn, (0,)), "x"), x=m.array(300, 5, 7))
        m.chain((ops.Reduce(fn, (-2,), True), "x"), x=m.array(3, 2, 9, 66))
        if fn != "mean":
            m.chain((ops.Reduce(fn, (1,)), "x"), x=m.array(3, 9, 66, dtype=np.int32))
    m.chain((ops.Reduce("max", (1, 2)), "x"), x=m.array(3, 5, 6, 20, special=True))
    m.chain((ops.Reduce("min", (1,)), "x"), x=m.array(3, 5, 80, dtype=np.int8))
    m.chain((ops.Reduce("sum", (0,)), "x"), x=m.array(30000, 3))


def chains(m: Maker) -> None:
    for channels in (3, 64, 70):
        q, bias = m.array(2, 7, 6, channels, dtype=np.uint8), m.array(channels)
        x = m.array(2, 7, 6, channels)
        window = ops.MaxPool((3, 3), (2, 2), (1, 1, 1, 1), (), True)
        m.chain((window, "q"), (ops.Dequantize(), ("v0", "s", "z")), q=q, s=SCALE, z=ZERO)
        m.chain((window, "x"), (ops.Quantize(U8), ("v0", "s", "z")), x=x, s=SCALE, z=ZERO)
        mean = ops.AvgPool((2, 2), (2, 2), (), (), True, True)
        m.chain((ops.Cast(F32), "q"), (mean, ("v0",)), (ops.Binary("add"), ("v1", "b")), q=q, b=bias)
        m.chain(
            (mean, "x"),
            (ops.Binary("mul"), ("v0", "r")),
            (ops.Unary("relu"), ("v1",)),
            x=x,
            r=m.array(2, 3, 3, channels),
        )
        total = (ops.Reduce("sum", (1, 2)), ("v0",))
        mult, shift = np.int32(1518500250).reshape(()), np.int32(34).reshape(())
        m.chain((ops.Cast(S32), "q"), total, (ops.Requantize(U8, 3), ("v1", "m", "e")), q=q, m=mult, e=shift)
        many = m.rng.integers(2**29, 2**30, channels).astype(np.int32)
        by = np.full(channels, 33, np.int32)
        m.chain((ops.Cast(S32), "q"), total, (ops.Requantize(U8, 3, 1), ("v1", "m", "e")), q=q, m=many, e=by)
        body = (
            (ops.Dequantize(), ("q", "s", "z")),
            (ops.Reduce("mean", (1, 2), True), ("v0",)),
            (ops.Quantize(U8), ("v1", "s")),
        )
        m.chain(*body, steps=1, q=q, s=SCALE, z=ZERO)  # sums in another order meet ties
        m.chain((ops.Reduce("mean", (1, 2)), "x"), (ops.Binary("add"), ("v0", "b")), x=x, b=bias)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", [windows, middles, chains], ids=lambda f: f.__name__)
def test_family(family: Any, target: str) -> None:
    m = Maker()
    family(m)
    failures = Batch(Pool(), target, m.cases if target == TARGETS[0] else m.cases[::3]).run()
    assert not failures, f"{len(failures)} of {len(m.cases)}:\n" + "\n".join(failures[:40])


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (ops.MaxPool((2, 2)), "channels first"),
        (ops.Reduce("sum", (3,)), "a reduction of other than middle axes"),
        (ops.Reduce("sum", (0, 2)), "a reduction of other than middle axes"),
        (ops.Reduce("prod", (1,)), "prod of f32"),
        (ops.Softmax(), "not one pooling operator"),
    ],
)
def test_refusals(op: ops.Op, reason: str) -> None:
    body = body_of((op, "x"), inputs={"x": np.zeros((2, 4, 4, 3), np.float32)})
    assert Pool().configure(body, {}, BUILTIN[TARGETS[0]]) == Refused(reason)
