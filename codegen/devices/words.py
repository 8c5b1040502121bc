"""Words whose lanes hold weights of several widths: patterns as data, which of them cover a layer, packing and back.

A word is split among outputs by a pattern: so many lanes of each instruction, every lane ``depth`` terms of one output
(after the four configurable precision patterns of arXiv:2311.14114). Outputs are permuted so that equal widths are
contiguous; a lane may take an output that needs fewer bits than it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bitwright.codegen.devices.units import quantity
from bitwright.ir.types import BIPOLAR, DType

if TYPE_CHECKING:
    from bitwright.codegen.devices.schema import Device, Instruction

Array = NDArray[Any]
UNITS = 96
"""Layers of more lanes than this are covered by several equal words at a time."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pattern(_Table):
    """How a word is split: lanes (outputs) by the name of the instruction that multiplies them."""

    name: str
    lanes: dict[str, Annotated[int, Field(ge=1)]]


class Area(_Table):
    """Weights of the area proxy, see :func:`area_of`."""

    multiplier: float = 1.0
    accumulator: float = 1.0
    multiplexer: float = 0.5


class WordFormat(_Table):
    """``[options.words]``: the size of a word, the family of patterns, and which (at most ``held``) are ``active``: the
    ones that the device has."""

    size: Annotated[float, BeforeValidator(lambda v: quantity(v, "bits"))]
    held: Annotated[int, Field(ge=1)] = 4
    active: Annotated[tuple[str, ...], Field(min_length=1)]
    pattern: Annotated[tuple[Pattern, ...], Field(min_length=1)]
    area: Area = Area()

    @property
    def id_bits(self) -> int:
        """Bits of a word that name its pattern."""
        return (self.held - 1).bit_length()

    @property
    def chosen(self) -> tuple[Pattern, ...]:
        """The active patterns; a word's pattern id is the place in this list."""
        return tuple(p for a in self.active for p in self.pattern if p.name == a)


def lanes_of(pattern: Pattern, device: Device) -> list[tuple[Instruction, int]]:
    """Instructions and lanes of a word, the widest weights first."""
    found = [(i, pattern.lanes[i.name]) for i in device.instruction if i.name in pattern.lanes]
    return sorted(found, key=lambda f: -f[0].parsed.w.bits)


def word_problems(device: Device, words: WordFormat) -> Iterator[tuple[tuple[Any, ...], str]]:
    """(place, message) of everything that contradicts itself."""
    names, known = [p.name for p in words.pattern], {i.name: i for i in device.instruction}
    place: tuple[Any, ...]
    used = [known[n] for p in words.pattern for n in p.lanes if n in known]
    for n, p in enumerate(words.pattern):
        place = ("options.words.pattern", n, "lanes")
        if names.index(p.name) != n:
            yield ("options.words.pattern", n, "name"), f"two patterns are called {p.name}"
        if unknown := [i for i in p.lanes if i not in known]:
            yield place, f"no instruction is called {', '.join(unknown)}; there are {', '.join(known)}"
        bits = sum(k * known[i].depth * known[i].parsed.w.bits for i, k in p.lanes.items() if i in known)
        if bits > words.size:
            yield place, f"its lanes take {bits:.0f} bits, the word has {words.size:.0f}"
    if any(i.parsed.acc is None or i.parsed.pattern is not None for i in used):
        yield ("options.words", "size"), "instructions of words take running sums (%acc) and no mask"
    elif len({(i.depth, i.parsed.x, i.parsed.acc) for i in used}) > 1:
        yield ("options.words", "size"), "instructions of one word have the same terms, x and sums"
    place = ("options.words", "active")
    if missing := [a for a in words.active if a not in names]:
        yield place, f"no pattern is called {', '.join(missing)}; there are {', '.join(names)}"
        return
    if len(set(words.active)) != len(words.active) or len(words.active) > words.held:
        yield place, f"{len(words.active)} patterns, the device holds {words.held} different ones"
    if used:
        widest = max(used, key=lambda i: i.parsed.w.bits).name
        if not any(widest in p.lanes for p in words.chosen):
            yield place, f"none has lanes of {widest}, the widest: outputs that need it would have no place"


# --- covering a layer ----------------------------------------------------------------------------------------


