"""Memory that was freed goes back to the system, where the C library would keep it."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    """glibc's malloc_trim; None where the C library has no such thing."""
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):
        return None


def give_back() -> None:
    """Return free pages of the heap, holes included.

    Torch asks for aligned blocks, which glibc does not cut from a hole of the same size: without this a loop that
    frees and makes tensors of some megabytes takes up to twice what it holds. Does nothing with other C libraries.
    """
    if (trim := _trim()) is not None:
        trim(0)


__all__ = ["give_back"]
