"""Malformed, hostile and unsupported files: one clear error, at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bitwright.frontends.onnx import Limits, NeedsConstants, load_onnx
from bitwright.ir.errors import InvalidInput, Unsupported
from bitwright.ir.interpret import evaluate
from bitwright.ir.verify import verify

Node = onnx.NodeProto
X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
FLAG = helper.make_tensor_value_info("q", TensorProto.BOOL, [])


def tensor(name: str, value: Any, dtype: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def model(
    nodes: Sequence[Node], weights: Sequence[TensorProto] = (), inputs: Sequence[Any] = (X,), **kwargs: Any
) -> onnx.ModelProto:
    functions = kwargs.pop("functions", [])
    graph = helper.make_graph(list(nodes), "g", list(inputs), kwargs.pop("outputs", [Y]), list(weights))
    imports = [helper.make_opsetid("", kwargs.pop("opset", 21)), helper.make_opsetid("d", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Node:
    return helper.make_node(
        op, ["" if i == "_" else i for i in inputs.split()], outputs.split(), name=f"the {op}", **attributes
    )


def side(op: str, reads: str, shape: list[int] | None) -> onnx.GraphProto:
    """A branch of one operator."""
    return helper.make_graph([node(op, reads, "o")], op, [], [helper.make_tensor_value_info("o", 1, shape)])


# --- files --------------------------------------------------------------------------------------------------------


def small_model() -> bytes:
    """A convolution, a reshape by computed shape, a function, a branch, a loop and quantized weights."""
    branch = [side(op, "h", None) for op in ("Neg", "Abs")]
    loop_inputs: list[tuple[str, int, list[int] | None]] = [("i", 7, []), ("k", 9, []), ("v", 1, None)]
    body = helper.make_graph(
        [node("Identity", "k", "k2"), node("Mul", "v v", "v2")], "body",
        [helper.make_tensor_value_info(*v) for v in loop_inputs],
        [helper.make_tensor_value_info("k2", 9, []), helper.make_tensor_value_info("v2", 1, None)],
    )  # fmt: skip
    twice = helper.make_function("d", "Twice", ["a"], ["b"], [node("Add", "a a", "b")], [helper.make_opsetid("", 21)])
    nodes = [
        node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Unsqueeze", "n zeros", "n1"),
        node("Concat", "n1 rest", "shape", axis=0), node("Conv", "x w", "c", pads=[1, 1, 1, 1]),
        node("Reshape", "c shape", "f"), node("DequantizeLinear", "q qs", "qd", axis=0), node("MatMul", "f qd", "m"),
        helper.make_node("Twice", ["m"], ["h"], domain="d"),
        node("If", "yes", "t", then_branch=branch[0], else_branch=branch[1]),
        node("Loop", "trips yes t", "y", body=body),
    ]  # fmt: skip
    weights = [
        tensor("zero", 0, np.int64), tensor("zeros", [0], np.int64), tensor("rest", [-1], np.int64),
        tensor("w", np.ones((2, 1, 3, 3))), tensor("q", np.ones((32, 4)), np.int8), tensor("qs", np.full(32, 0.1)),
        tensor("yes", True, bool), tensor("trips", 2, np.int64),
    ]  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 4, 4])]
    return bytes(model(nodes, weights, inputs, functions=[twice]).SerializeToString())


SMALL = small_model()


def test_the_small_model_itself_is_fine() -> None:
    graph = load_onnx(SMALL)
    verify(graph)
    assert evaluate(graph, [np.ones((3, 1, 4, 4), np.float32)])[0].shape == (3, 4)


@settings(max_examples=200, deadline=10_000, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_flipped_bytes_never_do_worse_than_an_error(data: st.DataObject) -> None:
    changed = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 6))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidInput, Unsupported):
        verify(load_onnx(bytes(changed)))


@settings(max_examples=60, deadline=10_000)
@given(st.integers(0, len(SMALL) - 1))
def test_truncated_files_never_do_worse_than_an_error(size: int) -> None:
    with contextlib.suppress(InvalidInput, Unsupported):
        verify(load_onnx(SMALL[:size]))


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot read"):
        load_onnx(tmp_path / "none.onnx")
    for i, content in enumerate((b"", b"hello", b"\x08\x0a", bytes(100))):
        path = tmp_path / f"{i}.onnx"
        path.write_bytes(content)
        with pytest.raises(InvalidInput, match="ONNX"):
            load_onnx(path)


def test_external_data_is_mapped(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "weights.bin").write_bytes(bytes(8) + values.tobytes())
    path = tmp_path / "m.onnx"
    path.write_bytes(model([node("Add", "x w", "y")], [external("weights.bin", 8, 24)]).SerializeToString())
    graph = load_onnx(path)
    array = graph.weights["w"].array
    np.testing.assert_array_equal(array, values)
    assert not array.flags.owndata


def external(location: str, offset: int = 0, length: int = 24) -> TensorProto:
    t = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = t.external_data.add()
        entry.key, entry.value = key, value
    return t


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "a/../../secret", "link", "", ".", "..\\secret", "none"]
)
def test_external_data_stays_in_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(24))
    (folder / "link").symlink_to(tmp_path / "secret")
    path = folder / "m.onnx"
    path.write_bytes(model([node("Add", "x w", "y")], [external(location)]).SerializeToString())
    with pytest.raises(InvalidInput, match="folder"):
        load_onnx(path)


@pytest.mark.parametrize(("offset", "length"), [(8, 24), (-1, 24), (0, 20), (2**60, 24)])
def test_external_data_must_lie_in_its_file(tmp_path: Path, offset: int, length: int) -> None:
    (tmp_path / "w").write_bytes(bytes(24))
    path = tmp_path / "m.onnx"
    path.write_bytes(model([node("Add", "x w", "y")], [external("w", offset, length)]).SerializeToString())
    with pytest.raises(InvalidInput, match="do not lie in the file"):
        load_onnx(path)


# --- graphs -------------------------------------------------------------------------------------------------------

MALFORMED = {
    "cycle": ([node("Add", "x b", "a"), node("Neg", "a", "b"), node("Neg", "b", "y")], (), "reads 'b'"),
    "missing": ([node("Add", "x w", "y")], (), "reads 'w', which no input"),
    "twice": ([node("Neg", "x", "a"), node("Abs", "x", "a"), node("Neg", "a", "y")], (), "'a' is defined twice"),
    "output": ([node("Neg", "x", "z")], (), "output 'y' is not defined"),
    "dtypes": ([node("Add", "x w", "y")], [tensor("w", [1, 2, 3], np.int64)], "one dtype"),
    "shapes": ([node("Add", "x w", "y")], [tensor("w", [1, 2])], "add does not fit"),
    "nan": ([node("Add", "x w", "y")], [tensor("w", [1, np.nan, 2])], "'w' contains NaN"),
    "inf": ([node("MatMul", "x w", "y")], [tensor("w", np.full((3, 2), np.inf))], "'w' of a contraction"),
    "nan_conv": ([node("Gemm", "x w", "y")], [tensor("w", np.full((3, 2), np.nan))], "'w' contains NaN"),
    "perm": ([node("Transpose", "x", "y", perm=[0, 0])], (), "no permutation"),
    "axis": ([node("Softmax", "x", "y", axis=7)], (), "axis 7"),
    "attribute": ([node("Softmax", "x", "y", axis="one")], (), "wrong type"),
    "reshape": ([node("Reshape", "x s", "y")], [tensor("s", [4, -1], np.int64)], "cannot be reshaped"),
    "index": ([node("Gather", "x i", "y")], [tensor("i", [9], np.int64)], "outside an axis of size 2"),
    "split": ([node("Split", "x s", "y z", axis=1)], [tensor("s", [9, 9], np.int64)], "does not add up"),
    "operands": ([node("Add", "x", "y")], (), "it takes 2 operands, got 1"),
    "range": ([node("Range", "a b d", "y")], [tensor("a", 0.0), tensor("b", np.inf), tensor("d", 1.0)], "Range"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_graphs(name: str) -> None:
    nodes, weights, message = MALFORMED[name]
    with pytest.raises(InvalidInput, match=message):
        load_onnx(model(nodes, weights))


def test_short_raw_data_is_malformed() -> None:
    t = tensor("w", [1, 2, 3])
    t.raw_data = t.raw_data[:-1]
    with pytest.raises(InvalidInput, match="11 bytes of data"):
        load_onnx(model([node("Add", "x w", "y")], [t]))


def test_infinities_in_masks_are_fine() -> None:
    load_onnx(model([node("Add", "x w", "y")], [tensor("w", [-np.inf, 0, np.inf])]))


def test_every_problem_is_reported_at_once_with_place_and_cure() -> None:
    nodes = [node("Foo", "x", "a"), node("NonZero", "x", "b"), node("Reshape", "x s", "c"), node("Neg", "a", "d")]
    outputs = [helper.make_tensor_value_info(n, 1, None) for n in "abcd"]
    inputs = [X, helper.make_tensor_value_info("s", 7, [2])]
    with pytest.raises(NeedsConstants) as e:
        load_onnx(model(nodes, (), inputs, outputs=outputs))
    assert [p.operator for p in e.value.problems] == ["Foo", "NonZero", "Reshape"]
    assert e.value.inputs == ("s",)
    assert "the Reshape (Reshape)" in str(e.value)
    assert "constants=" in str(e.value)


def test_dead_nodes_do_no_harm() -> None:
    graph = load_onnx(model([node("Foo", "x", "a"), node("Neg", "x", "y")]))
    assert len(graph.nodes) == 1


def test_strings_and_float8_are_refused() -> None:
    for element in (TensorProto.STRING, TensorProto.FLOAT8E4M3FN, TensorProto.COMPLEX64):
        with pytest.raises(Unsupported, match="no number format"):
            load_onnx(model([node("Identity", "x", "y")], (), [helper.make_tensor_value_info("x", element, [2])]))


def test_an_attribute_nobody_reads_is_refused_and_not_ignored() -> None:
    with pytest.raises(Unsupported, match="its attribute sparkle"):
        load_onnx(model([node("Neg", "x", "y", sparkle=1)]))


def test_operator_sets_of_the_future_are_refused() -> None:
    with pytest.raises(Unsupported, match="newer"):
        load_onnx(model([node("Neg", "x", "y")], opset=999))


# --- bombs --------------------------------------------------------------------------------------------------------


def doubling(count: int) -> onnx.ModelProto:
    nodes = [node("Concat", f"c{i} c{i}", f"c{i + 1}", axis=0) for i in range(count)]
    return model(
        [*nodes, node("ReduceSum", f"c{count}", "s", keepdims=0), node("Add", "x s", "y")], [tensor("c0", [1.0])]
    )


def nested(count: int) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("d", 1)]
    functions = [helper.make_function("d", "f0", ["a"], ["b"], [node("Neg", "a", "b")], imports)]
    for i in range(1, count):
        body = [helper.make_node(f"f{i - 1}", [a], [b], domain="d") for a, b in (("a", "t"), ("t", "b"))]
        functions.append(helper.make_function("d", f"f{i}", ["a"], ["b"], body, imports))
    return model([helper.make_node(f"f{count - 1}", ["x"], ["y"], domain="d")], functions=functions)


def recursive() -> onnx.ModelProto:
    body = [helper.make_node("r", ["a"], ["b"], domain="d")]
    f = helper.make_function("d", "r", ["a"], ["b"], body, [helper.make_opsetid("", 21), helper.make_opsetid("d", 1)])
    return model([helper.make_node("r", ["x"], ["y"], domain="d")], functions=[f])


def loops(depth: int, trips: int) -> onnx.ModelProto:
    def build(level: int, before: str, after: str) -> Node:
        infos = [helper.make_tensor_value_info(f"{n}{level}", t, []) for n, t in (("i", 7), ("k", 9))]
        infos.append(helper.make_tensor_value_info(f"v{level}", 1, [2, 3]))
        inner = node("Neg", f"v{level}", f"o{level}") if level == 0 else build(level - 1, f"v{level}", f"o{level}")
        outs = [
            helper.make_tensor_value_info(f"e{level}", 9, []),
            helper.make_tensor_value_info(f"o{level}", 1, [2, 3]),
        ]
        body = helper.make_graph([inner, node("Identity", f"k{level}", f"e{level}")], "body", infos, outs)
        return node("Loop", f"trips yes {before}", after, body=body)

    return model([build(depth, "x", "y")], [tensor("trips", trips, np.int64), tensor("yes", True, bool)])


BOMBS: dict[str, Callable[[], onnx.ModelProto]] = {
    "doubling constants": lambda: doubling(60), "nested functions": lambda: nested(31), "recursion": recursive,
    "nested loops": lambda: loops(4, 200), "endless loop": lambda: loops(0, 10**12),
    "expand": lambda: model([node("Expand", "x s", "y")], [tensor("s", [10**12, 2, 3], np.int64)]),
    "tile": lambda: model([node("Tile", "x s", "y")], [tensor("s", [2**40, 2**40], np.int64)]),
    "pad": lambda: model([node("Pad", "x s", "y", mode="reflect")], [tensor("s", [0, 2**40, 0, 0], np.int64)]),
    "resize": lambda: model([node("Resize", "x _ s", "y", mode="cubic")], [tensor("s", [1e9, 1e9])]),
    "fill": lambda: model(
        [node("ConstantOfShape", "s", "t"), node("ReduceSum", "t", "y")], [tensor("s", [10**5, 10**5], np.int64)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_hide_large_computations_hit_a_limit(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises((Unsupported, InvalidInput)):
        load_onnx(BOMBS[name](), limits=Limits(nodes=5000))
    assert time.perf_counter() - start < 20


def test_doubled_constants_within_the_limit_are_folded_or_left_as_operators() -> None:
    graph = load_onnx(doubling(24))
    verify(graph)
    assert sum(h.array.nbytes for h in graph.weights.values()) <= 32 << 20


# --- control flow -------------------------------------------------------------------------------------------------


def test_a_dynamic_branch_without_effects_becomes_a_choice() -> None:
    sides = [side(op, "x", [2, 3]) for op in ("Neg", "Abs")]
    graph = load_onnx(model([node("If", "q", "y", then_branch=sides[0], else_branch=sides[1])], (), [X, FLAG]))
    x = np.array([[-1.0, 2, -3], [4, -5, 6]], np.float32)
    for flag, want in ((True, -x), (False, np.abs(x))):
        np.testing.assert_array_equal(evaluate(graph, [x, np.array(flag)])[0].numpy(), want)


def test_a_loop_is_unrolled() -> None:
    graph = load_onnx(loops(1, 3))
    assert [n.op.spelling for n in graph.nodes] == ["neg"] * 9


def test_options_that_name_nothing_are_refused() -> None:
    plain = model([node("Neg", "x", "y")])
    for kwargs in ({"sizes": {"b": 1}}, {"shapes": {"z": (1,)}}, {"constants": {"z": np.ones(1)}}):
        with pytest.raises(InvalidInput, match="no "):
            load_onnx(plain, **kwargs)