@cache
def cover(needs: tuple[int, ...], patterns: tuple[tuple[int, ...], ...]) -> tuple[int, ...] | None:
    """Words of each pattern, as few as there can be, whose lanes hold the outputs; None: no number of words does.

    ``needs``: outputs by width, the widest first; ``patterns``: lanes by width. Narrow outputs may take wide lanes.
    More than ``UNITS`` outputs are covered in equal parts, the last of which may be less full than it could.

    >>> cover((2, 4, 8), ((2, 2, 4), (0, 0, 16))), cover((0, 1), ((1, 0),)), cover((1,), ((0,),))
    ((2, 0), (1,), None)
    """
    unit = max(1, ceil(sum(needs) / UNITS))
    goal = tuple(np.cumsum([ceil(n / unit) for n in needs]).tolist())
    steps = [tuple(np.cumsum(p).tolist()) for p in patterns]
    front: dict[tuple[int, ...], tuple[int, ...]] = {(0,) * len(goal): (0,) * len(patterns)}
    seen = set(front)
    while goal not in front:
        grown: dict[tuple[int, ...], tuple[int, ...]] = {}
        for state, counts in front.items():
            for p, step in enumerate(steps):
                now = tuple(min(g, a + b) for g, a, b in zip(goal, state, step, strict=True))
                if now not in seen and now not in grown:
                    grown[now] = (*counts[:p], counts[p] + 1, *counts[p + 1 :])
        if not grown:
            return None
        seen |= grown.keys()
        front = {s: c for s, c in grown.items() if not any(_covers(o, s) for o in grown)}
    return tuple(n * unit for n in front[goal])


