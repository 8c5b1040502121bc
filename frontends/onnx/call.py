"""One ONNX node as its handler sees it: typed attributes, operands, and ways to emit IR."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, TypeProto, helper

from bitwright.frontends.onnx.importer import Importer, Result, Scope
from bitwright.frontends.onnx.reader import DTYPES, ELEMENTS
from bitwright.frontends.onnx.symbolic import Entry, Poly, Unknown, to_dim
from bitwright.frontends.onnx.values import Nothing, NotStatic, Seq, Val, Value, as_entries
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput, Problem, Unsupported
from bitwright.ir.types import S64, Dim, DType, TensorType
from bitwright.ir.weights import Array


def _default(a: AttributeProto) -> Any:
    return helper.get_attribute_value(a) if a.type else None


LARGEST_IOTA = 1 << 24
_ELEMENT_NAMES = {TensorProto.DataType.Name(k).lower(): d for k, d in DTYPES.items()}


def shortest(value: float) -> float:
    """The shortest decimal that rounds to the f32 in the file: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


_ALLOWED: dict[tuple[str, str, int, int], frozenset[DType]] = {}


def allowed_types(s: onnx.defs.OpSchema, i: int) -> frozenset[DType]:
    """Number formats that a schema allows for operand ``i``; empty when it does not say."""
    formals = s.inputs
    at = min(i, len(formals) - 1)
    key = (s.domain, s.name, s.since_version, at)
    if at >= 0 and key not in _ALLOWED:
        names = formals[at].types
        found = (_ELEMENT_NAMES.get(n.removeprefix("tensor(").removesuffix(")")) for n in names)
        _ALLOWED[key] = frozenset(d for d in found if d is not None)
    return _ALLOWED.get(key, frozenset())


