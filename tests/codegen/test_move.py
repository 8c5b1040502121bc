"""Data movement kernels against the interpreter."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.tvm.move import Move
from bitwright.codegen.tvm.template import Refused
from bitwright.ir import ops
from bitwright.ir.types import F16, F32, S32, U8
from tests.codegen.kernel_batch import Array, Batch, Case, body_of

KINDS = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8, np.int64, np.bool_]
TARGETS = ["x86-avx512-vnni", "x86-avx2", "x86-portable"]


class Maker:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)
        self.cases: list[Case] = []

    def array(self, *shape: int, dtype: Any = np.float32) -> Array:
        d = np.dtype(dtype)
        if d.kind == "b":
            return self.rng.integers(0, 2, shape).astype(bool)
        return (self.rng.standard_normal(shape) * 30).astype(d)

    def add(self, op: ops.Op, *arrays: Array, then: tuple[tuple[ops.Op, dict[str, Any]], ...] = ()) -> None:
        inputs = {f"x{i}": a for i, a in enumerate(arrays)}
        chain: list[tuple[ops.Op, Any]] = [(op, tuple(inputs))]
        for k, (o, more) in enumerate(then):
            inputs |= more
            chain.append((o, (f"v{k}", *more)))
        kinds = ", ".join(f"{a.dtype}{list(a.shape)}" for a in inputs.values())
        self.cases.append(Case(f"{op} ({kinds})", body_of(*chain, inputs=inputs), inputs))


def transposes(m: Maker) -> None:
    for dtype in KINDS:
        m.add(ops.Transpose((1, 0)), m.array(35, 50, dtype=dtype))
        m.add(ops.Transpose((0, 2, 3, 1)), m.array(2, 3, 9, 8, dtype=dtype))
        m.add(ops.Transpose((0, 3, 1, 2)), m.array(2, 5, 4, 33, dtype=dtype))
    for shape in ((16, 16), (64, 16), (17, 1), (1, 17), (2, 3), (130, 20), (20, 130)):
        m.add(ops.Transpose((1, 0)), m.array(*shape))
        m.add(ops.Transpose((1, 0)), m.array(*shape, dtype=np.uint8))
    for perm in itertools.permutations(range(4)):
        m.add(ops.Transpose(perm), m.array(3, 4, 2, 18))
    m.add(ops.Transpose((0, 2, 1, 3)), m.array(2, 5, 3, 70, dtype=np.float16))
    for shape in ((70, 150), (33, 64), (200, 130)):
        for dtype in (np.uint8, np.float16, ml_dtypes.bfloat16):
            m.add(ops.Transpose((1, 0)), m.array(*shape, dtype=dtype))
    for many, positions in ((2, 64), (3, 200), (4, 7), (3, 5), (3, 65)):  # few channels are woven
        for dtype in (np.float32, np.uint8, np.float16):
            m.add(ops.Transpose((0, 2, 1)), m.array(2, many, positions, dtype=dtype))


def rows(m: Maker) -> None:
    for dtype in KINDS:
        m.add(ops.Concat(1), m.array(3, 4, 5, dtype=dtype), m.array(3, 1, 5, dtype=dtype))
        m.add(ops.Concat(2), m.array(3, 4, 40, dtype=dtype), m.array(3, 4, 1, dtype=dtype))
        m.add(ops.Pad((0, 1, 2, 1, 0, 3), 1.0), m.array(3, 4, 45, dtype=dtype))
        m.add(ops.Gather(0), m.array(7, 37, dtype=dtype), m.rng.integers(-7, 7, (2, 3)))
    for axis in range(3):
        m.add(ops.Slice(axis, 1, 3), m.array(3, 4, 70))
        m.add(ops.Concat(axis), *(m.array(2, 3, 4) for _ in range(3)))
        m.add(ops.Flip((axis,)) if axis < 2 else ops.Flip((0, 1)), m.array(3, 4, 21))
    m.add(ops.Slice(0, 0, 5, 2), m.array(5, 30))
    m.add(ops.Concat(0), m.array(0, 3), m.array(2, 3))
    m.add(ops.Expand((4, 3, 100)), m.array(3, 1))
    m.add(ops.Expand((4, 3, 100)), m.array(4, 1, 100))
    m.add(ops.Tile((2, 3)), m.array(5, 7))
    m.add(ops.Tile((3, 1, 2, 1)), m.array(2, 3, 33))
    m.add(ops.Pad((1, 2)), m.array(300))
    m.add(ops.Gather(1), m.array(4, 7, 3), m.rng.integers(-7, 7, (5,)).astype(np.int32))
    m.add(ops.Gather(0), m.array(300, 64), m.rng.integers(0, 300, (64,)))
    m.add(ops.Slice(0, 3, 9000), m.array(10000))


def chains(m: Maker) -> None:
    scale, zero = np.float32(0.25).reshape(()), np.uint8(7).reshape(())
    per = np.linspace(0.1, 0.9, 20).astype(np.float32)
    for shape, perm in (((2, 20, 6, 7), (0, 2, 3, 1)), ((2, 6, 7, 20), (0, 3, 1, 2)), ((6, 20), (0, 1))):
        x = m.array(*shape)
        quantize = (ops.Quantize(U8), {"scale": scale, "zero": zero})
        m.add(ops.Transpose(perm), x, then=(quantize,))
        m.add(ops.Transpose(perm), x, then=((ops.Unary("relu"), {}), (ops.Cast(F16), {})))
        axis = [shape[p] for p in perm].index(20)
        m.add(ops.Transpose(perm), x, then=((ops.Quantize(U8, axis), {"s": per}), (ops.Cast(S32), {})))
        other = m.array(*[shape[p] for p in perm][1:])
        m.add(ops.Transpose(perm), x, then=((ops.Binary("add"), {"other": other}),))
    q = m.array(70, 140, dtype=np.int8)
    m.add(ops.Transpose((1, 0)), q, then=((ops.Dequantize(0), {"s": np.linspace(0.1, 0.9, 140).astype(np.float32)}),))
    m.add(ops.Transpose((1, 0)), q, then=((ops.Dequantize(1), {"s": np.linspace(0.1, 0.9, 70).astype(np.float32)}),))
    three = np.linspace(0.1, 0.9, 3).astype(np.float32)
    m.add(ops.Transpose((0, 2, 3, 1)), m.array(2, 3, 9, 7), then=((ops.Quantize(U8, 3), {"s": three}),))
    m.add(ops.Transpose((0, 2, 3, 1)), m.array(2, 3, 9, 7), then=((ops.Binary("sub"), {"s": three}), quantize))
    m.add(ops.Transpose((0, 2, 3, 1)), m.array(1, 3, 9, 7), then=((ops.Binary("sub"), {"s": m.array(9, 7, 3)}),))
    m.add(ops.Transpose((1, 0)), m.array(40, 30, dtype=np.uint8), then=((ops.Dequantize(), {"s": scale}),))
    add = (ops.Binary("add"), {"o": m.array(9)})
    m.add(ops.Concat(0), m.array(3, 9), m.array(5, 9), then=(add, (ops.Unary("tanh"), {})))
    m.add(ops.Concat(1), m.array(5, 4), m.array(5, 5), then=(add,))
    m.add(ops.Pad((1, 2, 0, 3)), m.array(4, 4), then=(add,))
    m.add(ops.Gather(0), m.array(30, 9), m.rng.integers(-30, 30, (4, 2)), then=(add, (ops.Quantize(U8), {"s": scale})))
    m.add(ops.Slice(1, 2, 11), m.array(5, 20, dtype=np.int8), then=((ops.Cast(F32), {}), add))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", [transposes, rows, chains], ids=lambda f: f.__name__)
def test_family(family: Any, target: str) -> None:
    m = Maker()
    family(m)
    failures = Batch(Move(), target, m.cases if target == TARGETS[0] else m.cases[::3]).run()
    assert not failures, f"{len(failures)} of {len(m.cases)}:\n" + "\n".join(failures[:40])


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ([(ops.Slice(1, 0, 4, 2), "x")], "a source that is contiguous nowhere"),
        ([(ops.Flip((1,)), "x")], "a source that is contiguous nowhere"),
        ([(ops.Pad((1, 1, 1, 1), 0.0, "edge"), "x")], "edge padding"),
        (
            [(ops.Unary("relu"), "x"), (ops.Transpose((1, 0)), ("v0",))],
            "work before the shape operator, or several results",
        ),
        ([(ops.Unary("relu"), "x")], "not one shape operator"),
    ],
)
def test_refusals(chain: Any, reason: str) -> None:
    body = body_of(*chain, inputs={"x": np.zeros((4, 4), np.float32)})
    assert Move().configure(body, {}, BUILTIN[TARGETS[0]]) == Refused(reason)
