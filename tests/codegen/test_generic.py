"""The generic kernel against the interpreter: every operator, every number format."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright.codegen.targets import BUILTIN
from bitwright.codegen.tvm.adapter import build_object
from bitwright.codegen.tvm.generic import Generic
from bitwright.codegen.tvm.template import Refused
from bitwright.ir import ops
from bitwright.ir.types import S8, S32, S64, U8, dtype_of
from tests.codegen.kernel_batch import Array, Batch, Case, body_of, call, load

FLOATS = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
INTS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
ALL = [*FLOATS, *INTS, np.bool_]
TARGETS = ["x86-portable", "x86-avx512-vnni"]


class Maker:
    """Random arrays and one-operator cases."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.cases: list[Case] = []

    def array(self, *shape: int, dtype: Any = np.float32, special: bool = False) -> Array:
        """Normal floats (with NaN and infinities if ``special``), integers of the whole range of 8 bits."""
        d = np.dtype(dtype)
        if d.kind == "b":
            return self.rng.integers(0, 2, shape).astype(bool)
        if d.kind in "iu":
            return self.rng.integers(0 if d.kind == "u" else -20, 20, shape).astype(d)
        a = self.rng.standard_normal(shape).astype(np.float32)
        if special and a.size:
            flat = a.reshape(-1)
            for value in (np.nan, np.inf, -np.inf):
                flat[self.rng.integers(0, a.size)] = value
        return a.astype(d)

    def add(self, op: ops.Op, *arrays: Array, then: tuple[ops.Op, ...] = (), **options: Any) -> None:
        """A case of one operator, with unary operators behind it."""
        inputs = {f"x{i}": a for i, a in enumerate(arrays)}
        chain: list[tuple[ops.Op, Any]] = [(op, tuple(inputs))]
        chain += [(o, (f"v{k}",)) for k, o in enumerate(then)]
        kinds = ", ".join(f"{a.dtype}{list(a.shape)}" for a in arrays)
        self.cases.append(Case(f"{op} ({kinds})", body_of(*chain, inputs=inputs), inputs, **options))


def shape_cases(m: Maker) -> None:
    for dtype in ALL:
        x = m.array(3, 4, 5, dtype=dtype)
        m.add(ops.Transpose((2, 0, 1)), x)
        m.add(ops.Slice(1, 1, 4, 2), x)
        m.add(ops.Pad((0, 1, 2, 0, 0, 3), 1.0), x)
        m.add(ops.Concat(1), x, m.array(3, 1, 5, dtype=dtype), m.array(3, 2, 5, dtype=dtype))
    x = m.array(3, 4, 5)
    m.add(ops.Reshape((4, 15)), x)
    m.add(ops.Reshape((1, 60, 1)), x)
    m.add(ops.Reshape(()), m.array(1, 1))
    m.add(ops.Transpose(()), m.array())
    m.add(ops.Expand((2, 3, 4, 5)), m.array(3, 1, 5))
    m.add(ops.Expand((3, 1)), m.array())
    m.add(ops.Concat(-1), x)
    m.add(ops.Concat(0), x, m.array(0, 4, 5))
    m.add(ops.Concat(2), m.array(2, 1, 3), m.array(2, 1, 3))
    m.add(ops.Slice(2, 2, 3), x)
    m.add(ops.Slice(0, 1, 1), x)
    m.add(ops.Tile((2, 1, 3)), x)
    m.add(ops.Tile((2, 2, 1, 2)), x)
    m.add(ops.Flip((0, 2)), x)
    m.add(ops.Flip((-1,)), x)
    for mode in ("constant", "reflect", "edge", "wrap"):
        m.add(ops.Pad((2, 0, 1, 1, 3, 0), -2.0, mode), x)
        m.add(ops.Pad((7, 9), 0.0, mode), m.array(4))
        m.add(ops.Pad((3, 2), 0.0, mode), m.array(1))
    m.add(ops.Pad((0, 0, 0, 0)), m.array(2, 3))


