"""Kernels for N:M patterns that blocks of outputs share: compact the activations of some rows, then a dense product.

A task is one block of outputs by a block of rows. Tiles are taken in *chunks*: the rows of a chunk are compacted into
scratch, then every panel of the block passes over them. Where one panel is the whole block a chunk is one tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from bitwright.codegen.instructions import arm, x86
from bitwright.codegen.tvm.contract.address import emit_image, image_bytes, row_bases
from bitwright.codegen.tvm.contract.compact import (
    Array,
    Compaction,
    compacted,
    compaction,
    dense_spec,
    spread_out,
)
from bitwright.codegen.tvm.contract.emit import Contraction, contraction
from bitwright.codegen.tvm.contract.epilogue import Epilogue
from bitwright.codegen.tvm.contract.lowbit import scaled
from bitwright.codegen.tvm.contract.nest import Nest, nest_of
from bitwright.codegen.tvm.contract.packing import pack_weights, packed_sizes, unpack_weights
from bitwright.codegen.tvm.contract.spec import NEON, ContractSpec, Isa, KernelFunc, Knobs, Matrix, runs_of
from bitwright.codegen.tvm.contract.tile import LINE, Fetch, Place, Streams, TileWriter
from bitwright.codegen.tvm.spelling import call
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec, minimum, width
from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import S32, U8

CHUNK_BYTES = 8 * 1024
"""Compacted activations that stay in the first-level cache beside a panel of weights."""
_SET_STRIDE = 1024
"""Rows so many bytes apart fall into few sets of the first-level cache."""


@dataclass(frozen=True)
class Shared:
    """A spec with everything that packing and emitting share; ``dense`` is the product of one convolution group."""

    spec: ContractSpec
    knobs: Knobs
    compaction: Compaction
    dense: Contraction

    @property
    def cols(self) -> int:
        return self.spec.cols // self.spec.groups

    @property
    def units(self) -> int:
        """Blocks of outputs of one group."""
        return self.compaction.units(self.cols)

    @property
    def panel_cols(self) -> int:
        return self.dense.layout.vectors * self.dense.layout.lanes

    @property
    def panels_per_unit(self) -> int:
        return max(1, self.compaction.outputs // self.panel_cols)

    @property
    def pitch(self) -> int:
        """Elements from one compacted row to the next."""
        size = width(self.spec.input_dtype)
        nbytes = ceil(self.compaction.depth * size / LINE) * LINE
        return (nbytes + (LINE if nbytes % _SET_STRIDE == 0 else 0)) // size

    def chunk(self, tile: int) -> int:
        """Tiles that are compacted together."""
        if self.panels_per_unit == 1:
            return 1
        return max(1, CHUNK_BYTES // (tile * self.pitch * width(self.spec.input_dtype)))


def shared_of(spec: ContractSpec, knobs: Knobs) -> Shared:
    """Resolve the compaction and the dense product behind it; raises where a spec has none."""
    made = compaction(spec, knobs.isa)
    dense = contraction(dense_spec(spec, made, spec.cols // spec.groups), replace(knobs, prefetch=False))
    found = Shared(spec, knobs, made, dense)
    if made.outputs % found.panel_cols:
        raise InvalidInput(f"panels of {found.panel_cols} outputs do not divide blocks of {made.outputs}")
    return found


def pack_shared(spec: ContractSpec, knobs: Knobs, weight: Array, mask: Array | None) -> list[Array]:
    """Packed weights, group after group, and the index stream."""
    made = shared_of(spec, knobs)
    values, index = compacted(spec, made.compaction, weight, mask)
    dense, parts = made.dense, values.reshape(spec.groups, made.cols, -1)
    packed = [pack_weights(dense.spec, dense.stored, dense.layout, part, None)[0] for part in parts]
    return [np.concatenate(packed), index.reshape(-1)]


def unpack_shared(spec: ContractSpec, knobs: Knobs, arrays: list[Array]) -> tuple[Array, Array]:
    """The logical weights that the packed constants hold, and the mask of the non-zero ones."""
    made = shared_of(spec, knobs)
    dense = made.dense
    if arrays[0].size % spec.groups:
        raise InvalidInput(f"packed weights have {arrays[0].size} elements, not a multiple of {spec.groups} groups")
    parts = [unpack_weights(dense.spec, dense.stored, dense.layout, [p])[0] for p in np.split(arrays[0], spec.groups)]
    return spread_out(spec, made.compaction, np.concatenate(parts), arrays[1])


def emit_shared(spec: ContractSpec, knobs: Knobs, epilogue: Epilogue, name: str) -> KernelFunc:
    """``void name(begin, end, x, weights, indices, [init], epilogue operands..., outputs..., scratch)``."""
    made = shared_of(spec, knobs)
    b, nest, form = Builder(name), nest_of(spec.rows, knobs), made.compaction
    stored = packed_sizes(made.dense.spec, made.dense.stored, made.dense.layout)[0]
    x = b.param("x", spec.input_dtype, spec.input_elements)
    weights = b.param("weights", U8 if knobs.bits < 8 else spec.weight_dtype, spec.groups * stored)
    indices = b.param("indices", U8, spec.groups * made.units * form.depth)
    init = b.param("init", spec.acc_dtype, spec.cols) if spec.init else None
    pointers = {p.name: b.param(p.name, p.dtype, p.elements) for p in epilogue.params}
    image, rows = image_bytes(spec), nest.tile * made.chunk(nest.tile)
    scratch = image + rows * made.pitch * width(spec.input_dtype) + LINE
    memory = b.scratch(scratch)
    x = emit_image(b, spec, nest, memory, x)
    compact = b.view(memory, spec.input_dtype, image)
    dense = made.dense
    writer = TileWriter(
        b, dense.engine, dense.plan, runs_of(dense.spec), Streams(compact, weights, None, init), epilogue, pointers,
        knobs.spill, scaled(knobs),
    )  # fmt: skip
    emitter = _Emitter(made, writer, nest, x, indices, stored)
    with b.loop(b.end, b.begin, name="task") as task:
        emitter.task(task)
    return KernelFunc(b.finish(), name, spec.groups * made.units * nest.blocks, scratch, b.param_names)


@dataclass(frozen=True)
class _Emitter:
    made: Shared
    writer: TileWriter
    nest: Nest
    x: Pointer
    indices: Pointer
    stored: int
    """Packed weights of one group."""

    def task(self, task: Index) -> None:
        """All tiles of one block of outputs and one block of rows."""
        b, nest, made = self.writer.b, self.nest, self.made
        block = b.index(task % nest.blocks) if nest.blocks > 1 else 0
        outer = b.index(task // nest.blocks) if nest.blocks > 1 else task
        group = b.index(outer // made.units) if made.spec.groups > 1 else 0
        unit = b.index(outer % made.units) if made.units > 1 else 0
        first, size = block * nest.per_block, made.chunk(nest.tile)
        last = b.index(minimum(first + nest.per_block, nest.tiles))
        with b.loop((last - first + (size - 1)) // size, name="chunk") as c:
            begin = b.index(first + c * size)
            count = b.index(minimum(size, last - begin)) if size > 1 else 1
            self._chunk(group, unit, begin, count, nest.tile)
        if nest.rest:
            with b.when(block == nest.blocks - 1):
                self._chunk(group, unit, nest.tiles, 1, nest.rest)

    def _chunk(self, group: Index, unit: Index, first: Index, count: Index, rows: int) -> None:
        """Compact ``count`` tiles from tile ``first`` on, then every panel of the block over them."""
        b, made, tile = self.writer.b, self.made, self.nest.tile
        with b.loop(count, name="compact") as t:
            row = b.index((first + t) * tile)
            bases = row_bases(b, made.spec, tile, group, row, rows)
            self._compact(group, unit, bases, [b.index((t * tile + i) * made.pitch) for i in range(rows)])

        def tiles(panel: Index, vectors: int, cols: int) -> None:
            with b.loop(count, name="tile") as t:
                self._tile(group, panel, b.index((first + t) * tile), t, rows, vectors, cols)

        whole, each = made.cols // made.panel_cols, made.panels_per_unit
        begin = b.index(unit * each)
        with b.loop(minimum(begin + each, whole), begin, name="panel") as panel:
            tiles(b.index(panel), made.dense.layout.vectors, made.panel_cols)
        if whole < len(made.dense.panels):
            with b.when(unit == made.units - 1):
                start, vectors = made.dense.panels[-1]
                tiles(whole, vectors, made.cols - start)

    def _tile(self, group: Index, panel: Index, row: Index, at: Index, rows: int, vectors: int, cols: int) -> None:
        b, made, dense = self.writer.b, self.made, self.made.dense
        by_vector = dense.stored.all_weight_vectors * dense.layout.lanes * dense.engine.quad
        self.writer.tile(
            Place(
                row=row,
                col=b.index(group * made.cols + panel * made.panel_cols),
                x=[b.index((at * self.nest.tile + i) * made.pitch) for i in range(rows)],
                weights=b.index(group * self.stored + panel * (by_vector * dense.layout.vectors)),
                indices=0,
                vectors=vectors,
                cols=cols,
                fetch=self._later(row),
            )
        )

    def _later(self, row: Index) -> tuple[Fetch, ...]:
        """The activations of the next tile: its compaction would wait for the second-level cache."""
        g, plan = self.made.spec.geometry, self.made.dense.plan
        if not isinstance(g, Matrix) or not self.made.knobs.prefetch:
            return ()
        elements = ceil(self.nest.tile * g.depth / (plan.full + (plan.tail is not None)))
        return (Fetch(self.x, self.writer.b.index((row + self.nest.tile) * g.depth), elements),)

    def _compact(self, group: Index, unit: Index, bases: list[Index], out: list[Index]) -> None:
        """Every run of some rows, one behind the other in scratch."""
        b, form = self.writer.b, self.made.compaction
        at = b.index((group * self.made.units + unit) * form.depth)

        def runs(loops: tuple[tuple[int, int], ...], bases: list[Index], done: Index) -> None:
            if not loops:
                self._run(bases, b.index(at + done), [i + done for i in out])
                return
            (count, distance), inner = loops[0], int(np.prod([n for n, _ in loops[1:]], dtype=int))
            with b.loop(count, name="tap") as t:
                runs(loops[1:], [b.index(i + t * distance) for i in bases], b.index(done + t * (inner * form.picked)))

        runs(runs_of(self.made.spec).loops, bases, 0)

    def _run(self, bases: list[Index], at: Index, out: list[Index]) -> None:
        b, form = self.writer.b, self.made.compaction
        full, rest = divmod(form.groups, form.per_window)
        span, size = form.per_window * form.group, form.per_window * form.keep

        def window(w: Index, groups: int) -> None:
            here = [i + w * span for i in bases]
            self._window(here, at + w * size, [i + w * size for i in out], groups * form.keep)

        with b.loop(full, name="window") as w:
            window(w, form.per_window)
        if rest:
            window(full, rest)

    def _window(self, bases: list[Index], at: Index, out: list[Index], picked: int) -> None:
        b, isa, spec = self.writer.b, self.made.knobs.isa, self.made.spec
        compact = self.writer.streams.x
        if self.made.compaction.gathered:
            for n in range(picked):
                where = b.index(b.load(self.indices, at + n).cast(S32).expr)
                for base, to in zip(bases, out, strict=True):
                    b.store(compact, to + n, b.load(self.x, base + where))
            return
        lanes, select = _selection(spec, isa)
        index = b.let(b.load(self.indices, at, lanes) if spec.element == "u8s8" else self._wide_index(at, lanes))
        for base, to in zip(bases, out, strict=True):
            b.store(compact, to, select(b.load(self.x, base, lanes), index), picked)

    def _wide_index(self, at: Index, lanes: int) -> Vec:
        return self.writer.b.load(self.indices, at, lanes).cast(S32)


def _selection(spec: ContractSpec, isa: Isa) -> tuple[int, Callable[[Vec, Vec], Vec]]:
    """Lanes of a selection, and how it is spelled."""
    wide = isa == "avx512-vnni"
    if spec.element == "f32":
        permute = x86.VPERMPS_512 if wide else x86.VPERMPS_256
        return (16 if wide else 8), lambda table, index: call(permute, table, index)
    shuffle = x86.VPERMB_512 if wide else arm.TBL if isa in NEON else x86.VPSHUFB_128
    return (64 if wide else 16), lambda table, index: call(shuffle, table, index).bits(U8)
