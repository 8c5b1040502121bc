"""The ONNX backend interface, which the standard's own test suite drives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.backend.base import Backend as OnnxBackend
from onnx.backend.base import BackendRep

from bitwright.frontends.onnx.importer import clean
from bitwright.frontends.onnx.load import load_onnx
from bitwright.frontends.onnx.values import NeedsConstants
from bitwright.ir.errors import InvalidInput, Problem, Unsupported
from bitwright.ir.graph import Graph
from bitwright.ir.weights import Array

Runner = Callable[[list[Array]], list[Array]]
Executor = Callable[[Graph], Runner]

SHAPE_LIKE = 1024
"""Elements of the largest input that is bound as a constant."""


def interpreter(graph: Graph) -> Runner:
    """Run on the reference interpreter."""
    from bitwright.ir.interpret import evaluate, to_numpy

    return lambda inputs: [to_numpy(t) for t in evaluate(graph, inputs)]


class Prepared(BackendRep):
    """A model ready to run. ``binds`` names the inputs whose values are compiled in, once for each value seen."""

    def __init__(self, model: onnx.ModelProto, executor: Executor) -> None:
        self.model, self.executor = model, executor
        weights = {t.name for t in model.graph.initializer}
        self.inputs = [v.name for v in model.graph.input if v.name not in weights]
        self.binds: tuple[str, ...] = ()
        self.by_shape = False
        self.compiled: dict[tuple[Any, ...], tuple[list[str], Runner]] = {}
        try:
            self._compile({}, {})
        except NeedsConstants as e:
            self.binds = e.inputs
        except Unsupported:
            if not any(d.dim_param or not d.HasField("dim_value") for v in model.graph.input for d in _dims(v)):
                raise
            self.by_shape = True

    def run(self, inputs: Any, **kwargs: Any) -> Any:
        """Run on arrays in the order of the model's inputs (or by name); a tuple of arrays."""
        names = list(inputs) if isinstance(inputs, dict) else self.inputs[: len(inputs)]
        values = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
        if len(values) != len(names) or any(not isinstance(v, np.ndarray | np.generic) for v in values):
            raise InvalidInput(f"the model takes arrays for {self.inputs}")
        given = dict(zip(names, map(np.asarray, values), strict=True))
        names, runner = self._specialised(given)
        outputs = runner([_plain(given[n]) for n in names])
        return tuple(_declared(o, v) for o, v in zip(outputs, self.model.graph.output, strict=True))

    def _specialised(self, given: dict[str, Array]) -> tuple[list[str], Runner]:
        while True:
            constants = {n: given[n] for n in self.binds if n in given}
            if large := [n for n, a in constants.items() if a.size > SHAPE_LIKE]:
                raise Unsupported(Problem("input", ", ".join(large), "it must be a constant and is too large to bind"))
            shapes = {n: a.shape for n, a in given.items() if self.by_shape and n not in constants}
            try:
                return self._compile(constants, shapes)
            except NeedsConstants as e:
                more = [n for n in e.inputs if n in given and n not in self.binds]
                if not more:
                    raise
                self.binds = (*self.binds, *more)
            except Unsupported:
                if self.by_shape:
                    raise
                self.by_shape = True

    def _compile(self, constants: dict[str, Array], shapes: dict[str, tuple[int, ...]]) -> tuple[list[str], Runner]:
        bound = tuple((n, a.dtype.name, a.shape, a.tobytes()) for n, a in constants.items())
        key = (bound, tuple(shapes.items()))
        if key not in self.compiled:
            graph = load_onnx(self.model, constants=constants, shapes=shapes)
            by_name = {clean(n): n for n in self.inputs}
            self.compiled[key] = [by_name[v.name] for v in graph.inputs], self.executor(graph)
        return self.compiled[key]


def _dims(v: onnx.ValueInfoProto) -> Sequence[Any]:
    return list(v.type.tensor_type.shape.dim)


def _plain(a: Array) -> Array:
    return (
        a.astype(np.int8 if "u" not in a.dtype.name else np.uint8)
        if "int4" in a.dtype.name or "int2" in a.dtype.name
        else a
    )


def _declared(a: Array, v: onnx.ValueInfoProto) -> Array:
    """The array in the NumPy format that ONNX uses for the declared element type (int4 and its kin)."""
    element = v.type.tensor_type.elem_type
    if element in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.INT2, onnx.TensorProto.UINT2):
        return a.astype(onnx.helper.tensor_dtype_to_np_dtype(element))
    return a


class Backend(OnnxBackend):
    """bitwright as an ONNX backend."""

    @classmethod
    def prepare(
        cls, model: onnx.ModelProto, device: str = "CPU", executor: Executor | None = None, **kwargs: Any
    ) -> Prepared:
        """Import a model for ``executor(graph) -> callable`` (the reference interpreter by default)."""
        if not cls.supports_device(device):
            raise InvalidInput(f"no ONNX backend for device {device!r}")
        return Prepared(model, executor or interpreter)

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any) -> Any:
        """Import and run once."""
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Only the CPU is offered through this interface."""
        return device.split(":")[0] == "CPU"
