"""Measuring GPU kernels for the tuner: candidate and default by turns, in a process of their own for each candidate.

Nothing here needs TVM: :func:`measured_on` runs on a machine that has a device and the small runtime.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.cuda.package import unpacked
from bitwright.codegen.tuning.bench import LocalBench
from bitwright.codegen.tuning.measure import Case, Code, Outcome, Request, difference, interleaved, measured
from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.runtime.cuda_driver import CudaDriver, Driver

Array = NDArray[Any]
OpenDriver = Callable[[], Driver]
_FILL = 0xA5
_GUARD = 512
_FLUSH = 192 << 20
"""Bytes written between two calls where the model's other layers would have filled the second-level cache."""
_MOST_CALLS = 50
_UNLIMITED = 1 << 46
"""Bytes of address space: a CUDA context reserves as much as the device and the host have."""


class DeviceBench(LocalBench):
    """Compiles candidates on all cores of this machine, and measures them one by one on its device.

    ``open_driver``: top-level function (or a partial of one) that opens the device; it is called in the process of
    each candidate only.
    """

    def __init__(self, open_driver: OpenDriver, jobs: int | None = None) -> None:
        from bitwright.codegen.tvm.cuda.compile import compile_gpu

        measure = partial(measured_on, open_driver)
        super().__init__(jobs, compile=compile_gpu, measure=measure, memory=_UNLIMITED)

    @property
    def repeat(self) -> bytes:
        """Nothing: the device is called from Python."""
        return b""


def open_device(arch: str) -> Driver:
    """The first device, for machine code of ``arch``. Raises :class:`InvalidInput` where there is none for it."""
    return CudaDriver(arch)


def device_name(arch: str) -> str:
    """What the first device calls itself, asked in a process of its own (a context is not inherited by forks)."""
    from bitwright.codegen.tuning.worker import Worker

    worker = Worker(_name_of, memory=_UNLIMITED)
    try:
        reply = worker.call(arch, 60.0)
    finally:
        worker.stop()
    if reply.fate != "ok":
        raise InvalidInput(str(reply.value).partition(": ")[2] or str(reply.value))
    return str(reply.value)


def _name_of(arch: str) -> str:
    return CudaDriver(arch).name


def measured_on(open_driver: OpenDriver, request: Request) -> Outcome:
    """Compare and time on a device, in a fork: a kernel that hangs or faults ends its own context only."""
    return measured(replace(request, memory=0), partial(check_and_time, open_driver))


def check_and_time(open_driver: OpenDriver, request: Request) -> Outcome:
    """Compare with the reference on every case, then time in interleaved rounds, caches as in a model."""
    driver = open_driver()
    try:
        kernels = [unpacked(code.library) for code in (request.candidate, request.default)]
        driver.load({k.name: (k.cubin, k.text) for k in kernels})
        candidate = Loaded(driver, request.candidate, request.cases[0])
        for number, case in enumerate(request.cases):
            if why := candidate.check(case, request):
                return Outcome("wrong", f"inputs {number}: {why}")
        default = Loaded(driver, request.default, request.cases[0])
        flush = driver.alloc(_FLUSH) if request.cold_bytes else 0
        runs = [k.sampler(request.sample_seconds, flush) for k in (candidate, default)]
        return interleaved(runs, request.rounds)
    except InvalidInput:
        raise
    except BitwrightError as error:  # an illegal address, a launch that the device refuses
        return Outcome("memory" if "OUT_OF_MEMORY" in str(error) else "crash", str(error)[:500])


