"""Attention of a single query against the interpreter: grouped keys, masks, sizes, extreme scores, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitwright.codegen.tvm.attention_decode import Decode
from bitwright.codegen.tvm.template import Refused, canonical
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.target import Isa
from bitwright.ir.types import TensorType, dtype_of
from tests.codegen.harness import ISAS, check, target

Array = np.ndarray[Any, Any]


def body_of(inputs: dict[str, Array], op: ops.Attention, *, joined: bool = False) -> Graph:
    b = Builder("body")
    names = [b.input(n, TensorType(dtype_of(a.dtype), a.shape)) for n, a in inputs.items()]
    y = b.emit(op, *names)
    if joined:
        heads, width = b.types[y].static_shape[-3], b.types[y].static_shape[-1]
        y = b.emit(ops.Reshape((1, 1, heads * width)), b.emit(ops.Transpose((0, 2, 1, 3)), y))
    return b.finish([y])


def data(batch: tuple[int, ...], kv: tuple[int, ...], keys: int, depth: int, width: int) -> dict[str, Array]:
    rng = np.random.default_rng(keys)
    shapes = {"q": (*batch, 1, depth), "k": (*kv, keys, depth), "v": (*kv, keys, width)}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


CASES: dict[str, tuple[dict[str, Array], ops.Attention]] = {
    "grouped": (data((1, 8), (1, 2), 128, 64, 64), ops.Attention(0.125, kv_groups=4)),
    "remainder": (data((2, 3), (2, 3), 37, 32, 48), ops.Attention(0.2)),
    "few keys": (data((3,), (3,), 2, 16, 160), ops.Attention(0.3)),
    "one key": (data((), (), 1, 16, 16), ops.Attention(0.3)),
    "large scores": (
        {n: a * 30 for n, a in data((1, 2), (1, 2), 50, 16, 16).items()}, ops.Attention(1.0)
    ),
    "mask": (
        data((1, 4), (1, 2), 40, 16, 32)
        | {"m": np.where(np.arange(40) % 3, 0, -np.inf).astype(np.float32)[None, None, None]},
        ops.Attention(0.3, kv_groups=2),
    ),
    "bool mask": (
        data((2, 2), (2, 2), 21, 16, 16) | {"m": np.arange(42).reshape(2, 1, 1, 21) % 4 > 0}, ops.Attention(0.3)
    ),
    "nothing to attend": (data((1, 2), (1, 2), 20, 16, 16) | {"m": np.zeros((1, 1, 1, 20), bool)}, ops.Attention(0.3)),
}  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name: str, isa: Isa) -> None:
    inputs, op = CASES[name]
    check(Decode(), body_of(inputs, op), list(inputs.values()), isa, rtol=2e-5, atol=2e-6)


def test_a_view_behind_it_is_where_it_writes() -> None:
    inputs, op = CASES["grouped"]
    check(Decode(), body_of(inputs, op, joined=True), list(inputs.values()))


def test_infinities_and_nan() -> None:
    inputs = data((1, 3), (1, 3), 20, 16, 16)
    inputs["q"][0, 0, 0, 3], inputs["k"][0, 1, 5, 0], inputs["v"][0, 2, 3, 2] = np.nan, np.inf, np.inf
    check(Decode(), body_of(inputs, ops.Attention(0.3)), list(inputs.values()))


@pytest.mark.parametrize(
    ("inputs", "op", "why"),
    [
        (data((2,), (2,), 20, 12, 16), ops.Attention(0.3), "whole vectors of 16"),
        (data((2,), (2,), 20, 16, 16), ops.Attention(0.3, causal=True), "single query"),
        ({n: np.repeat(a, 2, 1) for n, a in data((2,), (2,), 20, 16, 16).items()}, ops.Attention(0.3), "single query"),
        (data((2,), (2,), 20, 16, 16) | {"m": np.zeros((2, 1, 1), np.float32)}, ops.Attention(0.3), "along the keys"),
    ],
)
def test_refusals(inputs: dict[str, Array], op: ops.Attention, why: str) -> None:
    made = Decode().configure(canonical(body_of(inputs, op)), {}, target())
    assert isinstance(made, Refused)
    assert why in made.reason
