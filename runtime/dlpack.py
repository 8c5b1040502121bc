"""Arrays of other libraries and for them, by DLPack: where they lie, without copies and without those libraries.

The structures are those of ``dlpack.h``, version 0.8 (capsules called ``dltensor``), which all of them read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import BF16

HOST, CUDA = 1, 2
"""Device types of DLPack."""
_INT, _UINT, _FLOAT, _BFLOAT, _BOOL = 0, 1, 2, 4, 6
_NAME = b"dltensor"


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("index", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )  # fmt: skip


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_api = ctypes.pythonapi
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_unused = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))


@dataclass(frozen=True, slots=True)
class View:
    """An array somewhere: its address, shape and format. ``owner`` keeps the memory."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    kind: int
    index: int
    contiguous: bool
    owner: Any


def view_of(value: Any, stream: int) -> View:
    """Where a DLPack array lies; what was done to it before is seen by work in ``stream``.

    Raises :class:`InvalidInput` for one of a format that NumPy and ml_dtypes do not have, or that cannot be shared.
    """
    try:
        kind, index = value.__dlpack_device__()
        capsule = value.__dlpack__(stream=(stream or 1) if kind == CUDA else None)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidInput(f"this array cannot be shared: {error}") from error
    t = _Managed.from_address(_api.PyCapsule_GetPointer(capsule, _NAME)).tensor
    shape = tuple(t.shape[i] for i in range(t.ndim))
    strides = tuple(t.strides[i] for i in range(t.ndim)) if t.strides else _packed(shape)
    same = all(n == 1 or s == p for n, s, p in zip(shape, strides, _packed(shape), strict=True)) or 0 in shape
    return View((t.data or 0) + t.offset, shape, _dtype(t), int(kind), int(index), same, capsule)


def _packed(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of an array without gaps."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def _dtype(t: _Tensor) -> np.dtype[Any]:
    names = {_INT: "int", _UINT: "uint", _FLOAT: "float"}
    if t.lanes == 1 and t.code == _BFLOAT and t.bits == 16:
        return BF16.numpy
    if t.lanes == 1 and t.code == _BOOL and t.bits == 8:
        return np.dtype(bool)
    if t.lanes != 1 or t.code not in names or t.bits not in (8, 16, 32, 64):
        raise InvalidInput(f"arrays of DLPack format {t.code} with {t.bits} bits and {t.lanes} lanes are not read")
    return np.dtype(f"{names[t.code]}{t.bits}")


# --- for others --------------------------------------------------------------------------------------------

_alive: dict[int, tuple[Any, ...]] = {}
"""What capsules refer to, by the address of their structure, until the reader has done with it."""


def _forget(address: int) -> None:
    _alive.pop(address, None)


def _drop(capsule: int) -> None:
    """A capsule that nobody read goes: so does what it refers to."""
    if _unused(capsule, _NAME):
        _alive.pop(_pointer(capsule, _NAME), None)


_done, _dropped = _Deleter(_forget), _Deleter(_drop)
for _callback in (_done, _dropped):  # capsules may outlive this module when the interpreter ends
    _api.Py_IncRef(ctypes.py_object(_callback))


def capsule_of(address: int, shape: Sequence[int], dtype: np.dtype[Any], kind: int, index: int, owner: Any) -> Any:
    """A DLPack capsule of memory that ``owner`` keeps."""
    codes = {"i": _INT, "u": _UINT, "f": _FLOAT, "b": _BOOL}
    code = _BFLOAT if dtype == BF16.numpy else codes.get(dtype.kind)
    if code is None:
        raise InvalidInput(f"DLPack has no format for {dtype}")
    sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    steps = (ctypes.c_int64 * max(len(shape), 1))(*_packed(shape))
    made, (first, step) = _Managed(), (ctypes.cast(x, ctypes.POINTER(ctypes.c_int64)) for x in (sizes, steps))
    made.tensor = _Tensor(address, kind, index, len(shape), code, 8 * dtype.itemsize, 1, first, step, 0)
    made.deleter = _done
    at = ctypes.addressof(made)
    _alive[at] = (made, sizes, steps, owner)
    return _api.PyCapsule_New(at, _NAME, ctypes.cast(_dropped, ctypes.c_void_p))
