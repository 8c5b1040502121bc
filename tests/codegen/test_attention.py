"""The attention kernel against the interpreter: views, masks, grouped keys, formats, sizes, what follows it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.targets.machine import cpu_flags
from bitwright.codegen.tvm.attention import AttentionConfig, AttentionTemplate
from bitwright.codegen.tvm.attention_views import Unfit, View
from bitwright.codegen.tvm.template import Refused
from bitwright.ir import ops
from bitwright.ir.types import F32, U8
from tests.codegen import harness as h
from tests.codegen.kernel_batch import Array, Batch, Case, body_of

TARGETS = ["x86-avx512-vnni", "x86-avx2", "x86-portable"]
RNG = np.random.default_rng(11)
QKV = ("q", "k", "v")
SWAP = ops.Transpose((0, 2, 1, 3))


def normal(*shape: int, dtype: Any = np.float32) -> Array:
    return RNG.standard_normal(shape).astype(np.float32).astype(dtype)


def qkv(
    batch: tuple[int, ...], rows: int, keys: int, depth: int, width: int, dtype: Any = np.float32
) -> dict[str, Array]:
    sizes = {"q": (rows, depth), "k": (keys, depth), "v": (keys, width)}
    return {x: normal(*batch, *n, dtype=dtype) for x, n in sizes.items()}


class Cases(list[Case]):
    def add_case(self, label: str, inputs: dict[str, Array], *chain: tuple[ops.Op, Any], **options: Any) -> None:
        self.append(Case(label, body_of(*chain, inputs=inputs), inputs, **options))


def size_cases(c: Cases) -> None:
    shapes = [(1, 1, 1, 1), (1, 50, 16, 16), (5, 7, 3, 9), (70, 33, 20, 70), (17, 130, 64, 64), (4, 4, 1, 100)]
    for rows, keys, depth, width in shapes:
        for causal in (False, True):
            op = ops.Attention(depth**-0.5, causal)
            label = f"{rows}x{keys}x{depth}x{width}{' causal' if causal else ''}"
            c.add_case(label, qkv((2,), rows, keys, depth, width), (op, QKV))
    c.add_case("no batch", qkv((), 6, 10, 8, 8), (ops.Attention(0.3), QKV))
    c.add_case("large scores", {x: a * 30 for x, a in qkv((2,), 9, 20, 16, 8).items()}, (ops.Attention(1.0), QKV))


def mask_cases(c: Cases) -> None:
    for shape in ((2, 1, 1, 21), (19, 21), (1, 3, 19, 21), (2, 1, 19, 1), (2, 3, 1, 1)):
        for kind in (np.float32, np.bool_, ml_dtypes.bfloat16)[: 3 if shape == (19, 21) else 2]:
            m = normal(*shape, dtype=kind) if kind != np.bool_ else RNG.integers(0, 4, shape) > 0
            inputs = qkv((2, 3), 19, 21, 8, 8) | {"m": m}
            name = f"mask {list(shape)} {np.dtype(kind)}"
            c.add_case(name, inputs, (ops.Attention(0.3, causal=shape == (19, 21)), (*QKV, "m")))
    never = np.zeros((19, 21), np.float32)
    never[3] = never[5, :20] = -np.inf
    inputs = qkv((2,), 19, 21, 8, 8)
    c.add_case("rows without keys", inputs | {"m": never}, (ops.Attention(0.3), (*QKV, "m")))
    c.add_case("rows without keys, bool", inputs | {"m": never == 0}, (ops.Attention(0.3), (*QKV, "m")))
    c.add_case("no key at all", inputs | {"m": np.zeros(21, bool)}, (ops.Attention(0.3), (*QKV, "m")))
    few = qkv((2,), 40, 5, 8, 8) | {"m": normal(40, 5)}
    c.add_case("mask narrower than a vector", few, (ops.Attention(0.3), (*QKV, "m")))


def batch_cases(c: Cases) -> None:
    grouped = {"q": normal(2, 6, 9, 8), "k": normal(2, 2, 11, 8), "v": normal(2, 2, 11, 12)}
    c.add_case("grouped keys", grouped, (ops.Attention(0.3, kv_groups=3), QKV))
    shared = {"q": normal(2, 6, 9, 8), "k": normal(1, 6, 11, 8), "v": normal(6, 11, 12)}
    c.add_case("broadcast keys", shared, (ops.Attention(0.3), QKV))
    nan = qkv((2,), 9, 20, 16, 8)
    nan["q"][0, 2, 3], nan["k"][1, 5, 0], nan["v"][0, 3, 2] = np.nan, np.inf, np.inf
    c.add_case("NaN and infinity", nan, (ops.Attention(0.3), QKV))
    for kind in (np.float16, ml_dtypes.bfloat16):
        c.add_case(f"{np.dtype(kind)}", qkv((2,), 20, 33, 20, 21, kind), (ops.Attention(0.3), QKV))
        c.add_case(
            f"{np.dtype(kind)} to f32", qkv((2,), 3, 5, 7, 9, kind), (ops.Attention(0.3), QKV), (ops.Cast(F32), ("v0",))
        )


def view_cases(c: Cases) -> None:
    b, rows, keys, heads, depth = 2, 19, 22, 3, 8
    sizes = {"q": rows, "k": keys, "v": keys}
    flat: dict[str, Array] = {x: normal(b, n, heads * depth) for x, n in sizes.items()}
    split: list[tuple[ops.Op, Any]] = []
    for k, (x, n) in enumerate(sizes.items()):
        split += [(ops.Reshape((b, n, heads, depth)), (x,)), (SWAP, (f"v{2 * k}",))]
    attend = (ops.Attention(0.3), ("v1", "v3", "v5"))
    join = (SWAP, ("v6",)), (ops.Reshape((b, rows, heads * depth)), ("v7",))
    c.add_case("heads", flat, *split, attend, *join)
    scale: dict[str, Array] = {"s": np.array(0.01, np.float32), "z": np.array(128, np.uint8)}
    quantize = ops.Quantize(U8)
    c.add_case("quantize last", flat | scale, *split, attend, *join, (quantize, ("v8", "s", "z")), steps=1)
    c.add_case("quantize first", flat | scale, *split, attend, (quantize, ("v6", "s", "z")), (SWAP, ("v7",)), steps=1)
    clamped = (ops.Binary("mul"), ("f", "v6")), (ops.Unary("relu"), ("v7",)), (SWAP, ("v8",))
    c.add_case("pointwise", flat | {"f": normal(1, 1)}, *split, attend, *clamped)
    c.add_case("columns apart", flat, *split, attend, (ops.Transpose((0, 1, 3, 2)), ("v6",)))
    back: dict[str, Array] = {"q": normal(2, 8, 19), "k": normal(2, 8, 22), "v": normal(22, 2, 9)}
    turn = ops.Transpose((0, 2, 1))
    chain = (turn, ("q",)), (turn, ("k",)), (ops.Transpose((1, 2, 0)), ("v",)), (turn, ("v2",))
    c.add_case("transposed operands", back, *chain, (ops.Attention(0.3), ("v0", "v1", "v3")))
    one: dict[str, Array] = {"x": normal(2, 19, 3 * 24)}
    parts: list[tuple[ops.Op, Any]] = []
    for k in range(3):
        cut = ops.Slice(2, 24 * k, 24 * k + 24)
        parts += [(cut, ("x",)), (ops.Reshape((2, 19, 3, 8)), (f"v{3 * k}",)), (SWAP, (f"v{3 * k + 1}",))]
    c.add_case("one projection", one, *parts, (ops.Attention(0.3, True), ("v2", "v5", "v8")))


def pair_cases(c: Cases) -> None:
    """bf16 by pairs of depth and of keys: odd and even numbers, remainders, masks, views, what follows."""
    kind = ml_dtypes.bfloat16
    for rows, keys, depth, width in (
        (16, 16, 2, 16),
        (70, 33, 20, 70),
        (17, 130, 64, 64),
        (33, 7, 36, 9),
        (100, 3, 8, 17),
    ):
        for causal in (False, True):
            label = f"pairs {rows}x{keys}x{depth}x{width}{' causal' if causal else ''}"
            c.add_case(label, qkv((2,), rows, keys, depth, width, kind), (ops.Attention(depth**-0.5, causal), QKV))
    large = {x: (a.astype(np.float32) * 20).astype(kind) for x, a in qkv((2,), 40, 37, 16, 32, kind).items()}
    c.add_case("pairs, large scores", large, (ops.Attention(1.0), QKV))
    for shape in ((2, 1, 1, 21), (19, 21), (2, 1, 19, 1)):
        for m in (normal(*shape), RNG.integers(0, 4, shape) > 0):
            inputs = qkv((2, 3), 19, 21, 8, 16, kind) | {"m": m}
            c.add_case(f"pairs, mask {list(shape)} {m.dtype}", inputs, (ops.Attention(0.3), (*QKV, "m")))
    never = np.zeros((19, 21), np.float32)
    never[3] = -np.inf
    c.add_case("pairs, no keys", qkv((2,), 19, 21, 8, 16, kind) | {"m": never}, (ops.Attention(0.3), (*QKV, "m")))
    bad = qkv((2,), 19, 20, 16, 16, kind)
    bad["q"][0, 2, 3], bad["k"][1, 5, 0], bad["v"][0, 3, 2] = np.nan, np.inf, np.inf
    c.add_case("pairs, NaN and infinity", bad, (ops.Attention(0.3), QKV))
    grouped = {"q": normal(2, 6, 19, 8, dtype=kind), "k": normal(2, 2, 11, 8, dtype=kind)}
    grouped["v"] = normal(2, 2, 11, 16, dtype=kind)
    c.add_case("pairs, grouped keys", grouped, (ops.Attention(0.3, kv_groups=3), QKV))
    one: dict[str, Array] = {"x": normal(2, 19, 3 * 48, dtype=kind)}
    parts: list[tuple[ops.Op, Any]] = []
    for k in range(3):
        cut = ops.Slice(2, 48 * k, 48 * k + 48)
        parts += [(cut, ("x",)), (ops.Reshape((2, 19, 3, 16)), (f"v{3 * k}",)), (SWAP, (f"v{3 * k + 1}",))]
    join: list[tuple[ops.Op, Any]] = [(SWAP, ("v9",)), (ops.Reshape((2, 19, 48)), ("v10",)), (ops.Cast(F32), ("v11",))]
    attend = (ops.Attention(0.25), ("v2", "v5", "v8"))
    c.add_case("pairs, one projection", one, *parts, attend, *join, rtol=8e-3, atol=8e-3)
    scale: dict[str, Array] = {"s": np.array(0.02, np.float32), "z": np.array(128, np.uint8)}
    c.add_case(
        "pairs, quantize", one | scale, *parts, attend, *join, (ops.Quantize(U8), ("v12", "s", "z")), steps=1
    )  # fmt: skip


@pytest.mark.skipif("avx512bf16" not in cpu_flags(), reason="this CPU has no products of bf16")
def test_pairs_match_interpreter() -> None:
    cases = Cases()
    pair_cases(cases)
    on = BUILTIN["x86-avx512-bf16"]
    for case in cases:
        made = AttentionTemplate().configure(case.body, {}, on)
        assert isinstance(made, AttentionConfig)
        assert made.pairs, (case.label, made.reason)
    assert Batch(AttentionTemplate(), on.name, cases).run() == []


@pytest.mark.skipif("avx512bf16" not in cpu_flags(), reason="this CPU has no products of bf16")
def test_error_of_pairs() -> None:
    """Probabilities are off by 2^-7 at most, whatever the values; results are rounded to bf16."""
    kind = ml_dtypes.bfloat16
    inputs = qkv((4,), 64, 200, 64, 64, kind)
    inputs["v"] = np.abs(inputs["v"])
    inputs["v"][2:, ::2] *= kind(100)
    body = body_of((ops.Attention(0.125), QKV), inputs=inputs)
    (got,) = h.run_template(AttentionTemplate(), body, list(inputs.values()), BUILTIN["x86-avx512-bf16"])
    q, k, v = (a.astype(np.float64) for a in inputs.values())
    scores = np.exp(q @ k.transpose(0, 2, 1) * 0.125)
    want = scores / scores.sum(-1, keepdims=True) @ v
    error = np.abs(got.astype(np.float64) - want) / want
    assert error.max() < 2**-7 + 2**-9
    assert error.mean() < 2**-9


def test_why_no_pairs() -> None:
    kind, on = ml_dtypes.bfloat16, BUILTIN["x86-avx512-bf16"]
    attend = (ops.Attention(0.3), QKV)
    odd = ((ops.Slice(2, 1, 9), ("k",)), (ops.Attention(0.3), ("q", "v0", "v")))
    turned = ((ops.Transpose((0, 2, 1)), ("v",)), (ops.Attention(0.3), ("q", "k", "v0")))
    for inputs, chain, target, reason in (
        (qkv((2,), 20, 20, 8, 16, kind), (attend,), BUILTIN["x86-avx512-vnni"], "no products of bf16"),
        (qkv((2,), 20, 20, 7, 16, kind), (attend,), on, "adjacent pairs"),
        (qkv((2,), 20, 20, 8, 8, kind), (attend,), on, "fewer than 16"),
        ({**qkv((2,), 20, 20, 8, 16, kind), "k": normal(2, 20, 9, dtype=kind)}, odd, on, "adjacent pairs"),
        ({**qkv((2,), 20, 20, 8, 16, kind), "v": normal(2, 16, 20, dtype=kind)}, turned, on, "value are not adjacent"),
    ):
        made = AttentionTemplate().configure(body_of(*chain, inputs=inputs), {}, target)
        assert isinstance(made, AttentionConfig)
        assert not made.pairs
        assert reason in made.reason


@pytest.mark.parametrize("target", TARGETS)
def test_matches_interpreter(target: str) -> None:
    cases = Cases()
    size_cases(cases)
    mask_cases(cases)
    batch_cases(cases)
    view_cases(cases)
    turn = TARGETS.index(target)  # the narrower targets share the cases
    assert Batch(AttentionTemplate(), target, cases[turn - 1 :: 2] if turn else cases).run() == []


def test_refusals() -> None:
    x, attend = qkv((2,), 4, 4, 4, 4), (ops.Attention(), QKV)
    refused: list[tuple[dict[str, Array], tuple[tuple[ops.Op, Any], ...], str]] = [
        ({"x": normal(3, 4)}, ((ops.Softmax(), ("x",)),), "not one attention"),
        (x, ((ops.Unary("exp"), ("q",)), (ops.Attention(), ("v0", "k", "v"))), "before"),
        (x | {"y": normal(4)}, (attend, (ops.Binary("add"), ("v0", "y"))), "not a scalar"),
        (x, (attend, (ops.Binary("add"), ("v0", "q"))), "not a scalar"),
        (x, (attend, (ops.Softmax(), ("v0",))), "behind"),
        ({k: a.astype(np.float64) for k, a in x.items()}, (attend,), "format"),
        (x, (attend, (ops.Transpose((1, 0, 2)), ("v0",)), (ops.Reshape((8, 4)), ("v1",))), ""),
    ]
    for inputs, chain, reason in refused:
        answer = AttentionTemplate().configure(body_of(*chain, inputs=inputs), {}, BUILTIN[TARGETS[0]])
        if reason:
            assert isinstance(answer, Refused), chain
            assert reason in answer.reason, chain
        else:
            assert not isinstance(answer, Refused), chain


def test_views() -> None:
    v = View.whole((4, 6, 5)).reshaped((2, 2, 1, 30))
    assert v.strides == (60, 30, 0, 1)
    assert View.whole((4, 6)).transposed((1, 0)).reshaped((3, 2, 4)).strides == (2, 1, 6)
    assert View.whole((4, 6)).transposed((1, 0)).untransposed((1, 0)) == View.whole((4, 6))
    with pytest.raises(Unfit, match="no view"):
        View.whole((4, 6)).transposed((1, 0)).reshaped((24,))
