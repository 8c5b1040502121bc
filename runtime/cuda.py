"""A compiled model on a GPU: ``Program.load("model.bw")(x)`` with arrays of the device or of NumPy.

Needs NumPy, cuda-bindings and the driver. Arrays come and go by DLPack: one of torch or CuPy is used where it lies,
one of NumPy is copied there and back. A program recorded once (:meth:`CudaProgram.record`) is replayed as one graph.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.runtime.artifact import Contents, read
from bitwright.runtime.cuda_driver import CudaDriver, Driver
from bitwright.runtime.cuda_memory import DeviceArray, Memory, Placed, at_port, is_there
from bitwright.runtime.manifest import Launch
from bitwright.runtime.native import Elsewhere
from bitwright.runtime.ports import Port
from bitwright.runtime.program import Program, StepTime

_ALIGN = 16


class CudaProgram(Program):
    """A program for a GPU. One call at a time: calls in several streams must wait for each other.

    ``driver``: the device; by default the first one, opened when it is needed.
    """

    def __init__(self, contents: Contents, driver: Driver | None = None) -> None:
        super().__init__(contents, threads=1, library=Elsewhere(contents.weights, contents.manifest))
        self._driver = driver
        self._device: _Device | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, index: int = 0, verify: bool = True) -> CudaProgram:  # type: ignore[override]
        """Load a ``.bw`` file onto device ``index``; raises :class:`InvalidInput` where it cannot run here."""
        contents = read(path, verify=verify)
        try:
            return cls(contents, CudaDriver(contents.manifest.arch, index)).opened()
        except InvalidInput as error:
            raise InvalidInput(f"{os.fspath(path)}: {error}") from error

    def opened(self) -> CudaProgram:
        """The program with its kernels and weights on the device."""
        self._on_device()
        return self

    def __call__(self, *args: Any, threads: int | None = None, **kwargs: Any) -> Any:
        """:meth:`run` in the default stream."""
        return self.run(*args, **kwargs)

    def run(self, *args: Any, out: Sequence[Any] | None = None, stream: Any = 0, **kwargs: Any) -> Any:
        """Run on inputs given in order or by name: an array, or a tuple of arrays in output order.

        ``stream``: an address, or an object of torch or CuPy. Inputs on the device are used where they lie and give
        :class:`DeviceArray` results, ready in stream order (``torch.from_dlpack(y)``); if all inputs are NumPy's,
        so are the results. ``out``: device arrays to write instead of new ones.
        """
        device, s = self._on_device(), _stream(stream)
        values = self._in_order(args, kwargs)
        inputs, rows = self._inputs_at(device, values, s)
        outputs = self._outputs_at(device, out, rows)
        device.run(self._launches_for(device, inputs, outputs, rows), s)
        arrays = [o.array for o in outputs]
        here = out is None and not any(is_there(v, device.driver) for v in values)
        results: list[Any] = [a.numpy(s) for a in arrays] if here else list(arrays)
        return self._results(results)

    def record(self, *args: Any, out: Sequence[Any] | None = None, stream: Any = 0, **kwargs: Any) -> Recorded:
        """The run on these very arrays as a graph: fill the inputs anew, replay it, read the outputs.

        Inputs of NumPy are copied once; :attr:`Recorded.inputs` are the device arrays to write to.
        """
        device, s = self._on_device(), _stream(stream)
        inputs, rows = self._inputs_at(device, self._in_order(args, kwargs), s)
        outputs = self._outputs_at(device, out, rows)
        actions = self._launches_for(device, inputs, outputs, rows)
        device.driver.wait(s)
        graph = device.driver.record(lambda side: device.run(actions, side))
        arrays = tuple(x.array for x in inputs), tuple(x.array for x in outputs)
        return Recorded(device.driver, graph, *arrays, actions, device)

    def profile(self, *args: Any, repeats: int = 10, threads: int | None = None, **kwargs: Any) -> list[StepTime]:
        """Seconds of every launch on these inputs, by the device's clock."""
        device = self._on_device()
        inputs, rows = self._inputs_at(device, self._in_order(args, kwargs), 0)
        outputs = self._outputs_at(device, None, rows)
        actions = self._launches_for(device, inputs, outputs, rows)[: len(self.manifest.steps)]
        found = []
        for action, step in zip(actions, self.manifest.steps, strict=False):
            times = [device.driver.timed(action, 0) for _ in range(repeats)]
            found.append(StepTime(step.label, step.kernel, step.rows, float(np.median(times)), min(times)))
        return found

    def trace(self, *args: Any, **kwargs: Any) -> dict[str, NDArray[Any]]:
        """Every step's result by label, as it lies in memory, for inputs of exactly one chunk of rows."""
        device = self._on_device()
        inputs, rows = self._inputs_at(device, self._in_order(args, kwargs), 0)
        if rows != self.manifest.chunks[0]:
            raise InvalidInput(f"trace needs a batch of {self.manifest.chunks[0]}, got {rows}")
        outputs = self._outputs_at(device, None, rows)
        values: dict[str, NDArray[Any]] = {}
        for step, action in zip(self.manifest.steps, self._launches_for(device, inputs, outputs, rows), strict=True):
            action(0)
            if step.result is not None:
                start = device.arena.address if step.result.space == "arena" else outputs[step.result.index].address
                values[step.label] = device.read(start + step.result.offset, step.result.shape, step.result.dtype)
        return values

    def close(self) -> None:
        """Give kernels, weights and arena back."""
        super().close()
        self._device = None

    # ---- inside
    def _on_device(self) -> _Device:
        self._opened()
        if self._device is None:
            driver = self._driver or CudaDriver(self.manifest.arch)
            self._device = _Device(driver, self._contents)
        return self._device

    def _inputs_at(self, device: _Device, values: Sequence[Any], stream: int) -> tuple[list[Placed], int]:
        placed, batch = [], -1
        for port, value in zip(self._inputs, values, strict=True):
            found, rows = at_port(port, value, device.driver, stream)
            if port.factor and batch not in (-1, rows):
                raise InvalidInput(
                    f"input {port.spec.name!r} has batch {self.manifest.batch} = {rows}, an input before it has {batch}"
                )
            batch = rows if port.factor else batch
            placed.append(found)
        return placed, batch if self.manifest.batch else 1

    def _outputs_at(self, device: _Device, out: Sequence[Any] | None, rows: int) -> list[Placed]:
        if out is None:
            shapes = [p.full_shape(rows) for p in self._outputs]
            arrays = [DeviceArray.empty(device.driver, s, p.dtype) for s, p in zip(shapes, self._outputs, strict=True)]
            return [Placed(a.address, a) for a in arrays]
        if len(out) != len(self._outputs):
            raise InvalidInput(f"out has {len(out)} arrays, the program {len(self._outputs)} outputs")
        placed = []
        for port, value in zip(self._outputs, out, strict=True):
            found, given = at_port(port, value, device.driver, 0, copies=False)
            if port.factor and given != rows:
                raise InvalidInput(f"out {port.spec.name!r} has {given} rows of the batch, the inputs have {rows}")
            placed.append(found)
        return placed

    def _launches_for(
        self, device: _Device, inputs: Sequence[Placed], outputs: Sequence[Placed], rows: int
    ) -> list[Callable[[int], None]]:
        """What a call does, each with a stream as its argument: chunk after chunk of the batch."""
        chunk = self.manifest.chunks[0]
        actions: list[Callable[[int], None]] = []
        for first in _starts(rows, chunk):
            here = [_Part(device, p, x, first, rows, chunk) for p, x in zip(self._inputs, inputs, strict=True)]
            there = [_Part(device, p, x, first, rows, chunk) for p, x in zip(self._outputs, outputs, strict=True)]
            actions += [part.bring for part in here if part.staged]
            actions += device.launches([p.address for p in here], [p.address for p in there])
            actions += [part.take for part in there if part.staged]
        return actions