def index_cases(m: Maker) -> None:
    for kind in (np.int32, np.int64):
        x = m.array(6, 4, 5)
        m.add(ops.Gather(0), x, m.rng.integers(-6, 6, (3, 2)).astype(kind))
        m.add(ops.Gather(1), x, m.rng.integers(-4, 4, (3,)).astype(kind))
        m.add(ops.Gather(-1), x, np.array(-2, kind))
        m.add(ops.GatherElements(1), x, m.rng.integers(-4, 4, (6, 7, 5)).astype(kind))
        m.add(ops.GatherElements(0), x, m.rng.integers(-6, 6, (2, 3, 4)).astype(kind))
        m.add(ops.GatherNd(), x, m.rng.integers(-4, 4, (3, 2)).astype(kind))
        m.add(ops.GatherNd(), x, m.rng.integers(-4, 4, (3, 2, 3)).astype(kind))
        m.add(ops.GatherNd(1), x, m.rng.integers(-4, 4, (6, 3, 1)).astype(kind))
    for dtype in ALL:
        x = m.array(6, 4, dtype=dtype)
        m.add(ops.Gather(0), x, m.rng.integers(-6, 6, (5,)))
        for how in ("none", "add", "mul", "min", "max"):
            if how != "none" and np.dtype(dtype).kind == "u" and np.dtype(dtype).itemsize > 1:
                continue  # torch has no such operator
            m.add(ops.ScatterElements(0, how), x, m.rng.integers(-6, 6, (5, 3)), m.array(5, 3, dtype=dtype))
            m.add(ops.ScatterNd(how), x, m.rng.integers(-4, 4, (5, 1)), m.array(5, 4, dtype=dtype))
    x, i = m.array(6, 4, 3, special=True), m.rng.integers(-3, 3, (5, 2))
    m.add(ops.ScatterNd("max"), x, i, m.array(5, 3, special=True), then=(ops.Unary("relu"),))
    m.add(ops.ScatterElements(-1, "min"), x, m.rng.integers(-3, 3, (6, 2, 3)), m.array(6, 2, 3, special=True))
    m.add(ops.ScatterElements(1), x, m.rng.integers(-3, 3, (6, 2, 3)), m.array(6, 2, 3), then=(ops.Cast(S32),))


def resize_cases(m: Maker) -> None:
    sizes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((7,), (11,)), ((5, 6), (10, 4)), ((3, 4, 5), (5, 4, 7))]
    spots = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    for (space, size), mode, spot in itertools.product(sizes, ("nearest", "linear", "cubic"), spots):
        scales = tuple(o / i for o, i in zip(size, space, strict=True))
        roundings = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil") if mode == "nearest" else ("floor",)
        for rounding in roundings if len(size) == 2 else roundings[:1]:
            m.add(ops.Resize(size, scales, mode, spot, rounding), m.array(2, 3, *space))
    for dtype in (*FLOATS, np.uint8, np.int8):
        m.add(ops.Resize((8, 3), (2.0, 0.5), "linear"), m.array(1, 2, 4, 6, dtype=dtype), steps=1)
        m.add(ops.Resize((8, 3), (2.0, 0.5), "nearest"), m.array(1, 2, 4, 6, dtype=dtype))


