"""Compiling many kernels: cached, each once, over several processes when there is enough to do.

Workers are fresh interpreters that import only what the job function needs (TVM takes them about 2 s), not
forks and not re-runs of the user's script, so no ``if __name__ == "__main__"`` guard is needed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from bitwright.codegen.cache import Cache
from bitwright.ir.errors import BitwrightError

_WORKER = "from bitwright.codegen.jobs import work; work()"
_STARTUP = 3.0
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to compile: ``key`` addresses the result, ``name`` is for people, ``payload`` is the argument."""

    key: str
    name: str
    payload: Any


def compile_all(
    function: Callable[[Any], bytes],
    jobs: Sequence[Job],
    workers: int | None = None,
    *,
    cache: Cache | None = None,
    progress: Progress | None = None,
    in_process: bool | None = None,
) -> dict[str, bytes]:
    """``{job.key: function(job.payload)}``, from the cache where it knows the key, each key computed once.

    ``function`` is a top-level function of an importable module. ``workers`` None means one per usable core.
    ``in_process`` None starts here and adds workers once the rest looks longer than their start-up; True
    never starts any; False computes nothing here. ``progress(done, total, name)`` is called in this thread's
    process after each job. Raises :class:`BitwrightError` that names the job when it raises or its worker dies.
    """
    unique = {job.key: job for job in jobs}
    results: dict[str, bytes] = {}
    todo: deque[Job] = deque()
    for job in unique.values():
        if (found := cache.get(job.key) if cache else None) is not None:
            results[job.key] = found
        else:
            todo.append(job)
    state = _State(function, todo, results, len(unique), cache, progress)
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    if function.__module__ == "__main__":
        in_process = True  # a worker could not import it
    try:
        if in_process is False:
            state.start(max(1, min(count, len(todo))))
        else:
            _work_here(state, 1 if in_process else count)
        for thread in state.threads:
            thread.join()
    except BaseException as error:
        state.failed(error)
        raise
    finally:
        state.stop()
    if state.error is not None:
        raise state.error
    return results


@dataclass(slots=True)
class _State:
    """What the threads of one :func:`compile_all` share."""

    function: Callable[[Any], bytes]
    todo: deque[Job]
    results: dict[str, bytes]
    total: int
    cache: Cache | None
    progress: Progress | None
    error: BaseException | None = None
    threads: list[threading.Thread] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, count: int) -> None:
        if not self.todo:
            return
        for _ in range(count):
            thread = threading.Thread(target=_feed, args=(self,), daemon=True)
            self.threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End what still runs (after an error or Ctrl-C)."""
        self.todo.clear()
        for process in self.processes:
            if process.poll() is None and self.error is not None:
                process.kill()
        for thread in self.threads:
            thread.join()
        for process in self.processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert stream is not None
                    stream.close()

    def take(self) -> Job | None:
        with self.lock:
            return self.todo.popleft() if self.todo and self.error is None else None

    def done(self, job: Job, data: bytes) -> None:
        if self.cache:
            self.cache.put(job.key, data)
        with self.lock:
            self.results[job.key] = data
            if self.progress:
                self.progress(len(self.results), self.total, job.name)

    def failed(self, error: BaseException) -> None:
        with self.lock:
            self.error = self.error or error


def _work_here(state: _State, workers: int) -> None:
    """Work in this process; start workers when the rest would take them less time, start-up included."""
    begin, count = time.perf_counter(), 0
    while (job := state.take()) is not None:
        try:
            data = state.function(job.payload)
        except Exception as error:
            raise BitwrightError(f"compiling {job.name} failed: {type(error).__name__}: {error}") from error
        state.done(job, data)
        count += 1
        left = (time.perf_counter() - begin) / count * len(state.todo)
        if workers > 1 and not state.threads and left * (1 - 1 / workers) > _STARTUP:
            state.start(min(workers - 1, len(state.todo)))


def _feed(state: _State) -> None:
    """A thread that owns one worker process and hands it job after job."""
    job: Job | None = None
    process = _spawn(state)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        _send(process.stdin, state.function)
        while (job := state.take()) is not None:
            _send(process.stdin, job.payload)
            ok, value = _receive(process.stdout)
            if not ok:
                raise BitwrightError(f"compiling {job.name} failed in a worker: {value}")
            state.done(job, value)
        process.stdin.close()
        process.wait()
    except (EOFError, BrokenPipeError):
        code = process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        place = f"compiling {job.name}" if job is not None else "starting"
        state.failed(BitwrightError(f"a compile worker died while {place} ({how})"))
    except BitwrightError as error:
        state.failed(error)
    except Exception as error:
        name = job.name if job is not None else "the first job"
        state.failed(BitwrightError(f"a compile worker cannot be given {name}: {error}"))


def _spawn(state: _State) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", _WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    )
    with state.lock:
        state.processes.append(process)
    return process


def _send(stream: IO[bytes], value: object) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    head = stream.read(8)
    size = int.from_bytes(head, "little")
    data = stream.read(size) if len(head) == 8 else b""
    if len(head) < 8 or len(data) < size:
        raise EOFError
    return pickle.loads(data)


def work() -> None:
    """The main of a worker: a function, then payloads, on stdin; (ok, result) each on the original stdout."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the compiler prints must not mix with the replies
    requests = sys.stdin.buffer
    try:
        function = _receive(requests)
        while True:
            payload = _receive(requests)
            try:
                reply: tuple[bool, object] = (True, function(payload))
            except Exception as error:
                last = "".join(traceback.format_tb(error.__traceback__)[-1:]).strip()
                reply = (False, f"{type(error).__name__}: {error}\n{last}")
            _send(replies, reply)
    except (EOFError, KeyboardInterrupt):
        pass