class Recorded:
    """A recorded run. ``inputs`` and ``outputs`` are the device arrays it reads and writes."""

    def __init__(
        self, driver: Driver, graph: Any, inputs: tuple[DeviceArray, ...], outputs: tuple[DeviceArray, ...],
        actions: Sequence[Callable[[int], None]], keeps: Any,
    ) -> None:  # fmt: skip
        self._driver, self._graph, self._actions = driver, graph, actions
        self._keeps = keeps  # memory that the graph names
        self.inputs, self.outputs = inputs, outputs

    def replay(self, stream: Any = 0) -> None:
        """Run again in stream order."""
        self._driver.replay(self._graph, _stream(stream))

    @classmethod
    def chained(cls, runs: Sequence[Recorded]) -> Recorded:
        """Several recorded runs of one device as one graph, one after the other; inputs and outputs of them all."""
        driver = runs[0]._driver

        def all_of_them(side: int) -> None:
            for action in (a for run in runs for a in run._actions):
                action(side)

        inputs, outputs = tuple(a for r in runs for a in r.inputs), tuple(a for r in runs for a in r.outputs)
        actions = [a for r in runs for a in r._actions]
        return cls(driver, driver.record(all_of_them), inputs, outputs, actions, list(runs))

    def seconds(self, stream: Any = 0) -> float:
        """What one replay takes by the device's clock."""
        s = _stream(stream)
        return self._driver.timed(lambda _: self._driver.replay(self._graph, s), s)


