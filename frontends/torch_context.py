"""What the torch operator tables emit through: values, constants, dtypes, symbolic sizes, origins, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitwright.ir import ops
from bitwright.ir.build import Builder
from bitwright.ir.interpret import to_numpy
from bitwright.ir.types import (
    BF16,
    BOOL,
    F16,
    F32,
    F64,
    S8,
    S16,
    S32,
    S64,
    U8,
    U16,
    U32,
    U64,
    Dim,
    DType,
    TensorType,
)  # fmt: skip

Array = np.ndarray[Any, np.dtype[Any]]
Handler = Callable[..., Any]
Table = Mapping[str, Handler]

DTYPES: dict[torch.dtype, DType] = {
    torch.float64: F64, torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16, torch.bool: BOOL,
    torch.int8: S8, torch.int16: S16, torch.int32: S32, torch.int64: S64,
    torch.uint8: U8, torch.uint16: U16, torch.uint32: U32, torch.uint64: U64,
}  # fmt: skip
TORCH = {ours: theirs for theirs, ours in DTYPES.items()}


class Refusal(Exception):
    """A node that cannot be captured: why, and what the user can do. Collected, never shown on its own."""

    def __init__(self, why: str, cure: str = "") -> None:
        super().__init__(why)
        self.why, self.cure = why, cure


@dataclass(frozen=True, slots=True)
class Literal:
    """A value known at capture; ``key`` names it in the weight store when it is a buffer."""

    tensor: torch.Tensor
    key: str = ""


def dtype_from_torch(dtype: torch.dtype) -> DType:
    """Our format of a torch dtype; refuses the ones the IR has no tensors for (complex, float8, quantized)."""
    if dtype not in DTYPES:
        raise Refusal(f"{dtype} tensors are not supported", "rewrite the computation with real floating point numbers")
    return DTYPES[dtype]


def dim_from_torch(size: Any, names: Mapping[str, str], known: Mapping[str, int]) -> Dim:
    """A shape entry from a size; refuses what is no product of symbols. ``known`` sizes were fixed by constants."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    factor, symbols = 1, []
    for part in expr.as_ordered_factors():
        base, exponent = part.as_base_exp()
        if part.is_Integer:
            factor *= int(part)
        elif str(part) in known:
            factor *= known[str(part)]
        elif base.is_Symbol and exponent.is_Integer and exponent > 0 and str(base) in names:
            symbols += [names[str(base)]] * int(exponent)
        else:
            shown = str(expr)
            for raw, nice in names.items():
                shown = re.sub(rf"\b{raw}\b", nice, shown)
            raise Refusal(
                f"a size depends on the input as {shown}; only products of symbols can be named",
                "make that dimension static",
            )
    if not symbols:
        return factor
    order = {n: i for i, n in enumerate(names.values())}
    symbols.sort(key=order.__getitem__)
    return "*".join(([str(factor)] if factor != 1 else []) + symbols)


def same_dim(a: Dim, b: Dim) -> bool:
    """Equal up to the order of factors."""
    return a == b or (isinstance(a, str) and isinstance(b, str) and sorted(a.split("*")) == sorted(b.split("*")))


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH_ROOT = str(Path(torch.__file__).parent)


