"""What a GPU program does, in order: kernel launches and copies over memory that a static plan has laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bitwright.codegen.plan import COPY, Place, Plan, Step
from bitwright.ir.errors import BitwrightError
from bitwright.ir.target import Target

Space = Literal["input", "output", "arena", "weight", "scratch"]
_GRID = ((1 << 31) - 1, 65535, 65535)
_THREADS = 1024


@dataclass(frozen=True, slots=True)
class Pointer:
    """An argument: ``offset`` bytes into a space; ``index`` numbers inputs and outputs.

    ``scratch`` is memory that is zero before the first launch and that every kernel leaves zero.
    """

    space: Space
    index: int
    offset: int


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel launch; or, where ``nbytes`` is not 0, a copy of so many bytes from the second argument to the first."""

    label: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    args: tuple[Pointer, ...]
    nbytes: int = 0


def launches_of(plan: Plan, shapes: Mapping[str, Sequence[int]], scratch: Mapping[str, int]) -> tuple[Launch, ...]:
    """The plan's steps as launches.

    ``shapes``: grid x, y, z, threads, shared bytes by kernel; ``scratch``: by kernel that takes some, at which of its
    arguments the pointer to it comes (all share one region, as each leaves it zero).
    """
    made = []
    for step, places in zip(plan.steps, plan.places, strict=True):
        args = [_pointer(p) for p in places]
        if step.kernel_symbol == COPY:
            made.append(Launch(step.label, COPY, (1, 1, 1), 1, 0, tuple(args), _copied(step, plan)))
            continue
        if step.kernel_symbol in scratch:
            args.insert(scratch[step.kernel_symbol], Pointer("scratch", 0, 0))
        x, y, z, threads, shared = shapes[step.kernel_symbol]
        made.append(Launch(step.label, step.kernel_symbol, (x, y, z), threads, shared, tuple(args)))
    return tuple(made)


def _pointer(place: Place) -> Pointer:
    return Pointer(place.space, place.index, place.offset)


def _copied(step: Step, plan: Plan) -> int:
    """Bytes that a copy step moves."""
    first = step.args[0]
    return first.nbytes if first.nbytes >= 0 else plan.sizes[first.buffer] - first.offset


def check_shape(kernel: str, shape: Sequence[int], target: Target) -> None:
    """Raise :class:`BitwrightError` for a launch that no device of the target takes."""
    x, y, z, threads, shared = shape
    fits = all(1 <= n <= most for n, most in zip((x, y, z), _GRID, strict=True))
    if not fits or not 1 <= threads <= _THREADS or not 0 <= shared <= target.l1_bytes:
        raise BitwrightError(
            f"kernel {kernel} has {x} x {y} x {z} blocks of {threads} threads with {shared} bytes of shared memory: "
            f"{target.name} takes at most {_GRID[0]} x {_GRID[1]} x {_GRID[2]}, {_THREADS} and {target.l1_bytes}"
        )