def reduce_cases(m: Maker) -> None:
    for fn, dtype in itertools.product(sorted(ops.REDUCE), ALL):
        if not reducible(fn, np.dtype(dtype)):
            continue
        x = m.array(3, 5, 4, dtype=dtype)
        if fn == "logsum":
            x = np.abs(x) if np.dtype(dtype).kind != "b" else x
        m.add(ops.Reduce(fn, (0, 2), True), x)
        if dtype in (np.float32, np.int8):
            m.add(ops.Reduce(fn, (1,)), x)
    for fn in ("sum", "mean", "max", "min", "prod", "l1", "l2", "logsumexp", "sumsq"):
        m.add(ops.Reduce(fn, (0, 1, 2)), m.array(3, 5, 4))
        m.add(ops.Reduce(fn, (-1,)), m.array(3, 7, special=True))
        m.add(ops.Reduce(fn, ()), m.array(3, 7))
        m.add(ops.Reduce(fn, ()), m.array())
        m.add(ops.Reduce(fn, (1,)), m.array(3, 1))
    for fn in ("sum", "mean", "prod"):
        m.add(ops.Reduce(fn, (1,)), m.array(3, 0))
    m.add(ops.Reduce("sum", (1,)), m.array(3, 20000))
    m.add(ops.Reduce("logsumexp", (0,)), np.array([[np.inf, -np.inf, 1], [1, -np.inf, np.nan]], np.float32))
    for fn, dtype, last in itertools.product(("argmax", "argmin"), ALL, (False, True)):
        if dtype in (np.uint16, np.uint32, np.uint64):
            continue  # torch has no argmax of these
        x = m.array(4, 9, dtype=dtype, special=True)
        m.add(ops.ArgReduce(fn, 1, False, last), x)
        m.add(ops.ArgReduce(fn, 0, True, last), x)
    m.add(ops.ArgReduce("argmax"), m.array())
    for dtype, exclusive, reverse in itertools.product(ALL, (False, True), (False, True)):
        if dtype in (np.bool_, np.uint16, np.uint32, np.uint64):
            continue
        m.add(ops.CumSum(1, exclusive, reverse), m.array(3, 6, 4, dtype=dtype))
    m.add(ops.CumSum(-1), m.array(70), then=(ops.Unary("relu"),))
    m.add(ops.CumSum(0, True), m.array(5, 3, special=True))


def reducible(fn: str, dtype: np.dtype[Any]) -> bool:
    """Whether torch has it (it lacks most for the wide unsigned formats)."""
    kind = dtype_of(dtype)
    if dtype.kind == "u" and dtype.itemsize > 1:
        return False
    if kind.kind == "bool":
        return fn in ("any", "all", "max", "min", "sum", "prod")
    return not (fn in ("any", "all") and kind.is_float) or fn in ("any", "all")


def topk_cases(m: Maker) -> None:
    for dtype, largest, k in itertools.product(ALL, (True, False), (1, 3, 20)):
        if dtype in (np.uint16, np.uint32, np.uint64):
            continue
        m.add(ops.TopK(k, 1, largest), m.array(2, 23, dtype=dtype, special=True))
        m.add(ops.TopK(min(k, 4), 0, largest), m.array(4, 3, dtype=dtype))
    m.add(ops.TopK(33, 0), np.round(m.array(33) * 2))
    m.add(ops.TopK(128, 1, False), np.round(m.array(2, 200) * 9))


def pool_cases(m: Maker) -> None:
    for dtype in (*FLOATS, np.uint8, np.int8, np.int32):
        for last in (False, True):
            x = m.array(*((2, 7, 6, 3) if last else (2, 3, 7, 6)), dtype=dtype)
            m.add(ops.MaxPool((3, 2), (2, 1), (1, 0, 1, 1), (), last), x)
            if np.dtype(dtype).kind not in "iu":
                m.add(ops.AvgPool((3, 2), (2, 2), (1, 0, 1, 1), (), False, last), x)
    m.add(ops.MaxPool((3, 2), (1, 2), (2, 1, 3, 2), (2, 3)), m.array(1, 2, 9, 8, special=True))
    m.add(ops.MaxPool((3,), (2,)), m.array(2, 3, 9))
    m.add(ops.MaxPool((2, 2, 2), (1, 2, 1), (0, 1, 0, 1, 0, 1)), m.array(1, 2, 4, 5, 3))
    for count, extra in itertools.product((False, True), ((), (1, 0))):
        m.add(ops.AvgPool((3, 3), (2, 2), (1, 1, 1, 1), extra, count), m.array(1, 2, 8, 9))
    m.add(ops.AvgPool((2, 2, 2), (2, 2, 2)), m.array(1, 2, 4, 5, 6))
    m.add(ops.AvgPool((4,), (3,), (2, 1)), m.array(1, 2, 10))


