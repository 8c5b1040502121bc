"""ONNX files as DeepSparse 1.8.0 runs them well: MatMulInteger and QLinearConv, and weights with zeros.

A QDQ file it hands to its built-in onnxruntime or runs in float; these forms it takes over whole. Convolutions get one
weight scale per tensor (a scale per channel stops its process), linear layers one per channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]
Ranges = Mapping[str, tuple[float, float]]


def pruned(weight: Array, kind: str, axis: int) -> Array:
    """Keep the largest: ``u80`` 20 % wherever they are, ``b80`` 20 % of the blocks of four along ``axis``, ``s24`` two
    of every four along it."""
    w = np.moveaxis(weight, axis, -1)
    shape = w.shape
    if kind[0] == "u" or shape[-1] % 4:
        keep = np.abs(w) > np.quantile(np.abs(w), int(kind[1:]) / 100 if kind[0] != "s" else 0.5)
    else:
        four = np.abs(w).reshape(-1, 4)
        if kind[0] == "b":
            size = four.sum(1, keepdims=True)
            keep = np.broadcast_to(size > np.quantile(size, int(kind[1:]) / 100), four.shape).reshape(shape)
        else:
            keep = (four.argsort(1).argsort(1) >= 2).reshape(shape)
    return np.moveaxis(np.where(keep, w, 0), -1, axis).astype(weight.dtype)


class Form:
    """A float model as nodes and constants that are rewritten one by one."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(str(path))
        self.graph = self.model.graph
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        self.nodes: list[Any] = []
        self.quantized: dict[str, tuple[str, str, str]] = {}

    def weighted(self) -> Iterator[tuple[Any, str, int]]:
        """Nodes with a constant weight, its name and its reduction axis."""
        for node in self.graph.node:
            if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in self.constants:
                turned = any(a.name == "transB" and a.i for a in node.attribute)
                yield node, node.input[1], 1 if node.op_type == "Conv" or turned else 0

    def prune(self, kind: str) -> None:
        """Zeros into every weight but those of grouped convolutions and of the first one."""
        for node, name, axis in list(self.weighted()):
            grouped = any(a.name == "group" and a.i > 1 for a in node.attribute)
            if not grouped and self.constants[name].shape[axis] > 3:
                self.constants[name] = pruned(self.constants[name], kind, axis)

    def tensors(self) -> set[str]:
        """Whose ranges :meth:`quantize` needs."""
        out = set()
        for node, _, _ in self.weighted():
            out.add(node.input[0])
            if node.op_type == "Conv":
                after = self._activation(node)
                out.add(after.output[0] if after is not None else node.output[0])
        return out

    def quantize(self, ranges: Ranges) -> None:
        """Integers for every node with a constant weight."""
        weights = {node.output[0]: (name, axis) for node, name, axis in self.weighted()}
        skipped: set[str] = set()
        for node in self.graph.node:
            if node.output[0] in skipped:
                continue
            if node.output[0] not in weights:
                self.nodes.append(node)
            elif node.op_type == "Conv":
                after = self._activation(node)
                skipped |= {after.output[0]} if after is not None else set()
                self._conv(node, after.output[0] if after is not None else node.output[0], ranges)
            else:
                self._linear(node, *weights[node.output[0]], ranges)

    def save(self, path: Path) -> None:
        """With dead nodes and unused constants left out."""
        nodes = list(self.nodes or self.graph.node)
        while True:
            used = {x for n in nodes for x in n.input} | {o.name for o in self.graph.output}
            alive = [n for n in nodes if used & set(n.output)]
            if len(alive) == len(nodes):
                break
            nodes = alive
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(
            numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in self.constants.items() if k in used
        )
        self.model.ir_version = 8
        onnx.save(self.model, str(path))

    def _activation(self, node: Any) -> Any:
        """The Relu or Clip that alone reads a convolution."""
        readers = [n for n in self.graph.node if node.output[0] in n.input]
        alone = len(readers) == 1 and readers[0].op_type in ("Relu", "Clip")
        return readers[0] if alone and node.output[0] not in {o.name for o in self.graph.output} else None

    def _constant(self, name: str, value: Any) -> str:
        self.constants[name] = value
        return name

    def _add(self, op: str, inputs: Iterable[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def _affine(self, tensor: str, ranges: Ranges) -> tuple[str, str]:
        lo, hi = min(ranges[tensor][0], 0.0), max(ranges[tensor][1], 1e-6)
        scale = (hi - lo) / 255
        return (
            self._constant(f"{tensor}_scale", np.float32(scale)),
            self._constant(f"{tensor}_zero", np.uint8(round(-lo / scale))),
        )

    def _input(self, tensor: str, ranges: Ranges) -> tuple[str, str, str]:
        """(u8 codes, scale, zero point) of a tensor, made once."""
        if tensor not in self.quantized:
            scale, zero = self._affine(tensor, ranges)
            self.quantized[tensor] = (
                self._add("QuantizeLinear", (tensor, scale, zero), f"{tensor}_q"), scale, zero
            )  # fmt: skip
        return self.quantized[tensor]

    def _codes(self, name: str, step: Any) -> str:
        return self._constant(f"{name}_q", np.clip(np.round(self.constants[name] / step), -127, 127).astype(np.int8))

    def _linear(self, node: Any, name: str, axis: int, ranges: Ranges) -> None:
        out, (q, scale, zero) = node.output[0], self._input(node.input[0], ranges)
        if axis == 1:
            name = self._constant(f"{name}_t", np.ascontiguousarray(self.constants[name].T))
        step = np.maximum(np.abs(self.constants[name]).max(0), 1e-9).astype(np.float32) / 127
        none = self._constant("no_zero", np.int8(0))
        acc = self._add("MatMulInteger", (q, self._codes(name, step), zero, none), f"{out}_acc")
        real = self._add("Cast", (acc,), f"{out}_float", to=onnx.TensorProto.FLOAT)
        factor = self._constant(f"{out}_factor", (step * self.constants[scale]).astype(np.float32))
        biased = node.op_type == "Gemm" and len(node.input) > 2
        self._add("Mul", (real, factor), f"{out}_scaled" if biased else out)
        if biased:
            self._add("Add", (f"{out}_scaled", node.input[2]), out)

    def _conv(self, node: Any, out: str, ranges: Ranges) -> None:
        q, scale, zero = self._input(node.input[0], ranges)
        name = node.input[1]
        step = np.float32(max(np.abs(self.constants[name]).max(), 1e-9) / 127)
        to_scale, to_zero = self._affine(out, ranges)
        inputs = [
            q, scale, zero, self._codes(name, step), self._constant(f"{name}_step", step),
            self._constant("no_zero", np.int8(0)), to_scale, to_zero,
        ]  # fmt: skip
        if len(node.input) > 2:
            bias = np.round(self.constants[node.input[2]] / (step * self.constants[scale])).astype(np.int32)
            inputs.append(self._constant(f"{out}_bias", bias))
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        code = self._add("QLinearConv", inputs, f"{out}_q", **attributes)
        self._add("DequantizeLinear", (code, to_scale, to_zero), out)
        self.quantized[out] = (code, to_scale, to_zero)


def ranges_of(
    path: Path, tensors: Iterable[str], batches: Iterable[Mapping[str, Array]]
) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each tensor on the batches, by onnxruntime."""
    import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]

    model = onnx.load(str(path))
    inputs, known = {i.name for i in model.graph.input}, {o.name for o in model.graph.output}
    wanted = sorted(set(tensors) - inputs)
    model.graph.output.extend(helper.make_empty_tensor_value_info(t) for t in wanted if t not in known)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    out: dict[str, tuple[float, float]] = {}
    for batch in batches:
        computed = session.run(wanted, dict(batch)) if wanted else []
        found = dict(zip(wanted, computed, strict=True)) | dict(batch)
        for name in tensors:
            lo, hi = out.get(name, (0.0, 0.0))
            out[name] = (min(lo, float(found[name].min())), max(hi, float(found[name].max())))
    return out
