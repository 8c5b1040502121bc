"""Compiling candidates in parallel worker processes, then measuring them one by one with nothing else running."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.codegen.cache import default_directory
from bitwright.codegen.link import find_compiler
from bitwright.codegen.tuning.measure import REPEAT_C, Code, Outcome, Request, measured
from bitwright.codegen.tuning.worker import Worker
from bitwright.ir.errors import BitwrightError

if TYPE_CHECKING:
    from bitwright.codegen.tvm.select import Choice, Order

COMPILE_SECONDS = 60.0
_GRACE = 10.0
_BATCH = 4


@dataclass(frozen=True)
class Trial:
    """A candidate to compile and measure beside the default kernel. ``request`` lacks the candidate's library."""

    order: Order
    request: Request


Compile = Callable[["Order"], bytes]


def compile_alone(order: Order) -> bytes:
    """Emit, compile and link one kernel as a shared library of its own. Runs in compile workers."""
    from bitwright.codegen.tvm.select import compile_order

    return link_alone({"kernel.o": compile_order(order)})


def link_alone(files: dict[str, bytes]) -> bytes:
    """The shared library of object and C files; raises :class:`BitwrightError` with what the compiler says."""
    with tempfile.TemporaryDirectory(prefix="bitwright-tune-") as name:
        folder = Path(name)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        command = [*find_compiler(), "-O2", "-fPIC", "-shared", "-w", "-Wl,-z,defs", "-o", "k.so", *files, "-lm"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise BitwrightError(f"linking a candidate failed: {done.stderr[-500:]}")
        return (folder / "k.so").read_bytes()


def code_of(choice: Choice, library: bytes = b"") -> Code:
    """What the measuring process needs of a kernel."""
    args = tuple((a.kind, a.index) for a in choice.config.args)
    config = choice.config
    work = getattr(config, "work_bytes", 0)
    return Code(library, choice.symbol, config.tasks, config.scratch_bytes, args, choice.packed, work)


@contextlib.contextmanager
def alone(patience: float = 600.0) -> Iterator[None]:
    """Hold the lock of this user on this machine: two tuners never measure at once. The kernel releases it when its
    holder dies. Raises :class:`BitwrightError` when another holds it for longer than ``patience`` seconds."""
    path = default_directory() / "measuring.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise BitwrightError(
                        f"another tuner has measured for {patience:.0f} s without a pause (lock {path}): end it first"
                    ) from error
                time.sleep(0.02)
        yield


class LocalBench:
    """Workers of this machine: ``jobs`` to compile, one to measure.

    ``compile`` and ``measure`` are top-level functions, which tests replace by faulty ones. ``memory``: bytes of
    address space that a worker may take.
    """

    def __init__(
        self,
        jobs: int | None = None,
        *,
        compile: Compile = compile_alone,
        measure: Callable[[Request], Outcome] = measured,
        compile_seconds: float = COMPILE_SECONDS,
        memory: int = 8 << 30,
    ) -> None:
        count = jobs or len(os.sched_getaffinity(0))
        self.compile_seconds = compile_seconds
        self.compilers = [Worker(compile, memory=memory) for _ in range(count)]
        self.measurer = Worker(measure, memory=memory)
        self.threads = [ThreadPoolExecutor(1) for _ in range(count)]  # a worker ends with the thread that started it
        self._repeat = b""

    @property
    def batch(self) -> int:
        """Candidates that are compiled before the next ones are measured."""
        return max(_BATCH, 2 * len(self.compilers))

    @property
    def repeat(self) -> bytes:
        """The library that calls a kernel many times."""
        if not self._repeat:
            self._repeat = link_alone({"repeat.c": REPEAT_C.encode()})
        return self._repeat

    def compile(self, orders: Sequence[Order]) -> list[bytes | Outcome]:
        """A library for each order, or what went wrong with it."""
        waiting = []
        for index, order in enumerate(orders):
            which = index % len(self.compilers)
            waiting.append(self.threads[which].submit(self._compile, self.compilers[which], order))
        return [w.result() for w in waiting]

    def _compile(self, worker: Worker, order: Order) -> bytes | Outcome:
        reply = worker.call(order, self.compile_seconds)
        if reply.fate == "ok":
            library: bytes = reply.value
            return library
        if reply.fate == "timeout":
            return Outcome("timeout", f"compiling took longer than {self.compile_seconds:.0f} s")
        if reply.out_of_memory:
            return Outcome("memory", f"compiling ran out of memory: {reply.value}")
        return Outcome("compile", str(reply.value))

    def measure(self, request: Request) -> Outcome:
        """Measure one candidate while nothing of ours runs beside it."""
        with alone():
            reply = self.measurer.call(replace(request, repeat=self.repeat), request.seconds + _GRACE)
        if reply.fate == "ok":
            outcome: Outcome = reply.value
            return outcome
        if reply.fate == "timeout":
            return Outcome("timeout", reply.value)
        return Outcome("memory" if reply.out_of_memory else "crash", str(reply.value))

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Outcome, bytes]]:
        """(position, outcome, library) of every trial: all are compiled, then measured in turn."""
        for index, made in enumerate(self.compile([t.order for t in trials])):
            if isinstance(made, Outcome):
                yield index, made, b""
                continue
            request = trials[index].request
            yield index, self.measure(replace(request, candidate=replace(request.candidate, library=made))), made

    def close(self) -> None:
        """End all processes."""
        for worker in (*self.compilers, self.measurer):
            worker.stop()
        for thread in self.threads:
            thread.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> LocalBench:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
