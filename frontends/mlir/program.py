"""One walk over a function of the torch dialect: every operator becomes a call of the torch operator it names."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitwright.frontends.mlir.context import elements
from bitwright.frontends.mlir.quantized import Codes, quantized
from bitwright.ir.errors import InvalidInput, Problem
from bitwright.ir.interpret import to_torch
from bitwright.ir.semantics import torch_dtype
from bitwright.ir.types import (
    BF16,
    BOOL,
    F16,
    F32,
    F64,
    Dim,
    DType,
    Encoding,
    TensorType,
    integer,
    parse_dtype,
    parse_encoding,
)

DTYPES: dict[str, DType] = {
    "f64": F64, "f32": F32, "f16": F16, "bf16": BF16, "i1": BOOL,
    **{f"si{b}": integer(b) for b in (8, 16, 32, 64)}, **{f"ui{b}": integer(b, False) for b in (8, 16, 32, 64)},
}  # fmt: skip
"""Formats of the torch dialect's element types."""

LARGEST = 1 << 40
"""Elements of the largest input."""

CURE = "replace it, or compute it outside the model"


@dataclass(frozen=True)
class Input:
    """A function argument that the user passes."""

    name: str
    type: TensorType

    def example(self, sizes: dict[str, int]) -> torch.Tensor:
        """A tensor of the input's type; nobody reads its values."""
        shape = [sizes[d] if isinstance(d, str) else d for d in self.type.shape]
        return torch.zeros(shape, dtype=torch_dtype(self.type.dtype))


@dataclass(frozen=True)
class LiteralInfo:
    """What the attributes of a stored tensor say: key, format where it is narrower than the torch dtype, mask."""

    key: str
    dtype: DType | None
    encoding: Encoding | None


