"""Measuring one candidate beside the default kernel, in a process that may hang or crash; needs NumPy and ctypes only.

The candidate's results are compared with the reference before its time counts. Each candidate gets a process of its
own (a fork of this one): one that writes where it should not spoils nobody else's measurement.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import select
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.tuning.records import Status
from bitwright.codegen.tuning.worker import die_with_parent, limit_memory

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
MOST_ARGUMENTS = 40
"""Pointers that the repeating loop passes (a kernel takes as many of them as it knows)."""
REPEAT_C = f"""
#define _POSIX_C_SOURCE 199309L
#include <stdint.h>
#include <time.h>
typedef void (*kernel)(int32_t, int32_t, {", ".join(["void*"] * MOST_ARGUMENTS)});
static double now(void) {{
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}}
void bw_repeat(kernel f, int32_t tasks, void** a, uint8_t* other, int64_t other_bytes, uint8_t** warm,
               const int64_t* warm_bytes, int32_t warm_count, int32_t calls, double* seconds) {{
  for (int32_t i = 0; i < calls; i++) {{
    for (int64_t n = 0; n < other_bytes; n += 64) other[n]++;
    volatile uint8_t sink = 0;
    for (int32_t w = 0; w < warm_count; w++)
      for (int64_t n = 0; n < warm_bytes[w]; n += 64) sink += warm[w][n];
    const double start = now();
    f(0, tasks, {", ".join(f"a[{i}]" for i in range(MOST_ARGUMENTS))});
    seconds[i] = now() - start;
  }}
}}
"""
"""Calls as in a model: other layers have used ``other_bytes`` since the last one, the inputs were just written."""
_GUARD = 256
_FILL = 0xA5
_STEPS = 0.05
"""Share of integer results behind float operators that may round to the next code (wrong rounding: half of them)."""


@dataclass(frozen=True)
class Code:
    """A kernel linked alone: library, name, tasks, where each pointer comes from (kind, index), packed constants."""

    library: bytes
    symbol: str
    tasks: int
    scratch_bytes: int
    args: tuple[tuple[str, int], ...]
    packed: tuple[Array, ...]
    work_bytes: int = 0
    """Of a GPU kernel: memory that may hold anything before and after."""


@dataclass(frozen=True)
class Case:
    """Values of all inputs of the body, and what the reference makes of them.

    ``places``: of each output the flat positions that are known, and compared; all of them where there is nothing.
    """

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    places: tuple[NDArray[np.int64], ...] = ()


@dataclass(frozen=True)
class Request:
    """What to measure: a candidate and the default kernel, which serves as the clock against drift.

    ``tolerance``: largest error of float results relative to the largest value; 0.0 asks for equal bits, as integers
    are always asked. ``codes``: integer results computed from floats may differ by one step in one of twenty.
    ``cold_bytes``: so many other bytes are touched between two calls, as the other layers of a model do.
    ``seconds``: after so long the candidate counts as hung. ``memory``: bytes it may take; 0: any number.
    """

    candidate: Code
    default: Code
    repeat: bytes
    cases: tuple[Case, ...]
    tolerance: float = 0.0
    codes: bool = False
    rounds: int = 15
    sample_seconds: float = 0.003
    cold_bytes: int = 0
    seconds: float = 30.0
    memory: int = 2 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of a request; times are seconds of one call, ``ratio`` the median of those of the rounds."""

    status: Status
    reason: str = ""
    seconds: float = 0.0
    default_seconds: float = 0.0
    ratio: float = 0.0
    rounds: int = 0


