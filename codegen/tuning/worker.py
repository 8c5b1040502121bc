"""A process that does one thing at a time for the tuner and may hang, crash or run out of memory while doing it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Fate = Literal["ok", "error", "timeout", "crash"]
_MAIN = "from bitwright.codegen.tuning.worker import main; main({memory})"
_MEMORY_TEXTS = ("MemoryError", "bad_alloc", "Cannot allocate memory", "out of memory")
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a call: its value (``ok``), or text that says why there is none."""

    fate: Fate
    value: Any

    @property
    def out_of_memory(self) -> bool:
        """Whether the lack of a value looks like a lack of memory."""
        return self.fate in ("error", "crash") and any(t in str(self.value) for t in _MEMORY_TEXTS)


class Worker:
    """A fresh interpreter that calls ``function`` (top-level, importable) on each payload.

    ``memory``: bytes of address space it may take beyond what it has when it starts. It is started with the first
    call, again after each failure, and ends with this process, however that ends.
    """

    def __init__(self, function: Callable[[Any], Any], *, memory: int = 4 << 30) -> None:
        self.function, self.memory = function, memory
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None

    def call(self, payload: Any, seconds: float) -> Reply:
        """``function(payload)`` there, or why not; a worker that takes longer than ``seconds`` is killed."""
        end = time.monotonic() + seconds
        process = self._process or self._start()
        try:
            _write(process, pickle.dumps(payload, protocol=pickle.HIGHEST_PROTOCOL))
            ok, value = pickle.loads(_read(process, end))
        except TimeoutError:
            self.stop()
            return Reply("timeout", f"no answer within {seconds:.0f} s")
        except (EOFError, OSError):
            code = process.wait()
            said = self._last_words()
            self.stop()
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Reply("crash", f"the process died ({name})" + (f": {said}" if said else ""))
        return Reply("ok" if ok else "error", value)

    def stop(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._errors):
                with contextlib.suppress(OSError):
                    assert stream is not None
                    stream.close()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MAIN.format(memory=self.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": path} | single,
        )
        _write(self._process, pickle.dumps(self.function))
        return self._process

    def _last_words(self) -> str:
        """The last line the process printed on stderr."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(len(data).to_bytes(8, "little") + data)
    process.stdin.flush()


def _read(process: subprocess.Popen[bytes], end: float) -> bytes:
    assert process.stdout is not None
    stream = process.stdout.fileno()
    data, wanted = b"", 8
    with selectors.DefaultSelector() as ready:
        ready.register(stream, selectors.EVENT_READ)
        while len(data) < wanted:
            if not ready.select(max(0.0, end - time.monotonic())):
                raise TimeoutError
            part = os.read(stream, 1 << 20)
            if not part:
                raise EOFError
            data += part
            if wanted == 8 and len(data) >= 8:
                wanted = 8 + int.from_bytes(data[:8], "little")
    return data[8:]


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (kill -9 of a tuner leaves nothing behind)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def limit_memory(more: int) -> None:
    """Let this process take ``more`` bytes of address space beyond what it has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + more
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(memory: int) -> None:
    """The main of the process: a function, then payloads, on stdin; (ok, value) each on the original stdout."""
    die_with_parent()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print must not mix with the replies
    function = pickle.loads(_receive())
    limit_memory(memory)
    while data := _receive():
        try:
            reply: tuple[bool, object] = (True, function(pickle.loads(data)))
        except Exception as error:
            reply = (False, f"{type(error).__name__}: {error}"[:2000])
        text = pickle.dumps(reply, protocol=pickle.HIGHEST_PROTOCOL)
        replies.write(len(text).to_bytes(8, "little") + text)
        replies.flush()


def _receive() -> bytes:
    head = sys.stdin.buffer.read(8)
    return sys.stdin.buffer.read(int.from_bytes(head, "little")) if len(head) == 8 else b""
