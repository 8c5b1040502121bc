"""``to_onnx``: a graph-level program as an ONNX model, quantization as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import os

import onnx
from onnx import helper

from bitwright._version import __version__
from bitwright.frontends.onnx import _write_contract, _write_index, _write_norm, _write_pointwise, _write_quant
from bitwright.frontends.onnx._write_context import Writing, container, element
from bitwright.frontends.onnx._write_quant import is_constant_dequantize, nibbles
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput, Problem, Unsupported
from bitwright.ir.files import save
from bitwright.ir.graph import Graph, Node
from bitwright.ir.types import TensorType

OPSET = 21
"""The operator set written: the first with INT4 and block scales."""
IR_VERSION = 10
LARGEST_BYTES = 1_500_000_000
"""A protobuf holds 2 GiB; weights above this are refused."""

HANDLERS = {
    **_write_pointwise.TABLE, **_write_quant.TABLE, **_write_contract.TABLE, **_write_norm.TABLE, **_write_index.TABLE,
}  # fmt: skip
"""What each operator of the graph level becomes."""


def to_onnx(graph: Graph, path: str | os.PathLike[str] | None = None) -> onnx.ModelProto:
    """Write a graph-level program as ONNX (operator set 21); into ``path`` too when it is given, whole or not at all.

    quantize and dequantize become QuantizeLinear and DequantizeLinear, per tensor, per axis or in blocks; integers of
    up to four bits INT4 and UINT4, other formats the next wider integer with values clipped to their range; weights in
    small floats, for which ONNX has no format, their values in f32. The bias of a layer whose operands are 8-bit codes
    becomes s32 codes (an error of at most half the product of the two scales), as runtimes want it. Sparsity encodings
    have no ONNX form: the zeros stay, and ``detect-sparsity`` finds them. The same graph gives the same bytes.

    Raises :class:`InvalidInput` for a lower level or more than 1.5 GB of weights, :class:`Unsupported` with every
    operator that has no ONNX form; then nothing is written.
    """
    if graph.level != "graph":
        raise InvalidInput(
            f"@{graph.name} is at the {graph.level} level; ONNX is written from the graph level: run the passes before"
            " lower-to-integer only"
        )
    size = sum(t.size * container(t.dtype, nibble=True).bits for t in _weights(graph)) / 8
    if size > LARGEST_BYTES:
        raise InvalidInput(
            f"{size / 1e9:.1f} GB of weights do not fit into one ONNX file (at most {LARGEST_BYTES / 1e9} GB);"
            " quantize them, or write the model in parts"
        )
    w = Writing(graph, _write_quant.constant_dequantize)
    w.nibbles = nibbles(graph)
    _write_nodes(w)
    outputs = _outputs(w)
    _drop_dead(w, {o.name for o in outputs})
    body = helper.make_graph(
        w.nodes, graph.name, [_described(v.name, v.type) for v in graph.inputs], outputs, list(w.initializers.values())
    )
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="bitwright",
        producer_version=__version__,
    )  # fmt: skip
    data = model.SerializeToString(deterministic=True)
    onnx.checker.check_model(data)
    if path is not None:
        save(path, data)
    return model


def _weights(graph: Graph) -> list[TensorType]:
    """The type of each stored tensor, once."""
    return list({n.op.ref: n.type for n in graph.nodes if isinstance(n.op, ops.Weight)}.values())


def _write_nodes(w: Writing) -> None:
    problems: list[Problem] = []
    for n in w.graph.nodes:
        if isinstance(n.op, (ops.Weight, ops.Constant)) or is_constant_dequantize(w.graph, n.output):
            continue  # written when somebody reads it
        try:
            _write_node(w, n)
        except Unsupported as e:
            problems += e.problems
            w.bound.update({o: o for o in n.outputs})  # go on: find every problem
    if problems:
        raise Unsupported(dict.fromkeys(problems))


def _write_node(w: Writing, n: Node) -> None:
    w.at(n)
    handler = HANDLERS.get(type(n.op))
    if handler is None:
        w.refuse("it has no ONNX form", "write the graph before the pass that made it")
    first = len(w.nodes)
    w.finish(n, handler(w, n, n.op), first)


def _outputs(w: Writing) -> list[onnx.ValueInfoProto]:
    """The outputs by the user's names: an Identity where a value has another name already."""
    graph, inputs, out = w.graph, {v.name for v in w.graph.inputs}, []
    for value, name in zip(graph.outputs, graph.output_names, strict=True):
        shown = w.fresh(name) if name in inputs else name
        have = w.name(value)
        if have != shown:
            w.nodes.append(helper.make_node("Identity", [have], [shown], name=w.fresh(f"{shown}.identity")))
        out.append(_described(shown, graph.types[value]))
    return out


def _drop_dead(w: Writing, wanted: set[str]) -> None:
    """Leave out what nobody reads, such as the casts before an operator that takes the codes themselves."""
    kept = []
    for node in reversed(w.nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    w.nodes[:] = reversed(kept)
    w.initializers = {k: t for k, t in w.initializers.items() if k in wanted}


def _described(name: str, t: TensorType) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element(container(t.dtype)), list(t.shape))