def contraction_cases(m: Maker) -> None:
    for dtype in ALL:
        x, w = m.array(2, 3, 7, dtype=dtype), m.array(5, 7, dtype=dtype)
        m.add(ops.Linear(), x, w)
        m.add(ops.Linear(), x, w, m.array(5, dtype=dtype))
        m.add(ops.MatMul(True), x, w)
        m.add(ops.MatMul(), m.array(2, 1, 3, 4, dtype=dtype), m.array(5, 4, 6, dtype=dtype))
    m.add(ops.MatMul(), m.array(3, 4), m.array(4))
    m.add(ops.MatMul(), m.array(4), m.array(2, 4, 3))
    m.add(ops.MatMul(), m.array(4), m.array(4))
    m.add(ops.Linear(), m.array(7), m.array(5, 7))
    m.add(ops.Linear(), m.array(2, 0), m.array(5, 0), m.array(5))
    m.add(ops.Linear(), m.array(2, 3000), m.array(4, 3000))
    for dtype in (*FLOATS, np.int32):
        m.add(
            ops.Conv((2, 1), (1, 0, 2, 1), (1, 2), 2),
            m.array(2, 4, 8, 7, dtype=dtype),
            m.array(6, 2, 3, 2, dtype=dtype),
        )
    for last in (False, True):
        for n in (1, 2, 3):
            space = (6, 5, 4)[:n]
            x = m.array(*((2, *space, 4) if last else (2, 4, *space)))
            m.add(ops.Conv((), (1,) * 2 * n, (), 1, last), x, m.array(3, 4, *(3,) * n), m.array(3))
            m.add(ops.Conv((2,) * n, (0,) * n + (2,) * n, (2,) * n, 4, last), x, m.array(8, 1, *(2,) * n))
            q = m.array(*x.shape, dtype=np.uint8)
            wide = {"x_zero": 3, "acc": S32, "channels_last": last, "groups": 2}
            m.add(ops.IntConv((1,) * n, (2,) * 2 * n, **wide), q, m.array(4, 2, *(2,) * n, dtype=np.int8))  # type: ignore[arg-type]
    for n in (1, 2, 3):
        x, space = m.array(2, 4, *(5, 4, 3)[:n]), (3, 2, 3)[:n]
        m.add(ops.ConvTranspose((2,) * n, (1,) * 2 * n, (), (), 1), x, m.array(4, 3, *space), m.array(3))
        m.add(ops.ConvTranspose((2,) * n, (0,) * 2 * n, (1,) * n, (), 2), x, m.array(4, 3, *space))
        m.add(ops.ConvTranspose((1,) * n, (1,) * n + (0,) * n, (), (2,) * n, 4), x, m.array(4, 1, *space))
    m.add(ops.ConvTranspose((3,), (), (2,)), m.array(1, 2, 4, dtype=np.float64), m.array(2, 3, 2, dtype=np.float64))
    for a, b in itertools.product((np.int8, np.uint8, np.int16), (np.int8, np.uint8)):
        for acc in (S32, S8, U8, S64):
            m.add(ops.IntLinear(5, acc), m.array(3, 9, dtype=a), m.array(4, 9, dtype=b))
        m.add(ops.IntMatMul(False, 3, -4), m.array(2, 3, 9, dtype=a), m.array(9, 4, dtype=b))
        m.add(ops.IntMatMul(True, 0, 128), m.array(2, 3, 9, dtype=a), m.array(1, 4, 9, dtype=b))


