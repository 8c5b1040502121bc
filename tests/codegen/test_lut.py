"""Look-up-table kernels for weights of two values: exact on extreme inputs, chosen where they pay, packed and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright import certificates
from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.tvm import lut
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.types import TensorType, parse_dtype

Array = np.ndarray[Any, Any]


def layer(
    shape: tuple[int, int, int], x_type: str, values: list[int], *, zero: int = 3, requantized: bool = False
) -> tuple[Graph, Array]:
    """rows x outputs x inputs, and inputs that reach the ends of the sums and of the tables."""
    rows, cols, depth = shape
    rng = np.random.default_rng(depth)
    b, dtype = Builder(level="integer"), parse_dtype(x_type)
    w = rng.choice(values, (cols, depth)).astype(np.int8)
    w[0], w[-1] = max(values), min(values)
    out = b.emit(ops.IntLinear(x_zero=zero), b.input("x", TensorType(dtype, (rows, depth))), b.weight("fc.weight", w))
    if requantized:
        m, e = (b.weight(n, np.full(cols, v, np.int32)) for n, v in (("m", 1 << 30), ("e", 38)))
        out = b.emit(ops.Requantize(parse_dtype("u8"), 100, 1), out, m, e)
    x = rng.integers(0, dtype.hi + 1, (rows, depth)).astype(np.uint8)
    for i in range(rows - 1):
        x[i] = dtype.hi * (w[i % cols] == max(values)) if i % 2 else dtype.hi
    x[-1] = dtype.hi
    return b.finish([out]), x


CASES = [
    ((1, 128, 7), "u4", [-1, 1]),
    ((5, 130, 203), "u6", [-1, 1]),
    ((3, 257, 64), "u5", [0, 1]),
    ((2, 300, 1000), "u5", [-3, 4]),
    ((1, 1100, 9), "u8", [1, -1]),
    ((3, 1030, 700), "u8", [-1, 1]),
    ((7, 1024, 4500), "u8", [0, 1]),
    ((4, 129, 4500), "u4", [-1, 1]),
    ((1, 140, 2500), "u6", [1, 1]),
    ((2, 200, 33), "u1", [-1, 1]),
]


@pytest.mark.parametrize(("shape", "x_type", "values"), CASES, ids=str)
def test_exact(shape: tuple[int, int, int], x_type: str, values: list[int]) -> None:
    """Every sum of bytes and of 16-bit words reaches its proven end: rows of the largest activation alone."""
    for requantized in (False, True):
        graph, x = layer(shape, x_type, values, requantized=requantized)
        program = bw.compile(graph, target="x86-avx2")
        assert [x.kernel for x in program.report.layers] == ["lut"]
        assert [c.fault for c in certificates.check(program.contents)] == [""]
        np.testing.assert_array_equal(program(x), to_numpy(evaluate(graph, [x])[0]))


@pytest.mark.parametrize(("bits", "byte_sums", "parts"), [(1, 4, 1), (4, 4, 1), (5, 2, 1), (6, 1, 1), (7, 4, 2)])
def test_sums_are_as_long_as_the_format_proves(bits: int, byte_sums: int, parts: int) -> None:
    graph, _ = layer((1, 1024, 9000), f"u{bits}", [-1, 1])
    spec = chosen(graph).spec
    assert (spec.byte_sums, spec.parts) == (byte_sums, parts)
    assert spec.byte_sums * 4 * spec.x_part <= 255
    assert spec.byte_sums == 4 or 2 * spec.byte_sums * 4 * spec.x_part > 255
    assert spec.chunk * 16 * spec.x_part <= 65535
    assert spec.chunk == spec.steps or (spec.chunk + 1) * 16 * spec.x_part > 65535


def chosen(graph: Graph) -> Any:
    """The template's decision for a graph of one layer."""
    node = next(n for n in graph.nodes if isinstance(n.op, ops.IntLinear))
    assert isinstance(node.op, ops.IntLinear)
    b = Builder("body", "kernel")
    x, w = (b.input(v, graph.types[v]) for v in node.inputs)
    body = b.finish([b.emit(replace(node.op, partial=parse_dtype("s16"), every=128), x, w)])
    weight = graph.constant(node.inputs[1])
    assert isinstance(weight, np.ndarray)
    return lut.Lut().configure(body, {node.inputs[1]: weight}, BUILTIN["x86-avx2"])


@pytest.mark.parametrize("values", [[-1, 1], [0, 1], [-7, 9]])
@pytest.mark.parametrize("shape", [(1, 130, 21), (5, 200, 64)])
def test_packed_bits_unpack(shape: tuple[int, int, int], values: list[int]) -> None:
    graph, _ = layer(shape, "u4", values)
    config = chosen(graph)
    weight = graph.constant("fc.weight")
    assert isinstance(weight, np.ndarray)
    body = Builder("b")
    body.input("x", graph.types["x"])
    name = body.input("w", graph.types["fc.weight"])
    packed, init = lut.Lut().pack(body.finish([name]), config, {"w": weight})
    assert packed.nbytes == config.spec.tasks * config.spec.block * config.spec.steps * 2
    np.testing.assert_array_equal(lut.unpack(config.spec, packed), weight)
    np.testing.assert_array_equal(init[: shape[1]], -3 * weight.astype(int).sum(1))
    packed[5] ^= 4
    assert np.count_nonzero(lut.unpack(config.spec, packed) != weight) <= 1
    with pytest.raises(InvalidInput, match="packed bits"):
        lut.unpack(config.spec, packed[1:])


@pytest.mark.parametrize(
    ("shape", "x_type", "values", "why"),
    [
        ((1, 256, 64), "u4", [-1, 0, 1], "more than two values"),
        ((1, 127, 64), "u4", [-1, 1], "127 outputs do not make up"),
        ((1, 1000, 64), "u8", [-1, 1], "1000 outputs do not make up"),
        ((600, 256, 2000), "u4", [-1, 1], "4800000 bytes of tables"),
    ],
)
def test_products_where_look_ups_do_not_pay(
    shape: tuple[int, int, int], x_type: str, values: list[int], why: str
) -> None:
    graph, _ = layer(shape, x_type, values)
    assert why in chosen(graph).reason


def test_other_targets_and_wide_sums_use_products() -> None:
    graph, x = layer((2, 256, 64), "u4", [-1, 1])
    want = to_numpy(evaluate(graph, [x])[0])
    for target, recipe in (("x86-avx512-vnni", "none"), ("x86-avx2", "lower-accumulators{width=32}")):
        program = bw.compile(graph, target=target, recipe=recipe)
        assert [x.kernel for x in program.report.layers] == ["contract"]
        np.testing.assert_array_equal(program(x), want)
