"""A GPU without a GPU: the runtime's driver over the emulator, which runs the text of a program's kernels here.

Everything is executed as on a device: memory, launches with their offsets in order, recorded graphs. Slow; its device
memory is the host's, so arrays of NumPy and of torch's CPU are "on the device".
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.codegen.cuda.emulator import Emulated, Guarded
from bitwright.ir.errors import BitwrightError, InvalidInput
from bitwright.runtime.dlpack import HOST

Bytes = NDArray[np.uint8]
Action = Callable[[], None]


class EmulatedDriver:
    """The driver of an emulated device. ``order``: the seed of the order in which threads of a block run."""

    kind = HOST
    index = 0

    def __init__(self, order: int = 1) -> None:
        self.order = order
        self._rooms: dict[int, Guarded] = {}
        self._library: Emulated | None = None
        self._texts: dict[str, str] = {}
        self._recording: list[Action] | None = None

    def alloc(self, nbytes: int) -> int:
        """Memory between pages that nothing may touch."""
        room = Guarded()
        address, view = room.place(np.empty(max(nbytes, 16), np.uint8))
        view[:] = 0xA5
        self._rooms[address] = room
        return address

    def free(self, address: int) -> None:
        self._rooms.pop(address).free()

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        self._do(lambda: ctypes.memset(address, 0, nbytes))

    def upload(self, address: int, array: Bytes, stream: int) -> None:
        self._now("a copy from the host")
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: Bytes, address: int, stream: int) -> None:
        self._now("a copy to the host")
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        self._do(lambda: ctypes.memmove(to, source, nbytes))

    def load(self, code: Mapping[str, tuple[bytes, str]]) -> None:
        if lacking := [name for name, (_, text) in code.items() if not text]:
            raise InvalidInput(f"the program cannot be emulated: it does not hold the text of {lacking[0]}")
        self._texts |= {name: text for name, (_, text) in code.items()}
        self._library = Emulated("\n".join(self._texts.values()), list(self._texts)) if self._texts else None

    def launch(
        self, kernel: str, grid: tuple[int, int, int], threads: int, shared: int, pointers: Sequence[int], stream: int
    ) -> None:
        assert self._library is not None
        run, shape = self._library.run, [*grid, threads, shared]
        self._do(lambda: run(kernel, shape, pointers, self.order))

    def wait(self, stream: int) -> None:
        self._now("waiting")

    def record(self, run: Callable[[int], None]) -> Any:
        made: list[Action] = []
        self._recording = made
        try:
            run(0)
        finally:
            self._recording = None
        return made

    def replay(self, graph: Any, stream: int) -> None:
        for action in graph:
            action()

    def timed(self, run: Callable[[int], None], stream: int) -> float:
        raise InvalidInput("an emulated program cannot be timed; its report holds predicted times")

    def _do(self, action: Callable[[], object]) -> None:
        """Now; or, while a graph is recorded, whenever it is replayed."""
        if self._recording is None:
            action()
        else:
            self._recording.append(lambda: (action(), None)[1])

    def _now(self, what: str) -> None:
        if self._recording is not None:
            raise BitwrightError(f"{what} cannot be recorded in a graph")
