"""Inputs and outputs of a program: what shape and format they must have, and where they lie in memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import parse_dtype
from bitwright.runtime.manifest import Manifest, TensorSpec
from bitwright.runtime.native import address_of, aligned

Array = NDArray[Any]
_PAGE = 4096


class Port:
    """An input or output with everything about it computed beforehand."""

    __slots__ = ("alignment", "dtype", "factor", "nbytes", "padding", "row_bytes", "shape", "spec", "tail")

    def __init__(self, spec: TensorSpec, manifest: Manifest) -> None:
        self.spec = spec
        self.dtype = parse_dtype(spec.dtype).numpy
        self.factor = spec.factor
        self.tail = tuple(int(d) for d in spec.shape[1:]) if self.factor else ()
        self.shape = () if self.factor else tuple(int(d) for d in spec.shape)
        self.row_bytes = spec.row_bytes
        self.nbytes = 0 if self.factor else math.prod(self.shape) * self.dtype.itemsize
        self.alignment = max(manifest.input_alignment, self.dtype.alignment)
        self.padding = manifest.input_padding

    def rows_of(self, shape: tuple[int, ...]) -> int:
        """Rows of the batch in an array of ``shape``: 0 for a static one, -1 when the shape is wrong."""
        if not self.factor:
            return 0 if shape == self.shape else -1
        if len(shape) != len(self.tail) + 1 or shape[1:] != self.tail or shape[0] % self.factor:
            return -1
        return shape[0] // self.factor

    def full_shape(self, rows: int) -> tuple[int, ...]:
        return (rows * self.factor, *self.tail) if self.factor else self.shape


def as_array(port: Port, value: Any) -> Array:
    """A NumPy array from a torch tensor, a DLPack or array-like object, a list or a number."""
    try:
        if isinstance(value, list | tuple | int | float):
            loose = np.asarray(value)
            return loose.astype(port.dtype) if np.can_cast(loose.dtype, port.dtype, "same_kind") else loose
        if hasattr(value, "detach"):
            tensor = value.detach().cpu()
            if str(tensor.dtype) == "torch.bfloat16":
                return np.asarray(tensor.float().numpy().astype(port.dtype))
            return np.asarray(tensor.numpy())
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise InvalidInput(f"input {port.spec.name!r} cannot be read as an array: {error}") from error


def mismatch(port: Port, shape: tuple[int, ...], dtype: np.dtype[Any]) -> InvalidInput:
    """Expected and given, and how to go on when only the type differs."""
    given = f"{dtype}[{', '.join(map(str, shape))}]"
    hint = f"; convert it with .astype({str(port.dtype)!r})" if dtype != port.dtype else ""
    return InvalidInput(f"input {port.spec.name!r}: expected {port.spec}, got {given}{hint}")


def input_address(port: Port, array: Array, rows: int, keep: list[Array]) -> int:
    """The address of ``array`` when kernels can use it as it lies, else of an aligned copy put into ``keep``.

    Kernels may read a few bytes past the end: harmless as long as they stay on the same page.
    """
    if array.flags.c_contiguous and (not port.factor or array.shape[0] == rows * port.factor):
        address = address_of(array)
        end = address + array.nbytes
        if not address % port.alignment and (end - 1) // _PAGE == (end - 1 + port.padding) // _PAGE:
            return address
    shape = port.full_shape(rows)
    nbytes = math.prod(shape) * port.dtype.itemsize
    copy = aligned(nbytes + 64 + port.padding)
    view = np.ndarray(shape, port.dtype, copy)
    if port.factor:
        view[: array.shape[0]] = array
        view[array.shape[0] :] = 0
    else:
        view[...] = array
    keep.append(copy)
    return address_of(copy)
