"""10^5 random small contractions for every target: this machine's levels, Arm and RISC-V (emulated), C on three
machines (two emulated), and the simulator of every device. Each has the bits of the reference.

A contraction is one sum of products: a row of x by the weights of one output. ``make nightly`` runs all of them, the
test suite two graphs for each of three targets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright.codegen.c.toolchain import TOOLCHAINS
from bitwright.codegen.devices import library
from bitwright.codegen.devices.simulate import schedule, simulate
from bitwright.codegen.targets import BUILTIN, CROSS
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.small_float import format_of, round_small_float
from bitwright.ir.types import NM, S8, TensorType, parse_dtype, parse_type
from tests.test_bit_exact import available, requantized, sparse
from tests.test_devices import layer
from tests.test_devices_m7e4 import layer as float_layer

Array = np.ndarray[Any, Any]
Rng = np.random.Generator
GRAPHS, ROWS, OUTPUTS = 10, 1000, 10
LAYERS, FIT, WIDE = 20, 250, 20
"""The same for devices, whose memories are small."""
PATTERNS = (None, (2, 4), None, (1, 4), (4, 8), (1, 16))


def codes(rng: Rng, shape: tuple[int, ...], dtype: str, extreme: bool) -> Array:
    """Random codes, or only the smallest and largest."""
    t = parse_dtype(dtype)
    both = [t.lo, t.hi]
    return (rng.choice(both, shape) if extreme else rng.integers(t.lo, t.hi + 1, shape)).astype(t.numpy)


# --- machines and C ------------------------------------------------------------------------------------------


def program_graph(rng: Rng, number: int) -> tuple[Graph, Array]:
    """A linear layer of u8 by s8 codes, dense or masked, its sums in s32 and requantized to u8, and its input."""
    terms, pattern = int(rng.integers(1, 80)), PATTERNS[number % len(PATTERNS)]
    b = Builder(level="integer")
    x = b.input("x", parse_type(f"u8[{ROWS}, {terms}]"))
    w = sparse(codes(rng, (OUTPUTS, terms), "s8", number % 3 == 1), pattern).astype(np.int8)
    kept = NM(*pattern, 1) if pattern else None
    acc = b.emit(ops.IntLinear(x_zero=int(rng.integers(0, 256))), x, b.weight("w", w, TensorType(S8, w.shape, kept)))
    graph = b.finish([acc, requantized(b, acc, 1, rng)], ["sums", "codes"])
    return graph, codes(rng, (ROWS, terms), "u8", number % 3 == 2)


def on_machine(target: str, graph: Graph, x: Array) -> tuple[Array, ...]:
    program = bw.compile(graph, target=target)
    result = (bw.emulate(program) if target in CROSS else program)(x)
    return tuple(np.asarray(a) for a in result)


def on_c(chain: str, graph: Graph, x: Array) -> None:
    """The self-test carries the reference's bits."""
    program = bw.compile_c(graph, calibration=[(x,)])
    assert program.source.exact
    assert program.samples[0][0][0].shape == x.shape
    assert program.self_test(chain) == 0


def check_program(target: str, graphs: int) -> None:
    rng = np.random.default_rng(len(target))
    for number in range(graphs):
        graph, x = program_graph(rng, number)
        if target.startswith("c:"):
            on_c(target[2:], graph, x)
            continue
        for got, want in zip(on_machine(target, graph, x), evaluate(graph, [x]), strict=True):
            assert np.array_equal(got, to_numpy(want))


# --- devices -------------------------------------------------------------------------------------------------


def few(rng: Rng, shape: tuple[int, ...]) -> Array:
    """Rows of at most 16 different codes."""
    return np.stack([rng.choice(rng.integers(-127, 128, 16), shape[1]) for _ in range(shape[0])]).astype(np.int8)


def between(low: int, high: int) -> Callable[[Rng, tuple[int, ...]], Array]:
    return lambda rng, shape: rng.integers(low, high + 1, shape).astype(np.int8)


def signs(rng: Rng, shape: tuple[int, ...]) -> Array:
    return rng.choice([-1, 1], shape).astype(np.int8)


DEVICES: dict[str, list[tuple[str, str, Callable[[Rng, tuple[int, ...]], Array]]]] = {
    "npu8": [("u8", "s8", between(-128, 127))],
    "bitword": [("u8", "s8", between(-127, 127)), ("u8", "s4", between(-8, 7)), ("u8", "ternary", between(-1, 1))],
    "simd124": [("u8", "s4", between(-8, 7)), ("u8", "s2", between(-2, 1)), ("u8", "bipolar", signs)],
    "gxnor": [("ternary", "ternary", between(-1, 1))],
    "rram": [("u8", "s5", between(-8, 8)), ("u8", "s4", between(-7, 7))],
    "bnn-riscv": [("u1", "bipolar", signs), ("u2", "bipolar", signs)],
    "lut": [("u8", "s8", few), ("u4", "s8", few)],
    "m7e4": [("f4m3", "f4m3", between(0, 0)), ("f5m2", "f5m2", between(0, 0))],
}
"""Formats of x and w, and the weights that a device takes."""


def floats(rng: Rng, shape: tuple[int, ...], dtype: str) -> Array:
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-9, 5, shape)
    return np.asarray(round_small_float(x.astype(np.float32), *format_of(parse_dtype(dtype)), "nearest"))


def check_device(name: str, graphs: int) -> None:
    rng, device, formats = np.random.default_rng(len(name)), library.find_device(name), DEVICES[name]
    for number in range(graphs):
        terms, (x, w, make) = int(rng.integers(1, 150)), formats[number % len(formats)]
        if name == "m7e4":
            graph = float_layer(ops.SmallLinear(), floats(rng, (WIDE, terms), w), FIT, x)
            data = floats(rng, (FIT, terms), x)
        else:
            graph = layer(x, make(rng, (WIDE, terms)), w, rows=FIT)
            data = codes(rng, (FIT, terms), x, number % 3 == 2)
        (got,) = simulate(schedule(graph, device), [data])
        assert np.array_equal(got, to_numpy(evaluate(graph, [data])[0]))


# --- the sweep -----------------------------------------------------------------------------------------------

TARGETS = [*BUILTIN, *CROSS, "c:host", "c:aarch64", "c:riscv64", *DEVICES]


def sweep(target: str, graphs: int) -> None:
    if target in DEVICES:
        check_device(target, graphs)
        return
    if target in BUILTIN and target not in available():
        pytest.skip(f"this CPU cannot run {target}")
    chain = target[2:] if target.startswith("c:") else CROSS[target].arch if target in CROSS else "host"
    if why := TOOLCHAINS[chain].missing():
        pytest.skip(why)
    check_program(target, graphs)


def test_every_target_is_swept() -> None:
    assert set(DEVICES) == set(library.names())
    assert min(GRAPHS * ROWS * OUTPUTS, LAYERS * FIT * WIDE) >= 10**5


@pytest.mark.parametrize("target", ["x86-portable", "c:host", "bitword"])
def test_some(target: str) -> None:
    sweep(target, 2)


@pytest.mark.nightly
@pytest.mark.parametrize("target", TARGETS)
def test_a_hundred_thousand(target: str) -> None:
    sweep(target, LAYERS if target in DEVICES else GRAPHS)