def _covers(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """How the outputs of one layer lie in words.

    ``order``: outputs of each group, equal widths contiguous. ``patterns``: of each word of a group, its place among
    the active ones. ``instructions``: by width, the widest first; ``lanes``: of each active pattern, by instruction.
    """

    size: int
    id_bits: int
    depth: int
    instructions: tuple[Instruction, ...]
    lanes: tuple[tuple[int, ...], ...]
    order: tuple[tuple[int, ...], ...]
    patterns: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """Words of ``depth`` terms that one row of x meets."""
        return sum(map(len, self.patterns))

    def stored_bytes(self, terms: int) -> float:
        """Bytes of the layer's words with their pattern ids."""
        return self.count * ceil(terms / self.depth) * (self.size + self.id_bits) / 8

    def energy(self) -> float:
        """Joules of one step of each word: each instruction's, by its share of the word."""
        bits = [self.depth * i.parsed.w.bits / self.size for i in self.instructions]
        one = [
            sum(n * b * i.energy for n, b, i in zip(lanes, bits, self.instructions, strict=True))
            for lanes in self.lanes
        ]
        return sum(one[p] for group in self.patterns for p in group)

    def places(self, group: int) -> Iterator[list[tuple[int, int | None]]]:
        """For each word of a group, its lanes: the place of the instruction, and the output (None: empty)."""
        order, used = self.order[group], self.patterns[group]
        next_: list[int] = []
        start = 0
        for n in range(len(self.instructions)):
            next_.append(start)
            start += sum(self.lanes[p][n] for p in used)
        for p in used:
            lanes: list[tuple[int, int | None]] = []
            for n, count in enumerate(self.lanes[p]):
                for _ in range(count):
                    lanes.append((n, order[next_[n]] if next_[n] < len(order) else None))
                    next_[n] += 1
            yield lanes

    def runs(self) -> list[tuple[Instruction, list[int]]]:
        """The outputs that each instruction multiplies."""
        found: list[list[int]] = [[] for _ in self.instructions]
        for g in range(len(self.order)):
            for word in self.places(g):
                for n, output in word:
                    if output is not None:
                        found[n].append(output)
        return [(i, sorted(rows)) for i, rows in zip(self.instructions, found, strict=True) if rows]


def plan(weight: Array, groups: int, device: Device) -> Words | str:
    """The words of a layer's codes [O, ...], or why there are none."""
    words = device.words
    assert words is not None
    used = {n for p in words.chosen for n in p.lanes}
    instructions = sorted((i for i in device.instruction if i.name in used), key=lambda i: -i.parsed.w.bits)
    lanes = tuple(tuple(p.lanes.get(i.name, 0) for i in instructions) for p in words.chosen)
    needed = width_of(weight, [i.parsed.w for i in instructions])
    if needed is None:
        return f"codes from {weight.min()} to {weight.max()}, the widest lanes hold {instructions[0].parsed.w}"
    order, patterns = [], []
    outside = len(weight) // groups
    for g in range(groups):
        mine = needed[g * outside : (g + 1) * outside]
        needs = tuple(int((mine == n).sum()) for n in range(len(instructions)))
        counts = cover(needs, lanes)
        assert counts is not None, "a pattern with lanes of the widest instruction is active"
        order.append(tuple((np.argsort(mine, kind="stable") + g * outside).tolist()))
        patterns.append(tuple(p for p, n in enumerate(counts) for _ in range(n)))
    return Words(
        int(words.size), words.id_bits, instructions[0].depth, tuple(instructions), lanes, tuple(order), tuple(patterns)
    )  # fmt: skip


def width_of(weight: Array, formats: Sequence[DType]) -> Array | None:
    """Of each output, the place of the last (narrowest) format that holds its codes; None where none does."""
    rows = weight.reshape(len(weight), -1)
    found = np.full(len(rows), -1)
    for n, t in enumerate(formats):
        good = (np.abs(rows) == 1).all(1) if t == BIPOLAR else ((rows >= t.lo) & (rows <= t.hi)).all(1)
        found[good] = n
    return None if (found < 0).any() else found


# --- packing -------------------------------------------------------------------------------------------------


def pack(weight: Array, words: Words) -> tuple[Array, Array]:
    """Codes [O, K] as words u8 [words, steps, bytes], bits from the lowest, and pattern ids u8 [words, steps]."""
    steps = ceil(weight.shape[1] / words.depth)
    padded = np.pad(weight, ((0, 0), (0, steps * words.depth - weight.shape[1])))
    out, ids = [], []
    for g, used in enumerate(words.patterns):
        for p, word in zip(used, words.places(g), strict=True):
            bits = np.zeros((steps, ceil(words.size / 8) * 8), np.uint8)
            at = 0
            for n, output in word:
                width = int(words.instructions[n].parsed.w.bits)
                if output is not None:
                    codes = padded[output].astype(np.int64)
                    codes = codes > 0 if width == 1 else codes & ((1 << width) - 1)
                    cut = (codes[:, None] >> np.arange(width)) & 1
                    bits[:, at : at + width * words.depth] = cut.reshape(steps, -1)
                at += width * words.depth
            out.append(np.packbits(bits, axis=1, bitorder="little"))
            ids.append(np.full(steps, p, np.uint8))
    return np.stack(out), np.stack(ids)


def unpack(packed: tuple[Array, Array], words: Words, terms: int) -> Array:
    """The codes s8 [O, terms] of words; the pattern of each is read from its id."""
    data, ids = packed
    out = np.zeros((sum(map(len, words.order)), terms), np.int8)
    start = 0
    for g, used in enumerate(words.patterns):
        read = tuple(int(i) for i in ids[start : start + len(used), 0])
        group = Words(
            words.size, words.id_bits, words.depth, words.instructions, words.lanes, (words.order[g],), (read,)
        )  # fmt: skip
        for k, word in enumerate(group.places(0)):
            bits = np.unpackbits(data[start + k], axis=1, bitorder="little")
            at = 0
            for n, output in word:
                width = int(words.instructions[n].parsed.w.bits)
                if output is not None:
                    out[output] = _codes(bits[:, at : at + width * words.depth], width)[:terms]
                at += width * words.depth
        start += len(used)
    return out


def _codes(bits: Array, width: int) -> Array:
    """Two's complement codes from bits [steps, depth * width]; one bit means -1 or 1."""
    values: Array = (bits.reshape(-1, width).astype(np.int64) << np.arange(width)).sum(1)
    if width == 1:
        values = 2 * values - 1
    else:
        values[values >= 1 << (width - 1)] -= 1 << width
    return values


def area_of(device: Device, active: Sequence[str]) -> float:
    """The area proxy of a set of patterns: bits of x times bits of the word, for the multipliers; the bits of one sum
    for every lane of the pattern that has most; for every lane and each further place in the word that a pattern gives
    it, the bits it switches. The factors are the device's ``[options.words.area]``."""
    words = device.words
    assert words is not None
    patterns = [lanes_of(p, device) for a in active for p in words.pattern if p.name == a]
    one = patterns[0][0][0]
    acc = one.parsed.acc
    places: dict[int, set[tuple[int, int]]] = {}
    for lanes in patterns:
        at = lane = 0
        for i, count in lanes:
            width = int(i.parsed.w.bits * i.depth)
            for _ in range(count):
                places.setdefault(lane, set()).add((at, width))
                at, lane = at + width, lane + 1
    switched = sum(width for found in places.values() if len(found) > 1 for _, width in found)
    sums = len(places) * (acc.bits if acc else 0)
    factors = words.area
    return (
        factors.multiplier * words.size * one.parsed.x.bits
        + factors.accumulator * sums
        + factors.multiplexer * switched
    )


def told(words: Words, device: Device) -> str:
    """Outputs by instruction, and words by pattern, in a few words."""
    assert device.words is not None
    names = [p.name for p in device.words.chosen]
    counts: Mapping[str, int] = {n: sum(g.count(k) for g in words.patterns) for k, n in enumerate(names)}
    runs = ", ".join(f"{len(rows)} outputs by {i.name}" for i, rows in words.runs())
    return f"{runs}, in {', '.join(f'{n} words {k}' for k, n in counts.items() if n)}"
