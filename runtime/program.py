"""A compiled model that can be called: ``Program.load("model.bw")(x)``.

Needs NumPy and the C library only. Inputs are NumPy arrays or anything that turns into one (torch tensors,
DLPack); results are NumPy arrays. An input that is contiguous and aligned for its elements is used in place.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.errors import BitwrightError, InvalidInput, did_you_mean
from bitwright.runtime.artifact import Contents, read, write
from bitwright.runtime.manifest import Manifest, TensorSpec
from bitwright.runtime.native import Elsewhere, Library, address_of, aligned, failed, team_starts
from bitwright.runtime.ports import Port, as_array, input_address, mismatch
from bitwright.runtime.report import Report

Array = NDArray[Any]
_MAX_THREADS = 1024


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step per call: median and minimum over the repeats."""

    label: str
    kernel: str
    rows: int
    seconds: float
    best: float


class _Workspace:
    """What one call at a time needs: arena, scratch, pointer tables. Pooled."""

    __slots__ = ("arena", "arena_address", "inputs", "outputs", "scratch", "scratch_address", "threads")

    def __init__(self, manifest: Manifest, threads: int) -> None:
        self.threads = threads
        self.arena = aligned(manifest.arena_bytes + 64)
        self.scratch = aligned(manifest.scratch_bytes * threads + 64)
        self.arena_address, self.scratch_address = address_of(self.arena), address_of(self.scratch)
        self.inputs = (ctypes.c_void_p * max(1, len(manifest.inputs)))()
        self.outputs = (ctypes.c_void_p * max(1, len(manifest.outputs)))()