def norm_cases(m: Maker) -> None:
    for dtype in FLOATS:
        x = m.array(2, 6, 5, dtype=dtype)
        c, t, f = (m.array(*n, dtype=dtype) for n in ((6,), (5,), (6, 5)))
        m.add(ops.BatchNorm(), x, c, c, c, np.abs(c))
        m.add(ops.LayerNorm(), x)
        m.add(ops.LayerNorm(1, 1e-3), x, t, t)
        m.add(ops.LayerNorm(2), x, f, f)
        m.add(ops.RmsNorm(), x)
        m.add(ops.RmsNorm(2, 1e-2), x, f)
        m.add(ops.GroupNorm(3), x)
        m.add(ops.GroupNorm(2), m.array(2, 6, 3, 2, dtype=dtype), c, c)
        m.add(ops.GroupNorm(1), m.array(2, 6, dtype=dtype), c, c)
        for axis, log in itertools.product((0, 1, -1), (False, True)):
            m.add(ops.Softmax(axis, log), x)
        m.add(ops.Attention(0.3), *(m.array(2, 3, 4, dtype=dtype) for _ in range(3)))
    m.add(ops.Softmax(-1), m.array())
    m.add(ops.Softmax(1), m.array(3, 40, special=True))
    m.add(ops.LayerNorm(3), m.array(2, 3, 4))
    m.add(ops.LayerNorm(), m.array(4, 1))
    m.add(ops.LayerNorm(), m.array(3, 2000) * 100 + 500, atol=1e-4)
    q, k, v = m.array(2, 4, 5, 6), m.array(2, 2, 7, 6), m.array(2, 2, 7, 3)
    m.add(ops.Attention(0.5, True, 2), q, k, v)
    m.add(ops.Attention(0.5, False, 2), q, k, v, m.array(4, 5, 7))
    mask = m.array(5, 7, dtype=np.bool_)
    mask[:, 0] = True
    m.add(ops.Attention(0.5, True, 1), m.array(1, 4, 5, 6), m.array(7, 6), m.array(7, 2), mask)


def pointwise_cases(m: Maker) -> None:
    """Broadcasts of every kind; scales per tensor, axis and group."""
    for dtype in ALL:
        m.add(ops.Binary("max"), m.array(3, 1, 4, dtype=dtype), m.array(5, 1, dtype=dtype))
        m.add(ops.Where(), m.array(2, 1, dtype=np.bool_), m.array(3, dtype=dtype), m.array(dtype=dtype))
    for axis, group, shape in ((None, 0, ()), (1, 0, (6,)), (-1, 0, (1,)), (1, 2, (4, 3)), (0, 4, (1, 6))):
        scale = np.abs(m.array(*shape)) * 0.1 + 0.05
        zero = m.array(*shape, dtype=np.uint8)
        m.add(ops.Quantize(U8, axis, group), m.array(4, 6), scale, zero)
        m.add(ops.Dequantize(axis, group), m.array(4, 6, dtype=np.uint8), scale, zero)
        m.add(ops.Dequantize(axis, group), m.array(4, 6, dtype=np.int8), scale)
    acc = m.rng.integers(-(2**30), 2**30, (3, 4, 5)).astype(np.int32)
    for shape, axis in (((), None), ((4,), 1)):
        factor, shift = (m.rng.integers(a, b, shape).astype(np.int32) for a, b in ((2**29, 2**31 - 1), (50, 56)))
        m.add(ops.Requantize(S8, -3, axis), acc, np.asarray(factor), np.asarray(shift))


