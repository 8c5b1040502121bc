"""Loading machine code: processor features, the shared library from memory, aligned buffers, forks."""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import itertools
import json
import os
import platform
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.runtime.manifest import ABI_VERSION, Manifest

SPIN_COUNT = "10000"
"""How often libgomp's idle threads look for work before they sleep (about 0.2 ms; its own default: 5 ms)."""
_NAMES = {
    "abm": "lzcnt", "bmi1": "bmi", "lahflm": "sahf", "pni": "sse3", "3dnowprefetch": "prfchw",
    "pclmulqdq": "pclmul", "shani": "sha", "asimd": "neon", "asimddp": "dotprod", "asimdhp": "fullfp16",
}  # fmt: skip
_counter = itertools.count()
_anything = ctypes.c_char
_load_lock = threading.Lock()


def _plain(feature: str) -> str:
    """One spelling for the kernel's and LLVM's names: ``avx512_vnni`` is ``avx512vnni``."""
    name = feature.lower().lstrip("+").translate(str.maketrans("", "", "_.-"))
    return _NAMES.get(name, name)


@functools.cache
def host_features() -> frozenset[str] | None:
    """Features of this processor by their LLVM names without punctuation; None where they cannot be told."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in itertools.islice(file, 200):
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    return frozenset(map(_plain, value.split()))
    except OSError:
        pass
    return None


def check_host(features: Iterable[str], arch: str = "") -> None:
    """Raise :class:`InvalidInput` naming the features this processor lacks."""
    if arch and arch != platform.machine():
        raise InvalidInput(
            f"the program is for {arch}, this machine is {platform.machine()}: compile it again here, or run it"
            " emulated (bitwright run --emulate, bitwright.emulate)"
        )
    have = host_features()
    lacking = [] if have is None else [f for f in features if _plain(f) not in have]
    if lacking:
        raise InvalidInput(
            f"the program needs processor features that this machine lacks: {', '.join(lacking)};"
            " compile the model for this machine's target"
        )


def aligned(nbytes: int, alignment: int = 64) -> NDArray[np.uint8]:
    """An uninitialised uint8 array of ``nbytes`` that starts at a multiple of ``alignment``."""
    raw = np.empty(nbytes + alignment, np.uint8)
    start = -address_of(raw) % alignment
    return raw[start : start + nbytes]


def address_of(array: NDArray[Any]) -> int:
    """The address of an array's first element (many times quicker than ``array.ctypes.data``, if it is writable)."""
    try:
        return ctypes.addressof(_anything.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):  # read-only, empty, not contiguous, of a format without buffers
        return array.__array_interface__["data"][0]  # type: ignore[no-any-return]


class Library:
    """A program's shared library and its weights; unmapped when the last reference goes.

    ``run`` and ``profile`` are the C functions of codegen/main_c.py; ctypes releases the GIL around them.
    Raises :class:`InvalidInput` when it cannot be loaded here or does not fit the manifest.
    """

    def __init__(self, data: bytes, weights: NDArray[np.uint8], manifest: Manifest) -> None:
        self._handle: int | None = None
        check_host(manifest.features, manifest.arch)
        self.weights = weights
        if address_of(weights) % 64:
            self.weights = aligned(len(weights))
            self.weights[:] = weights
        self.weights_address = address_of(self.weights)
        self._library = open_library(data)
        self._handle = self._library._handle
        self.info = self._read_info()
        expected = {"chunks": sorted(manifest.chunks, reverse=True), "steps": len(manifest.steps)}
        for key, value in expected.items():
            if self.info.get(key) != value:
                raise InvalidInput(f"program.so has {key} {self.info.get(key)}, the manifest says {value}")
        check_host(self.info.get("features", ()))
        self.openmp = bool(self.info.get("openmp")) and _keep_openmp(self._library)
        pointers: list[Any] = [ctypes.c_void_p] * 5
        run, profile, trace = self._library.bw_run, self._library.bw_profile, self._library.bw_trace
        run.argtypes = [*pointers, ctypes.c_int, ctypes.c_int64]
        profile.argtypes = [*pointers, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p]
        trace.argtypes = [*pointers, ctypes.c_int64, ctypes.c_int]
        run.restype = profile.restype = trace.restype = ctypes.c_int
        self.run: Callable[..., int] = run
        self.profile: Callable[..., int] = profile
        self.trace: Callable[..., int] = trace

    def _read_info(self) -> dict[str, Any]:
        try:
            version = ctypes.c_int32.in_dll(self._library, "bw_abi_version").value
            info = self._library.bw_info
            if version != ABI_VERSION:
                raise InvalidInput(
                    f"program.so has ABI {version}, this bitwright calls {ABI_VERSION}: compile it again"
                )
            _ = self._library.bw_run, self._library.bw_profile, self._library.bw_trace
        except (ValueError, AttributeError) as error:
            raise InvalidInput(f"program.so is not a bitwright program: {error}") from error
        info.restype = ctypes.c_char_p
        try:
            answer = json.loads(info())
        except ValueError as error:
            raise InvalidInput(f"program.so describes itself wrongly: {error}") from error
        return answer if isinstance(answer, dict) else {}

    def __del__(self, _close: Any = _ctypes.dlclose) -> None:
        if self._handle is not None:
            _close(self._handle)
            self._handle = None