class Program:
    """A loaded program. Safe to call from several threads at once; each call in flight has its own arena.

    ``threads`` is how many threads one call uses: set it here, by attribute, or per call. With more than one,
    idle threads wait 0.2 ms for work before they sleep unless ``OMP_WAIT_POLICY`` or ``GOMP_SPINCOUNT`` is set.
    """

    def __init__(self, contents: Contents, *, threads: int | None = None, library: Library | None = None) -> None:
        self._contents = contents
        manifest = self.manifest = contents.manifest
        self._library: Library | None = library or Library(contents.library, contents.weights, manifest)
        self._inputs = tuple(Port(t, manifest) for t in manifest.inputs)
        self._outputs = tuple(Port(t, manifest) for t in manifest.outputs)
        self.input_names = tuple(t.name for t in manifest.inputs)
        self.output_names = tuple(t.name for t in manifest.outputs)
        self._position = {name: i for i, name in enumerate(self.input_names)}
        self._chunks = sorted(manifest.chunks)
        self._pool: list[_Workspace] = []
        self._report: Report | None = None
        self._threads = 1
        self.threads = manifest.threads if threads is None else threads

    @classmethod
    def compiled(cls, contents: Contents, threads: int | None = None) -> Program:
        """The program just compiled: one for another architecture can be saved and emulated, calling it raises."""
        if contents.manifest.device:
            from bitwright.runtime.cuda import CudaProgram

            return CudaProgram(contents)
        there = contents.manifest.arch
        library = Elsewhere(contents.weights, contents.manifest) if there and there != platform.machine() else None
        return cls(contents, threads=threads, library=library)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, threads: int | None = None, verify: bool = True) -> Program:
        """Load a ``.bw`` file; raises :class:`InvalidInput` for a file that is damaged or does not fit here.

        ``verify=False`` leaves out the checksum of the weights (for models of many gigabytes).
        """
        contents = read(path, verify=verify)
        try:
            if contents.manifest.device:
                return cls.compiled(contents).opened()
            return cls(contents, threads=threads)
        except InvalidInput as error:
            raise InvalidInput(f"{os.fspath(path)}: {error}") from error

    def opened(self) -> Program:
        """The program, ready to be called."""
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the program to a ``.bw`` file, whole or not at all."""
        write(path, self.contents)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, format and shape of each input."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Name, format and shape of each output."""
        return self.manifest.outputs

    @property
    def contents(self) -> Contents:
        """What :meth:`save` writes: manifest, graph, library, weights and report as they were built."""
        self._opened()
        return self._contents

    @property
    def graph(self) -> str:
        """The compiled graph as text."""
        return self._contents.graph

    @property
    def report(self) -> Report:
        """What each pass did and what each layer is; read when first asked for."""
        if self._report is None:
            self._report = Report.from_json(self._contents.report)
        return self._report

    @property
    def threads(self) -> int:
        """Threads that a call uses when it does not say."""
        return self._threads

    @threads.setter
    def threads(self, count: int) -> None:
        self._threads = _thread_count(count)

    def close(self) -> None:
        """Give the code, weights and arenas back; calls in flight finish first, later ones raise."""
        self._library = None
        self._pool = []
        self._contents = Contents(
            self.manifest, self._contents.graph, b"", np.zeros(0, np.uint8), self._contents.report
        )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        ins = ", ".join(f"{t.name}: {t}" for t in self.inputs)
        outs = ", ".join(f"{t.name}: {t}" for t in self.outputs)
        return f"<Program {self.manifest.name}({ins}) -> ({outs}), {self._threads} thread(s)>"

    def __reduce__(self) -> Any:
        return _unpickle, (self.contents, self._threads)

    def __call__(self, *args: Any, threads: int | None = None, **kwargs: Any) -> Any:
        """Run on inputs given in order or by name; an array, or a tuple of arrays in output order.

        Raises :class:`InvalidInput` that names the input, what was expected and what was given. An input that
        is itself called ``threads`` must be given in order.
        """
        count = self._threads if threads is None else _thread_count(threads)
        return self._call(args if not kwargs else self._in_order(args, kwargs), count, None)

    def profile(self, *args: Any, repeats: int = 10, threads: int | None = None, **kwargs: Any) -> list[StepTime]:
        """Seconds of every step on these inputs; with several threads each step ends with a wait for all."""
        if repeats < 1:
            raise InvalidInput(f"repeats must be at least 1, not {repeats}")
        values = self._in_order(args, kwargs)
        count = self._threads if threads is None else _thread_count(threads)
        table = np.zeros((repeats, max(1, len(self.manifest.steps))))
        self._call(values, count, table[0])
        for row in table:
            row[:] = 0
            self._call(values, count, row)
        median, best = np.median(table, axis=0), table.min(axis=0)
        return [
            StepTime(s.label, s.kernel, s.rows, float(median[i]), float(best[i]))
            for i, s in enumerate(self.manifest.steps)
        ]

    def trace(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Every step's result by label, as it lies in memory, for inputs of exactly one chunk of rows.

        Runs the program once per step: for inspection, not for use. Raises :class:`InvalidInput` for wrong inputs.
        """
        from bitwright.runtime.trace import trace

        library = self._library
        if library is None:
            raise BitwrightError(f"program {self.manifest.name!r} is closed")
        arrays, rows = self._check(self._in_order(args, kwargs))
        if rows != self.manifest.chunks[0]:
            raise InvalidInput(f"trace needs a batch of {self.manifest.chunks[0]}, got {rows}")
        return trace(library, self.manifest, arrays, rows)

    def _in_order(self, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """Positional and named inputs as one tuple."""
        if len(args) > len(self.input_names):
            raise InvalidInput(f"expected {self._expected()}, got {len(args)} inputs")
        values = dict(zip(self.input_names, args, strict=False))
        for name, value in named.items():
            if name not in self._position:
                raise InvalidInput(
                    f"no input is called {name!r}{did_you_mean(name, self.input_names)}; {self._expected()}"
                )
            if name in values:
                raise InvalidInput(f"input {name!r} is given twice, in order and by name")
            values[name] = value
        if missing := [n for n in self.input_names if n not in values]:
            raise InvalidInput(f"input {missing[0]!r} is missing; expected {self._expected()}")
        return tuple(values[n] for n in self.input_names)

    def _expected(self) -> str:
        listing = ", ".join(f"{t.name}: {t}" for t in self.inputs)
        return f"{len(self.inputs)} input{'' if len(self.inputs) == 1 else 's'} ({listing})"

    def _opened(self) -> Library:
        library = self._library
        if library is None:
            raise BitwrightError(f"program {self.manifest.name!r} is closed")
        return library

    def _call(self, values: Sequence[Any], threads: int, seconds: Array | None) -> Any:
        library = self._opened()
        if len(values) != len(self._inputs):
            values = self._in_order(values, {})
        arrays, rows = self._check(values)
        if rows == 0:
            return self._results([np.empty(p.full_shape(0), p.dtype) for p in self._outputs])
        padded = self._padded(rows)
        if threads > 1 and not (library.openmp and team_starts()):
            threads = 1
        try:
            space = self._pool.pop()
            if space.threads < threads:
                space = _Workspace(self.manifest, threads)
        except IndexError:
            space = _Workspace(self.manifest, threads)
        try:
            return self._run(library, space, arrays, rows, padded, threads, seconds)
        finally:
            if self._library is not None:
                self._pool.append(space)

    def _run(
        self,
        library: Library,
        space: _Workspace,
        arrays: list[Array],
        rows: int,
        padded: int,
        threads: int,
        seconds: Array | None,
    ) -> Any:
        keep: list[Array] = []  # inputs that had to be copied must live through the call
        for index, port in enumerate(self._inputs):
            space.inputs[index] = input_address(port, arrays[index], padded, keep)
        results: list[Array] = []
        for index, port in enumerate(self._outputs):
            shape = port.full_shape(padded)
            nbytes = port.row_bytes * padded if port.factor else port.nbytes
            raw = np.empty(nbytes + 128, np.uint8)
            address = address_of(raw)
            start = -address & 63
            space.outputs[index] = address + start
            results.append(np.ndarray(shape, port.dtype, raw, start))
        arguments = (
            space.inputs, space.outputs, library.weights_address, space.arena_address, space.scratch_address,
            threads, padded,
        )  # fmt: skip
        code = library.run(*arguments) if seconds is None else library.profile(*arguments, address_of(seconds))
        if code:
            raise failed(code)
        if padded != rows:
            results = [r[: rows * p.factor] if p.factor else r for r, p in zip(results, self._outputs, strict=True)]
        return self._results(results)

    @staticmethod
    def _results(results: list[Array]) -> Any:
        return results[0] if len(results) == 1 else tuple(results)

    def _check(self, values: Sequence[Any]) -> tuple[list[Array], int]:
        """The inputs as arrays of the right type and shape, and the rows of the batch (1 when static)."""
        arrays: list[Array] = []
        batch = -1
        for port, value in zip(self._inputs, values, strict=True):
            array = value if type(value) is np.ndarray else as_array(port, value)
            if array.dtype != port.dtype:
                raise mismatch(port, array.shape, array.dtype)
            rows = port.rows_of(array.shape)
            if rows < 0:
                raise mismatch(port, array.shape, array.dtype)
            if port.factor:
                if batch >= 0 and rows != batch:
                    raise InvalidInput(
                        f"input {port.spec.name!r} has batch {self.manifest.batch} = {rows},"
                        f" an input before it has {batch}"
                    )
                batch = rows
            arrays.append(array)
        return arrays, batch if self.manifest.batch else 1

    def _padded(self, rows: int) -> int:
        """The rows to run: more than ``rows`` when a chunk that fits them is less than twice as large."""
        for chunk in self._chunks:
            if chunk >= rows:
                return chunk if chunk <= 2 * rows or chunk == self._chunks[0] else rows
        return rows


def _unpickle(contents: Contents, threads: int) -> Program:
    return Program.compiled(contents, threads)


def _thread_count(count: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or not 1 <= count <= _MAX_THREADS:
        raise InvalidInput(f"threads must be a whole number from 1 to {_MAX_THREADS}, not {count!r}")
    return int(count)