def fused_cases(m: Maker) -> None:
    """Pointwise and shape operators around the costly one; several outputs."""
    relu = ops.Unary("relu")
    x, w = m.array(3, 8), m.array(5, 8)
    inputs = {"x": x, "w": w, "r": m.array(2, 3, 5), "c": m.array(3, 1)}
    keep = {k: inputs[k] for k in ("x", "w")}
    add, mul = ops.Binary("add"), ops.Binary("mul")

    def case(label: str, body: Any, values: dict[str, Array]) -> None:
        m.cases.append(Case(label, body, values))

    case("prologue and epilogue", body_of((relu, "x"), (ops.Linear(), ("v0", "w")), (relu, ("v1",)), inputs=keep), keep)
    more = {k: inputs[k] for k in ("x", "w", "r")}
    case("residual that broadcasts", body_of((ops.Linear(), "xw"), (add, ("v0", "r")), inputs=more), more)
    for fn in ("sum", "max"):
        one = {"x": x}
        body = body_of((ops.Reduce(fn, (1,), True), "x"), (mul, ("v0", "x")), inputs=one, outputs=("v1",))
        case("reduce read back", body, one)
        body = body_of((ops.Reduce(fn, (0,)), "x"), (mul, ("v0", "x")), inputs=one, outputs=("v1", "v0"))
        case("two shapes of output", body, one)
    one = {"x": m.array(2, 3, 4)}
    body = body_of(
        (ops.Transpose((0, 2, 1)), "x"), (ops.Linear(), ("v0", "w")), (ops.Reshape((5, 8)), ("v1",)),
        inputs={**one, "w": m.array(5, 3)},
    )  # fmt: skip
    case("shapes around a contraction", body, {**one, "w": m.array(5, 3)})
    for op in (ops.Softmax(1), ops.LayerNorm(), ops.RmsNorm()):
        two = {"x": x, "s": m.array(2, 3, 8)}
        body = body_of((relu, "x"), (op, ("v0",)), (mul, ("v1", "s")), (add, ("v2", "v1")), inputs=two)
        case(f"{op} fused", body, two)
    body = body_of((ops.Softmax(1), "x"), (ops.Transpose((1, 0)), ("v0",)), inputs={"x": x})
    case("a view after softmax", body, {"x": x})
    body = body_of((ops.TopK(2), "x"), (relu, ("v0",)), inputs={"x": x}, outputs=("v2", "v1", "v0"))
    case("top k fused", body, {"x": x})
    body = body_of((ops.Slice(0, 1, 3), "x"), (ops.Concat(1), ("v0", "v0")), (ops.Flip((1,)), ("v1",)), inputs={"x": x})
    case("only shapes", body, {"x": x})
    body = body_of((ops.Tile((2, 2)), "x"), (ops.Pad((1, 0, 0, 2)), ("v0",)), (relu, ("v1",)), inputs={"x": x})
    case("tile, pad, relu", body, {"x": x})


def test_out_of_range_indices_read_inside() -> None:
    """What comes out is unspecified; nothing outside the operand is touched."""
    m = Maker(1)
    x, far = m.array(4, 3), np.array([2**40, -(2**40), 4, -5])
    for op, index in (
        (ops.Gather(0), far),
        (ops.GatherElements(0), np.stack([far] * 3, 1)),
        (ops.GatherNd(), far[:, None]),
    ):
        inputs = {"x": x, "i": index}
        body = body_of((op, "xi"), inputs=inputs)
        config = Generic().configure(body, {}, BUILTIN[TARGETS[0]])
        assert not isinstance(config, Refused)
        library = load(build_object([Generic().emit(body, config, "k")], "portable"))
        got = call(config, Generic(), body, inputs, library["k"])[0]
        assert np.isin(got, x).all()


def test_refusals() -> None:
    m = Maker(2)
    x = {"x": m.array(3, 3)}
    target = BUILTIN[TARGETS[0]]
    twice = body_of((ops.Softmax(), "x"), (ops.Reduce("sum", (1,)), ("v0",)), inputs=x)
    assert Generic().configure(twice, {}, target) == Refused("more than one costly operator")
    turned = body_of((ops.CumSum(), "x"), (ops.Transpose((1, 0)), ("v0",)), inputs=x)
    assert Generic().configure(turned, {}, target) == Refused("a shape operator follows cumsum")


FAMILIES: list[Callable[[Maker], None]] = [
    shape_cases, index_cases, resize_cases, reduce_cases, topk_cases, pool_cases, contraction_cases,
    norm_cases, pointwise_cases, fused_cases,
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_family(family: Callable[[Maker], None], target: str) -> None:
    m = Maker(0)
    family(m)
    cases = m.cases if target == TARGETS[0] else m.cases[1::5]  # what differs between targets is LLVM's part
    failures = Batch(Generic(), target, cases).run()
    assert not failures, f"{len(failures)} of {len(m.cases)}:\n" + "\n".join(failures[:40])