class _Buffer:
    """Device memory for an array, with guard bytes on both sides."""

    def __init__(self, driver: Driver, like: Array) -> None:
        self.driver, self.dtype, self.shape, self.nbytes = driver, like.dtype, like.shape, like.nbytes
        self.base = driver.alloc(like.nbytes + 2 * _GUARD)
        self.address = self.base + _GUARD
        self.put(like)

    def put(self, array: Array | None) -> None:
        """Write the array (None: a pattern) and the guards."""
        raw = np.full(self.nbytes + 2 * _GUARD, _FILL, np.uint8)
        if array is not None:
            raw[_GUARD : _GUARD + self.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.driver.upload(self.base, raw, 0)
        self.driver.wait(0)

    def get(self) -> tuple[Array, bool]:
        """The array, and whether the guards are as they were."""
        raw = np.empty(self.nbytes + 2 * _GUARD, np.uint8)
        self.driver.download(raw, self.base, 0)
        whole = bool((raw[:_GUARD] == _FILL).all() and (raw[_GUARD + self.nbytes :] == _FILL).all())
        return raw[_GUARD : _GUARD + self.nbytes].view(self.dtype).reshape(self.shape), whole


class Loaded:
    """A kernel that the device has, with buffers for its arguments."""

    def __init__(self, driver: Driver, code: Code, case: Case) -> None:
        self.driver, self.code, self.kernel = driver, code, unpacked(code.library)
        self.inputs = [_Buffer(driver, a) for a in case.inputs]
        self.outputs = [_Buffer(driver, a) for a in case.outputs]
        self.packed = [_Buffer(driver, a) for a in code.packed]
        self.scratch = [_Buffer(driver, np.zeros(code.scratch_bytes, np.uint8))] if code.scratch_bytes else []
        self.work = [_Buffer(driver, np.full(code.work_bytes, _FILL, np.uint8))] if code.work_bytes else []
        where = {"input": self.inputs, "output": self.outputs, "packed": self.packed}
        first = [where[kind][index] for kind, index in code.args]
        self.pointers = [b.address for b in (*first, *self.scratch, *self.work)]

    def launch(self, stream: int) -> None:
        """One launch."""
        x, y, z, threads, shared = self.kernel.launch
        self.driver.launch(self.kernel.name, (x, y, z), threads, shared, self.pointers, stream)

    def check(self, case: Case, request: Request) -> str:
        """Run twice (what the first run leaves behind must not matter) and compare: why it is wrong, or nothing."""
        for buffer, given in zip(self.inputs, case.inputs, strict=True):
            buffer.put(given)
        for _ in range(2):
            for buffer in self.outputs:
                buffer.put(None)
            self.launch(0)
            self.driver.wait(0)
            if why := self._difference(case, request):
                return why
        return ""

    def _difference(self, case: Case, request: Request) -> str:
        kept = [(self.inputs, case.inputs, "an input"), (self.packed, self.code.packed, "its weights")]
        kept.append((self.scratch, (np.zeros(self.code.scratch_bytes, np.uint8),) * len(self.scratch), "the scratch"))
        for buffers, arrays, name in kept:
            for buffer, held in zip(buffers, arrays, strict=True):
                if buffer.get()[0].tobytes() != np.ascontiguousarray(held).tobytes():
                    return f"it changed {name}"
        if not all(b.get()[1] for b in (*self.inputs, *self.outputs, *self.packed, *self.scratch, *self.work)):
            return "it wrote outside its buffers"
        for i, (buffer, want) in enumerate(zip(self.outputs, case.outputs, strict=True)):
            got = buffer.get()[0]
            if case.places:
                got, want = got.reshape(-1)[case.places[i]], want.reshape(-1)[case.places[i]]
            if why := difference(got, want, request.tolerance, request.codes):
                return why
        return ""

    def sampler(self, seconds: float, flush: int) -> Callable[[], float]:
        """A function that gives the median seconds of the launches of one sample.

        ``flush``: memory that is written before each launch, then the inputs are read, as if just written by the
        layer before; 0: everything stays in the cache.
        """
        copies = [(self.driver.alloc(b.nbytes), b) for b in self.inputs]

        def once() -> float:
            if flush:
                self.driver.zero(flush, _FLUSH, 0)
                for to, b in copies:
                    self.driver.copy(to, b.address, b.nbytes, 0)
            return max(self.driver.timed(self.launch, 0), 1e-9)

        once()
        calls = max(3, min(_MOST_CALLS, round(seconds / once())))
        return lambda: statistics.median(once() for _ in range(calls))