class Call:
    """A node, its operands and its place."""

    def __init__(self, importer: Importer, node: NodeProto, scope: Scope, ins: Sequence[Value | None]) -> None:
        self.importer, self.node, self.scope = importer, node, scope
        self.ins = tuple(None if isinstance(x, Nothing) else x for x in ins)
        self.domain = "" if node.domain == "ai.onnx" else node.domain
        self.seen: set[str] = set()

    # --- the node -----------------------------------------------------------------------------------------------

    @cached_property
    def attributes(self) -> dict[str, AttributeProto]:
        return {a.name: a for a in self.node.attribute}

    @cached_property
    def opset(self) -> int:
        return self.scope.opsets.get(self.domain, 1)

    @cached_property
    def schema(self) -> onnx.defs.OpSchema | None:
        try:
            return onnx.defs.get_schema(self.node.op_type, self.opset, self.domain)
        except onnx.defs.SchemaError:
            return None

    @property
    def since(self) -> int:
        """The operator set version that this operator's definition dates from."""
        return self.schema.since_version if self.schema is not None else 1

    def _get(self, name: str, kind: int) -> AttributeProto | None:
        self.seen.add(name)
        a = self.attributes.get(name)
        if a is not None and a.type != kind:
            raise InvalidInput(f"attribute {name!r} has the wrong type")
        return a

    def has(self, name: str) -> bool:
        """Does the node carry this attribute?"""
        self.seen.add(name)
        return name in self.attributes

    def ignore(self, *names: str) -> None:
        """These attributes say nothing here."""
        self.seen.update(names)

    def unread(self) -> list[str]:
        """Attributes that no handler looked at and that say something else than the default."""
        defaults = self.schema.attributes if self.schema is not None else {}
        out = []
        for name, a in self.attributes.items():
            d = defaults[name].default_value if name in defaults else None
            if name not in self.seen and not (d is not None and helper.get_attribute_value(a) == _default(d)):
                out.append(name)
        return out

    def int_(self, name: str, default: int = 0) -> int:
        a = self._get(name, AttributeProto.INT)
        return default if a is None else int(a.i)

    def float_(self, name: str, default: float = 0.0) -> float:
        a = self._get(name, AttributeProto.FLOAT)
        return default if a is None else shortest(a.f)

    def text(self, name: str, default: str = "") -> str:
        a = self._get(name, AttributeProto.STRING)
        return default if a is None else a.s.decode("utf-8", "replace")

    def ints(self, name: str) -> tuple[int, ...] | None:
        a = self._get(name, AttributeProto.INTS)
        return None if a is None else tuple(int(i) for i in a.ints)

    def floats(self, name: str) -> tuple[float, ...] | None:
        a = self._get(name, AttributeProto.FLOATS)
        return None if a is None else tuple(float(f) for f in a.floats)

    def graph(self, name: str) -> onnx.GraphProto:
        a = self._get(name, AttributeProto.GRAPH)
        if a is None:
            raise InvalidInput(f"attribute {name!r} is missing")
        return a.g

    @property
    def outputs(self) -> int:
        """How many results the model names (trailing empty names excluded)."""
        return max((i + 1 for i, o in enumerate(self.node.output) if o), default=0)

    def wants(self, i: int) -> bool:
        """Is result ``i`` named?"""
        return i < len(self.node.output) and bool(self.node.output[i])

    # --- operands -----------------------------------------------------------------------------------------------

    def check_operands(self) -> None:
        """The number of operands and their element types, as the operator's definition has them."""
        s = self.schema
        if s is None:
            return
        if not s.min_input <= len(self.node.input) <= s.max_input:
            takes = f"{s.min_input}" if s.min_input == s.max_input else f"{s.min_input} to {s.max_input}"
            raise InvalidInput(f"it takes {takes} operands, got {len(self.node.input)}")
        for i, v in enumerate(self.ins):
            allowed = allowed_types(s, i)
            if isinstance(v, Val) and allowed and v.type.dtype not in allowed:
                raise InvalidInput(f"operand {i} may not be {v.type}")

    def value(self, i: int) -> Value | None:
        return self.ins[i] if i < len(self.ins) else None

    def opt(self, i: int) -> Val | None:
        """Operand ``i`` as a tensor, or None when it is absent."""
        v = self.value(i)
        if v is None or isinstance(v, Val):
            return v
        raise InvalidInput(f"operand {i} is not a tensor")

    def x(self, i: int = 0) -> Val:
        """Operand ``i``, which must be there."""
        v = self.opt(i)
        if v is None:
            raise InvalidInput(f"operand {i} is missing")
        return v

    def seq(self, i: int = 0) -> Seq:
        v = self.value(i)
        if not isinstance(v, Seq):
            raise InvalidInput(f"operand {i} is not a sequence")
        return v

    def all(self) -> list[Val]:
        return [self.x(i) for i in range(len(self.ins))]

    def const(self, i: int, what: str = "") -> Array:
        """The value of operand ``i``; raises :class:`NotStatic` when it is computed at run time."""
        return self.known(self.x(i), what or self._formal(i))

    def known(self, v: Val, what: str, bindable: bool = True) -> Array:
        if v.handle is None:
            why = "depends on a symbolic size" if v.entries is not None else "is computed when the model runs"
            raise NotStatic(f"its {what} {why}; it must be a constant", v.sources, bindable)
        return v.handle.array

    def _formal(self, i: int) -> str:
        formals = self.schema.inputs if self.schema is not None else ()
        return repr(formals[i].name) if i < len(formals) else f"operand {i}"

    def const_ints(self, i: int) -> tuple[int, ...] | None:
        """Integers of an optional constant operand."""
        if self.value(i) is None:
            return None
        return tuple(int(v) for v in self.const(i).reshape(-1))

    def entries(self, i: int) -> list[Entry]:
        """Sizes of operand ``i``: numbers and polynomials in symbols."""
        v = self.x(i)
        found = as_entries(v, 1 << 20)
        if found is None:
            raise NotStatic(f"its {self._formal(i)} is computed when the model runs; it must be a constant", v.sources)
        return list(found.reshape(-1))

    def ints_at(self, name: str, i: int) -> tuple[int, ...] | None:
        """Integers from an attribute (older operator sets) or a constant operand (newer)."""
        found = self.ints(name)
        return found if found is not None else self.const_ints(i)

    def axis(self, value: int, rank: int) -> int:
        """A non-negative axis."""
        if not -rank <= value < max(rank, 1):
            raise InvalidInput(f"axis {value} is outside a tensor of rank {rank}")
        return value % rank if rank else 0

    def axes(self, values: Sequence[int], rank: int) -> tuple[int, ...]:
        out = tuple(self.axis(int(a), rank) for a in values)
        if len(set(out)) != len(out):
            raise InvalidInput(f"axes {list(values)} name an axis twice")
        return out

    # --- emitting -----------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        return self.node.output[0] if self.node.output else ""

    def emit(self, op: ops.Op, *xs: Val, fold: bool = True) -> Val:
        return self.importer.emit(op, *xs, fold=fold, label=self.label)

    def emit_all(self, op: ops.Op, *xs: Val) -> tuple[Val, ...]:
        return self.importer.emit_all(op, *xs, label=self.label)

    def unary(self, fn: str, x: Val) -> Val:
        return self.emit(ops.Unary(fn), x)

    def binary(self, fn: str, a: Val, b: Val | float | int) -> Val:
        """``fn`` of two tensors, or of a tensor and a number in the tensor's dtype."""
        return self.emit(ops.Binary(fn), a, b if isinstance(b, Val) else self.scalar(b, a.type.dtype))

    def add(self, a: Val, b: Val | float | int) -> Val:
        return self.binary("add", a, b)

    def sub(self, a: Val, b: Val | float | int) -> Val:
        return self.binary("sub", a, b)

    def mul(self, a: Val, b: Val | float | int) -> Val:
        return self.binary("mul", a, b)

    def div(self, a: Val, b: Val | float | int) -> Val:
        return self.binary("div", a, b)

    def where(self, c: Val, a: Val, b: Val) -> Val:
        return self.emit(ops.Where(), c, a, b)

    def scalar(self, value: Any, dtype: DType) -> Val:
        return self.importer.constant(np.asarray(value).astype(dtype.numpy), TensorType(dtype, ()))

    def literal(self, array: Any, dtype: DType = S64) -> Val:
        a = np.asarray(array, dtype=dtype.numpy)
        return self.importer.constant(a, TensorType(dtype, a.shape))

    def cast(self, x: Val, dtype: DType, fold: bool = True) -> Val:
        return x if x.type.dtype == dtype else self.emit(ops.Cast(dtype), x, fold=fold)

    def dims(self, shape: Sequence[Entry]) -> tuple[Dim, ...]:
        """Shape entries; a sum of symbols has no name in the IR and is refused."""
        try:
            out = tuple(to_dim(e) for e in shape)
        except Unknown:
            raise self.refuse("a size is a sum of symbolic sizes; only products can be named") from None
        if any(isinstance(d, int) and d < 0 for d in out):
            raise InvalidInput(f"shape {list(out)} has a negative size")
        return out

    def reshape(self, x: Val, shape: Sequence[Entry]) -> Val:
        new = self.dims(shape)
        return x if new == x.shape else self.emit(ops.Reshape(new), x)

    def transpose(self, x: Val, perm: Sequence[int]) -> Val:
        perm = tuple(perm)
        return x if perm == tuple(range(x.rank)) else self.emit(ops.Transpose(perm), x)

    def expand(self, x: Val, shape: Sequence[Entry]) -> Val:
        new = self.dims(shape)
        return x if new == x.shape else self.emit(ops.Expand(new), x)

    def unsqueeze(self, x: Val, axis: int) -> Val:
        axis = self.axis(axis, x.rank + 1)
        return self.reshape(x, (*x.dims[:axis], 1, *x.dims[axis:]))

    def squeeze(self, x: Val, axis: int) -> Val:
        axis = self.axis(axis, x.rank)
        return self.reshape(x, (*x.dims[:axis], *x.dims[axis + 1 :]))

    def slice(self, x: Val, axis: int, start: int, stop: int, step: int = 1) -> Val:
        if (start, stop, step) == (0, x.shape[axis], 1):
            return x
        return self.emit(ops.Slice(axis, start, stop, step), x)

    def concat(self, xs: Sequence[Val], axis: int) -> Val:
        return xs[0] if len(xs) == 1 else self.emit(ops.Concat(axis), *xs)

    def reduce(self, fn: str, x: Val, axes: Sequence[int], keep: bool = False) -> Val:
        return self.emit(ops.Reduce(fn, tuple(axes), keep), x)

    def size(self, x: Val, axis: int) -> int:
        """A size that must be a number."""
        d = x.shape[axis]
        if isinstance(d, int):
            return d
        raise self.refuse(f"it needs axis {axis} of {x.type} to be a number", f"bind it: sizes={{{d!r}: ...}}")

    def static(self, x: Val) -> tuple[int, ...]:
        return tuple(self.size(x, i) for i in range(x.rank))

    def iota(self, count: Entry, dtype: DType = S64) -> Val:
        """0, 1, ..., count - 1; a symbolic count is the running sum of ones."""
        if not isinstance(count, Poly):
            if count > LARGEST_IOTA:
                raise self.refuse(f"it needs a table of {count} entries")
            return self.literal(np.arange(int(count)), dtype)
        ones = self.expand(self.scalar(1, dtype), (count,))
        return self.emit(ops.CumSum(0, exclusive=True), ones)

    def refuse(self, why: str, cure: str = "") -> Unsupported:
        """The error to raise when this node has no static meaning here."""
        return Unsupported(Problem(self.node.op_type, self.importer.origin, why, cure))

    # --- function bodies ------------------------------------------------------------------------------------------

    def by_function_body(self) -> Result:
        """Translate through the body that the ONNX standard gives this operator."""
        self.seen.update(self.attributes)
        body = self._function_body()
        if body is None:
            raise self.refuse(self.why_unknown())
        return self.importer.run_function(body, self)

    def why_unknown(self) -> str:
        domain = self.domain or "ai.onnx"
        if self.schema is None:
            return f"{domain} (operator set {self.opset}) has no such operator, and the model defines none"
        return f"this operator of {domain} is not supported"

    def _function_body(self) -> FunctionProto | None:
        s: Any = self.schema
        if s is None:
            return None
        for name, a in s.attributes.items():  # a body refers to the attributes, defaults included
            if name not in self.attributes and a.default_value.type:
                self.attributes[name] = a.default_value
        data: bytes = b""
        if s.has_function:
            data = s.get_function_with_opset_version(self.opset)
        elif s.has_context_dependent_function:
            types = [self._type_proto(v).SerializeToString() for v in self.ins]
            data = s.get_context_dependent_function_with_opset_version(
                self.opset, self.node.SerializeToString(), types
            )  # fmt: skip
        if not data:
            return None
        body = FunctionProto()
        body.ParseFromString(data)
        return body

    def _type_proto(self, v: Value | None) -> TypeProto:
        t = TypeProto()
        if isinstance(v, Val):
            t.tensor_type.elem_type = ELEMENTS[v.type.dtype]
            t.tensor_type.shape.SetInParent()
            for d in v.shape:
                dim = t.tensor_type.shape.dim.add()
                if isinstance(d, int):
                    dim.dim_value = d
        elif isinstance(v, Seq) and v.items:
            t.sequence_type.elem_type.CopyFrom(self._type_proto(v.items[0]))
        return t
