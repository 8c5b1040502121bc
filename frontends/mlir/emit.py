"""torch-mlir's importer with our literals, locations, and quantized types for PT2E's operators."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Node as FxNode

from bitwright.frontends.mlir.context import Module
from bitwright.ir.types import BF16, BOOL, DType, Encoding, dtype_of, integer
from bitwright.ir.weights import Array

INLINE = 64
"""Elements up to which a tensor is written as ``dense<...>`` and not as a resource."""

_FORMS: dict[torch.dtype, tuple[str, int, DType]] = {
    torch.int8: ("!torch.qint8", 12, integer(8)), torch.uint8: ("!torch.quint8", 13, integer(8, False)),
}  # fmt: skip
"""Quantized type, torch's number of it, and its format, by the dtype of the codes."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the program: values, key (none for a constant), a format narrower than the dtype, a mask."""

    array: Array
    key: str = ""
    dtype: DType | None = None
    encoding: Encoding | None = None


def emitted(
    program: ExportedProgram,
    stored: dict[str, Stored],
    place: Callable[[FxNode], str],
    dtype: Callable[[FxNode], DType | None],
    names: tuple[str, list[str], list[str]],
) -> Module:
    """The program as a module of one function ``main`` in the current context.

    ``stored``: the tensors by the placeholders they come in; ``place`` and ``dtype``: location and format of codes of a
    node; ``names``: graph, inputs, outputs.
    """
    from torch_mlir import ir
    from torch_mlir.extras.fx_importer import FxImporter, GraphNodeImporter

    class Importer(GraphNodeImporter):  # type: ignore[misc]
        """Operators at our locations, PT2E's as operators of quantized types."""

        def _import_torch_op_overload(self, loc: Any, node: FxNode, concrete_target: Any = None) -> None:
            at = place(node)
            loc = ir.Location.name(at) if at else ir.Location.unknown()
            word = str(concrete_target or node.target)
            if word == "aten._native_batch_norm_legit_no_training.default":
                return self._batch_norm(loc, node)
            form = _FORMS.get(node.args[-1]) if word.startswith("quantized_decomposed.") else None  # type: ignore[arg-type]
            if form is None or "group" in word:
                super()._import_torch_op_overload(loc, node, concrete_target)
            else:
                _Codes(self, ir, loc, node, form, dtype(node)).emit(word)
            return None

        def _batch_norm(self, loc: Any, node: FxNode) -> None:
            """The dialect's ``batch_norm``: the form torch decomposes it to has no lowering."""
            x, scale, bias, mean, variance, momentum, eps = node.args
            ordered = [x, scale, bias, mean, variance, False, momentum, eps, False]
            parameters = torch.ops.aten.batch_norm.default._schema.arguments
            operands = [self._import_argument(loc, a, p.type) for a, p in zip(ordered, parameters, strict=True)]
            kind = self._cc.value_info_to_type(node.meta["val"][0])
            made = ir.Operation.create("torch.aten.batch_norm", results=[kind], operands=operands, loc=loc)
            self._multi_result_nodes.add(node)
            self.bind_node_value(node, made.result, 0)

    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names files of this machine
    importer = FxImporter(context=ir.Context.current, graph_node_importer_cls=Importer)
    function = importer.import_stateless_graph(program.graph_module.graph, func_name="main")
    _finish(ir, function, program, stored, names)
    return importer.module


class _Codes:
    """Emits one quantize or dequantize."""

    def __init__(self, importer: Any, ir: Any, loc: Any, node: FxNode, form: Any, dtype: DType | None) -> None:
        self.importer, self.ir, self.loc, self.node = importer, ir, loc, node
        self.quantized, self.number, self.held = form
        self.dtype = dtype or self.held

    def emit(self, word: str) -> None:
        """PT2E's operator of that name."""
        out = str(self.importer._cc.node_val_to_type(self.node))
        if ".quantize_per_tensor." in word:
            self._bind(self._quantize(out))
            return
        shape = str(self.importer._cc.node_val_to_type(self.node.args[0])).rpartition(",")[0]
        if ".dequantize_per_tensor." in word:
            made = self._op(
                "torch.aten._make_per_tensor_quantized_tensor", f"{shape},{self.quantized}>", *self._args(3)
            )
        else:
            made = self._op(
                "torch.aten._make_per_channel_quantized_tensor", f"{shape},{self.quantized}>", *self._args(4)
            )
        self._mark(made)
        self._bind(self._op("torch.aten.dequantize.self", out, made))

    def _quantize(self, out: str) -> Any:
        quantized = f"{out.rpartition(',')[0]},{self.quantized}>"
        made = self._op("torch.aten.quantize_per_tensor", quantized, *self._args(3), self._int(self.number))
        self._mark(made)
        codes = self._op("torch.aten.int_repr", out, made)
        if self.dtype == self.held:
            return codes
        clamped = self._op("torch.aten.clamp", out, codes, self._int(self.dtype.lo), self._int(self.dtype.hi))
        self._mark(clamped)
        return clamped

    def _args(self, count: int) -> list[Any]:
        kinds = (torch.TensorType.get(), None, None, None)
        return [
            self.importer._import_argument(self.loc, a, k) for a, k in zip(self.node.args[:count], kinds, strict=False)
        ]

    def _int(self, value: int) -> Any:
        attr = self.ir.IntegerAttr.get(self.ir.IntegerType.get_signless(64), value)
        made = self.ir.Operation.create(
            "torch.constant.int", results=[self.ir.Type.parse("!torch.int")], attributes={"value": attr}, loc=self.loc
        )
        return made.result

    def _op(self, name: str, result: str, *operands: Any) -> Any:
        kind = self.ir.Type.parse(result)
        return self.ir.Operation.create(name, results=[kind], operands=list(operands), loc=self.loc).result

    def _mark(self, value: Any) -> None:
        if self.dtype != self.held:
            value.owner.attributes["bitwright.dtype"] = self.ir.StringAttr.get(str(self.dtype))

    def _bind(self, value: Any) -> None:
        self.importer.bind_node_value(self.node, value, 0)


