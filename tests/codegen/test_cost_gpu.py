"""What GPU kernels should take: bound by memory, by tensor cores or by a launch, and 2:4 only where it can help."""

from __future__ import annotations

import pytest

from bitwright.advice import advise
from bitwright.codegen.cost import cost_of, weight_bytes
from bitwright.codegen.targets import GPUS
from bitwright.ir.graph import Graph
from bitwright.ir.text import parse
from bitwright.ir.types import NM, S8, TensorType

SM90 = GPUS["cuda-sm90"]


def linear(m: int, n: int, k: int, kind: str = "f16", encoding: str = "") -> Graph:
    return parse(
        f"graph @g (%x: {kind}[{m}, {k}], %w: {kind}[{n}, {k}]{encoding}) -> (y = %y) level=graph {{\n"
        f"  %y = linear(%x, %w) : {kind}[{m}, {n}]\n}}\n"
    )


def test_few_rows_take_the_time_of_their_weights() -> None:
    cost = cost_of(linear(1, 8192, 8192), SM90)
    assert cost.limit == pytest.approx(cost.bytes / SM90.memory_bandwidth)
    assert cost.limit < cost.seconds < 1.5 * cost.limit


def test_large_products_come_near_the_tensor_cores_rate() -> None:
    cost = cost_of(linear(8192, 8192, 8192), SM90)
    assert cost.limit == pytest.approx(2 * 8192**3 / 989e12)
    assert cost.limit < cost.seconds < 1.5 * cost.limit


def test_small_layers_take_a_launch_whatever_their_format() -> None:
    dense, sparse = (cost_of(linear(16, 64, 64, "f16", e), SM90) for e in ("", " nm<2:4, axis=1>"))
    assert dense.seconds == pytest.approx(SM90.launch_seconds, rel=0.5)
    assert sparse.seconds == pytest.approx(dense.seconds, rel=0.05)


def test_2_4_halves_what_products_take_and_less_of_what_memory_takes() -> None:
    for size, low, high in ((8192, 1.4, 1.5), (1, 1.3, 1.9)):
        dense, sparse = (cost_of(linear(size, 8192, 8192, "f16", e), SM90) for e in ("", " nm<2:4, axis=1>"))
        assert low < dense.seconds / sparse.seconds < high
        assert cost_of(linear(size, 8192, 8192, "f16", " nm<2:4, axis=1>"), SM90, sparse=False).seconds > sparse.seconds


def test_sparse_tensor_cores_take_what_obeys_2_4_and_nothing_else() -> None:
    assert (
        SM90.sparse_gain(S8, NM(2, 4, 1))
        == SM90.sparse_gain(S8, NM(1, 4, 1))
        == SM90.sparse_gain(S8, NM(2, 8, 1))
        == 1.5
    )
    assert SM90.sparse_gain(S8, NM(4, 8, 1)) == SM90.sparse_gain(S8, NM(2, 4, 1, block=4)) == 0
    w = TensorType(S8, (64, 64))
    assert weight_bytes(w.with_encoding(NM(2, 4, 1)), "cuda") == 64 * 64 * (8 + 2) / 16
    assert weight_bytes(w.with_encoding(NM(4, 8, 1)), "cuda") == 64 * 64


def test_advice_says_where_2_4_pays() -> None:
    text = (
        "graph @g (%x: f32[{m}, {k}]) -> (y = %y) level=graph {{\n"
        '  %w = weight {{ref="w"}} : f32[{n}, {k}]\n'
        "  %y = linear(%x, %w) : f32[{m}, {n}]\n}}\n"
    )
    (large,) = advise(parse(text.format(m=4096, n=4096, k=4096)), SM90)
    (small,) = advise(parse(text.format(m=16, n=64, k=64)), SM90)
    assert large.gains["2:4"] > 1.3 * large.gains["int8"]
    assert large.gains["2:4 bf16"] > 1.3 * large.gains["bf16"]
    assert "2:4 4x4" not in large.gains
    assert small.best == "" or small.gains["2:4"] < 1.1 * small.gains["int8"]
