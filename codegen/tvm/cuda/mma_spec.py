"""What a tensor-core product is (:class:`Product`) and how a kernel cuts it (:class:`Tile`); the default cut."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from bitwright.codegen.tuning.space import Knob, Point, Rule, Setting
from bitwright.codegen.tvm.cuda.operands import Matrix, Window
from bitwright.codegen.tvm.cuda.store import Fragments

Element = Literal["f16", "bf16", "s8", "s8u8", "u8s8", "u8", "f32", "e4m3"]


@dataclass(frozen=True, slots=True)
class Product:
    """y[row, out] = sum over k of x[row, k] * w[out, k], ``batch`` times. The left operand of ``mma`` is w.

    ``element``: formats of w and x. ``source``: where x lies. ``left``: w is packed into fragments (``packed``), or in
    memory as [out, k] (``rows``) or [k, out] (``columns``, 16-bit types only), described by ``right``.
    ``sparse``: w is 2:4 along k and packed. ``fill``: the byte that x has where an image is padded.
    """

    element: Element
    outs: int
    source: Matrix | Window
    batch: int = 1
    left: Literal["packed", "rows", "columns"] = "packed"
    right: Matrix | None = None
    sparse: bool = False
    fill: int = 0

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return {"f32": 4, "f16": 2, "bf16": 2}.get(self.element, 1)

    @property
    def rows(self) -> int:
        """Rows of x of one batch."""
        return self.source.rows

    @property
    def bytes_of_k(self) -> int:
        """Length of a row of x."""
        return self.source.length * self.size

    @property
    def is_integer(self) -> bool:
        """Whether sums are exact s32."""
        return self.size == 1 and self.element != "e4m3"


@dataclass(frozen=True, slots=True)
class Tile:
    """A block makes ``outs`` x ``rows`` sums with ``warps`` (along outputs, rows); ``depth`` bytes of x's k a stage.

    ``split``: so many blocks share the sums of one tile. ``raster``: tiles of rows that run before the next of outputs.
    """

    outs: int
    rows: int
    warps: tuple[int, int]
    depth: int = 64
    stages: int = 3
    split: int = 1
    raster: int = 4

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps[0] * self.warps[1]

    @property
    def fragments(self) -> Fragments:
        """A warp's sums."""
        return Fragments(self.outs // self.warps[0] // 16, self.rows // self.warps[1] // 8, self.warps)

    def step(self, p: Product) -> int:
        """Bytes of x's k of one instruction."""
        return 64 if p.sparse else 32

    def turns(self, p: Product) -> int:
        """Stages of the whole sum."""
        return max(-(-p.bytes_of_k // self.depth), 1)

    def left_bytes(self, p: Product) -> int:
        """Of w's values in a stage."""
        return self.outs * self.depth // (2 if p.sparse else 1)

    def meta_bytes(self, p: Product) -> int:
        """Of metadata in a stage: 512 for 64 outputs and 64 elements."""
        return self.outs // 64 * (self.depth // p.size // 64) * 512 if p.sparse else 0

    def stage_bytes(self, p: Product) -> int:
        """Shared memory of a stage."""
        return self.left_bytes(p) + self.meta_bytes(p) + self.rows * self.depth

    def shared_bytes(self, p: Product) -> int:
        """Shared memory of a block, and the place through which sums go."""
        f, stages = self.fragments, self.stages * self.stage_bytes(p)
        return max(stages, f.nbytes(f.passes(stages))) + 16

    def resident(self, p: Product, shared: int) -> int:
        """Blocks on a multiprocessor at once, 1 or 2, as shared memory and the registers of such tiles allow."""
        return 2 if 2 * self.shared_bytes(p) <= shared - 2048 and self.threads <= 128 else 1

    def grid(self, p: Product) -> tuple[int, int, int]:
        """Tiles, parts of a sum, batches."""
        return math.ceil(p.outs / self.outs) * math.ceil(p.rows / self.rows), self.split, p.batch

    def packed_bytes(self, p: Product) -> int:
        """Of packed weights without metadata, in whole tiles."""
        if p.left != "packed":
            return 0
        return p.batch * math.ceil(p.outs / self.outs) * self.turns(p) * self.left_bytes(p)

    def work_words(self, p: Product) -> int:
        """Sums of parts that meet in memory."""
        return math.prod(self.grid(p)) * self.outs * self.rows if self.split > 1 else 0

    def fault(self, p: Product, shared: int) -> str:
        """Why no kernel is cut so; the empty string if one is. ``shared``: bytes a block may have."""
        f = self.fragments
        if f.m < 1 or f.n < 1 or (f.n > 1 and f.n % 2) or f.outs != self.outs or f.n * 8 * self.warps[1] != self.rows:
            return "warps do not fit the tile"
        if self.threads > 512 or 4 * f.m * f.n > 128:
            return "a warp has more sums than registers"
        if self.depth % (2 * self.step(p)) or (p.sparse and f.m != 4):
            return "a stage has an even number of steps; a warp of a sparse product has 64 outputs"
        if self.shared_bytes(p) > shared:
            return f"{self.shared_bytes(p)} bytes of shared memory"
        if self.split > self.turns(p) or (self.split - 1) * math.ceil(self.turns(p) / self.split) >= self.turns(p):
            return "parts of the sum are empty"
        return ""


_CUTS: tuple[tuple[int, int, tuple[int, int]], ...] = (
    (128, 128, (2, 2)), (256, 128, (4, 2)), (128, 64, (2, 2)), (64, 128, (1, 4)), (256, 64, (4, 1)), (64, 64, (1, 4)),
    (256, 32, (4, 1)), (64, 32, (1, 4)), (256, 16, (4, 1)), (128, 16, (2, 1)), (256, 8, (4, 1)), (64, 8, (1, 1)),
    (32, 128, (1, 4)), (16, 128, (1, 4)),
)  # fmt: skip
"""Outputs, rows and warps that the default is chosen from; of equals the first."""
_PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
_START, _FETCH, _SHARED = 1500, 40, 128
"""Cycles until a block's first product and behind its last; bytes a cycle that a multiprocessor gets from the second
cache, and from shared memory (NVIDIA, "A100 tensor core GPU architecture", 2020: 5120 bytes a cycle of the device)."""


def cycles(t: Tile, p: Product, shared: int) -> tuple[float, str]:
    """About how long a block computes, alone on its multiprocessor, and what bounds it.

    A product of 16 by 8 takes a quarter of a multiprocessor eight cycles (A100: 1024 fused multiply-adds of f16 a
    cycle); fragments are read and stages written through shared memory; stages come from the second cache. Begin and
    end hide behind the other block where two fit.
    """
    f, warps = t.fragments, t.warps[0] * t.warps[1]
    products = f.m * f.n * warps * (t.depth // t.step(p)) * 2
    read = t.left_bytes(p) * t.warps[1] + t.meta_bytes(p) * t.warps[1] + t.rows * t.depth * t.warps[0]
    bounds = {
        "tensor cores": float(products),
        "shared memory": (read + t.stage_bytes(p)) / _SHARED,
        "copies": t.stage_bytes(p) / _FETCH,
    }
    worst = max(bounds, key=lambda k: bounds[k])
    sums = t.outs * t.rows * 4
    ends = _START + 2 * sums / _SHARED + (_START + 2 * sums / _FETCH * (1 + 1 / t.split) if t.split > 1 else 0)
    return math.ceil(t.turns(p) / t.split) * bounds[worst] + ends / t.resident(p, shared), worst


def duration(t: Tile, p: Product, processors: int, shared: int) -> float:
    """Cycles until the last block is done."""
    return math.ceil(math.prod(t.grid(p)) / processors) * cycles(t, p, shared)[0]


def default(p: Product, processors: int, shared: int) -> tuple[Tile, str]:
    """The tile of a product for a device of so many multiprocessors that is done first, and why."""
    best: tuple[float, Tile] | None = None
    for outs, rows, warps in _CUTS:
        for parts in _PARTS:
            t = Tile(outs, rows, warps, depth=128 if p.sparse else 64, split=parts)
            if t.fault(p, shared) or parts > 1 >= 2 * processors // math.prod(replace(t, split=1).grid(p)):
                continue
            time = duration(t, p, processors, shared)
            if best is None or time < best[0]:
                best = time, t
    assert best is not None
    made = _stages(best[1], p, shared)
    blocks, bound = math.prod(made.grid(p)), cycles(best[1], p, shared)[1]
    why = f"tiles of {made.outs} outputs by {made.rows} rows, {blocks} blocks bound by {bound}"
    if made.split > 1:
        why += f", sums in {made.split} parts to occupy {processors} multiprocessors"
    return made, f"{why}; {made.stages} stages of {made.depth} bytes"


def _stages(t: Tile, p: Product, shared: int) -> Tile:
    """Four stages where two blocks of them fit a multiprocessor, no more than there are, two at least."""
    wide = replace(t, stages=4)
    t = wide if 2 * wide.shared_bytes(p) <= shared - 2048 and not wide.fault(p, shared) else t
    while t.stages > 2 and t.stages > t.turns(p) + 1:
        t = replace(t, stages=t.stages - 1)
    return t


def knobs() -> tuple[Knob, ...]:
    """What the tuner may choose."""
    return (
        Knob("outs", (64, 128, 256)), Knob("rows", (8, 16, 32, 64, 128, 256)), Knob("warps_outs", (1, 2, 4)),
        Knob("warps_rows", (1, 2, 4)), Knob("depth", (64, 128)), Knob("stages", (2, 3, 4, 5)),
        Knob("split", (1, 2, 3, 4, 6, 8, 16)), Knob("raster", (1, 4, 8)), Knob("kernel", ("dense", "2:4")),
    )  # fmt: skip


def point_of(t: Tile, p: Product) -> dict[str, Setting]:
    """The point of the space that is a tile."""
    return {
        "outs": t.outs, "rows": t.rows, "warps_outs": t.warps[0], "warps_rows": t.warps[1], "depth": t.depth,
        "stages": t.stages, "split": t.split, "raster": t.raster, "kernel": "2:4" if p.sparse else "dense",
    }  # fmt: skip


def tile_of(point: Point) -> Tile:
    """The tile of a point."""
    n = {k: int(v) for k, v in point.items() if k != "kernel"}
    return Tile(
        n["outs"], n["rows"], (n["warps_outs"], n["warps_rows"]), n["depth"], n["stages"], n["split"], n["raster"]
    )


def rules(p: Product, shared: int) -> tuple[Rule, ...]:
    """What points must obey."""

    def fits(point: Point) -> bool:
        return not tile_of(point).fault(replace(p, sparse=point["kernel"] == "2:4"), shared)

    return (Rule("the tile fits no block, or leaves a part of the sum empty", fits),)