class Operators:
    """The torch program under construction."""

    def __init__(self) -> None:
        self.root = torch.nn.Module()
        self.graph = torch.fx.Graph()
        self.place = ""
        self.line = 0

    def call(self, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        """A call, noted to come from the operator at hand."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["place"] = self.place
        node.meta["stack_trace"] = f'  File "mlir", line {self.line}, in mlir\n'
        return node

    def store(self, tensor: torch.Tensor, parameter: bool) -> torch.fx.Node:
        """A stored tensor; parameters are never folded into other constants."""
        name = f"w{sum(1 for n in self.graph.nodes if n.op == 'get_attr')}"
        if parameter:
            self.root.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        else:
            self.root.register_buffer(name, tensor)
        return self.graph.get_attr(name)

    def finish(self) -> torch.fx.GraphModule:
        """The module that runs the program."""
        return torch.fx.GraphModule(self.root, self.graph)


class Program:
    """A function of the torch dialect, walked once by :meth:`read`; problems are collected."""

    def __init__(self, function: Any, file: str, held: dict[str, bytes], shapes: dict[str, Sequence[Dim]]) -> None:
        self.function, self.file, self.held, self.shapes = function, file, held, shapes
        self.name = _text(function.attributes, "bitwright.graph") or str(function.attributes["sym_name"]).strip('"')
        self.operators = Operators()
        self.inputs: list[Input] = []
        self.output_names: list[str] = []
        self.literals: dict[str, LiteralInfo] = {}
        self.problems: list[Problem] = []
        self.places: list[str] = []
        self.symbols: list[str] = []
        self.env: dict[Any, Any] = {}
        self._missing = 0

    def placed(self, origin: str) -> str:
        """A place in the user's words for one that :class:`Operators` noted."""
        m = re.search(r"mlir:(\d+)", origin)
        return self.places[int(m[1])] if m else origin

    def read(self) -> None:
        """Walk the function."""
        block = self.function.regions[0].blocks[0]
        attributes = _each(self.function.attributes, "arg_attrs", len(block.arguments))
        for i, (value, given) in enumerate(zip(block.arguments, attributes, strict=True)):
            self._input(value, _text(given, "bitwright.name") or f"arg{i}")
        for key in self.shapes:
            if key not in [v.name for v in self.inputs]:
                names = ", ".join(v.name for v in self.inputs)
                raise InvalidInput(f"shapes names {key!r}, which is no input of the function (it has {names})")
        for op in block.operations:
            self._operation(op.operation)
        self.operators.graph.lint()

    # --- sources -------------------------------------------------------------------------------------------

    def _input(self, value: Any, name: str) -> None:
        name = re.sub(r"\W", "_", name)
        found = tensor_type(str(value.type))
        if found is None:
            self.problems.append(Problem("input", name, f"a {value.type} input is not supported", "pass tensors only"))
            found = F32, ()
        dtype, dims = found
        given = self.shapes.get(name, dims)
        if len(given) != len(dims) or any(d is not None and d != g for d, g in zip(dims, given, strict=True)):
            raise InvalidInput(f"shapes gives input {name!r} {list(given)}, the function has {value.type}")
        shape = tuple(self._dim(d, axis, name) for axis, d in enumerate(given))
        self.inputs.append(Input(name, TensorType(dtype, shape)))
        self.env[value] = self.operators.graph.placeholder(name)

    def _dim(self, size: Any, axis: int, name: str) -> Dim:
        if size is None:
            if axis:
                raise InvalidInput(f"size {axis} of input {name!r} is open (?): give shapes={{{name!r}: ...}}")
            size = "b"
        if isinstance(size, str) and size not in self.symbols:
            if not size.isidentifier() or len(self.symbols) == 6:
                raise InvalidInput(f"a symbolic size is a name (at most 6 of them), not {size!r}")
            self.symbols.append(size)
        return size  # type: ignore[no-any-return]

    # --- operators -----------------------------------------------------------------------------------------

    def _operation(self, op: Any) -> None:
        name = str(op.attributes["name"]).strip('"') if op.name == "torch.operator" else str(op.name)
        self.places.append(self._place(op))
        self.operators.place, self.operators.line = self.places[-1], len(self.places) - 1
        if name in ("func.return", "return"):
            return self._return(op)
        step = SPECIAL.get(name)
        if step is not None:
            return step(self, op)
        args = [self.env[v] for v in op.operands]
        if quantized(self, name, op, args):
            return None
        target = _overload(name)
        if target is None:
            return self._problem(op, name, "torch has no such operator")
        if any(isinstance(a, Codes) for a in args) or "!torch.q" in str([str(r.type) for r in op.results]):
            return self._problem(op, name, "it computes with quantized values", "dequantize first")
        self._call(op, name, target, args)
        return None

    def _call(self, op: Any, name: str, target: Any, args: list[Any]) -> None:
        parameters = target._schema.arguments
        if len(args) > len(parameters):
            raise InvalidInput(f"{self.operators.place}: {name} has {len(args)} operands, torch's {len(parameters)}")
        plain = [a for a, p in zip(args, parameters, strict=False) if not p.kwarg_only]
        named = {p.name: a for a, p in zip(args, parameters, strict=False) if p.kwarg_only and a is not None}
        for p in parameters:  # dtypes and layouts are numbers in MLIR
            if p.name in named and str(p.type).endswith("Optional[int]") and p.name == "dtype":
                named[p.name] = scalar_type(named[p.name])
        plain = [scalar_type(a) if p.name == "dtype" and isinstance(a, int) else a
                 for a, p in zip(plain, parameters, strict=False)]  # fmt: skip
        for dropped in ("device", "layout", "pin_memory", "memory_format"):
            named.pop(dropped, None)
        self.bind(op, self.operators.call(target, *plain, **named))

    def bind(self, op: Any, result: Any) -> None:
        """The results of an operator."""
        if len(op.results) == 1:
            self.env[op.results[0]] = result
            return
        for i, value in enumerate(op.results):
            self.env[value] = self.operators.call(_item, result, i)

    def _problem(self, op: Any, name: str, why: str, cure: str = CURE) -> None:
        """Note it, and go on with made-up values of the right types (never folded), to find the others."""
        self.problems.append(Problem(name, self.operators.place, why, cure))
        for value in op.results:
            found = tensor_type(str(value.type))
            dtype, dims = found or (F32, ())
            shape = [SIZE_OF_OPEN if d is None else d for d in dims]
            kind = torch_dtype(dtype)
            self.env[value] = self.operators.call(torch.ops.aten.empty.memory_format, shape, dtype=kind)

    def _return(self, op: Any) -> None:
        names = _each(self.function.attributes, "res_attrs", len(op.operands))
        for i, given in enumerate(names):
            default = "output" if len(names) == 1 else f"output_{i}"
            self.output_names.append(_text(given, "bitwright.name") or default)
        values = [self.env[v] for v in op.operands]
        if any(isinstance(v, Codes) for v in values):
            raise InvalidInput(f"{self.file}: the function returns quantized values: dequantize them, or int_repr")
        self.operators.graph.output(tuple(values))

    def _place(self, op: Any) -> str:
        """``layer1.conv1`` where the operator's location has a name, else ``model.mlir:12``."""
        text = str(op.location)
        if m := re.match(r'loc\("((?:[^"\\]|\\.)*)"(?:\(|\)$)', text):
            return m[1]
        if m := re.search(r'"([^"]*)":(\d+):\d+', text):
            return f"{self.file if m[1] == '-' else m[1].rpartition('/')[2]}:{m[2]}"
        return self.file

    def literal(self, op: Any) -> None:
        """A stored tensor."""
        try:
            array = elements(op.attributes["value"], self.held)
        except InvalidInput as e:
            raise InvalidInput(f"{self.operators.place}: {e}") from e
        key, dtype = _text(op.attributes, "bitwright.key"), _text(op.attributes, "bitwright.dtype")
        encoding = _text(op.attributes, "bitwright.encoding")
        tensor = to_torch(array)
        node = self.operators.store(tensor, bool(encoding) or (tensor.is_floating_point() and tensor.dim() > 0))
        self.env[op.results[0]] = node
        shown = str(op.attributes["value"])
        if not key and shown.startswith("dense_resource<"):
            key = shown.removeprefix("dense_resource<").partition(">")[0].strip('"')
        if key:
            self.literals[str(node.target)] = LiteralInfo(
                key, parse_dtype(dtype) if dtype else None, parse_encoding(encoding) if encoding else None
            )

    def format_of(self, node: Any) -> DType | None:
        """The format of a stored tensor where an attribute gave it."""
        info = self.literals.get(str(node.target)) if getattr(node, "op", "") == "get_attr" else None
        return info.dtype if info else None


SIZE_OF_OPEN = 4


def _item(values: Any, index: int) -> Any:
    return values[index]


def _constant(program: Program, op: Any) -> None:
    program.env[op.results[0]] = op.attributes["value"].value


def _bool(program: Program, op: Any) -> None:
    program.env[op.results[0]] = str(op.attributes["value"]) in ("true", "1 : i1", "-1 : i1")


def _none(program: Program, op: Any) -> None:
    program.env[op.results[0]] = None


def _list(program: Program, op: Any) -> None:
    program.env[op.results[0]] = [program.env[v] for v in op.operands]


def _unpack(program: Program, op: Any) -> None:
    whole = program.env[op.operands[0]]
    for i, value in enumerate(op.results):
        program.env[value] = whole[i] if isinstance(whole, list) else program.operators.call(_item, whole, i)


def _same(program: Program, op: Any) -> None:
    program.env[op.results[0]] = program.env[op.operands[0]]


def _clamp(program: Program, op: Any) -> None:
    """A clamp that only states a format that the codes have already is that; any other is torch's."""
    x, *bounds = (program.env[v] for v in op.operands)
    if "bitwright.dtype" in op.attributes and getattr(x, "meta", {}).get("codes") == tuple(bounds):
        program.env[op.results[0]] = x
    else:
        program._call(op, str(op.name), torch.ops.aten.clamp.default, [x, *bounds])


def _size(x: torch.Tensor, axis: int) -> Any:
    return x.shape[axis]


def _number(run: Callable[..., Any]) -> Callable[[Program, Any], None]:
    """Arithmetic of sizes, which torch traces as Python's."""

    def step(program: Program, op: Any) -> None:
        args = [program.env[v] for v in op.operands]
        plain = not any(isinstance(a, torch.fx.Node) for a in args)
        program.env[op.results[0]] = run(*args) if plain else program.operators.call(run, *args)

    return step


def _nothing(program: Program, op: Any) -> None:
    """An assertion or a note about sizes: no value."""


SPECIAL: dict[str, Callable[[Program, Any], None]] = {
    "torch.constant.int": _constant, "torch.constant.float": _constant, "torch.constant.number": _constant,
    "torch.constant.str": _constant, "torch.constant.device": _constant, "torch.constant.bool": _bool,
    "torch.constant.none": _none, "torch.prim.ListConstruct": _list, "torch.prim.TupleConstruct": _list,
    "torch.prim.ListUnpack": _unpack, "torch.prim.TupleUnpack": _unpack, "torch.copy.to_tensor": _same,
    "torch.copy.to_vtensor": _same, "torch.tensor_static_info_cast": _same, "torch.derefine": _same,
    "torch.vtensor.literal": Program.literal, "torch.aten.clamp": _clamp, "torch.runtime.assert": _nothing,
    "torch.aten.size.int": _number(_size), "torch.aten.sym_size.int": _number(_size),
    "torch.aten.add.int": _number(operator.add), "torch.aten.sub.int": _number(operator.sub),
    "torch.aten.mul.int": _number(operator.mul), "torch.aten.floordiv.int": _number(operator.floordiv),
    "torch.bind_symbolic_shape": _nothing, "torch.symbolic_int": _none,
}  # fmt: skip
"""Operators of the dialect that are no operators of torch."""


_SPACES = ("aten", "prims", "torchvision", "quantized_decomposed")
"""Where torch's operators live that a program may call."""

_VALUES = {"torch.aten.view": "torch.aten.reshape", "torch.aten._unsafe_view": "torch.aten.reshape"}
"""Values have no strides in MLIR, so that a view of any value is a reshape."""


def _overload(name: str) -> Any:
    """torch's operator: ``torch.aten.add.Tensor`` is ``torch.ops.aten.add.Tensor``."""
    parts = _VALUES.get(name, name).removeprefix("torch.").split(".")
    if len(parts) not in (2, 3) or not name.startswith("torch.") or parts[0] not in _SPACES:
        return None
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    return getattr(packet, parts[2] if len(parts) == 3 else "default", None) if packet is not None else None


def scalar_type(number: Any) -> Any:
    """torch's dtype of its number."""
    from torch_mlir.extras.fx_importer import TORCH_DTYPE_TO_INT

    found = {v: k for k, v in TORCH_DTYPE_TO_INT.items()} if isinstance(number, int) else {}
    return found.get(number, number)


def tensor_type(text: str) -> tuple[DType, tuple[int | None, ...]] | None:
    """Format and sizes (None for ``?``) of a ``!torch.vtensor``; None for what is none or has no format here."""
    m = re.fullmatch(r"!torch\.v?tensor<\[([\d?,]*)\],(\w+)>", text)
    if m is None or m[2] not in DTYPES:
        return None
    return DTYPES[m[2]], tuple(None if d == "?" else int(d) for d in m[1].split(",") if d)


def _text(attributes: Any, key: str) -> str:
    return str(attributes[key].value) if key in attributes else ""


def _each(attributes: Any, key: str, count: int) -> list[Any]:
    return list(attributes[key]) if key in attributes else [{}] * count
