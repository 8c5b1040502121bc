"""Memory of a device: allocations that free themselves, arrays in it, arrays of other libraries."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.runtime.cuda_driver import Driver
from bitwright.runtime.dlpack import capsule_of, view_of
from bitwright.runtime.ports import Port, as_array, mismatch


class Memory:
    """Bytes on a device, freed with the object."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self.driver, self.nbytes = driver, nbytes
        self.address = driver.alloc(nbytes)

    def __del__(self) -> None:
        if address := getattr(self, "address", 0):
            with contextlib.suppress(BitwrightError):
                self.driver.free(address)


class DeviceArray:
    """An array on the device: ``shape``, ``dtype``, DLPack for other libraries, :meth:`numpy` for a copy."""

    def __init__(self, driver: Driver, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], owner: Any) -> None:
        self.driver, self.address, self.shape, self.dtype, self._owner = driver, address, shape, dtype, owner

    @classmethod
    def empty(cls, driver: Driver, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """Memory for an array; it holds anything."""
        memory = Memory(driver, math.prod(shape) * dtype.itemsize)
        return cls(driver, memory.address, shape, dtype, memory)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        return capsule_of(self.address, self.shape, self.dtype, self.driver.kind, self.driver.index, self._owner)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.driver.kind, self.driver.index

    def numpy(self, stream: int = 0) -> NDArray[Any]:
        """A copy in host memory, of what ``stream`` has written."""
        out = np.empty(self.shape, self.dtype)
        self.driver.download(out.reshape(-1).view(np.uint8), self.address, stream)
        return out

    def fill(self, values: Any, stream: int = 0) -> None:
        """Copy an array of the same shape and format here. Raises :class:`InvalidInput` for another one."""
        array = np.ascontiguousarray(values)
        if array.shape != self.shape or array.dtype != self.dtype:
            raise InvalidInput(f"expected {self.dtype}{list(self.shape)}, got {array.dtype}{list(array.shape)}")
        self.driver.upload(self.address, array.reshape(-1).view(np.uint8), stream)

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype}{list(self.shape)} on device {self.driver.index}>"


@dataclass(frozen=True, slots=True)
class Placed:
    """Where an input or output lies on the device."""

    address: int
    array: DeviceArray


def is_there(value: Any, driver: Driver) -> bool:
    """Whether a value is an array in memory of the device's kind, to be used where it lies; NumPy's are copied."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack_device__"):
        return False
    return int(value.__dlpack_device__()[0]) == driver.kind


def at_port(port: Port, value: Any, driver: Driver, stream: int, *, copies: bool = True) -> tuple[Placed, int]:
    """Where a value for a port lies on the device, and its rows of the batch (0: it does not depend on it).

    Values of host memory are copied there, unless ``copies`` is False. Raises :class:`InvalidInput` for a wrong one.
    """
    if not is_there(value, driver):
        return _uploaded(port, value, driver, stream, copies)
    found = view_of(value, stream)
    if (found.kind, found.index) != (driver.kind, driver.index):
        raise InvalidInput(f"input {port.spec.name!r} lies on another device than the program ({driver.index})")
    rows = _rows(port, found.shape, found.dtype)
    if not found.contiguous:
        raise InvalidInput(f"input {port.spec.name!r} has gaps between its elements: pass x.contiguous()")
    array = DeviceArray(driver, found.address, found.shape, found.dtype, (found.owner, value))
    return Placed(found.address, array), rows


def _uploaded(port: Port, value: Any, driver: Driver, stream: int, copies: bool) -> tuple[Placed, int]:
    if not copies:
        raise InvalidInput(f"output {port.spec.name!r} must be an array on the device")
    array = value if type(value) is np.ndarray else as_array(port, value)
    rows = _rows(port, array.shape, array.dtype)
    made = DeviceArray.empty(driver, array.shape, array.dtype)
    made.fill(array, stream)
    return Placed(made.address, made), rows


def _rows(port: Port, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    rows = port.rows_of(shape) if dtype == port.dtype else -1
    if rows < 0:
        raise mismatch(port, shape, dtype)
    return rows