def _finish(
    ir: Any, function: Any, program: ExportedProgram, stored: dict[str, Stored], names: tuple[str, list[str], list[str]]
) -> None:
    """Stored tensors as literals in the place of arguments; names of the graph, its inputs and outputs."""
    block = function.regions[0].blocks[0]
    places = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    taken: set[str] = set()
    with ir.InsertionPoint.at_block_begin(block):
        for argument, placeholder in zip(list(block.arguments), places, strict=True):
            if placeholder in stored and any(True for _ in argument.uses):
                argument.replace_all_uses_with(_literal(ir, stored[placeholder], argument.type, taken))
    for i in reversed(range(len(places))):
        if places[i] in stored:
            block.erase_argument(i)
    results = list(function.attributes["function_type"].value.results)
    kinds = [a.type for a in block.arguments]
    function.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(kinds, results))
    graph, ins, outs = names
    function.attributes["bitwright.graph"] = ir.StringAttr.get(graph)
    for key, words in (("arg_attrs", ins), ("res_attrs", outs)):
        named = [ir.DictAttr.get({"bitwright.name": ir.StringAttr.get(w)}) for w in words]
        function.attributes[key] = ir.ArrayAttr.get(named)


def _literal(ir: Any, tensor: Stored, kind: Any, taken: set[str]) -> Any:
    attributes = {"value": _elements(ir, tensor, taken)}
    for key, value in (("key", tensor.key), ("dtype", tensor.dtype), ("encoding", tensor.encoding)):
        if value:
            attributes[f"bitwright.{key}"] = ir.StringAttr.get(str(value))
    loc = ir.Location.name(tensor.key) if tensor.key else ir.Location.unknown()
    return ir.Operation.create("torch.vtensor.literal", results=[kind], attributes=attributes, loc=loc).result


def _elements(ir: Any, tensor: Stored, taken: set[str]) -> Any:
    array = np.ascontiguousarray(tensor.array).reshape(tensor.array.shape)
    kind = _element_type(ir, dtype_of(array.dtype))
    shaped = ir.RankedTensorType.get(list(array.shape), kind)
    if array.dtype == np.bool_:
        return ir.DenseElementsAttr.get(array, shape=list(array.shape), type=kind)
    if not array.size or (array.size <= INLINE and not tensor.key) or array.ndim == 0:
        if array.dtype == BF16.numpy:
            return ir.Attribute.parse(f"dense<{array.astype(np.float32).tolist()}> : {shaped}")
        return ir.DenseElementsAttr.get(array, shape=list(array.shape), type=kind)
    stem = re.sub(r"[^\w.$-]", "_", tensor.key) or "constant"
    name, i = stem if re.match(r"[A-Za-z_]", stem) else f"w_{stem}", 0
    while name in taken:
        i += 1
        name = f"{stem}_{i}"
    taken.add(name)
    data = array.view(np.int16) if array.dtype == BF16.numpy else array
    return ir.DenseResourceElementsAttr.get_from_buffer(data, name, shaped)


def _element_type(ir: Any, dtype: DType) -> Any:
    if dtype == BOOL:
        return ir.IntegerType.get_signless(1)
    if dtype.is_float:
        return ir.Type.parse(str(dtype))
    make = ir.IntegerType.get_unsigned if dtype.kind == "uint" else ir.IntegerType.get_signed
    return make(dtype.bits)


__all__ = ["Stored", "emitted"]
