"""Every operator of the graph level, written as ONNX and run by onnxruntime, against its meaning."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings

from bitwright.frontends.onnx import load_onnx, to_onnx
from bitwright.frontends.onnx.write import HANDLERS
from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.errors import Unsupported
from bitwright.ir.graph import Graph
from bitwright.ir.interpret import evaluate, to_numpy
from bitwright.ir.types import BOOL, F32, S32, S64, U8, DType, TensorType, integer
from tests.frontends.onnx_cases import CASES, Case
from tests.frontends.test_onnx_operators import compare, reference
from tests.frontends.test_onnx_write import Array, run
from tests.random_graphs import graphs

pytestmark = pytest.mark.filterwarnings("ignore")
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_an_imported_operator_is_written_and_computes_the_same(case: Case) -> None:
    want = reference(case)
    for symbolic in (False, True):
        try:
            graph = load_onnx(case.model(symbolic=symbolic))
        except Unsupported:
            assert symbolic
            continue
        model = to_onnx(graph)
        onnx.checker.check_model(model, full_check=True)
        compare(case, run(model, list(case.inputs.values())), want)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs())
def test_random_graphs(drawn: tuple[Graph, list[Array]]) -> None:
    graph, inputs = drawn
    model = to_onnx(graph)
    for w, h in zip(evaluate(graph, inputs), run(model, inputs), strict=True):
        np.testing.assert_allclose(h, to_numpy(w), rtol=1e-3, atol=1e-4)


def check(op: ops.Op, *inputs: Array, dtypes: tuple[DType, ...] = (), tolerance: float = 1e-5) -> onnx.ModelProto:
    """One operator on data; gives the model."""
    b = Builder("one")
    kinds = dtypes or tuple({"f": F32, "b": BOOL, "u": U8}.get(a.dtype.kind, S64) for a in inputs)
    values = [b.input(f"x{i}", TensorType(d, a.shape)) for i, (a, d) in enumerate(zip(inputs, kinds, strict=True))]
    graph = b.finish([b.emit(op, *values)], ["y"])
    model = to_onnx(graph)
    onnx.checker.check_model(model, full_check=True)
    (want,), (have,) = evaluate(graph, list(inputs)), run(model, list(inputs))
    assert have.shape == tuple(want.shape)
    np.testing.assert_allclose(have, to_numpy(want), rtol=tolerance, atol=tolerance)
    return model


REALS = np.array([-3.5, -2.5, -1.0, -0.5, -0.3, -1e-4, 0.0, 1e-4, 0.4, 0.5, 1.5, 2.5, 20.0], np.float32)
DOMAIN = {
    "acos": (-1, 1), "asin": (-1, 1), "atanh": (-1, 1), "acosh": (1, 99), "log": (1e-9, 99), "sqrt": (0, 99),
    "rsqrt": (1e-9, 99), "log1p": (-0.999, 99), "reciprocal": (1e-9, 99),
}  # fmt: skip


@pytest.mark.parametrize("fn", sorted(ops.UNARY - {"not", "bitnot"}))
def test_unary(fn: str) -> None:
    lo, hi = DOMAIN.get(fn, (-99, 99))
    check(ops.Unary(fn), REALS[(REALS > lo) & (REALS < hi)])


@pytest.mark.parametrize("fn", ["log1p", "expm1"])
def test_small_arguments_keep_their_digits(fn: str) -> None:
    b = Builder("one")
    x = np.array([1e-7, -1e-6, 3e-5, 0.499, 0.501, -0.499, -0.501], np.float32)
    graph = b.finish([b.emit(ops.Unary(fn), b.input("x", TensorType(F32, x.shape)))], ["y"])
    np.testing.assert_allclose(run(to_onnx(graph), [x])[0], getattr(np, fn)(x.astype(np.float64)), rtol=1e-6)


def test_unary_of_other_formats() -> None:
    rng = np.random.default_rng(0)
    check(ops.Unary("not"), rng.random((4,)) > 0.5)
    check(ops.Unary("bitnot"), rng.random((4,)) > 0.5)
    check(ops.Unary("bitnot"), rng.integers(-9, 9, 5))
    check(ops.Unary("relu"), rng.integers(-9, 9, 5).astype(np.int32), dtypes=(S32,))


KINDS = {
    "real": [fn for fn in sorted(ops.BINARY) if not fn.startswith("bit")],
    "whole": sorted(ops.BINARY),
    "bool": "add mul max min eq ne bitand bitor bitxor".split(),
}


@pytest.mark.parametrize(
    ("kind", "fn"),
    [(k, fn) for k, fns in KINDS.items() for fn in fns if fn not in ("shl", "shr", "atan2", "and", "or", "xor")],
)
def test_binary(kind: str, fn: str) -> None:
    a, b = np.array([7, -7, 6, -6, 5, 0]), np.array([3, 3, -3, -4, 5, 2])
    if kind == "bool":
        a, b = a > 0, b > 2
    elif fn == "pow":
        a, b = np.abs(a) + 1, np.abs(b)
    if kind == "real":
        a, b = a.astype(np.float32) + np.float32(0.25), b.astype(np.float32)
    check(ops.Binary(fn), a, b)


def test_logic_and_shifts() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((4, 1)) > 0.5, rng.random((3,)) > 0.5
    for fn in ("and", "or", "xor"):
        check(ops.Binary(fn), a, b)
        check(ops.Binary(fn), a * 3, b * 2)
    for fn in ("shl", "shr"):
        check(ops.Binary(fn), np.array([1, 200, 255], np.uint8), np.array([1, 2, 7], np.uint8))


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


X = normal(2, 4, 9, 8)
INDEX = np.array([[2, -1], [0, 1]])


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        (ops.AvgPool((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), True), (X,)),
        (ops.AvgPool((3, 3), (2, 2), (1, 0, 1, 1), (0, 1), False), (X,)),
        (ops.AvgPool((3, 3), (2, 2), (1, 1, 1, 1), (), True), (X,)),
        (ops.MaxPool((3, 2), (2, 2), (1, 1, 0, 0), (2, 1)), (X,)),
        (ops.LayerNorm(2, 1e-3), (X,)), (ops.LayerNorm(1), (X, X[0, 0, 0])), (ops.RmsNorm(2), (X,)),
        (ops.GroupNorm(2), (X,)), (ops.GroupNorm(2), (X, X[0, :, 0, 0])), (ops.Softmax(1, True), (X,)),
        (ops.Reduce("any", (1,)), (X > 1,)), (ops.Reduce("all", (-1, 0), True), (X > -2,)), (ops.Reduce("sum"), (X,)),
        *((ops.Reduce(fn, (1, -1)), (np.abs(X) + 0.1,)) for fn in sorted(ops.REDUCE - {"any", "all"})),
        (ops.ArgReduce("argmax", 1, True, True), (X,)), (ops.ArgReduce("argmin", -1), (X > 0,)),
        (ops.CumSum(2, True, True), (X,)), (ops.Flip((1, 3)), (X,)), (ops.Tile((1, 2, 1, 3)), (X,)),
        (ops.Pad((0, 1, 2, 0, 0, 0, 1, 3), 2.5), (X,)), (ops.Pad((0, 0, 2, 1, 0, 0, 1, 3), 0, "reflect"), (X,)),
        (ops.Pad((0, 0, 2, 1, 0, 0, 1, 3), 0, "edge"), (X,)), (ops.Pad((0, 0, 2, 1, 0, 0, 1, 3), 0, "wrap"), (X,)),
        (ops.Clamp(-1.0), (X,)), (ops.Clamp(-1.0, 2.0), (INDEX,)), (ops.Clamp(), (X,)), (ops.LeakyRelu(0.2), (X,)),
        (ops.Elu(0.5), (X,)), (ops.Elu(1.6, 1.05), (X,)), (ops.Elu(0.7, 1.0, 0.7), (X,)),
        (ops.Where(), (X > 0, X, X * 2)), (ops.Gather(1), (X, INDEX)), (ops.GatherNd(0), (X, INDEX % 2)),
        (ops.GatherElements(0), (X[:, :2, 0, 0], INDEX % 2)), (ops.ScatterNd("add"), (X, INDEX % 2, X[:, 0])),
        (ops.ScatterElements(1, "max"), (X[:, :, 0, 0], INDEX, X[:, :2, 0, 0])),
        (ops.Slice(2, 1, 8, 3), (X,)), (ops.Cast(BOOL), (X,)), (ops.Cast(S32), (X * 9,)), (ops.Reshape((8, 72)), (X,)),
        (ops.Reshape((0, 5)), (X[:0],)), (ops.Expand((3, 2, 4)), (X[:, :, 0, 0],)),
        (ops.Linear(), (X[0], X[0, 0])), (ops.Linear(), (X[0, 0], X[0, 0], X[0, 0, :, 0])),
        (ops.MatMul(), (X, X[0, 0].T.copy())), (ops.MatMul(True), (X, X)),
        (ops.Conv((2, 1), (1, 0, 2, 1), (1, 2), 2), (X, normal(6, 2, 3, 2), X[0, 0, 0, :6])),
        (ops.ConvTranspose((2, 3), (1, 0, 1, 1), (1, 1), (1, 1), 2), (X, normal(4, 3, 3, 3))),
        (ops.BatchNorm(1e-3), (X, *np.abs(X[0, :, :4, 0]))),
        (ops.Resize((18, 4), (2.0, 0.5), "linear"), (X,)), (ops.Resize((13, 11), (1.5, 1.4), "linear"), (X,)),
        (ops.Resize((5, 20), (5 / 9, 2.5), "cubic", "align_corners"), (X,)),
        (ops.Resize((18, 16), (2.0, 2.0), "nearest", "asymmetric"), (X,)),
        (ops.Attention(0.4, True, 2), (X, X[:, :2], X[:, :2])), (ops.Attention(0.4), (X, X, X, X[0, 0, :, :1] < 1)),
        (ops.Attention(0.4), (X, X, X, normal(9, 9))),
    ],
    ids=lambda v: v.spelling if isinstance(v, ops.Op) else "",
)  # fmt: skip
def test_operator(op: ops.Op, inputs: tuple[Array, ...]) -> None:
    check(op, *inputs, tolerance=1e-4)


def test_topk_gives_values_and_indices() -> None:
    rng = np.random.default_rng(0)
    b = Builder("one")
    x = b.input("x", TensorType(F32, (4, 9)))
    values, indices = b.emit_all(ops.TopK(3, 1), x)
    graph = b.finish([values, indices], ["v", "i"])
    data = np.round(rng.standard_normal((4, 9)) * 2).astype(np.float32)
    for h, w in zip(run(to_onnx(graph), [data]), evaluate(graph, [data]), strict=True):
        assert np.array_equal(h, to_numpy(w))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8, 12, 16])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("layout", ["tensor", "axis", "group"])
def test_activations_of_any_width(bits: int, signed: bool, layout: str) -> None:
    """Codes that leave the model, and codes that only a dequantize reads."""
    dtype = integer(bits, signed)
    axis, group = {"tensor": (None, 0), "axis": (1, 0), "group": (1, 2)}[layout]
    shape = {"tensor": (), "axis": (8,), "group": (3, 4)}[layout]
    rng = np.random.default_rng(bits)
    x = (rng.standard_normal((3, 8)) * 3).astype(np.float32)
    scale = rng.uniform(0.2, 0.6, shape).astype(np.float32)
    zero = np.full(shape, (dtype.lo + dtype.hi) // 2, dtype.numpy)
    b = Builder("q")
    s = b.constant(scale, TensorType(F32, shape))
    z = b.constant(zero, TensorType(dtype, shape))
    v = b.input("x", TensorType(F32, x.shape))
    q = b.emit(ops.Quantize(dtype, axis, group), v, s, z)
    q2 = b.emit(ops.Quantize(dtype, axis, group), v, s)
    graph = b.finish(
        [b.emit(ops.Dequantize(axis, group), q, s, z), b.emit(ops.Dequantize(axis, group), q2, s), q], ["y", "u", "q"]
    )
    for outputs in (graph, Graph(graph.name, graph.inputs, graph.nodes, graph.outputs[:2], ("y", "u")).drop_dead()):
        model = to_onnx(outputs)
        onnx.checker.check_model(model, full_check=True)
        for h, w in zip(run(model, [x]), evaluate(outputs, [x]), strict=True):
            np.testing.assert_allclose(h, to_numpy(w), rtol=1e-6)
        if bits == 4:
            types = {t.data_type for t in model.graph.initializer}
            assert onnx.TensorProto.INT4 in types or onnx.TensorProto.UINT4 in types


def test_small_floats_are_written_as_their_values() -> None:
    rng = np.random.default_rng(0)
    from bitwright.ir.types import parse_dtype

    b = Builder("f")
    codes = np.array([[1.5, -0.25], [2.0, 0.0], [-3.5, 1.0]], np.float32)
    w = b.constant(codes, TensorType(parse_dtype("f2m2"), codes.shape))
    s = b.constant(np.array([0.5, 2.0, 1.0], np.float32), TensorType(F32, (3,)))
    x = b.input("x", TensorType(F32, (4, 2)))
    graph = b.finish([b.emit(ops.Linear(), x, b.emit(ops.Dequantize(0), w, s))], ["y"])
    data = rng.standard_normal((4, 2)).astype(np.float32)
    np.testing.assert_allclose(run(to_onnx(graph), [data])[0], to_numpy(evaluate(graph, [data])[0]), rtol=1e-5)


def test_every_operator_of_the_graph_level_is_in_the_table_or_has_no_form() -> None:
    without = {
        ops.Weight, ops.Constant, ops.Region, ops.UnbiasedMask, ops.DynamicQuantize, *ops.INTEGER, *ops.SMALL_FLOAT,
    }  # fmt: skip
    known = {cls for cls, _ in ops.spellings().values()}
    assert known - without == set(HANDLERS)