class Elsewhere(Library):
    """Stands for the library of a program that another architecture runs: it can be saved, not called."""

    def __init__(self, weights: NDArray[np.uint8], manifest: Manifest) -> None:
        self._handle = None
        self.manifest, self.weights, self.weights_address = manifest, weights, address_of(weights)
        self.info, self.openmp = {}, False

    def run(self, *_: Any) -> int:
        """Raises :class:`InvalidInput`: it cannot run here."""
        check_host(self.manifest.features, self.manifest.arch)
        raise AssertionError("made for this machine")

    profile = trace = run


class _Symbol(ctypes.Structure):
    """``Dl_info``: the file and address a symbol comes from."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _keep_openmp(library: ctypes.CDLL) -> bool:
    """Pin the OpenMP runtime in memory: its sleeping threads outlive the program that started them."""
    try:
        symbol = ctypes.cast(library.omp_get_num_threads, ctypes.c_void_p)
        found = _Symbol()
        if not ctypes.CDLL(None).dladdr(symbol, ctypes.byref(found)) or not found.file:
            return False
        ctypes.CDLL(os.fsdecode(found.file), mode=os.RTLD_NOW | os.RTLD_NODELETE)
    except (AttributeError, OSError):
        return False
    return True


def _check_elf(data: bytes) -> None:
    """Refuse what is not ELF, and truncated libraries: dlopen maps them and dies of SIGBUS."""
    if not data.startswith(b"\x7fELF"):
        raise InvalidInput("program.so is not an ELF library")
    if data[4:6] != b"\x02\x01":
        return  # 32-bit or big-endian: dlopen says what is wrong
    try:
        (table,) = struct.unpack_from("<Q", data, 0x20)
        size, count = struct.unpack_from("<HH", data, 0x36)
        ends = [
            sum(struct.unpack_from("<Q16xQ", data, table + size * i + 8))
            for i in range(count)
            if struct.unpack_from("<I", data, table + size * i) == (1,)
        ]
    except struct.error:
        ends = [len(data) + 1]
    if not ends or max(ends) > len(data):
        raise InvalidInput("program.so is truncated")


def open_library(data: bytes) -> ctypes.CDLL:
    """dlopen a library given as bytes, without leaving a file behind."""
    _check_elf(data)
    with _load_lock, _SpinCount():
        try:
            descriptor = os.memfd_create("bitwright-program", os.MFD_CLOEXEC)
        except (AttributeError, OSError):
            return _open_from_disk(data)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            # glibc knows libraries by path and descriptors are reused: spell the path differently each time.
            digits = bin(next(_counter))[2:].replace("0", "/").replace("1", "./")
            try:
                return ctypes.CDLL(f"/proc/self/fd/{digits}{descriptor}", mode=os.RTLD_NOW | os.RTLD_LOCAL)
            except OSError as error:
                problem = str(error)
        if "libgomp" in problem or "undefined symbol" in problem:
            raise InvalidInput(f"program.so cannot be loaded here: {problem}")
        return _open_from_disk(data)


def _open_from_disk(data: bytes) -> ctypes.CDLL:
    """The way for systems without memfd or /proc: a temporary file, removed at once."""
    descriptor, name = tempfile.mkstemp(prefix="bitwright-", suffix=".so")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        return ctypes.CDLL(name, mode=os.RTLD_NOW | os.RTLD_LOCAL)
    except OSError as error:
        raise InvalidInput(f"program.so cannot be loaded here: {error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


class _SpinCount:
    """libgomp reads its settings when it is loaded: give it ours for that moment unless the user set any."""

    def __enter__(self) -> None:
        self.ours = not ({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys())
        if self.ours:
            os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT

    def __exit__(self, *_: object) -> None:
        if self.ours:
            os.environ.pop("GOMP_SPINCOUNT", None)


class _Forks:
    """libgomp's threads do not survive a fork and a team started in the child would wait for them forever."""

    team_ran = False
    child_is_single = False


def team_starts() -> bool:
    """Called before each use of more than one thread; False in a forked child of a process that used threads."""
    if _Forks.child_is_single:
        return False
    _Forks.team_ran = True
    return True


def _after_fork() -> None:
    _Forks.child_is_single = _Forks.child_is_single or _Forks.team_ran


os.register_at_fork(after_in_child=_after_fork)


def failed(code: int) -> BitwrightError:
    """The error for a nonzero result of ``bw_run``."""
    return BitwrightError({1: "bad thread count", 2: "too few rows"}.get(code, f"the program failed ({code})"))
