"""What every step of a program leaves in memory: the program is run up to each step, and its result is read."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.ir.types import parse_dtype
from bitwright.runtime.manifest import Manifest, TensorSpec
from bitwright.runtime.native import Library, address_of, aligned, failed

Array = NDArray[Any]


def _nbytes(t: TensorSpec, rows: int) -> int:
    sizes = [d if isinstance(d, int) else t.factor * rows for d in t.shape]
    return math.prod(sizes) * t.itemsize


def trace(library: Library, manifest: Manifest, inputs: Sequence[Array], rows: int) -> dict[str, Array]:
    """Results by step label, for checked inputs of one chunk of ``rows``."""
    given = []
    for array in inputs:  # copied: aligned, contiguous and readable a little past the end
        raw = aligned(array.nbytes + 64)
        raw[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        given.append(raw)
    outputs = [aligned(_nbytes(t, rows) + 64) for t in manifest.outputs]
    arena, scratch = aligned(manifest.arena_bytes + 64), aligned(manifest.scratch_bytes + 64)
    ins = (ctypes.c_void_p * max(1, len(given)))(*(address_of(a) for a in given))
    outs = (ctypes.c_void_p * max(1, len(outputs)))(*(address_of(a) for a in outputs))
    values: dict[str, Array] = {}
    for number, step in enumerate(manifest.steps):
        if step.result is None:
            continue
        code = library.trace(ins, outs, library.weights_address, address_of(arena), address_of(scratch), rows, number)
        if code:
            raise failed(code)
        memory = arena if step.result.space == "arena" else outputs[step.result.index]
        dtype = parse_dtype(step.result.dtype).numpy
        end = step.result.offset + math.prod(step.result.shape) * dtype.itemsize
        values[step.label] = memory[step.result.offset : end].view(dtype).reshape(step.result.shape).copy()
    return values
