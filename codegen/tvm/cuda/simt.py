"""Linear layers, matrix products and convolutions of f32 without tensor cores (their tf32 would round to 10 bits).

The stages and splits of ``mma_emit``; a thread has 8 outputs by 8 or 2 rows of sums. w lies k first ([k, outputs], as
a run-time operand may, or packed so), or by rows of k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from bitwright.codegen.tuning.space import Knob, Point, Rule, Setting, Space
from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.mma import PROCESSORS, Mma, MmaConfig, contraction, made, others
from bitwright.codegen.tvm.cuda.mma_emit import Kernel, Pointers, Put
from bitwright.codegen.tvm.cuda.mma_spec import Product, Tile
from bitwright.codegen.tvm.cuda.operands import CHUNK, Loader, Matrix, swizzled
from bitwright.codegen.tvm.cuda.products import product_of, rows_of
from bitwright.codegen.tvm.cuda.store import Fragments
from bitwright.codegen.tvm.generic_eval import div, mod
from bitwright.codegen.tvm.template import Arg, Config, Refused
from bitwright.codegen.tvm.tir import Index, Vec
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.types import F32
from bitwright.ir.weights import Array

OUTS, DEPTH = 64, 64
"""Outputs of a warp; bytes of k of a stage."""


@dataclass(frozen=True, slots=True)
class SimtTile(Tile):
    """Warps of 64 outputs by 4 ``each`` rows."""

    depth: int = DEPTH

    @property
    def each(self) -> int:
        """Rows of a thread."""
        return self.rows // self.warps[1] // 4

    @property
    def fragments(self) -> Fragments:
        """Two words of four outputs for each row."""
        return Fragments(2, self.each, self.warps)

    def left_bytes(self, p: Product) -> int:
        return self.outs * self.depth

    def shared_bytes(self, p: Product) -> int:
        return self.stages * self.stage_bytes(p) + 16

    def fault(self, p: Product, shared: int) -> str:
        if self.outs != OUTS * self.warps[0] or self.rows != 4 * self.each * self.warps[1] or self.each not in (2, 8):
            return "warps do not fit the tile"
        if self.threads > 512 or self.shared_bytes(p) > shared:
            return f"{self.threads} threads and {self.shared_bytes(p)} bytes of shared memory"
        turns = self.turns(p)
        if self.split > turns or (self.split - 1) * math.ceil(turns / self.split) >= turns:
            return "parts of the sum are empty"
        return ""


@dataclass(eq=False)
class SimtKernel(Kernel):
    """The kernel of a :class:`SimtTile`."""

    def emit(self, put: Put) -> None:
        b, p, t = self.b, self.p, self.t
        assert isinstance(t, SimtTile)
        self._open()
        rows = p.left == "rows"
        deep, wide = t.turns(p) * DEPTH // 4, _wide(p, t)
        source = p.right or Matrix(deep, wide, wide, deep * wide if p.batch > 1 else 0)
        self._left = Loader(
            b, source, self._shared, t.outs if rows else DEPTH // 4, DEPTH if rows else t.outs * 4, x=self.at.w
        )
        self._left.start(self._out if rows else 0, self._z)
        self._acc = b.local(F32, 8 * t.each, "acc")
        self._zero()
        self._steps = 1
        lane = b.lane
        self._row_lane = b.index(self._warp_row * (4 * t.each) + div(lane, 8))
        self._out_lane = b.index(self._warp_out * OUTS + mod(lane, 8) * (1 if rows else 4))
        self._prologue()
        with b.loop(self._turns(), name="turn") as turn:
            ahead = turn + (t.stages - 1)
            with b.when(ahead < self._count):
                self._copy(ahead, mod(ahead, t.stages))
            b.call("bw_cp_async_commit")
            self._products(b.index(mod(turn, t.stages) * t.stage_bytes(p)))
            b.call(f"bw_cp_async_wait{t.stages - 2}")
            b.sync()
        self._close(put)

    def _copy(self, turn: Index, slot: Index) -> None:
        b, p, t = self.b, self.p, self.t
        at, k = b.index(slot * t.stage_bytes(p)), b.index((self._first + turn) * (DEPTH // 4))
        assert self._left is not None
        if p.left == "rows":
            self._left.copy(at, k)
        else:
            self._left.copy(at, self._out, k)
        self._right.copy(at, k)

    def _products(self, stage: Index) -> None:
        """The outer products of a stage, four elements of k at a time."""
        b, p, t = self.b, self.p, self.t
        assert isinstance(t, SimtTile)
        n, rows = t.each, p.left == "rows"
        x, w = b.local(F32, 4 * n, "x"), b.local(F32, 32 if rows else 8, "w")
        for four in range(DEPTH // 16):
            for i in range(n):
                row = self._row_lane + 4 * i
                at = stage + self._x_at + row * DEPTH + swizzled(four, row, DEPTH) * CHUNK
                b.call("bw_copy16", b.address(x, 4 * i), b.address(self._shared, at))
            if rows:
                for j in range(8):
                    row = self._out_lane + 8 * j
                    at = stage + row * DEPTH + swizzled(four, row, DEPTH) * CHUNK
                    b.call("bw_copy16", b.address(w, 4 * j), b.address(self._shared, at))
            for k in range(4):
                if not rows:
                    for h in range(2):
                        chunk = div(self._out_lane, 4) + 8 * h
                        depth = t.outs * 4
                        at = stage + (4 * four + k) * depth + swizzled(chunk, 4 * four + k, depth) * CHUNK
                        b.call("bw_copy16", b.address(w, 4 * h), b.address(self._shared, at))
                name = f"bw_outer{n}" + ("_rows" if rows else "")
                b.call(name, b.address(self._acc), b.address(w, k if rows else 0), b.address(x, k))

    def _write(self, put: Put) -> None:
        """Sums are neighbours already (k first), or eight outputs apart."""
        t = self.t
        assert isinstance(t, SimtTile)
        if self.p.left == "rows":
            for i in range(t.each):
                for j in range(8):
                    self._one(put, self._row_lane + 4 * i, self._out_lane + 8 * j, [8 * i + j])
            return
        for i in range(t.each):
            for h in range(2):
                self._one(put, self._row_lane + 4 * i, self._out_lane + 32 * h, [8 * i + 4 * h + q for q in range(4)])

    def _one(self, put: Put, row: Index, out: Index, sums: list[int]) -> None:
        b = self.b
        at, column = b.index(self._row + row), b.index(self._out + out)
        with b.when(self._inside(at, column)):
            values: list[Vec] = [b.let(b.load(self._acc, s)) for s in sums]
            put(self._z, at, column, values)


def _wide(p: Product, t: Tile) -> int:
    """Outputs of packed weights: whole tiles."""
    return math.ceil(p.outs / t.outs) * t.outs


class Simt(Mma):
    """Contractions of f32."""

    name: ClassVar[str] = "cuda_simt"

    def at(self, body: Graph, constants: Mapping[str, Array], target: Target, point: Point) -> Config | Refused:
        found = product_of(body, constants, f32=True)
        if isinstance(found, Refused):
            return found
        root, p = found
        tile = _tile_of(point) if point else _default(p, PROCESSORS.get(target.mcpu, 108))
        if fault := tile.fault(p, target.l1_bytes):
            return Refused(f"no kernel of this tile: {fault}")
        position = {v.name: i for i, v in enumerate(body.inputs)}
        packed = p.left == "packed"
        if max(p.batch * tile.turns(p) * DEPTH // 4 * _wide(p, tile), tile.work_words(p)) >= 1 << 31:
            return Refused("more weights, or sums of parts, than 32-bit indices reach")
        args = [Arg("input", position[root.inputs[0]])]
        args += [Arg("packed", 0)] if packed else [Arg("input", position[root.inputs[1]])]
        args += [Arg("input", position[x]) for x in others(body, root, p)]
        args += [Arg("output", i) for i in range(len(body.outputs))]
        why = f"f32 without tensor cores, tiles of {tile.outs} outputs by {tile.rows} rows"
        why += f", sums in {tile.split} parts" if tile.split > 1 else ""
        return made(p, tile, target, args, position[root.inputs[1]] if packed else -1, why)

    def space(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Space:
        config = self.configure(body, constants, target)
        if not isinstance(config, MmaConfig):
            return Space()
        p, t = config.product, config.tile
        default: dict[str, Setting] = {
            "warps_outs": t.warps[0], "warps_rows": t.warps[1], "each": t.rows // t.warps[1] // 4, "stages": t.stages,
            "split": t.split, "raster": t.raster,
        }  # fmt: skip
        knobs = (
            Knob("warps_outs", (1, 2, 4)), Knob("warps_rows", (1, 2, 4)), Knob("each", (2, 8)),
            Knob("stages", (2, 3, 4)), Knob("split", (1, 2, 3, 4, 6, 8, 16)), Knob("raster", (1, 4, 8)),
        )  # fmt: skip
        rule = Rule("the tile fits no block", lambda point: not _tile_of(point).fault(p, target.l1_bytes))
        return Space(default, knobs, (rule,))

    def pack(self, body: Graph, config: Config, constants: Mapping[str, Array]) -> list[Array]:
        """w as [batch, k, outputs], zeros up to whole tiles."""
        assert isinstance(config, MmaConfig)
        if config.weight < 0:
            return []
        p, t = config.product, config.tile
        w = rows_of(contraction(body), constants[body.inputs[config.weight].name], p)
        out = np.zeros((p.batch, t.turns(p) * DEPTH // 4, _wide(p, t)), np.float32)
        out[:, : w.shape[2], : p.outs] = w.transpose(0, 2, 1)
        return [out]

    def verify(self, body: Graph, config: Config, constants: Mapping[str, Array], packed: list[Array]) -> str:
        assert isinstance(config, MmaConfig)
        if config.weight < 0:
            return ""
        w = rows_of(contraction(body), constants[body.inputs[config.weight].name], config.product)
        k, outs = w.shape[2], w.shape[1]
        if not np.array_equal(packed[0][:, :k, :outs].transpose(0, 2, 1), w, equal_nan=True):
            return "the packed weights do not unpack to the weights"
        rest = packed[0].copy()
        rest[:, :k, :outs] = 0
        return "the packed weights have values where there are none" if rest.any() else ""

    def write(self, b: CudaBuilder, config: MmaConfig, at: Pointers, put: Put) -> None:
        SimtKernel(b, config.product, config.tile, at).emit(put)


def _tile_of(point: Point) -> SimtTile:
    n = {k: int(v) for k, v in point.items()}
    warps = (n["warps_outs"], n["warps_rows"])
    return SimtTile(
        OUTS * warps[0], 4 * n["each"] * warps[1], warps, stages=n["stages"], split=n["split"], raster=n["raster"]
    )


def _default(p: Product, processors: int) -> SimtTile:
    """The largest tile that occupies the device; parts of sums where none does."""
    shapes = (
        ((2, 4, 8), (1, 4, 8), (2, 2, 8), (1, 2, 8), (2, 2, 2), (1, 2, 2)) if p.rows > 8 else ((4, 1, 2), (2, 1, 2))
    )
    for outs, rows, each in shapes:
        t = SimtTile(OUTS * outs, 4 * each * rows, (outs, rows))
        blocks = math.prod(t.grid(p))
        if blocks >= processors and p.outs > t.outs // 2 and p.rows > t.rows // 2:
            return t
    turns = t.turns(p)
    if blocks * 2 > processors:
        return t
    wanted = min(processors // blocks, max(turns // 4, 1), 32)
    return replace(t, split=math.ceil(turns / math.ceil(turns / wanted)))
