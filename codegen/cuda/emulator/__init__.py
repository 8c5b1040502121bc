"""Runs the CUDA C++ text of kernels on this machine: compiled by g++ with a prelude that gives it its meaning."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from bitwright.codegen.cache import default_directory
from bitwright.codegen.cuda.instructions import prelude, used
from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.ir.weights import Array

_HERE = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-fwrapv")
PAGE = 4096
_KEPT = 2000
"""Compiled texts that stay on disk, about 0.1 MB each; the oldest go."""
_SHARED = re.compile(r"extern __shared__ __align__\(\d+\) uchar shared_ptr\[\];")


def missing() -> str:
    """What must be installed before kernels can be emulated, or the empty string."""
    return "" if shutil.which("g++") else "emulating GPU kernels needs a C++ compiler: apt-get install g++"


class Emulated:
    """Kernels of one text. ``run`` runs a launch of one; arguments are addresses.

    Raises :class:`BitwrightError` with the block and thread where a kernel waits for ever, reads or writes outside
    of its arrays or misuses an instruction.
    """

    def __init__(self, text: str, names: Sequence[str]) -> None:
        self._library = ctypes.CDLL(str(_compiled(text, tuple(names))))
        self._library.bw_message.restype = ctypes.c_char_p

    def run(self, name: str, launch: Sequence[int], addresses: Sequence[int], order: int = 1) -> None:
        """``launch``: grid x, y, z, threads, shared bytes. ``order``: seed of the order in which threads run."""
        if launch[4] > 227 * 1024:
            raise InvalidInput(f"{name} asks for {launch[4]} bytes of shared memory; a block has 232448")
        function = getattr(self._library, f"run_{name}")
        arguments = (ctypes.c_void_p * max(len(addresses), 1))(*addresses)
        if function(arguments, (ctypes.c_int * 5)(*launch), ctypes.c_uint64(order)):
            raise BitwrightError(f"kernel {name}: {self._library.bw_message().decode()}")

    def run_guarded(
        self, name: str, launch: Sequence[int], arrays: Mapping[str, Array], order: int = 1
    ) -> dict[str, Array]:
        """Run one launch on copies of the arrays (arguments in their order): the arrays afterwards.

        Every array ends at a guard page: reading 16 bytes or more past one is an error.
        """
        room = Guarded()
        try:
            placed = {key: room.place(np.ascontiguousarray(a)) for key, a in arrays.items()}
            self.run(name, launch, [at for at, _ in placed.values()], order)
            return {key: view.copy() for key, (_, view) in placed.items()}
        finally:
            room.free()


class Guarded:
    """Arrays whose ends lie at the end of a page that nothing may touch beyond, so that a read past them is seen."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._maps: list[tuple[int, int]] = []

    def place(self, array: Array, align: int = 16) -> tuple[int, Array]:
        """A copy of the array: its address, and an array that shares it. It ends less than ``align`` bytes early."""
        nbytes = max(-(-array.nbytes // align) * align, align)
        room = -(-nbytes // PAGE) * PAGE
        base = self._libc.mmap(None, room + 2 * PAGE, 3, 0x22, -1, 0)
        self._libc.mprotect(base, PAGE, 0)
        self._libc.mprotect(base + PAGE + room, PAGE, 0)
        self._maps.append((base, room + 2 * PAGE))
        start = base + PAGE + room - nbytes
        raw = (ctypes.c_uint8 * max(array.nbytes, 1)).from_address(start)
        view = np.ctypeslib.as_array(raw)[: array.nbytes].view(array.dtype).reshape(array.shape)
        view[...] = array
        return start, view

    def free(self) -> None:
        for base, size in self._maps:
            self._libc.munmap(base, size)
        self._maps.clear()


def run_guarded(
    text: str, name: str, launch: Sequence[int], arrays: Mapping[str, Array], order: int = 1
) -> dict[str, Array]:
    """Run one launch of a text's only kernel on copies of the arrays; see :meth:`Emulated.run_guarded`."""
    return Emulated(text, [name]).run_guarded(name, launch, arrays, order)


def _unit(text: str, names: Sequence[str]) -> str:
    heads = ["emulator.h", "types.h"] + (["hopper.h"] if any(i.arch >= 90 for i in used(text)) else [])
    body = _SHARED.sub("unsigned char* shared_ptr = bw::here->shared;", text)
    parts = [*(f'#include "{h}"' for h in heads), prelude(text, emulated=True), body]
    for name in names:
        cluster = re.search(rf"__cluster_dims__\((\d+), 1, 1\) __launch_bounds__\([^)]*\) {name}\(", text)
        parts.append(
            f"static void call_{name}(void** a) {{ bw::apply({name}, a); }}\n"
            f'extern "C" int run_{name}(void** a, const int* shape, uint64_t order) '
            f"{{ return bw::launch(call_{name}, a, shape, order, {cluster[1] if cluster else 1}); }}"
        )
    return "\n".join(parts)


@cache
def _folder() -> Path:
    base = default_directory() / "emulator"
    base.mkdir(parents=True, exist_ok=True)
    return base


def _compiled(text: str, names: tuple[str, ...]) -> Path:
    """The shared library of a text, from the cache where it was compiled before."""
    unit = _unit(text, names)
    headers = b"".join((_HERE / f).read_bytes() for f in ("emulator.h", "types.h", "hopper.h"))
    key = hashlib.blake2b(unit.encode() + headers + " ".join(_FLAGS).encode(), digest_size=16).hexdigest()
    made = _folder() / f"{key}.so"
    if made.exists():
        return made
    with tempfile.TemporaryDirectory(dir=_folder()) as scratch:
        source, out = Path(scratch) / "kernel.cpp", Path(scratch) / "kernel.so"
        source.write_text(unit)
        command = ["g++", *_FLAGS, f"-I{_HERE}", str(source), "-o", str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise InvalidInput(missing()) from None
        if done.returncode:
            raise BitwrightError(f"the emulator cannot compile {', '.join(names)}:\n{done.stderr[:4000]}")
        os.replace(out, made)
    with contextlib.suppress(FileNotFoundError):  # another process removes the same ones
        for old in sorted(_folder().glob("*.so"), key=lambda p: p.stat().st_mtime)[:-_KEPT]:
            old.unlink()  # one that is loaded stays in memory
    return made