def measured(request: Request, check: Callable[[Request], Outcome] | None = None) -> Outcome:
    """Measure in a fork of this process and watch it: a hang, a crash or a lack of memory is an outcome.

    ``check``: what compares and times; :func:`check_and_time` on this processor unless given.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(request, writer, check or check_and_time)
    os.close(writer)
    end, data = time.monotonic() + request.seconds, b""
    timed_out = False
    with os.fdopen(reader, "rb", buffering=0) as stream:
        while True:
            if not select.select([stream], [], [], max(0.0, end - time.monotonic()))[0]:
                timed_out = True
                os.kill(child, signal.SIGKILL)
                break
            part = stream.read(1 << 16)
            if not part:
                break
            data += part
    _, status = os.waitpid(child, 0)
    if timed_out:
        return Outcome("timeout", f"no result within {request.seconds:.0f} s")
    if os.WIFSIGNALED(status):
        return Outcome("crash", f"the kernel died of {signal.Signals(os.WTERMSIG(status)).name}")
    if not data:
        return Outcome("crash", f"the kernel ended the process with exit code {os.waitstatus_to_exitcode(status)}")
    outcome: Outcome = pickle.loads(data)
    return outcome


def _child(request: Request, writer: int, check: Callable[[Request], Outcome]) -> None:
    """Measure, answer, and leave without running anybody's exit handlers."""
    code = 1
    try:
        faulthandler.disable()
        die_with_parent()
        if request.memory:
            limit_memory(request.memory)
        try:
            outcome = check(request)
        except MemoryError:
            outcome = Outcome("memory", f"more than {request.memory >> 20} MB")
        except OSError as error:
            outcome = Outcome("crash", f"the kernel cannot be loaded: {error}")
        with os.fdopen(writer, "wb") as stream:
            stream.write(pickle.dumps(outcome))
        code = 0
    finally:
        os._exit(code)


def check_and_time(request: Request) -> Outcome:
    """Compare with the reference on every case, then time in interleaved rounds."""
    case = request.cases[0]
    candidate = _Bound(request.candidate, case, request)
    for number, one in enumerate(request.cases):
        if why := candidate.check(one, request):
            return Outcome("wrong", f"inputs {number}: {why}")
    default = _Bound(request.default, case, request)
    repeat = _open(request.repeat).bw_repeat
    repeat.restype = None
    other = np.zeros(request.cold_bytes, np.uint8)
    runs = [kernel.sampler(repeat, request.sample_seconds, other) for kernel in (candidate, default)]
    return interleaved(runs, request.rounds)


def interleaved(runs: Sequence[Callable[[], float]], rounds: int) -> Outcome:
    """Seconds of the candidate and of the default kernel, by turns, so that what slows the machine slows both."""
    times: tuple[list[float], list[float]] = ([], [])
    for n in range(rounds):
        for which in (0, 1) if n % 2 else (1, 0):
            times[which].append(runs[which]())
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    return Outcome("ok", "", statistics.median(times[0]), statistics.median(times[1]), ratio, rounds)