def origin_of(node: torch.fx.Node) -> str:
    """``layer1.0.conv1, resnet.py:12``: the module path and the user's own line, without torch's frames."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(v[0]) for v in stack.values() if not str(v[0]).startswith("_empty")]
    path = paths[-1].removeprefix("L['self'].") if paths else ""
    place = ""
    for file, line in _FRAME.findall(node.meta.get("stack_trace") or ""):
        if not file.startswith((_TORCH_ROOT, "torch/")):
            place = f"{Path(file).name}:{line}"
    return ", ".join(p for p in (path, place) if p)


class Context:
    """The node at hand (``node``, ``fake``) and the graph that grows (``b``)."""

    def __init__(self, builder: Builder, symbols: Mapping[str, str]) -> None:
        self.b = builder
        self.symbols = symbols
        self.node: torch.fx.Node = None  # type: ignore[assignment]
        self.origin = ""
        self.known: dict[str, int] = {}
        self.iotas: set[str] = set()
        self.tied: dict[tuple[Any, ...], str] = {}

    # --- facts ---------------------------------------------------------------------------------------------

    @property
    def fake(self) -> Any:
        """What torch says the current node gives (a fake tensor, or a tuple of them)."""
        return self.node.meta["val"]

    def dim(self, size: Any) -> Dim:
        return dim_from_torch(size, self.symbols, self.known)

    def learn(self, fake: torch.Tensor, value: str) -> None:
        """Sizes that torch leaves open (places selected by a constant mask) are those we found."""
        for size, have in zip(fake.shape, self.shape(value), strict=False):
            if isinstance(size, torch.SymInt) and isinstance(have, int) and str(size.node.expr) not in self.symbols:
                self.known.setdefault(str(size.node.expr), have)

    def fake_type(self, fake: torch.Tensor) -> TensorType:
        return TensorType(dtype_from_torch(fake.dtype), tuple(self.dim(d) for d in fake.shape))

    @property
    def out(self) -> TensorType:
        """Type of the current node's (first) result as torch has it."""
        fake = self.fake[0] if isinstance(self.fake, (tuple, list)) else self.fake
        return self.fake_type(fake)

    def type(self, value: str) -> TensorType:
        return self.b.types[value]

    def shape(self, value: str) -> tuple[Dim, ...]:
        return self.b.types[value].shape

    def rank(self, value: str) -> int:
        return self.b.types[value].rank

    def dtype(self, value: str) -> DType:
        return self.b.types[value].dtype

    def axis(self, value: str, dim: int) -> int:
        """A non-negative axis."""
        return dim % max(self.rank(value), 1)

    def static(self, dim: Dim, what: str) -> int:
        if not isinstance(dim, int):
            raise Refusal(f"{what} is symbolic ({dim})", "make that dimension static")
        return dim

    def literal(self, value: str) -> Array | None:
        """The array behind a constant, or None when it is computed."""
        return self.b.value_of(value)

    def is_parameter(self, value: str) -> bool:
        node = self.b.defined_by.get(value)
        return node is not None and isinstance(node.op, ops.Weight)

    def refuse(self, why: str, cure: str = "") -> Refusal:
        return Refusal(why, cure)

    # --- emission ------------------------------------------------------------------------------------------

    def emit(self, op: ops.Op, *values: str) -> str:
        return self.b.emit(op, *values, name=self.node.name, origin=self.origin)

    def emit_all(self, op: ops.Op, *values: str) -> tuple[str, ...]:
        return self.b.emit_all(op, *values, names=(self.node.name,) * op.results, origin=self.origin)

    def unary(self, fn: str, x: str) -> str:
        return self.emit(ops.Unary(fn), x)

    def binary(self, fn: str, a: str, b: str) -> str:
        return self.emit(ops.Binary(fn), a, b)

    def constant(self, value: Any, dtype: DType | None = None) -> str:
        """A literal: Python scalar, array or tensor."""
        array = to_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)
        if dtype is not None:
            array = array.astype(dtype.numpy)
        if array.size > 64 and array.dtype.kind != "V" and (array == array.flat[0]).all():
            return self.expand(self.constant(array.flat[0]), array.shape)
        return self.b.constant(array, name=f"{self.node.name}.c", origin=self.origin)

    def store(self, literal: Literal) -> str:
        """The value of a literal: a weight under its key, or a constant."""
        if not literal.key:
            return self.constant(literal.tensor)
        return self.weight(literal.key, literal.tensor)

    def weight(self, key: str, tensor: torch.Tensor) -> str:
        """A handle onto the tensor's own storage; tensors that share storage share the key."""
        dtype_from_torch(tensor.dtype)
        tensor = tensor.detach()
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else (key,)
        if place not in self.tied:
            self.tied[place] = self.b.weight(key, to_numpy(tensor), name=key, origin=self.origin or key)
        return self.tied[place]

    def cast(self, value: str, dtype: DType) -> str:
        return value if self.dtype(value) == dtype else self.emit(ops.Cast(dtype), value)

    def as_value(self, x: Any, dtype: DType) -> str:
        """An operand of the wanted dtype from a value, a Python scalar or a symbolic size."""
        if isinstance(x, Size):
            return self.cast(self.size_value(x.dim), dtype)
        return self.cast(x, dtype) if isinstance(x, str) else self.constant(x, dtype)

    def promoted(self, x: Any, y: Any) -> tuple[str, str]:
        """Two operands in torch's common dtype."""

        def stand_in(v: Any) -> Any:
            if isinstance(v, Size):
                return 2
            return torch.empty([1] * self.rank(v), dtype=TORCH[self.dtype(v)]) if isinstance(v, str) else v

        dtype = DTYPES[torch.result_type(stand_in(x), stand_in(y))]
        return self.as_value(x, dtype), self.as_value(y, dtype)

    # --- shapes --------------------------------------------------------------------------------------------

    def reshape(self, x: str, shape: Sequence[Dim]) -> str:
        return x if self.shape(x) == tuple(shape) else self.emit(ops.Reshape(tuple(shape)), x)

    def transpose(self, x: str, perm: Sequence[int]) -> str:
        perm = tuple(p % self.rank(x) for p in perm)
        return x if perm == tuple(range(len(perm))) else self.emit(ops.Transpose(perm), x)

    def move(self, x: str, source: int, target: int) -> str:
        """Move one axis to another place."""
        order = [i for i in range(self.rank(x)) if i != source]
        order.insert(target, source)
        return self.transpose(x, order)

    def expand(self, x: str, shape: Sequence[Dim]) -> str:
        return x if self.shape(x) == tuple(shape) else self.emit(ops.Expand(tuple(shape)), x)

    def unsqueeze(self, x: str, axis: int) -> str:
        shape = list(self.shape(x))
        shape.insert(axis, 1)
        return self.reshape(x, shape)

    def squeeze(self, x: str, axis: int) -> str:
        shape = list(self.shape(x))
        del shape[axis]
        return self.reshape(x, shape)

    def slice(self, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        if start == 0 and step == 1 and self.shape(x)[axis] == stop:
            return x
        return self.emit(ops.Slice(axis, start, max(start, stop), step), x)

    def concat(self, parts: Sequence[str], axis: int) -> str:
        return parts[0] if len(parts) == 1 else self.emit(ops.Concat(axis), *parts)

    def iota(self, size: Dim) -> str:
        """0, 1, ... size-1 as s64; for a symbolic size a running sum of ones."""
        if isinstance(size, int):
            return self.constant(np.arange(size, dtype=np.int64))
        count = self.emit(ops.CumSum(0, exclusive=True), self.expand(self.constant(1, S64), (size,)))
        self.iotas.add(count)
        return count

    def size_value(self, size: Dim) -> str:
        """A symbolic size as an s64 scalar: a sum of ones."""
        if isinstance(size, int):
            return self.constant(size, S64)
        return self.emit(ops.Reduce("sum", (0,)), self.expand(self.constant(1, S64), (size,)))

    def along(self, x: str, matrix: Array, axis: int) -> str:
        """Multiply one axis by a constant matrix [out, in]."""
        last = self.rank(x) - 1
        y = self.move(x, axis, last)
        y = self.emit(ops.Linear(), y, self.constant(matrix, self.dtype(x)))
        return self.move(y, last, axis)


@dataclass(frozen=True, slots=True)
class Size:
    """A symbolic size among an operator's arguments."""

    dim: str


def dims(args: Sequence[Any]) -> tuple[Dim, ...]:
    """Shape entries from resolved arguments."""
    return tuple(a.dim if isinstance(a, Size) else int(a) for a in args)


def per_axis(values: Any, n: int, default: int) -> tuple[int, ...]:
    """An int list argument spread over n axes."""
    if isinstance(values, int):
        return (values,) * n
    values = tuple(values or (default,))
    return tuple(int(v) for v in (values * n if len(values) == 1 else values))
