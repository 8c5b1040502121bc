"""The template: which sparse contractions it takes, with their epilogues, against the reference interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.tvm.lanes.template import Lanes, LanesConfig
from bitwright.codegen.tvm.select import choose
from bitwright.codegen.tvm.template import Refused, canonical
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.target import Isa, Target
from bitwright.ir.types import parse_type
from tests.codegen.harness import Kernel, runnable

Array = np.ndarray[Any, Any]


def on(isa: Isa) -> Target:
    return next(t for t in BUILTIN.values() if t.isa == isa)


def linear(rows: int, outputs: int, inputs: int, encoding: str, integer: bool = True) -> Graph:
    """A linear layer, with zero point, addition and ReLU or requantization."""
    b = Builder("body")
    kind, shape = ("u8", "s8") if integer else ("f32", "f32"), f"[{outputs}, {inputs}]"
    x = b.input("x", parse_type(f"{kind[0]}[{rows}, {inputs}]"))
    w = b.input("w", parse_type(f"{kind[1]}{shape} {encoding}"))
    if not integer:
        bias, skip = b.input("b", parse_type(f"f32[{outputs}]")), b.input("s", parse_type(f"f32[{rows}, {outputs}]"))
        y = b.emit(ops.Binary("add"), b.emit(ops.Linear(), x, w, bias), skip)
        return b.finish([b.emit(ops.Unary("relu"), y)])
    multiplier, shift = b.input("m", parse_type(f"s32[{outputs}]")), b.input("e", parse_type(f"s32[{outputs}]"))
    return b.finish(
        [b.emit(ops.Requantize(parse_type("u8[1]").dtype, 3, 1), b.emit(ops.IntLinear(9), x, w), multiplier, shift)]
    )


def weights(outputs: int, inputs: int, share: float, block: int, shared: int, integer: bool, seed: int = 0) -> Array:
    """Whole blocks kept at random, the same ones for ``shared`` outputs."""
    rng = np.random.default_rng(seed)
    kept = rng.random((outputs // shared, inputs // block)) < share
    values = rng.integers(-90, 91, (outputs, inputs)) if integer else rng.standard_normal((outputs, inputs))
    out: Array = values * np.repeat(np.repeat(kept, shared, 0), block, 1)
    return out.astype(np.int8 if integer else np.float32)


def of_pattern(outputs: int, inputs: int, keep: int, group: int, block: int, shared: int, integer: bool) -> Array:
    rng = np.random.default_rng(keep)
    order = rng.random((outputs // shared, inputs // (group * block), group)).argsort(-1) < keep
    kept = np.repeat(np.repeat(order.reshape(outputs // shared, -1), shared, 0), block, 1)
    return (weights(outputs, inputs, 1.0, 1, 1, integer) * kept).astype(np.int8 if integer else np.float32)


def inputs_of(body: Graph, weight: Array) -> list[Array]:
    rng = np.random.default_rng(5)
    made: list[Array] = []
    for v in body.inputs:
        t = v.type
        if v.name == "w":
            made.append(weight)
        elif v.name[0] == "m":
            made.append(rng.integers(1 << 20, 1 << 21, t.static_shape).astype(np.int32))
        elif v.name[0] == "e":
            made.append(np.full(t.static_shape, 30, np.int32))
        elif t.dtype.is_integer:
            made.append(rng.integers(0, 256, t.static_shape).astype(t.dtype.numpy))
        else:
            made.append(rng.standard_normal(t.static_shape).astype(np.float32))
    return made


def run(body: Graph, weight: Array, isa: Isa, constant: str = "wbme") -> LanesConfig:
    """Compile, run in three ranges and compare; the configuration."""
    if not runnable(isa):
        pytest.skip(f"this machine has no {isa}")
    values = inputs_of(body, weight)
    held = {v.name: a for v, a in zip(body.inputs, values, strict=True) if v.name in constant}
    kernel = Kernel(Lanes(), body, replace(on(isa), sparse=()), held)  # whatever else the target has for the pattern
    got = kernel(values, ranges=3)[0]
    want = to_numpy(evaluate(body, values)[0])
    if want.dtype.kind in "iu":
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert isinstance(kernel.config, LanesConfig)
    return kernel.config


@pytest.mark.parametrize("isa", ["avx512-vnni", "avx-vnni", "avx2"])
def test_integer_blocks_shared_by_four_outputs(isa: Isa) -> None:
    body = linear(61, 72, 128, "nm<1:4, axis=1, shared=4, block=4>")
    config = run(body, of_pattern(72, 128, 1, 4, 4, 4, True), isa)
    assert config.tile.counts
    assert "25.0% of blocks of 4" in config.reason
    assert "a fixed count" in config.reason


@pytest.mark.parametrize("isa", ["avx512-vnni", "avx2", "portable"])
def test_unstructured_floats_with_bias_skip_and_relu(isa: Isa) -> None:
    config = run(linear(33, 70, 131, "unstructured<0 per 0>", False), weights(70, 131, 0.1, 1, 1, False), isa)
    assert config.tile.counts == ()
    assert "row pointers" in config.reason


def test_a_fixed_count_needs_no_pointers() -> None:
    config = run(
        linear(32, 64, 256, "unstructured<2 per 16, axis=1>", False),
        of_pattern(64, 256, 2, 16, 1, 1, False),
        "avx512-vnni",
    )
    assert config.tile.counts == (32, 0)


@pytest.mark.parametrize("layout", ["1x1", "3x3"])
def test_convolutions_of_blocks(layout: str) -> None:
    b = Builder("body")
    x = b.input("x", parse_type("u8[2, 9, 7, 24]"))
    k = 1 if layout == "1x1" else 3
    w = b.input("w", parse_type(f"s8[40, 24, {k}, {k}] unstructured<0 per 0, axis=1, block=4>"))
    pad = (0,) * 4 if k == 1 else (1,) * 4
    op = ops.IntConv(stride=(1, 1), padding=pad, dilation=(1, 1), groups=1, x_zero=7, channels_last=True)
    body = b.finish([b.emit(op, x, w)])
    weight = weights(40 * k * k, 24, 0.2, 4, 1, True).reshape(40, k, k, 24).transpose(0, 3, 1, 2)
    run(body, np.ascontiguousarray(weight), "avx512-vnni")


def refused(body: Graph, weight: Array, target: Target) -> str:
    plain = canonical(body)
    values = {v.name: a for v, a in zip(plain.inputs, inputs_of(body, weight), strict=True) if v.name != "i0"}
    made = Lanes().configure(plain, values, target)
    assert isinstance(made, Refused)
    return made.reason


ANY = "unstructured<0 per 0>"
SPARSE = weights(64, 64, 0.1, 4, 1, True)
REFUSED: list[tuple[str, Graph, Array, Isa]] = [
    ("no contraction with sparse weights", linear(50, 64, 64, ""), SPARSE, "avx512-vnni"),
    ("15 rows do not fill", linear(15, 64, 64, ANY), SPARSE, "avx512-vnni"),
    ("62 channels are no multiple of 4", linear(50, 64, 62, ANY), SPARSE[:, 2:], "avx512-vnni"),
    ("dense is as fast", linear(50, 64, 64, ANY), weights(64, 64, 0.9, 4, 1, True), "avx512-vnni"),
    ("is expected to gain", linear(50, 64, 64, "nm<2:4, axis=1>"), of_pattern(64, 64, 2, 4, 1, 1, True), "avx512-vnni"),
    ("portable code", linear(50, 64, 64, ANY), SPARSE, "portable"),
]


@pytest.mark.parametrize(("why", "body", "weight", "isa"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refusals_say_why(why: str, body: Graph, weight: Array, isa: Isa) -> None:
    assert why in refused(body, weight, on(isa))


def test_packed_weights_that_differ_are_found() -> None:
    body = canonical(linear(32, 64, 64, "unstructured<0 per 0>"))
    values = dict(
        zip(
            (v.name for v in body.inputs),
            inputs_of(linear(32, 64, 64, ""), weights(64, 64, 0.1, 4, 1, True)),
            strict=True,
        )
    )
    made = Lanes().configure(body, values, on("avx512-vnni"))
    assert isinstance(made, LanesConfig)
    packed = Lanes().pack(body, made, values)
    assert Lanes().verify(body, made, values, packed) == ""
    packed[0].reshape(-1)[0] += 1
    assert Lanes().verify(body, made, values, packed) == "the packed weights do not unpack to the weights"


def test_selection_prefers_it_and_says_what_ran() -> None:
    body = linear(64, 64, 128, "nm<1:8, axis=1, shared=4, block=4>")
    values = dict(
        zip((v.name for v in body.inputs), inputs_of(body, of_pattern(64, 128, 1, 8, 4, 4, True)), strict=True)
    )
    made = choose(body, {k: v for k, v in values.items() if k != "x"}, on("avx512-vnni"))
    assert not isinstance(made, list)
    assert made.template == "lanes"