class _Bound:
    """A loaded kernel with guarded buffers for its arguments."""

    def __init__(self, code: Code, case: Case, request: Request) -> None:
        self.code = code
        self.call = getattr(_open(code.library), code.symbol)
        self.call.restype = None
        self.inputs = [_guarded(a) for a in case.inputs]
        self.outputs = [_guarded(a) for a in case.outputs]
        self.scratch = _guarded(np.full(code.scratch_bytes, 0xFF, np.uint8))
        self.packed = [_guarded(a) for a in code.packed]

    def pointers(self) -> list[int]:
        """Addresses in the order of the kernel's arguments."""
        where = {"input": self.inputs, "output": self.outputs, "packed": self.packed}
        found = [where[kind][index][1].ctypes.data for kind, index in self.code.args]
        return found + ([self.scratch[1].ctypes.data] if self.code.scratch_bytes else [])

    def check(self, case: Case, request: Request) -> str:
        """Run the tasks in two ranges and compare; why the results are wrong, or the empty string."""
        for (_, view), given in zip(self.inputs, case.inputs, strict=True):
            view[...] = given
        for _, view in self.outputs:
            view.view(np.uint8).reshape(-1)[...] = _FILL
        pointers = [ctypes.c_void_p(p) for p in self.pointers()]
        middle = self.code.tasks // 2
        for begin, end in ((0, middle), (middle, self.code.tasks)):
            if begin < end:
                self.call(begin, end, *pointers)
        for (_, view), given in zip(self.inputs, case.inputs, strict=True):
            if view.tobytes() != np.ascontiguousarray(given).tobytes():
                return "it changed an input"
        for (_, view), held in zip(self.packed, self.code.packed, strict=True):
            if view.tobytes() != np.ascontiguousarray(held).tobytes():
                return "it changed its weights"
        for raw, view in [*self.inputs, *self.outputs, *self.packed, self.scratch]:
            start = view.ctypes.data - raw.ctypes.data
            if (raw[:start] != _FILL).any() or (raw[start + view.nbytes :] != _FILL).any():
                return "it wrote outside its buffers"
        pairs = zip(self.outputs, case.outputs, strict=True)
        return next(
            filter(None, (difference(got[1], want, request.tolerance, request.codes) for got, want in pairs)), ""
        )

    def sampler(self, repeat: Any, seconds: float, other: Bytes) -> Callable[[], float]:
        """A function that gives the median seconds of the calls of one sample (a call that the system interrupts, or
        a neighbour slows, is an outlier)."""
        here = self.pointers()
        args = (ctypes.c_void_p * MOST_ARGUMENTS)(*here, *[0] * (MOST_ARGUMENTS - len(here)))
        read = [self.inputs[i][1] for kind, i in self.code.args if kind == "input"]
        warm = (ctypes.c_void_p * max(1, len(read)))(*[v.ctypes.data for v in read])
        sizes = (ctypes.c_int64 * max(1, len(read)))(*[v.nbytes for v in read])
        function = ctypes.cast(self.call, ctypes.c_void_p)

        def run(calls: int) -> float:
            times = (ctypes.c_double * calls)()
            at = ctypes.c_void_p(other.ctypes.data)
            repeat(
                function, self.code.tasks, args, at, ctypes.c_int64(other.nbytes), warm, sizes, len(read), calls, times
            )
            return max(float(statistics.median(times)), 1e-9)

        began = time.perf_counter()
        run(3)
        calls = max(3, min(10_000, round(3 * seconds / max(time.perf_counter() - began, 1e-7))))
        return lambda: run(calls)


def difference(got: Array, want: Array, tolerance: float, codes: bool) -> str:
    """How results differ from the reference; the empty string if they do not beyond what is allowed."""
    if want.dtype.kind in "iub":
        wrong = got != want
        share = np.count_nonzero(wrong) / max(1, want.size)
        if codes and want.dtype.kind in "iu" and share <= _STEPS:
            wrong = np.abs(got.astype(np.int64) - want.astype(np.int64)) > 1
        return f"{np.count_nonzero(wrong)} of {want.size} integers differ" if wrong.any() else ""
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(b)
    same = (np.isnan(a) & np.isnan(b)) | (a == b)
    if not same[~finite].all():
        return "NaN or infinity in other places"
    if not finite.any():
        return ""
    if not np.isfinite(a[finite]).all():
        return "NaN or infinity where the reference is finite"
    error, largest = float(np.abs(a - b)[finite].max()), float(np.abs(b[finite]).max())
    return f"largest error {error:.3g} beside values up to {largest:.3g}" if error > tolerance * largest else ""


def _guarded(array: Array) -> tuple[Bytes, Array]:
    """A copy on a cache line of its own with guard bytes around it: the whole buffer, and the view of the values."""
    array = np.asarray(array)
    raw = np.full(array.nbytes + 3 * _GUARD, _FILL, np.uint8)
    start = -raw.ctypes.data % 64 + _GUARD
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return raw, view


def _open(library: bytes) -> ctypes.CDLL:
    """Load a shared library that is given as bytes."""
    descriptor = os.memfd_create("bitwright-candidate")
    view, written = memoryview(library), 0
    while written < len(view):
        written += os.write(descriptor, view[written:])
    return ctypes.CDLL(f"/proc/self/fd/{descriptor}", mode=os.RTLD_NOW | os.RTLD_LOCAL)
