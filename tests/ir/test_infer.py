"""Shapes and dtypes by running the meaning on meta tensors, symbols included."""

from __future__ import annotations

import pytest

from bitwright.ir import ops
from bitwright.ir.infer import InferenceError, bind_graph, infer
from bitwright.ir.types import BOOL, F32, S8, S64, TensorType, parse_type


def result(op: ops.Op, *types: str) -> str:
    return "; ".join(map(str, infer(op, [parse_type(t) for t in types])))


def test_symbols_pass_through() -> None:
    assert result(ops.Linear(), "f32[b, s, 16]", "f32[4, 16]") == "f32[b, s, 4]"
    assert result(ops.Reshape(("12*b", 8)), "f32[b, 12, 8]") == "f32[12*b, 8]"
    assert result(ops.Reshape(("b*s", 8)), "f32[b, s, 8]") == "f32[b*s, 8]"
    assert result(ops.MatMul(transpose_b=True), "f32[b, s, 8]", "f32[b, s, 8]") == "f32[b, s, s]"


def test_convolutions() -> None:
    conv = ops.Conv((2, 2), (3, 3, 3, 3))
    assert result(conv, "f32[b, 3, 224, 224]", "f32[64, 3, 7, 7]") == "f32[b, 64, 112, 112]"
    last = ops.Conv((1, 1), (1, 1, 1, 1), channels_last=True)
    assert result(last, "f32[1, 8, 8, 4]", "f32[6, 4, 3, 3]") == "f32[1, 8, 8, 6]"


def test_dtypes() -> None:
    assert infer(ops.Binary("lt"), [TensorType(F32, (2,)), TensorType(F32, (2,))])[0].dtype == BOOL
    assert infer(ops.Cast(S8), [TensorType(F32, (2,))])[0].dtype == S8
    assert [t.dtype for t in infer(ops.TopK(1), [TensorType(F32, (2,))])] == [F32, S64]


@pytest.mark.parametrize(
    ("op", "types"),
    [
        (ops.Linear(), ("f32[2, 3]", "f32[4, 5]")),
        (ops.Binary("add"), ("f32[2]", "s32[2]")),
        (ops.Unary("relu"), ("f32[2]", "f32[2]")),
        (ops.Reshape((7,)), ("f32[2, 3]",)),
        (ops.Where(), ("f32[2]", "f32[2]", "f32[2]")),
        (ops.Concat(0), ("f32[2, 2]", "f32[2, 3]")),
    ],
)
def test_misfits_raise_with_the_types(op: ops.Op, types: tuple[str, ...]) -> None:
    with pytest.raises(InferenceError) as e:
        result(op, *types)
    assert op.spelling in str(e.value)


def test_binding_replaces_symbols_everywhere() -> None:
    from bitwright.ir.text import parse, show

    g = parse('graph @g (%x: f32[b, 4]) -> (y = %y) level=graph {\n  %y = reshape(%x) {shape=["4*b"]} : f32[4*b]\n}\n')
    assert "f32[12]" in show(bind_graph(g, {"b": 3}))
    assert "shape=[12]" in show(bind_graph(g, {"b": 3}))
