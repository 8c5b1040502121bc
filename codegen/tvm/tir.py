"""Direct construction of TIR: pointers, registers and a statement builder over typed values.

Every kernel generator in ``codegen/tvm`` writes its function with :class:`Builder`. A value in flight is a
:class:`Vec`: an expression that knows its number format and its number of lanes (1 for a scalar). Index
expressions are plain ``int`` or int32 TIR expressions (:data:`Index`); they use Python's operators.

>>> from bitwright.ir.types import F32
>>> b = Builder("double")
>>> x, y = b.param("x", F32, 64), b.param("y", F32, 64)
>>> with b.loop(b.end, b.begin) as i:
...     v = b.load(x, i * 16, 16)
...     b.store(y, i * 16, v + v)
>>> b.finish().attrs["global_symbol"]
'double'

Rules that the builder keeps so that no symbol of libtvm is needed: parameters are raw pointers, a stack
buffer is smaller than 1 KiB and of scope "global". A vector :meth:`Builder.register` becomes a machine
register because it is only used whole; :meth:`Builder.let` evaluates an expression once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tvm import tirx  # type: ignore[import-untyped]
from tvm.ir import PointerType, PrimType, StringImm  # type: ignore[import-untyped]

from bitwright.codegen.tvm.values import (
    Condition,
    Expr,
    Index,
    Number,
    Vec,
    both,
    choose,
    concat,
    const,
    constants,
    either,
    fma,
    intrinsic,
    is_static,
    maximum,
    minimum,
    scalar,
    shuffle,
    tvm_dtype,
    wide,
    width,
)
from bitwright.ir.types import S32, U8, DType

__all__ = [
    "STACK_LIMIT",
    "Builder",
    "Condition",
    "Expr",
    "Index",
    "Number",
    "Pointer",
    "Register",
    "Vec",
    "both",
    "choose",
    "concat",
    "const",
    "constants",
    "either",
    "fma",
    "intrinsic",
    "is_static",
    "maximum",
    "minimum",
    "scalar",
    "shuffle",
    "tvm_dtype",
    "wide",
    "width",
]

STACK_LIMIT = 1008
"""Bytes a stack buffer may have: TVM asks for a runtime workspace from 1024 on."""


@dataclass(eq=False)
class Pointer:
    """Memory: a root pointer seen as elements of ``dtype`` from element ``offset`` on. The builder makes it."""

    root: Expr
    buffer: Any
    dtype: DType
    offset: Index = 0
    name: str = ""


@dataclass(eq=False)
class Register:
    """A mutable vector that lives in a machine register."""

    builder: Builder
    buffer: Any
    dtype: DType
    lanes: int

    def get(self) -> Vec:
        return Vec(tirx.BufferLoad(self.buffer, [0]), self.dtype, self.lanes)

    def set(self, value: Vec) -> None:
        self.builder.emit(tirx.BufferStore(self.buffer, value.expr, [0]))


@dataclass(eq=False)
class Builder:
    """Writes one C-ABI function ``void name(int32_t begin, int32_t end, T0* p0, ...)``."""

    name: str
    begin: Index = field(default_factory=lambda: tirx.Var("begin", "int32"))
    end: Index = field(default_factory=lambda: tirx.Var("end", "int32"))
    _params: list[Pointer] = field(default_factory=list)
    _blocks: list[list[Any]] = field(default_factory=lambda: [[]])
    _views: dict[tuple[int, str], Any] = field(default_factory=dict)
    _head: list[Any] = field(default_factory=list)
    _count: int = 0
    _imports: dict[str, None] = field(default_factory=dict)
    private: ClassVar[str] = "global"
    """The storage scope of registers and stack buffers, in TVM's terms."""

    # ---- parameters and memory
    def param(self, name: str, dtype: DType, elements: int) -> Pointer:
        """The next pointer parameter; call it in the order of the ABI."""
        kind = tvm_dtype(dtype)
        root = tirx.Var(name, PointerType(PrimType(kind), "global"))
        buffer = self._declare(root, kind, max(elements, 1), name)
        pointer = Pointer(root, buffer, dtype, 0, name)
        self._params.append(pointer)
        return pointer

    def scratch(self, nbytes: int) -> Pointer:
        """The scratch parameter: bytes private to the calling thread. It comes last."""
        return self.param("scratch", U8, nbytes)

    @property
    def param_names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self._params)

    def view(self, pointer: Pointer, dtype: DType, byte_offset: Index = 0) -> Pointer:
        """The same memory as elements of another format (same root, so that LLVM knows they overlap)."""
        kind, start = tvm_dtype(dtype), pointer.offset * width(pointer.dtype) + byte_offset
        key = (id(pointer.root), kind)
        if tvm_dtype(pointer.dtype) == kind:
            self._views.setdefault(key, pointer.buffer)
        elif key not in self._views:
            self._views[key] = self._declare(pointer.root, kind, 1 << 30, f"{pointer.name}_{kind}")
        offset = start // width(dtype) if width(dtype) > 1 else start
        return Pointer(pointer.root, self._views[key], dtype, offset, pointer.name)

    def at(self, pointer: Pointer, offset: Index) -> Pointer:
        """The pointer moved by ``offset`` elements."""
        return Pointer(pointer.root, pointer.buffer, pointer.dtype, pointer.offset + offset, pointer.name)

    def stack(self, dtype: DType, elements: int, name: str = "stack") -> Pointer:
        """A small private array, at most :data:`STACK_LIMIT` bytes; it may be indexed by expressions."""
        if elements * width(dtype) > STACK_LIMIT:
            raise ValueError(f"{elements} x {dtype} do not fit a stack buffer of {STACK_LIMIT} bytes")
        buffer = tirx.decl_buffer(
            (elements,), tvm_dtype(dtype), name=self._unique(name), scope=self.private, data_alignment=64
        )
        self.emit(tirx.AllocBuffer(buffer))
        return Pointer(tirx.buffer_data(buffer), buffer, dtype, 0, name)

    def register(self, dtype: DType, lanes: int, init: Vec | None = None, name: str = "r") -> Register:
        """A mutable vector value, optionally initialised."""
        buffer = tirx.decl_buffer((1,), tvm_dtype(dtype, lanes), name=self._unique(name), scope=self.private)
        self.emit(tirx.AllocBuffer(buffer))
        made = Register(self, buffer, dtype, lanes)
        if init is not None:
            made.set(init)
        return made

    # ---- values
    def load(self, pointer: Pointer, index: Index, lanes: int = 1) -> Vec:
        """``lanes`` consecutive elements (no alignment needed)."""
        place = self._place(pointer, index, lanes)
        return Vec(tirx.BufferLoad(pointer.buffer, [place]), pointer.dtype, lanes)

    def gather(self, pointer: Pointer, base: Index, index: Vec) -> Vec:
        """Elements ``pointer[base + index]`` for a vector of s32 indices: scalar loads, works everywhere."""
        start = tirx.Broadcast(scalar(pointer.offset + base, S32).expr, index.lanes)
        return Vec(tirx.BufferLoad(pointer.buffer, [tirx.Add(start, index.expr)]), pointer.dtype, index.lanes)

    def store(self, pointer: Pointer, index: Index, value: Vec, valid: int | None = None) -> None:
        """Store consecutive elements; with ``valid``, only that many first lanes (by halving, no branch)."""
        if tvm_dtype(value.dtype) != tvm_dtype(pointer.dtype):
            raise TypeError(f"storing {value.dtype} to {pointer.dtype} {pointer.name}")
        if valid is None or valid >= value.lanes:
            self.emit(tirx.BufferStore(pointer.buffer, value.expr, [self._place(pointer, index, value.lanes)]))
            return
        value, start, size = self.let(value), 0, 1 << value.lanes.bit_length()
        while start < valid:
            while size > valid - start:
                size //= 2
            piece = value.part(start, size) if size > 1 else self._lane(value, start)
            self.emit(tirx.BufferStore(pointer.buffer, piece.expr, [self._place(pointer, index + start, size)]))
            start += size

    def let(self, value: Vec, name: str = "v") -> Vec:
        """Evaluate once; the result is visible to the end of the enclosing block.

        A vector goes through a register: TVM's analyzer would try to simplify the value of a binding.
        """
        if value.lanes > 1:
            return self.register(value.dtype, value.lanes, value, name).get()
        var = tirx.Var(self._unique(name), tvm_dtype(value.dtype, value.lanes))
        self.emit(tirx.Bind(var, value.expr))
        return Vec(var, value.dtype, value.lanes)

    def index(self, value: Index, name: str = "at") -> Index:
        """Evaluate an index expression once."""
        if is_static(value):
            return value
        var = tirx.Var(self._unique(name), "int32")
        self.emit(tirx.Bind(var, value))
        return var

    def prefetch(self, pointer: Pointer, index: Index, write: bool = False) -> None:
        """Ask for the cache line of an element, to ``write`` to it or to read; any address is harmless."""
        address = tirx.address_of(tirx.BufferLoad(pointer.buffer, [pointer.offset + index]))
        self.emit(tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, int(write), 3, 1)))

    # ---- control
    @contextmanager
    def loop(self, end: Index, start: Index = 0, step: int = 1, name: str = "i") -> Iterator[Index]:
        """A serial loop from ``start`` while the index is below ``end``."""
        var = tirx.Var(self._unique(name), "int32")
        self._blocks.append([])
        extent = end - start
        if step == 1:
            yield var if is_static(start) and start == 0 else var + start
        else:
            extent = (extent + (step - 1)) // step
            yield var * step + start
        body = self._pop()
        if not (is_static(extent) and extent <= 0):
            self.emit(tirx.For(var, 0, extent, tirx.ForKind.SERIAL, body))

    @contextmanager
    def when(self, condition: Expr) -> Iterator[None]:
        """Statements that run only if the (scalar) condition holds; a static condition costs nothing."""
        self._blocks.append([])
        yield
        body = self._pop()
        if isinstance(condition, bool):
            if condition:
                self.emit(body)
        else:
            test = condition.expr if isinstance(condition, Condition) else condition
            self.emit(tirx.IfThenElse(test, body, None))

    def emit(self, statement: Any) -> None:
        """Append a raw TIR statement."""
        self._blocks[-1].append(statement)

    def require(self, text: str) -> None:
        """LLVM IR that the function needs: functions to be inlined into it (none if the text is empty)."""
        if text:
            self._imports[text] = None

    def finish(self) -> Any:
        """The finished ``PrimFunc``."""
        body = tirx.SeqStmt(self._head + self._blocks[0] + [tirx.Evaluate(tirx.const(0, "int32"))])
        for text in self._imports:
            body = tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", StringImm(text), body)
        function = tirx.PrimFunc([self.begin, self.end, *(p.root for p in self._params)], body)
        for key, value in (("global_symbol", self.name), ("tirx.noalias", True), ("s_tir", True)):
            function = function.with_attr(key, value)
        return function

    # ---- inside
    def _pop(self) -> Any:
        statements = self._blocks.pop()
        if len(statements) == 1:
            return statements[0]
        return tirx.SeqStmt(statements or [tirx.Evaluate(tirx.const(0, "int32"))] * 2)

    def _lane(self, value: Vec, lane: int) -> Vec:
        return Vec(tirx.Shuffle([value.expr], [lane]), value.dtype, 1)

    def _unique(self, name: str) -> str:
        self._count += 1
        return f"{name}_{self._count}"

    def _declare(self, root: Expr, kind: str, elements: int, name: str) -> Any:
        buffer = tirx.decl_buffer((elements,), kind, name=self._unique(name))
        self._head.append(tirx.DeclBuffer(buffer, data=root))
        return buffer

    def _place(self, pointer: Pointer, index: Index, lanes: int) -> Any:
        start = pointer.offset + index
        return start if lanes == 1 else tirx.Ramp(start, 1, lanes)
