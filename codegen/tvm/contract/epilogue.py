"""What happens to a finished accumulator: the protocol, and the plain store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec
from bitwright.ir.types import DType


@dataclass(frozen=True, slots=True)
class EpilogueParam:
    """A pointer parameter of the kernel that only the epilogue uses."""

    name: str
    dtype: DType
    elements: int


class Epilogue(Protocol):
    """Turns accumulators into outputs.

    The generator appends ``params`` (operands first, outputs last) to the kernel's parameters in this order and
    calls :meth:`store` once for every vector of accumulators. ``row`` is the flattened output row (batch, or
    batch x height x width), ``col`` the first output channel; only the first ``valid`` lanes belong to the output.
    A load at ``col`` or ``row * cols + col`` may read all lanes (buffers are padded by 64 bytes); a store must
    pass ``valid``: ``b.store(out, row * cols + col, value, valid)``.

    ``heavy``: more than about ten operations. The generator then emits the epilogue once per column vector, in a
    loop over the rows of the tile, instead of once per accumulator.
    """

    @property
    def params(self) -> Sequence[EpilogueParam]: ...

    @property
    def heavy(self) -> bool: ...

    def store(
        self, b: Builder, pointers: Mapping[str, Pointer], acc: Vec, row: Index, col: Index, valid: int
    ) -> None: ...

    def store_row(
        self, b: Builder, pointers: Mapping[str, Pointer], accs: Sequence[Vec], row: Index, col: Index, valid: int
    ) -> None:
        """:meth:`store` for the vectors of consecutive columns, of which the first ``valid`` lanes count."""


def one_by_one(
    epilogue: Epilogue,
    b: Builder,
    pointers: Mapping[str, Pointer],
    accs: Sequence[Vec],
    row: Index,
    col: Index,
    valid: int,
) -> None:
    """:meth:`Epilogue.store_row` by :meth:`Epilogue.store`."""
    for j, acc in enumerate(accs):
        epilogue.store(b, pointers, acc, row, col + j * acc.lanes, min(acc.lanes, valid - j * acc.lanes))


@dataclass(frozen=True)
class StoreAcc:
    """Stores accumulators as they are to ``out[rows, cols]``."""

    rows: int
    cols: int
    dtype: DType
    heavy: bool = False

    @property
    def params(self) -> Sequence[EpilogueParam]:
        return (EpilogueParam("out", self.dtype, self.rows * self.cols),)

    def store(self, b: Builder, pointers: Mapping[str, Pointer], acc: Vec, row: Index, col: Index, valid: int) -> None:
        b.store(pointers["out"], row * self.cols + col, acc, valid)

    def store_row(
        self, b: Builder, pointers: Mapping[str, Pointer], accs: Sequence[Vec], row: Index, col: Index, valid: int
    ) -> None:
        one_by_one(self, b, pointers, accs, row, col, valid)
