"""A GPU as a program sees it: memory, kernels, copies, launches, recorded graphs; here through NVIDIA's driver.

:class:`Driver` is all that the runtime asks of a device. ``bitwright.gpu_emulation`` has one without a device.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.errors import BitwrightError, InvalidInput

Bytes = NDArray[np.uint8]
_NEEDED = 'running on an NVIDIA GPU needs cuda-bindings: pip install "bitwright[cuda]"'


class Driver(Protocol):
    """A device. Addresses are integers of device memory, streams integers (0: the default stream)."""

    kind: int
    """Of DLPack: 2 for CUDA memory, 1 where device memory is the host's."""
    index: int

    def alloc(self, nbytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def zero(self, address: int, nbytes: int, stream: int) -> None: ...
    def upload(self, address: int, array: Bytes, stream: int) -> None: ...
    def download(self, array: Bytes, address: int, stream: int) -> None:
        """Into host memory; done when it returns."""

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None: ...
    def load(self, code: Mapping[str, tuple[bytes, str]]) -> None:
        """Kernels by name: machine code and text."""

    def launch(
        self, kernel: str, grid: tuple[int, int, int], threads: int, shared: int, pointers: Sequence[int], stream: int
    ) -> None: ...
    def wait(self, stream: int) -> None: ...
    def record(self, run: Callable[[int], None]) -> Any:
        """What ``run(stream)`` launches, as a graph to replay; nothing runs now."""

    def replay(self, graph: Any, stream: int) -> None: ...
    def timed(self, run: Callable[[int], None], stream: int) -> float:
        """Seconds that ``run(stream)`` takes on the device."""


@cache
def _bindings() -> Any:
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        raise InvalidInput(_NEEDED)
    from cuda.bindings import driver

    return driver


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for ``arch`` runs on a device: the same generation, not newer; ``a``: exactly this one.

    >>> runs_on("sm_80", (8, 6)), runs_on("sm_90a", (9, 0)), runs_on("sm_80", (9, 0)), runs_on("sm_90a", (10, 0))
    (True, True, False, False)
    """
    digits = arch.removeprefix("sm_").rstrip("af")
    if not digits.isdigit():
        return False
    major, minor = int(digits[:-1]), int(digits[-1])
    return capability[0] == major and (capability[1] == minor if arch[-1] == "a" else capability[1] >= minor)


class CudaDriver:
    """Device ``index`` through cuda-bindings; memory and streams are those of its primary context, as in torch.

    Raises :class:`InvalidInput` without cuda-bindings, driver or device, and where machine code for ``arch`` does not
    run on it; :class:`BitwrightError` where a call fails.
    """

    kind = 2

    def __init__(self, arch: str, index: int = 0) -> None:
        self.index = index
        self._cu = cu = _bindings()
        try:
            (error, *_) = cu.cuInit(0)
        except RuntimeError as why:  # libcuda.so.1 is not there
            raise InvalidInput(
                f"this machine has no NVIDIA driver ({why}): install one, or run the program emulated"
                " (bitwright run --emulate)"
            ) from why
        count = 0 if error else self._asked(cu.cuDeviceGetCount())
        if index >= count:
            many = f"{count} NVIDIA GPU{'s' if count != 1 else ''}"
            raise InvalidInput(f"there is no device {index}: this machine has {many if count else 'no NVIDIA GPU'}")
        device = self._asked(cu.cuDeviceGet(index))
        attribute = cu.CUdevice_attribute
        self.capability = (
            int(self._asked(cu.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))),
            int(self._asked(cu.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))),
        )
        optin = attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        self._shared = int(self._asked(cu.cuDeviceGetAttribute(optin, device)))
        self.name = bytes(self._asked(cu.cuDeviceGetName(256, device))).split(b"\0")[0].decode()
        if not runs_on(arch, self.capability):
            raise InvalidInput(
                f"the program is compiled for {arch}, device {index} ({self.name}) is"
                f" sm_{self.capability[0]}{self.capability[1]}: compile it for that device's target"
            )
        self._context = self._asked(cu.cuDevicePrimaryCtxRetain(device))
        self._functions: dict[str, Any] = {}
        self._modules: list[Any] = []
        self._device = device
        self._enter()
        self._side = self._asked(cu.cuStreamCreate(1))  # not blocking: graphs are recorded in it

    def _asked(self, answer: tuple[Any, ...]) -> Any:
        """The result of a driver call; raises :class:`BitwrightError` that names the driver's error."""
        error, *rest = answer
        if int(error):
            (_, text) = self._cu.cuGetErrorString(error)
            told = bytes(text).decode() if text else "no description"
            raise BitwrightError(f"the CUDA driver says {getattr(error, 'name', error)}: {told}")
        return rest[0] if rest else None

    def _enter(self) -> None:
        self._asked(self._cu.cuCtxSetCurrent(self._context))

    def alloc(self, nbytes: int) -> int:
        self._enter()
        return int(self._asked(self._cu.cuMemAlloc(max(nbytes, 16))))

    def free(self, address: int) -> None:
        self._enter()
        self._asked(self._cu.cuMemFree(address))

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        self._enter()
        if nbytes:
            self._asked(self._cu.cuMemsetD8Async(address, 0, nbytes, stream))

    def upload(self, address: int, array: Bytes, stream: int) -> None:
        self._enter()
        if array.nbytes:
            self._asked(self._cu.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, stream))

    def download(self, array: Bytes, address: int, stream: int) -> None:
        self._enter()
        if array.nbytes:
            self._asked(self._cu.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, stream))
        self._asked(self._cu.cuStreamSynchronize(stream))

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        self._enter()
        self._asked(self._cu.cuMemcpyDtoDAsync(to, source, nbytes, stream))

    def load(self, code: Mapping[str, tuple[bytes, str]]) -> None:
        self._enter()
        for name, (cubin, _) in code.items():
            module = self._asked(self._cu.cuModuleLoadData(cubin))
            self._modules.append(module)
            self._functions[name] = self._with_shared(self._asked(self._cu.cuModuleGetFunction(module, name.encode())))

    def _with_shared(self, function: Any) -> Any:
        """The function, allowed to have all shared memory of a block (48 KiB are without being asked)."""
        cu, kinds = self._cu, self._cu.CUfunction_attribute
        own = self._asked(cu.cuFuncGetAttribute(kinds.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function))
        most = self._shared - int(own)
        self._asked(cu.cuFuncSetAttribute(function, kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most))
        return function

    def launch(
        self, kernel: str, grid: tuple[int, int, int], threads: int, shared: int, pointers: Sequence[int], stream: int
    ) -> None:
        self._enter()
        function, cu = self._functions[kernel], self._cu
        values = (ctypes.c_uint64 * max(len(pointers), 1))(*pointers)
        first = ctypes.addressof(values)
        table = (ctypes.c_uint64 * max(len(pointers), 1))(*(first + 8 * i for i in range(len(pointers))))
        at = ctypes.addressof(table)
        self._asked(cu.cuLaunchKernel(function, *grid, threads, 1, 1, shared, stream, at, 0))

    def wait(self, stream: int) -> None:
        self._enter()
        self._asked(self._cu.cuStreamSynchronize(stream))

    def record(self, run: Callable[[int], None]) -> Any:
        self._enter()
        cu, side = self._cu, self._side
        self._asked(cu.cuStreamBeginCapture(side, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            run(int(side))
        finally:
            graph = self._asked(cu.cuStreamEndCapture(side))
        return self._asked(cu.cuGraphInstantiate(graph, 0))

    def replay(self, graph: Any, stream: int) -> None:
        self._enter()
        self._asked(self._cu.cuGraphLaunch(graph, stream))

    def timed(self, run: Callable[[int], None], stream: int) -> float:
        self._enter()
        cu = self._cu
        before, after = (self._asked(cu.cuEventCreate(0)) for _ in range(2))
        self._asked(cu.cuEventRecord(before, stream))
        run(stream)
        self._asked(cu.cuEventRecord(after, stream))
        self._asked(cu.cuEventSynchronize(after))
        seconds = float(self._asked(cu.cuEventElapsedTime(before, after))) * 1e-3
        for event in (before, after):
            self._asked(cu.cuEventDestroy(event))
        return seconds

    def __del__(self) -> None:
        if getattr(self, "_side", None) is None:
            return  # it was never opened
        with contextlib.suppress(Exception):  # the driver may be gone when the interpreter ends
            self._enter()
            for module in self._modules:
                self._cu.cuModuleUnload(module)
            self._cu.cuStreamDestroy(self._side)
            self._cu.cuDevicePrimaryCtxRelease(self._device)
