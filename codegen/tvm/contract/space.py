"""The knobs of a contraction kernel that the tuner may set, and which of their combinations make sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil

from bitwright.codegen.tuning.space import Knob, Point, Rule, Setting
from bitwright.codegen.tvm.contract.choose import is_depthwise
from bitwright.codegen.tvm.contract.spec import LANES, NEON, ContractSpec, Conv, Isa, Knobs, Matrix

_REGISTERS: dict[Isa, int] = {
    "avx512-vnni": 32, "avx-vnni": 16, "avx2": 16, "portable": 8, "neon-i8mm": 32, "neon-dot": 32, "vector": 8,
}  # fmt: skip
_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28)
_VECTORS = (1, 2, 3, 4, 5, 6)
_BLOCKS = (1, 2, 4, 8, 16, 32, 64)
_HEIGHTS = (1, 2, 3, 4)
_SHARED = 8
"""Tasks a tuned kernel keeps for the threads that may call it, if the untuned one has them."""


def knobs_of(spec: ContractSpec, isa: Isa) -> tuple[Knob, ...]:
    """The tile (``rows`` x ``vectors``), ``blocks`` of rows that are tasks, ``prefetch`` and ``compact``."""
    if is_depthwise(spec):
        return Knob("rows", _ROWS[:10]), Knob("vectors", _HEIGHTS)
    constant = spec.right == "constant"
    knobs = [Knob("rows", _ROWS), Knob("vectors", _VECTORS), Knob("blocks", _BLOCKS)]
    knobs += [Knob("prefetch", (False, True))] if constant else []
    packs = constant and spec.element == "u8s8" and isa in ("avx2", "avx-vnni", *NEON)
    return (*knobs, Knob("compact", (False, True))) if packs else tuple(knobs)


def point_of(spec: ContractSpec, knobs: Knobs) -> dict[str, Setting]:
    """The point at which a kernel is: its knobs among those of :func:`knobs_of`."""
    given = {
        "rows": knobs.rows, "vectors": knobs.vectors, "blocks": knobs.row_blocks, "prefetch": knobs.prefetch,
        "compact": knobs.compact,
    }  # fmt: skip
    return {k.name: given[k.name] for k in knobs_of(spec, knobs.isa)}


def rules_of(spec: ContractSpec, default: Knobs) -> tuple[Rule, ...]:
    """Tiles that fit the registers and the result, and tasks enough for threads."""
    registers, lanes = _REGISTERS[default.isa], LANES[default.isa]
    if is_depthwise(spec) and isinstance(spec.geometry, Conv):
        height, width = spec.geometry.output
        return (
            Rule(
                "the tile is larger than the image", lambda p: int(p["vectors"]) <= height and int(p["rows"]) <= width
            ),
            Rule("its sums do not fit the registers", lambda p: int(p["rows"]) * int(p["vectors"]) < registers),
        )
    rows = spec.geometry.rows if isinstance(spec.geometry, Matrix) else spec.rows
    needed = ceil(spec.cols // spec.groups / lanes)
    copies = spec.groups * (spec.geometry.batch if isinstance(spec.geometry, Matrix) else 1)

    def tasks(tile: int, vectors: int, blocks: int) -> int:
        return copies * ceil(needed / vectors) * min(blocks, ceil(rows / tile))

    wanted = min(_SHARED, tasks(default.rows, default.vectors, default.row_blocks))

    def shared(p: Point) -> bool:
        return tasks(int(p["rows"]), int(p["vectors"]), int(p["blocks"])) >= wanted

    def used(p: Point) -> int:
        return (int(p["rows"]) + 1) * int(p["vectors"]) + 1

    return (
        Rule("the tile is larger than the result", lambda p: int(p["rows"]) <= rows and int(p["vectors"]) <= needed),
        Rule("the tile does not fit the registers", lambda p: used(p) <= registers),
        Rule("there are not so many blocks of rows", lambda p: int(p["blocks"]) <= ceil(rows / int(p["rows"]))),
        Rule("too few tasks for threads", shared),
    )


def moved(default: Knobs, point: Mapping[str, Setting]) -> Knobs:
    """``default`` with the knobs that the point sets; what is proven about sums holds for its own packing only, so
    kernels with 16-bit sums keep theirs."""
    compact = default.compact if default.spill else bool(point.get("compact", default.compact))
    return replace(
        default,
        rows=int(point.get("rows", default.rows)),
        vectors=int(point.get("vectors", default.vectors)),
        row_blocks=int(point.get("blocks", default.row_blocks)),
        prefetch=bool(point.get("prefetch", default.prefetch)) and not default.panel,
        compact=compact,
    )
