"""Contractions of bf16 against the interpreter: dense, patterns, convolutions; packing; what has no kernel and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.targets.machine import cpu_flags
from bitwright.codegen.tvm.contract.halves import as_words
from bitwright.codegen.tvm.contract_template import Contract, ContractConfig
from bitwright.codegen.tvm.template import Refused
from bitwright.ir.graph import Graph
from bitwright.ir.text import parse
from bitwright.ir.types import NM
from tests.codegen import harness as h

Array = np.ndarray[Any, Any]
ON = BUILTIN["x86-avx512-bf16"]
able = pytest.mark.skipif("avx512bf16" not in cpu_flags(), reason="this CPU has no products of bf16")
PATTERNS = [(2, 4), (4, 8), (1, 4), (2, 8), (4, 16), (1, 8), (2, 16), (1, 16), (3, 8), (2, 6), (1, 32)]


def values(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)


def thinned(rng: np.random.Generator, weight: Array, keep: int, group: int) -> Array:
    """Zeros outside ``keep`` of every ``group`` along axis 1, some of them negative zeros."""
    length = weight.shape[1]
    rank = np.argsort(np.argsort(rng.random((weight.shape[0], -(-length // group), group)), -1), -1)
    kept = (rank < keep).reshape(weight.shape[0], -1)[:, :length].reshape(weight.shape[:2] + (1,) * (weight.ndim - 2))
    zero = np.where(rng.random(weight.shape) < 0.5, 0.0, -0.0).astype(weight.dtype)
    return np.where(kept, weight, zero)


def linear(rows: int, depth: int, cols: int, pattern: NM | None = None) -> Graph:
    graph = parse(f"""
        graph @g (%x: bf16[{rows}, {depth}], %w: bf16[{cols}, {depth}], %b: bf16[{cols}]) -> (y = %y) level=integer {{
          %h = linear(%x, %w, %b) : bf16[{rows}, {cols}]
          %r = relu(%h) : bf16[{rows}, {cols}]
          %y = cast(%r) {{dtype=f32}} : f32[{rows}, {cols}]
        }}
    """)
    return encoded(graph, pattern)


def encoded(graph: Graph, pattern: NM | None) -> Graph:
    x, w, *rest = graph.inputs
    return replace(graph, inputs=(x, replace(w, type=w.type.with_encoding(pattern)), *rest)) if pattern else graph


def check(graph: Graph, inputs: list[Array], pattern: NM | None) -> None:
    names = [v.name for v in graph.inputs]
    constants = dict(zip(names[1:], inputs[1:], strict=True))
    kernel = h.Kernel(Contract(), graph, ON, constants)
    assert isinstance(kernel.config, ContractConfig)
    assert kernel.config.spec.element == "bf16"
    assert kernel.config.spec.pattern == pattern, kernel.config.reason
    (got,), (want,) = kernel(inputs), h.expected(graph, inputs)
    depth = float(np.prod(inputs[1].shape[1:]))
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=2e-6 * depth)


@able
@pytest.mark.parametrize("sizes", [(1, 2, 1), (5, 6, 17), (9, 130, 33), (33, 64, 100), (130, 34, 70)], ids=str)
def test_dense(sizes: tuple[int, int, int]) -> None:
    rows, depth, cols = sizes
    rng = np.random.default_rng(sum(sizes))
    check(linear(*sizes), [values(rng, rows, depth), values(rng, cols, depth), values(rng, cols)], None)


@able
@pytest.mark.parametrize("keep_group", PATTERNS, ids=str)
def test_patterns(keep_group: tuple[int, int]) -> None:
    rng = np.random.default_rng(keep_group[1])
    rows, depth, cols = 9, 8 * keep_group[1] + 2 * (keep_group[1] // 2), 37
    pattern = NM(*keep_group, axis=1)
    weight = thinned(rng, values(rng, cols, depth), *keep_group)
    check(linear(rows, depth, cols, pattern), [values(rng, rows, depth), weight, values(rng, cols)], pattern)


CONVOLUTIONS = {
    "3x3": (1, 8, 9, 16, 20, 3, 1, 1, 1), "strided": (2, 9, 8, 6, 17, 3, 2, 1, 1), "1x1": (1, 5, 7, 32, 40, 1, 1, 0, 1),
    "grouped": (1, 6, 6, 8, 12, 3, 1, 1, 2),
}  # fmt: skip


@able
@pytest.mark.parametrize(
    ("name", "keep_group"), [*((n, None) for n in CONVOLUTIONS), *((n, (2, 4)) for n in ("3x3", "1x1", "grouped"))]
)
def test_convolution(name: str, keep_group: tuple[int, int] | None) -> None:
    n, height, width, c, o, k, stride, pad, groups = CONVOLUTIONS[name]
    rng = np.random.default_rng(c + o)
    oh, ow = ((s + 2 * pad - k) // stride + 1 for s in (height, width))
    graph = parse(
        f"""
        graph @body (%x: bf16[{n}, {height}, {width}, {c}], %w: bf16[{o}, {c // groups}, {k}, {k}], %b: bf16[{o}])
            -> (y = %y) level=integer {{
          %y = conv(%x, %w, %b) {{stride=[{stride}, {stride}], padding=[{pad}, {pad}, {pad}, {pad}], dilation=[1, 1],
            groups={groups}, channels_last=true}} : bf16[{n}, {oh}, {ow}, {o}]
        }}
    """.replace("\n            ", " ")
    )
    weight = values(rng, o, c // groups, k, k)
    pattern = NM(*keep_group, axis=1) if keep_group else None
    weight = thinned(rng, weight, *keep_group) if keep_group else weight
    check(encoded(graph, pattern), [values(rng, n, height, width, c), weight, values(rng, o)], pattern)


def test_words_have_one_zero() -> None:
    array = np.array([0.0, -0.0, 1.0, -2.0], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(as_words(array), np.array([0, 0, 0x3F80, 0xC000], np.uint16))
    plain = np.array([-0.0, 1.0], np.float32)
    assert as_words(plain) is plain
    assert as_words(None) is None


@pytest.mark.parametrize(
    ("graph", "target", "reason"),
    [
        (linear(4, 8, 8), "x86-avx512-vnni", "x86-avx512-vnni has no products of bf16"),
        (linear(4, 8, 8), "x86-avx2", "x86-avx2 has no products of bf16"),
        (linear(4, 7, 8), "x86-avx512-bf16", "a reduction of 7 has no pairs of bf16"),
    ],
)
def test_refusals(graph: Graph, target: str, reason: str) -> None:
    zeros = {v.name: np.zeros(v.type.static_shape, v.type.dtype.numpy) for v in graph.inputs[1:]}
    assert Contract().configure(graph, zeros, BUILTIN[target]) == Refused(reason)


def test_corrupt_weights_are_found() -> None:
    rng = np.random.default_rng(1)
    graph = linear(4, 16, 20)
    constants = {"w": values(rng, 20, 16), "b": values(rng, 20)}
    config = Contract().configure(graph, constants, ON)
    assert isinstance(config, ContractConfig)
    packed = Contract().pack(graph, config, constants)
    assert Contract().verify(graph, config, constants, packed) == ""
    packed[0].reshape(-1)[3] ^= 1
    assert "do not unpack" in Contract().verify(graph, config, constants, packed)
