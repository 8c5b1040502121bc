"""Direct construction of TIR for a GPU: the builder of CPU kernels with blocks, threads and shared memory.

A kernel is ``extern "C" __global__ void NAME(T0* p0, T1* p1, ...)``. Everything of :class:`Builder` holds; registers
and stack buffers are per thread, and a :class:`Vec` in memory has 1, 2 or 4 lanes (at most 16 bytes, aligned to its
size). Instructions that C++ does not have are calls of device functions (:meth:`CudaBuilder.call`), whose text and
meaning stand in ``codegen/cuda/instructions``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tvm import tirx  # type: ignore[import-untyped]
from tvm.backend.cuda.op import cuda_func_call  # type: ignore[import-untyped]

from bitwright.codegen.tvm.tir import Builder, Expr, Index, Pointer, Vec, tvm_dtype, width
from bitwright.ir.types import DType

MAX_THREADS = 1024


@dataclass(eq=False)
class CudaBuilder(Builder):
    """Writes one kernel of ``grid`` blocks (x, y, z) of ``threads`` threads.

    ``tasks``: for kernels with one output of a loop nest per thread; ``begin`` and ``end`` are this thread's.
    ``cluster``: so many neighbouring blocks (x) run together and reach each other's shared memory.
    ``min_blocks``: blocks that must fit a multiprocessor (``__launch_bounds__``' second argument); 0 asks nothing.
    """

    grid: tuple[int, int, int] = (1, 1, 1)
    threads: int = 128
    tasks: int = 0
    min_blocks: int = 0
    cluster: int = 1
    begin: Index = 0
    end: Index = 0
    shared_bytes: int = 0
    private: ClassVar[str] = "local"
    _axes: dict[str, Any] = field(default_factory=dict)
    _arena: Any = None

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= MAX_THREADS:
            raise ValueError(f"{self.threads} threads in a block of {self.name}")
        for axis in "xyz":
            tag = f"blockIdx.{axis}"
            self._axes[tag] = tirx.IterVar(None, tirx.Var(tag.replace(".", "_"), "int32"), 1, tag)
        self._axes["threadIdx.x"] = tirx.IterVar(None, tirx.Var("threadIdx_x", "int32"), 1, "threadIdx.x")
        if self.tasks:
            self.grid = ((self.tasks + self.threads - 1) // self.threads, 1, 1)
            self.begin = self.block() * self.threads + self.thread
            self.end = tirx.Min(self.begin + 1, tirx.const(self.tasks, "int32"))

    # ---- where this thread is
    def block(self, axis: str = "x") -> Index:
        """The block's index."""
        return self._axes[f"blockIdx.{axis}"].var

    @property
    def thread(self) -> Index:
        """The thread's index in its block."""
        return self._axes["threadIdx.x"].var

    @property
    def lane(self) -> Index:
        """The thread's index in its warp."""
        return self.thread % 32

    @property
    def warp(self) -> Index:
        """The warp's index in its block."""
        return self.thread // 32

    # ---- memory
    def shared(self, dtype: DType, elements: int, align: int = 128, name: str = "shared") -> Pointer:
        """An array in the block's shared memory; its first byte lies at a multiple of ``align``."""
        start = -(-self.shared_bytes // align) * align
        self.shared_bytes = start + elements * width(dtype)
        if self._arena is None:
            self._arena = tirx.decl_buffer((1,), "uint8", name="shared", scope="shared.dyn", data_alignment=128)
        root = tirx.buffer_data(self._arena)
        kind = tvm_dtype(dtype)
        buffer = tirx.decl_buffer(
            (1 << 30,), kind, name=self._unique(f"{name}_{kind}"), scope="shared.dyn", data_alignment=128
        )
        self._head.append(tirx.DeclBuffer(buffer, data=root))
        return Pointer(root, buffer, dtype, start // width(dtype), name)

    def local(self, dtype: DType, elements: int, name: str = "local") -> Pointer:
        """An array per thread. It becomes registers when every index is known after unrolling; see :meth:`unrolled`."""
        buffer = tirx.decl_buffer(
            (elements,), tvm_dtype(dtype), name=self._unique(name), scope="local", data_alignment=16
        )
        self.emit(tirx.AllocBuffer(buffer))
        return Pointer(tirx.buffer_data(buffer), buffer, dtype, 0, name)

    def address(self, pointer: Pointer, index: Index = 0) -> Expr:
        """The address of an element, for :meth:`call`."""
        return tirx.address_of(tirx.BufferLoad(pointer.buffer, [pointer.offset + index]))

    def element(self, pointer: Pointer, index: Index = 0) -> Expr:
        """An element as an lvalue (a C++ reference), for :meth:`call`."""
        return tirx.BufferLoad(pointer.buffer, [pointer.offset + index])

    # ---- control
    def either(self, condition: Expr, first: Callable[[], None], second: Callable[[], None]) -> None:
        """One ``if`` with two branches, each written by a function (``setmaxnreg`` wants roles to be one)."""
        branches = []
        for run in (first, second):
            self._blocks.append([])
            run()
            branches.append(self._pop())
        self.emit(tirx.IfThenElse(condition, *branches))

    # ---- instructions
    def sync(self) -> None:
        """All threads of the block wait for each other; what they wrote is seen."""
        self.emit(tirx.Evaluate(tirx.call_intrin("int32", "tirx.tvm_storage_sync", "shared")))

    def call(self, name: str, *args: Expr | int | float | Vec) -> None:
        """Run an instruction of ``codegen/cuda/instructions`` for its effect."""
        self.emit(tirx.Evaluate(cuda_func_call(name, *map(_plain, args), source_code=_declared(name))))

    def value(self, name: str, dtype: DType, *args: Expr | int | float | Vec) -> Vec:
        """Run an instruction and keep what it returns."""
        kind = tvm_dtype(dtype)
        called = cuda_func_call(name, *map(_plain, args), source_code=_declared(name), return_type=kind)
        return self.register(dtype, 1, Vec(called, dtype, 1)).get()

    # ---- the end
    def finish(self) -> Any:
        """The finished device function; its attributes hold the launch (``bitwright.launch``)."""
        statements = self._head + self._blocks[0] + [tirx.Evaluate(tirx.const(0, "int32"))]
        if self._arena is not None:
            statements = [tirx.AllocBuffer(self._arena), *statements]
        body = tirx.SeqStmt(statements)
        extents = {"threadIdx.x": self.threads}
        extents |= {f"blockIdx.{axis}": n for axis, n in zip("xyz", self.grid, strict=True)}
        for tag, extent in extents.items():
            body = tirx.AttrStmt(self._axes[tag], "thread_extent", tirx.IntImm("int32", extent), body)
        function = tirx.PrimFunc([p.root for p in self._params], body)
        launch = [*self.grid, self.threads, self.shared_bytes]
        attributes = {
            "global_symbol": self.name, "calling_conv": 2, "tirx.is_global_func": True, "tirx.noalias": True,
            "s_tir": True, "bitwright.launch": launch, "bitwright.min_blocks": self.min_blocks,
            "bitwright.cluster": self.cluster,
        }  # fmt: skip
        for key, value in attributes.items():
            function = function.with_attr(key, value)
        return function


def _plain(value: Expr | int | float | Vec) -> Expr:
    if isinstance(value, Vec):
        return value.expr
    if isinstance(value, int):
        return tirx.const(value, "int32")
    return value


def _declared(name: str) -> str:
    """What TVM prints before the kernels: nothing, the functions come with the prelude of whoever compiles."""
    return f"/* {name} */"


def launch_of(function: Any) -> Sequence[int]:
    """Grid x, y, z, threads of a block, bytes of shared memory of a finished kernel."""
    return [int(x) for x in function.attrs["bitwright.launch"]]


__all__ = ["MAX_THREADS", "CudaBuilder", "launch_of"]
