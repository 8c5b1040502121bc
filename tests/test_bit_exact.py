"""Integer programs equal the reference bit for bit, at every instruction-set level, dense and N:M."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bitwright as bw
from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.targets.machine import cpu_flags
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.types import NM, S32, U8, TensorType, parse_type

Array = np.ndarray[Any, np.dtype[Any]]
PATTERNS = [None, (2, 4), (4, 8), (1, 4), (2, 8), (1, 16), (3, 5)]


def available() -> list[str]:
    return [n for n, t in BUILTIN.items() if set(t.features) <= {f.replace("avx_vnni", "avxvnni") for f in cpu_flags()}]


def sparse(w: Array, pattern: tuple[int, int] | None) -> Array:
    """Zero all but the first ``keep`` of every ``group`` in a rotated order along axis 1."""
    if pattern is None:
        return w
    keep, group = pattern
    w = w.copy()
    for g in range(0, w.shape[1], group):
        width = min(group, w.shape[1] - g)
        left = -(-keep * width // group)
        for o in range(w.shape[0]):
            drop = [(i + o) % width for i in range(width)][left:]
            w[o, [g + i for i in drop]] = 0
    return w


def requantized(b: Builder, acc: str, axis: int, rng: np.random.Generator) -> str:
    """Bias, dyadic requantization and residual-free saturation behind a contraction."""
    channels = b.types[acc].static_shape[axis]
    shape = [1] * b.types[acc].rank
    shape[axis] = channels
    bias = b.weight("bias", rng.integers(-(1 << 14), 1 << 14, shape).astype(np.int32))
    m = b.weight("m", rng.integers(1 << 30, (1 << 31) - 1, channels).astype(np.int32))
    e = b.weight("e", rng.integers(34, 44, channels).astype(np.int32))
    return b.emit(ops.Requantize(U8, int(rng.integers(0, 255)), axis), b.emit(ops.Binary("add"), acc, bias), m, e)


def weight(b: Builder, w: Array, pattern: tuple[int, int] | None) -> str:
    t = TensorType(parse_type("s8[1]").dtype, w.shape, NM(*pattern, 1) if pattern else None)
    return b.weight("w", sparse(w, pattern).astype(np.int8), t)


def codes(rng: np.random.Generator, shape: tuple[int, ...], extreme: bool, dtype: type[Any]) -> Array:
    info = np.iinfo(dtype)
    if extreme:
        return rng.choice([info.min, info.max], shape).astype(dtype)
    return rng.integers(info.min, info.max + 1, shape).astype(dtype)


def check(graph: Graph, inputs: list[Array], target: str) -> None:
    got = bw.compile(graph, target=target)(*inputs)
    got = got if isinstance(got, tuple) else (got,)
    for a, b in zip(got, evaluate(graph, inputs), strict=True):
        np.testing.assert_array_equal(a, to_numpy(b))


@pytest.mark.parametrize("target", list(BUILTIN))
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: "dense" if p is None else f"{p[0]}:{p[1]}")
def test_linear(target: str, pattern: tuple[int, int] | None) -> None:
    if target not in available():
        pytest.skip(f"this CPU cannot run {target}")

    @settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 70), st.booleans(), st.integers(0, 2**31))
    def run(rows: int, cols: int, depth: int, extreme: bool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        b = Builder(level="integer")
        x = b.input("x", parse_type(f"u8[{rows}, {depth}]"))
        w = weight(b, codes(rng, (cols, depth), extreme, np.int8), pattern)
        acc = b.emit(ops.IntLinear(x_zero=int(rng.integers(0, 256))), x, w)
        graph = b.finish([requantized(b, acc, 1, rng)])
        check(graph, [codes(rng, (rows, depth), extreme, np.uint8)], target)

    run()


@pytest.mark.parametrize("target", list(BUILTIN))
@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)], ids=str)
def test_convolution(target: str, pattern: tuple[int, int] | None) -> None:
    if target not in available():
        pytest.skip(f"this CPU cannot run {target}")

    @settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
        groups = data.draw(st.sampled_from([1, 1, 2, 0])) if pattern is None else 1
        c = data.draw(st.sampled_from([3, 4, 8, 12, 20]))
        groups = {0: c, 2: 2 if c % 2 == 0 else 1}.get(groups, 1)
        o = groups * data.draw(st.sampled_from([1, 4, 9])) if groups < c or c == 1 else c
        k, stride, dilation = (data.draw(st.integers(1, n)) for n in (3, 2, 2))
        pad = tuple(data.draw(st.integers(0, k - 1)) for _ in range(4))
        size = (k - 1) * dilation + data.draw(st.integers(1, 6))
        extreme = data.draw(st.booleans())
        b = Builder(level="integer")
        x = b.input("x", parse_type(f"u8[2, {c}, {size}, {size + 1}]"))
        w = weight(b, codes(rng, (o, c // groups, k, k), extreme, np.int8), pattern)
        conv = ops.IntConv((stride,) * 2, pad, (dilation,) * 2, groups, x_zero=int(rng.integers(0, 256)))
        graph = b.finish([requantized(b, b.emit(conv, x, w), 1, rng)])
        check(graph, [codes(rng, (2, c, size, size + 1), extreme, np.uint8)], target)

    run()


@pytest.mark.parametrize("target", list(BUILTIN))
def test_a_residual_block_stays_in_integers(target: str) -> None:
    if target not in available():
        pytest.skip(f"this CPU cannot run {target}")
    rng = np.random.default_rng(7)
    b = Builder(level="integer")
    x = b.input("x", parse_type("u8[1, 16, 9, 7]"))
    w = weight(b, codes(rng, (16, 16, 3, 3), False, np.int8), (2, 4))
    y = requantized(b, b.emit(ops.IntConv((1, 1), (1,) * 4, x_zero=3), x, w), 1, rng)
    scalars = [b.constant(np.int32(v)) for v in (1_300_000_000, 32, 1_800_000_000, 33)]
    left = b.emit(ops.Requantize(S32), b.emit(ops.Cast(S32), y), *scalars[:2])
    right = b.emit(ops.Requantize(S32), b.emit(ops.Cast(S32), x), *scalars[2:])
    total = b.emit(ops.Saturate(U8, lo=5), b.emit(ops.Binary("add"), left, right))
    pooled = b.emit(ops.MaxPool((3, 3), (2, 2), (1, 1, 1, 1)), total)
    graph = b.finish([pooled, b.emit(ops.Reduce("sum", (2, 3)), b.emit(ops.Cast(S32), pooled))], ["y", "sums"])
    check(graph, [codes(rng, (1, 16, 9, 7), False, np.uint8)], target)