class _Device:
    """A program's kernels, weights, arena and scratch on a device."""

    def __init__(self, driver: Driver, contents: Contents) -> None:
        self.driver, self.manifest = driver, contents.manifest
        driver.load(_kernels(contents))
        self.weights = Memory(driver, len(contents.weights))
        self.arena = Memory(driver, self.manifest.arena_bytes)
        self.scratch = Memory(driver, self.manifest.scratch_bytes)
        driver.upload(self.weights.address, contents.weights, 0)
        driver.zero(self.scratch.address, self.manifest.scratch_bytes, 0)
        driver.wait(0)

    def launches(self, inputs: Sequence[int], outputs: Sequence[int]) -> list[Callable[[int], None]]:
        """Every launch of one chunk on ports at these addresses."""
        spaces = {
            "input": list(inputs), "output": list(outputs), "arena": [self.arena.address],
            "weight": [self.weights.address], "scratch": [self.scratch.address],
        }  # fmt: skip
        return [self._action(x, [spaces[p.space][p.index] + p.offset for p in x.args]) for x in self.manifest.launches]

    def _action(self, x: Launch, pointers: list[int]) -> Callable[[int], None]:
        if x.nbytes:
            return lambda stream: self.driver.copy(pointers[0], pointers[1], x.nbytes, stream)
        return lambda stream: self.driver.launch(x.kernel, x.grid, x.threads, x.shared_bytes, pointers, stream)

    def run(self, actions: Sequence[Callable[[int], None]], stream: int) -> None:
        for action in actions:
            action(stream)

    def read(self, address: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        from bitwright.ir.types import parse_dtype

        found = np.empty(shape, parse_dtype(dtype).numpy)
        self.driver.download(found.reshape(-1).view(np.uint8), address, 0)
        return found


class _Part:
    """One chunk's part of a port: where it lies if kernels can use it there, else a copy of it that they can."""

    def __init__(self, device: _Device, port: Port, placed: Placed, first: int, rows: int, chunk: int) -> None:
        self.driver = device.driver
        self.outside = placed.address + first * port.row_bytes
        self.nbytes = port.row_bytes * min(chunk, rows) if port.factor else port.nbytes
        self.room = port.row_bytes * chunk if port.factor else port.nbytes
        self.staged = self.outside % _ALIGN != 0 or self.room > self.nbytes
        self.memory = Memory(device.driver, self.room) if self.staged else None
        self.address = self.memory.address if self.memory else self.outside

    def bring(self, stream: int) -> None:
        if self.room > self.nbytes:
            self.driver.zero(self.address, self.room, stream)
        self.driver.copy(self.address, self.outside, self.nbytes, stream)

    def take(self, stream: int) -> None:
        self.driver.copy(self.outside, self.address, self.nbytes, stream)


def _starts(rows: int, chunk: int) -> list[int]:
    """First rows of the chunks; one that does not fit starts earlier and computes some rows twice."""
    if rows == 0:
        return []
    return sorted({max(0, min(first, rows - chunk)) for first in range(0, rows, chunk)})


def _kernels(contents: Contents) -> dict[str, tuple[bytes, str]]:
    """Machine code and text by kernel; raises :class:`InvalidInput` where one that is launched is missing."""
    try:
        with zipfile.ZipFile(io.BytesIO(contents.library)) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError) as error:
        raise InvalidInput(f"the program's kernels cannot be read: {error}") from error
    named = {x.kernel for x in contents.manifest.launches if not x.nbytes}
    if missing := sorted(n for n in named if f"{n}.cubin" not in files):
        raise InvalidInput(f"the program launches {missing[0]!r}, which it does not contain")
    return {n: (files[f"{n}.cubin"], files.get(f"{n}.cu", b"").decode()) for n in sorted(named)}


def _stream(stream: Any) -> int:
    """The address of a stream of torch (``cuda_stream``), CuPy (``ptr``), the CUDA protocol, or a number."""
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for name in ("cuda_stream", "ptr"):
        if hasattr(stream, name):
            return int(getattr(stream, name))
    if isinstance(stream, bool) or not isinstance(stream, int):
        raise BitwrightError(f"a stream is a number or an object of torch or CuPy, not {stream!r}")
    return stream
