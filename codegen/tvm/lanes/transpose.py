"""Square transposition of vectors of 32-bit lanes, and of a block of rows into lanes."""

from __future__ import annotations

from collections.abc import Sequence

from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec, shuffle


def transposed(b: Builder, rows: Sequence[Vec]) -> list[Vec]:
    """``lanes`` vectors of as many 32-bit lanes: element j of result i is element i of operand j.

    Unpacks of 32 and 64 bits inside 128-bit parts, then a transposition of the parts: log2(lanes) instructions each.
    """
    lanes = rows[0].lanes
    unpacked = [_zip(b, rows[i], rows[i + 1], half, 1) for i in range(0, lanes, 2) for half in (0, 1)]
    quads = [
        _zip(b, unpacked[i + h], unpacked[i + h + 2], part, 2)
        for i in range(0, lanes, 4)
        for h in (0, 1)
        for part in (0, 1)
    ]
    columns = [[quads[4 * i + c] for i in range(lanes // 4)] for c in range(4)]
    parts = [_parts(b, column) for column in columns]
    return [parts[i % 4][i // 4] for i in range(lanes)]


def _zip(b: Builder, x: Vec, y: Vec, half: int, size: int) -> Vec:
    """Pieces of ``size`` lanes of ``x`` and ``y`` in turn, of the low or the high half of every 128 bits."""
    order = []
    for start in range(0, x.lanes, 4):
        for piece in range(2 // size):
            at = start + 2 * half + piece * size
            order += [at + i for i in range(size)] + [x.lanes + at + i for i in range(size)]
    return b.let(shuffle([x, y], order))


def _parts(b: Builder, v: list[Vec]) -> list[Vec]:
    """A square (of 2 or 4) of 128-bit parts transposed: result i holds part i of every vector."""
    if len(v) == 2:
        return [_pick(b, v[0], v[1], (i,)) for i in (0, 1)]
    even = [_pick(b, v[i], v[i + 1], (0, 2)) for i in (0, 2)]
    odd = [_pick(b, v[i], v[i + 1], (1, 3)) for i in (0, 2)]
    return [_pick(b, low, high, pick) for pick in ((0, 2), (1, 3)) for low, high in (even, odd)]


def _pick(b: Builder, x: Vec, y: Vec, parts: Sequence[int]) -> Vec:
    """The 128-bit ``parts`` of ``x``, then those of ``y``."""
    order = [base + 4 * p + i for base in (0, x.lanes) for p in parts for i in range(4)]
    return b.let(shuffle([x, y], order))


def rows_to_lanes(
    b: Builder,
    x: Pointer,
    table: Pointer,
    shift: Index,
    units: int,
    vectors: int,
    out: Pointer,
    to: Index,
    pitch: int,
    lanes: int,
) -> None:
    """Units ``shift`` .. ``shift + units`` (in words of ``x``, an S32 view) of the rows in ``table`` into lanes.

    ``table``: s32, the first word of every row. Unit u of vector r goes to word ``to + u * pitch + r * lanes`` of
    ``out``. Loads may pass the end of a row by less than a vector.
    """
    with b.loop(vectors, name="vector") as r:
        bases = [b.index(b.load(table, r * lanes + i).expr + shift) for i in range(lanes)]
        place = b.index(to + r * lanes)
        whole = units // lanes
        with b.loop(whole, name="chunk") as chunk:
            lane_tile(b, x, bases, b.index(chunk * lanes), lanes, out, place, pitch)
        if units % lanes:
            lane_tile(b, x, bases, whole * lanes, units % lanes, out, place, pitch)


def lane_tile(
    b: Builder, x: Pointer, bases: Sequence[Index], first: Index, count: int, out: Pointer, to: Index, pitch: int
) -> None:
    """Words ``first`` .. ``first + count`` behind every base in ``x`` into lanes: word u of all rows goes to word
    ``to + u * pitch`` of ``out``."""
    columns = transposed(b, [b.let(b.load(x, base + first, len(bases))) for base in bases])
    for i, column in enumerate(columns[:count]):
        b.store(out, to + (first + i) * pitch, column)
