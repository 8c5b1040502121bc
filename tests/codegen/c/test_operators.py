"""Every operator of the C back end against the reference, in one strict compilation; what it lacks is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.codegen.c.nests import unsupported
from bitwright.codegen.c.program import source_of
from bitwright.codegen.c.scalar import LIBM
from bitwright.ir import ops
from bitwright.ir.errors import Unsupported
from bitwright.ir.types import BOOL, F32, NM, S8, S16, S32, S64, U8, TensorType, parse_dtype
from tests.codegen.c.harness import Case, one_region, run

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(7)


def real(*shape: int, positive: bool = False) -> Array:
    a = RNG.standard_normal(shape).astype(np.float32)
    return np.abs(a) + np.float32(0.1) if positive else a


def codes(*shape: int, dtype: Any = np.uint8, lo: int = 0, hi: int = 255) -> Array:
    return RNG.integers(lo, hi + 1, shape).astype(dtype)


def signed(*shape: int) -> Array:
    """Weights over the whole range of s8."""
    return codes(*shape, dtype=np.int8, lo=-128, hi=127)


def case(op: ops.Op, *arrays: Array, then: tuple[ops.Op, ...] = (), tolerance: float = 2e-6) -> Case:
    inputs = {f"x{i}": a for i, a in enumerate(arrays)}
    chain = [(op, tuple(inputs)), *((o, (f"v{k}",)) for k, o in enumerate(then))]
    return Case(f"{op}", one_region(*chain, inputs=inputs), list(inputs.values()), tolerance)


def unary_cases() -> list[Case]:
    positive = {"log", "sqrt", "rsqrt", "reciprocal", "log1p"}
    names = set(LIBM) | {
        "relu", "neg", "abs", "square", "reciprocal", "rsqrt", "sigmoid", "silu", "softplus", "softsign", "hardswish",
        "hardsigmoid", "gelu", "gelu_tanh", "mish", "sign", "round", "isnan", "isinf",
    }  # fmt: skip
    out = []
    for fn in sorted(names):
        x = real(4, 33, positive=fn in positive)
        x = np.clip(x, -0.99, 0.99) if fn in ("asin", "acos", "tan") else x
        if fn in ("isnan", "isinf", "relu"):
            x[0, :3] = (np.nan, np.inf, -np.inf) if fn != "relu" else (1e30, -1e30, -0.0)
        if fn == "round":
            x = np.concatenate([x.reshape(-1), [0.5, 1.5, 2.5, -0.5, -1.5, 8388609.0, 1e30]]).astype(np.float32)
        out.append(case(ops.Unary(fn), x, tolerance=4e-6))
    out += [case(ops.Unary(fn), codes(40, dtype=np.int32, lo=-99, hi=99)) for fn in ("relu", "neg", "abs", "sign")]
    return out


def binary_cases() -> list[Case]:
    out = []
    for fn in ("add", "sub", "mul", "div", "min", "max", "eq", "lt", "ge", "pow"):
        out.append(case(ops.Binary(fn), real(3, 1, 5, positive=True), real(4, 5, positive=True)))
    for fn in ("add", "sub", "mul", "min", "max", "ne", "gt", "bitand", "bitor", "bitxor"):
        out.append(case(ops.Binary(fn), codes(7, 5, dtype=np.int32, hi=999), codes(5, dtype=np.int32, hi=99)))
    flags = codes(30, hi=1).astype(bool)
    out += [case(ops.Binary(fn), flags, flags[::-1].copy()) for fn in ("and", "or", "xor")]
    return out


def other_pointwise() -> list[Case]:
    wide = codes(6, 9, dtype=np.int32, lo=-(1 << 30), hi=(1 << 30) - 1)
    m, e = codes(9, dtype=np.int32, lo=1 << 29, hi=(1 << 31) - 1), codes(9, dtype=np.int32, lo=31, hi=60)
    ties = np.array([[-3 << 20, -(1 << 19), 1 << 19, 3 << 19]], np.int32)
    return [
        case(ops.Requantize(U8, 3, 1), wide, m, e),
        case(ops.Requantize(S8, 0, 1), wide, m, e),
        case(ops.Requantize(S32, 0), ties, np.array(1 << 11, np.int32), np.array(31, np.int32)),
        case(ops.Quantize(U8), real(50) * 9, np.array(0.05, np.float32), np.array(128, np.uint8)),
        case(ops.Quantize(S8, axis=1), real(5, 7) * 90, real(7, positive=True)),
        case(ops.Dequantize(axis=1), wide, real(9, positive=True)),
        case(ops.Dequantize(axis=1, group=3), codes(2, 9), real(2, 3, positive=True)),
        case(ops.Saturate(S8), wide), case(ops.Saturate(U8, lo=3, hi=200), codes(40, dtype=np.int32, lo=-9, hi=400)),
        case(ops.Cast(S8), codes(40, dtype=np.int32, lo=-999, hi=999)), case(ops.Cast(F32), wide),
        case(ops.Cast(S32), real(30) * 100), case(ops.Cast(BOOL), codes(30, hi=1)),
        case(ops.Cast(S16), codes(30, dtype=np.int64, lo=-99, hi=99)), case(ops.Clamp(-0.5, 0.25), real(30)),
        case(ops.LeakyRelu(0.2), real(30)), case(ops.Elu(1.2, 1.1, 0.9), real(30)),
        case(ops.Where(), codes(20, hi=1).astype(bool), real(20), real(20)),
    ]  # fmt: skip


def shape_cases() -> list[Case]:
    x = real(3, 4, 5)
    return [
        case(ops.Transpose((2, 0, 1)), x), case(ops.Reshape((5, 12)), x), case(ops.Reshape((3, 1, 4, 5)), x),
        case(ops.Expand((2, 3, 4, 5)), x), case(ops.Slice(1, 1, 4, 2), x), case(ops.Flip((0, 2)), x),
        case(ops.Tile((2, 1, 3)), x), case(ops.Concat(1), x, real(3, 2, 5), real(3, 1, 5)),
        case(ops.Pad((0, 1, 2, 1, 0, 1), 3.5), x), case(ops.Gather(1), x, codes(2, 2, dtype=np.int64, lo=-4, hi=3)),
        case(ops.Transpose((1, 0, 2)), x, then=(ops.Reshape((4, 15)), ops.Unary("relu"))),
    ]  # fmt: skip


def reduction_cases() -> list[Case]:
    x, image = real(3, 4, 50), real(2, 3, 9, 7)
    out = [case(ops.Reduce(fn, axes=(2,)), x) for fn in ("sum", "mean", "max", "min", "sumsq", "l2")]
    out += [case(ops.Reduce("sum", axes=(0, 2), keepdim=True), codes(3, 4, 5, dtype=np.int32, lo=-99, hi=99))]
    out += [
        case(ops.Softmax(-1), x), case(ops.Softmax(1, log=True), x), case(ops.LayerNorm(1), x, real(50), real(50)),
        case(ops.LayerNorm(2), x), case(ops.RmsNorm(1), x, real(50)),
        case(ops.GroupNorm(3), real(2, 6, 5, 4), real(6), real(6)),
        case(ops.MaxPool((3, 2), (2, 1), (1, 0, 1, 1)), image),
        case(ops.MaxPool((2, 2), (2, 2), channels_last=True), codes(1, 6, 8, 5)),
        case(ops.AvgPool((3, 3), (2, 2), (1, 1, 1, 1)), image),
        case(ops.AvgPool((3, 3), (2, 2), (1, 1, 1, 1), count_padding=False), image),
        case(ops.AvgPool((2, 2), (2, 2), (), (1, 1)), image),
        case(ops.Resize((18, 14), (2.0, 2.0)), image), case(ops.Resize((5, 11), (0.6, 1.6), "linear"), image),
        case(ops.Attention(0.3), real(2, 4, 5, 8), real(2, 4, 6, 8), real(2, 4, 6, 3)),
        case(ops.Attention(0.3, causal=True, kv_groups=2), real(1, 4, 6, 8), real(1, 2, 6, 8), real(1, 2, 6, 8)),
        case(ops.Attention(0.3), real(2, 2, 5, 8), real(2, 2, 5, 8), real(2, 2, 5, 8), codes(5, 5, hi=1) > 0),
        case(ops.Attention(0.3), real(2, 2, 5, 8), real(2, 2, 5, 8), real(2, 2, 5, 8), real(2, 1, 5, 5)),
    ]  # fmt: skip
    out[-2].inputs[3][:, 0] = True  # a row that attends to nothing is NaN everywhere
    return out


def weighted(op: ops.Op, x: Array, w: Array, dtype: str, nm: NM | None = None, bias: Array | None = None) -> Case:
    weights = {"w": (w, TensorType(parse_dtype(dtype), w.shape, nm))}
    names = ["x", "w"]
    if bias is not None:
        weights["b"] = (bias, TensorType(F32, bias.shape))
        names.append("b")
    graph = one_region((op, tuple(names)), inputs={"x": x}, weights=weights)
    return Case(f"{op} {dtype} {nm}", graph, [x], 2e-6)


def contraction_cases() -> list[Case]:
    x, image, last = codes(5, 21), codes(2, 6, 9, 8), codes(2, 9, 8, 6)
    out = [weighted(ops.IntLinear(x_zero=z), x, signed(7, 21), "s8") for z in (0, 113)]
    for d, (lo, hi) in {"s4": (-8, 7), "s2": (-2, 1), "ternary": (-1, 1)}.items():
        w = codes(7, 21, dtype=np.int8, lo=lo, hi=hi)
        out.append(weighted(ops.IntLinear(x_zero=9), x, w, d))
        out.append(weighted(ops.IntConv(padding=(1, 1, 1, 1), channels_last=True), last, codes(
            5, 6, 3, 3, dtype=np.int8, lo=lo, hi=hi), d))  # fmt: skip
        depthwise = codes(6, 1, 3, 3, dtype=np.int8, lo=lo, hi=hi)
        out.append(
            weighted(ops.IntConv(padding=(1, 1, 1, 1), groups=6, channels_last=True, x_zero=4), last, depthwise, d)
        )
    out.append(weighted(ops.IntLinear(), x, RNG.choice([-1, 1], (7, 21)).astype(np.int8), "bipolar"))
    for keep, group in ((2, 4), (1, 4), (4, 8), (1, 16), (3, 5)):
        w = signed(7, 21)
        conv = signed(4, 6, 3, 3)
        for a in (w, conv):
            for c in range(a.shape[1]):
                a[:, c][np.broadcast_to(c % group >= keep, a[:, c].shape)] = 0
        out.append(weighted(ops.IntLinear(x_zero=7), x, w, "s8", NM(keep, group, 1)))
        out.append(
            weighted(ops.IntConv(padding=(1, 0, 0, 1), channels_last=True), last, conv, "s8", NM(keep, group, 1))
        )
    odd = ops.IntConv(stride=(2, 1), padding=(2, 1, 2, 1), dilation=(2, 1), x_zero=3)
    up = ops.ConvTranspose(stride=(2, 2), padding=(1, 1, 1, 1))
    grouped_up = ops.ConvTranspose(stride=(2, 1), groups=2, output_padding=(1, 0))
    small = real(1, 4, 5, 5)
    out += [
        weighted(odd, image, signed(4, 6, 3, 3), "s8"),
        weighted(ops.IntConv(groups=2), image, signed(8, 3, 2, 2), "s8"),
        weighted(ops.Linear(), real(4, 30), real(6, 30), "f32", bias=real(6)),
        weighted(ops.Conv(padding=(1, 1, 1, 1)), real(1, 3, 6, 6), real(4, 3, 3, 3), "f32", bias=real(4)),
        weighted(up, small, real(4, 3, 4, 4), "f32", bias=real(3)),
        weighted(grouped_up, small, real(4, 3, 3, 3), "f32"),
        case(ops.MatMul(), real(2, 3, 4, 8), real(3, 8, 5)),
        case(ops.MatMul(transpose_b=True), real(4, 8), real(5, 8)),
        case(ops.IntMatMul(a_zero=3, b_zero=-2), codes(2, 4, 8), signed(2, 8, 5)),
    ]  # fmt: skip
    return out


@pytest.mark.parametrize(
    "made", [unary_cases, binary_cases, other_pointwise, shape_cases, reduction_cases, contraction_cases]
)
def test_results_are_the_references(made: Any, tmp_path: Path) -> None:
    assert run(made(), tmp_path) == []


def test_extremes_of_every_width_are_exact(tmp_path: Path) -> None:
    """All-largest operands of both signs, where an accumulator or an unsigned field would go wrong first."""
    cases = []
    for d, (lo, hi) in {"s8": (-128, 127), "s4": (-8, 7), "s2": (-2, 1)}.items():
        for value in (lo, hi):
            for x in (0, 255):
                w, a = np.full((3, 64), value, np.int8), np.full((2, 64), x, np.uint8)
                cases.append(weighted(ops.IntLinear(x_zero=255 - x), a, w, d))
    assert run(cases, tmp_path) == []


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_words_are_counted_exactly(bits: int, tmp_path: Path) -> None:
    """Bipolar and ternary weights by bit planes, at sizes that fill no word (arXiv:1912.12636: all nine products)."""
    cases = []
    for k in (1, 7, 33, 65, 288):
        for dtype in ("bipolar", "ternary"):
            values = [-1, 1] if dtype == "bipolar" else [-1, 0, 1]
            x = parse_dtype(f"u{bits}")
            a = codes(4, k, hi=x.hi)
            a[0], a[1] = 0, x.hi
            w = RNG.choice(values, (5, k)).astype(np.int8)
            w[0], w[1] = 1, -1
            image, kernel = codes(1, 5, 6, k, hi=x.hi), RNG.choice(values, (3, k, 2, 3)).astype(np.int8)
            for op, given, weight in (
                (ops.IntLinear(), a, w), (ops.IntLinear(x_zero=x.hi), a, w),
                (ops.IntConv(padding=(1, 1, 0, 1), stride=(2, 1), x_zero=1, channels_last=True), image, kernel),
            ):  # fmt: skip
                cases.append(narrow(weighted(op, given, weight, dtype), x))
    assert run(cases, tmp_path) == []
    forms = {f for c in cases for call in source_of(c.graph).calls for f in call.forms}
    assert any("counted" in f for f in forms)
    assert all("counted" in f for f in forms) == (bits <= 2)


def narrow(c: Case, x: Any) -> Case:
    """The case with its input typed as ``x``."""
    from dataclasses import replace

    from bitwright.ir.graph import Value

    (node,) = (n for n in c.graph.nodes if isinstance(n.op, ops.Region))
    assert isinstance(node.op, ops.Region)
    t = c.graph.inputs[0].type.with_dtype(x)
    body = replace(node.op.body, inputs=(Value("x", t), *node.op.body.inputs[1:]))
    changed = replace(node, op=replace(node.op, body=body))
    nodes = tuple(changed if n is node else n for n in c.graph.nodes)
    return Case(c.label, replace(c.graph, inputs=(Value("x", t),), nodes=nodes), c.inputs)


def test_what_is_missing_is_told_with_its_place() -> None:
    graph = one_region((ops.CumSum(0), ("x",)), inputs={"x": real(4)})
    with pytest.raises(Unsupported, match="cumsum"):
        source_of(graph)
    half = one_region((ops.Unary("relu"), ("x",)), inputs={"x": real(4).astype(np.float16)}).nodes[0].op
    assert isinstance(half, ops.Region)
    assert unsupported(half.body) == ["C99 has no number format f16"]


def test_two_sums_in_a_region_become_two_functions(tmp_path: Path) -> None:
    x = real(3, 8)
    graph = one_region((ops.Softmax(-1), ("x",)), (ops.Reduce("sum", axes=(1,)), ("v0",)), inputs={"x": x})
    assert len(source_of(graph).calls) == 2
    assert run([Case("two", graph, [x])], tmp_path) == []


def test_equal_layers_share_a_function() -> None:
    from bitwright.ir.build import Builder

    b = Builder("twice", "kernel")
    v = b.input("x", TensorType(S64, (4,)))
    for k in range(2):
        inner = Builder("body", "kernel")
        inner.input("a", TensorType(S64, (4,)))
        body = inner.finish([inner.emit(ops.Unary("neg"), "a", name="y")])
        v = b.emit_all(ops.Region(body), v, names=(f"r{k}",))[0]
    source = source_of(b.finish([v]))
    assert (len(source.functions), len(source.calls)) == (1, 2)
