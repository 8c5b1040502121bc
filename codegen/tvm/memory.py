"""Copying and filling memory in a kernel, exact to the element and without library calls."""

from __future__ import annotations

from collections.abc import Callable

from bitwright.codegen.tvm.tir import Builder, Index, Number, Pointer, const, width

CHUNK = 64
"""Bytes per step."""


def copy(b: Builder, source: Pointer, start: Index, out: Pointer, to: Index, elements: int) -> None:
    """``out[to : to + elements] = source[start : start + elements]``."""
    _pieces(b, elements, width(out.dtype), lambda at, n: b.store(out, to + at, b.load(source, start + at, n)))


def fill(b: Builder, out: Pointer, to: Index, elements: int, value: Number) -> None:
    """``out[to : to + elements] = value``."""
    _pieces(b, elements, width(out.dtype), lambda at, n: b.store(out, to + at, const(value, out.dtype, n)))


def _pieces(b: Builder, elements: int, size: int, emit: Callable[[Index, int], None]) -> None:
    lanes = CHUNK // size
    whole = elements // lanes
    if whole > 2:
        with b.loop(whole, name="chunk") as i:
            emit(i * lanes, lanes)
    else:
        for i in range(whole):
            emit(i * lanes, lanes)
    at = whole * lanes
    while at < elements:
        while lanes > elements - at:
            lanes //= 2
        emit(at, lanes)
        at += lanes
