"""The loop nest around the microkernel: tasks, weight panels, rows; for packed (constant) right operands."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from bitwright.codegen.tvm.contract.address import emit_image, image_bytes, row_bases
from bitwright.codegen.tvm.contract.choose import contraction_plan
from bitwright.codegen.tvm.contract.engine import Engine
from bitwright.codegen.tvm.contract.engines import engine_of
from bitwright.codegen.tvm.contract.epilogue import Epilogue
from bitwright.codegen.tvm.contract.lowbit import scaled, unpack_panel
from bitwright.codegen.tvm.contract.nest import Nest, near_blocks, nest_of
from bitwright.codegen.tvm.contract.packing import Layout, packed_sizes
from bitwright.codegen.tvm.contract.plan import Plan
from bitwright.codegen.tvm.contract.spec import ContractSpec, KernelFunc, Knobs, runs_of
from bitwright.codegen.tvm.contract.tile import LINE, Fetch, Place, Streams, TileWriter
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, width
from bitwright.ir.types import U8


@dataclass(frozen=True)
class Contraction:
    """A spec with everything derived from it that packing and emitting share."""

    spec: ContractSpec
    knobs: Knobs
    engine: Engine
    plan: Plan
    layout: Layout
    stored: Plan
    """The plan of the packed weights: several steps may share a vector that ``plan`` reads as bytes."""

    @property
    def group_cols(self) -> int:
        return self.spec.cols // self.spec.groups

    @property
    def panel_bytes(self) -> int:
        """Of the weights of one panel, a byte each."""
        vector = self.layout.vectors * self.layout.lanes * self.engine.quad
        return runs_of(self.spec).count * self.plan.steps * vector + LINE

    @property
    def panels(self) -> list[tuple[int, int]]:
        """(first column, vectors) of the panels of one group."""
        return self.layout.panels(self.group_cols)


def contraction(spec: ContractSpec, knobs: Knobs) -> Contraction:
    """Resolve engine, plan and layout; raises when the pattern has no plan."""
    engine, plan = engine_of(spec, knobs), contraction_plan(spec, knobs)
    layout = Layout(
        engine.lanes, knobs.vectors, engine.index_dtype, engine.index_quad, knobs.bits, engine.biased or knobs.panel
    )
    return Contraction(spec, knobs, engine, plan, layout, contraction_plan(spec, replace(knobs, panel=False)))


def emit_packed(spec: ContractSpec, knobs: Knobs, epilogue: Epilogue, name: str) -> KernelFunc:
    """The kernel of a contraction with packed weights."""
    made = contraction(spec, knobs)
    b = Builder(name)
    sizes = packed_sizes(spec, made.stored, made.layout)
    x = b.param("x", spec.input_dtype, spec.input_elements)
    weights = b.param("weights", U8 if knobs.bits < 8 else spec.weight_dtype, sizes[0])
    indices = b.param("indices", made.engine.index_dtype, sizes[1]) if made.plan.sparse else None
    init = b.param("init", spec.acc_dtype, spec.cols) if spec.init else None
    pointers = {p.name: b.param(p.name, p.dtype, p.elements) for p in epilogue.params}
    rows_first = near_blocks(spec) and not knobs.panel
    nest = nest_of(spec.rows, knobs, spec.groups * len(made.panels) if rows_first else 0)
    panel = image_bytes(spec)
    scratch = panel + made.panel_bytes if knobs.panel else panel
    memory = b.scratch(scratch) if scratch else None
    x = emit_image(b, spec, nest, memory, x)
    bytes_ = b.view(memory, spec.weight_dtype, panel) if knobs.panel and memory is not None else None
    writer = TileWriter(
        b,
        made.engine,
        made.plan,
        runs_of(spec),
        Streams(x, weights if bytes_ is None else bytes_, indices, init),
        epilogue,
        pointers,
        knobs.spill,
        scaled(knobs),
    )
    emitter = _Emitter(made, writer, nest, weights)
    tasks = spec.groups * len(made.panels) * nest.blocks
    with b.loop(b.end, b.begin, name="task") as task:
        emitter.task(task)
    return KernelFunc(b.finish(), name, tasks, scratch, b.param_names)


@dataclass(frozen=True)
class _Emitter:
    made: Contraction
    writer: TileWriter
    nest: Nest
    packed: Pointer

    def task(self, task: Index) -> None:
        """All tiles of one panel and one block of rows."""
        b, nest = self.writer.b, self.nest
        panel, block = nest.place(b, task)
        panels = self.made.panels
        group = b.index(panel // len(panels)) if self.made.spec.groups > 1 else 0
        within = b.index(panel - group * len(panels)) if len(panels) > 1 else 0
        width_of_panel = self.made.layout.vectors * self.made.layout.lanes
        whole = self.made.group_cols // width_of_panel
        if whole:
            with b.when(within < whole):
                self._panel(group, within, block, self.made.layout.vectors, width_of_panel)
        if whole < len(panels):
            with b.when(within == whole):
                first, vectors = panels[-1]
                self._panel(group, whole, block, vectors, self.made.group_cols - first)

    def _panel(self, group: Index, panel: Index, block: Index, vectors: int, cols: int) -> None:
        if self.made.knobs.panel:
            made, lanes = self.made, vectors * self.made.layout.lanes * self.made.engine.quad
            at, out = self.writer.b.index(self._weights_at(group, panel)), self.writer.streams.weights
            runs = self.writer.runs.count
            unpack_panel(self.writer.b, made.stored, runs, made.knobs.bits, self.packed, at, out, lanes)

        def tile(row: Index, rows: int) -> None:
            self._tile(group, panel, row, rows, vectors, cols)

        self.nest.emit(self.writer.b, block, tile)

    def _tile(self, group: Index, panel: Index, row: Index, rows: int, vectors: int, cols: int) -> None:
        b, made = self.writer.b, self.made
        runs, engine, layout = self.writer.runs.count, made.engine, made.layout
        panel_indices = runs * made.plan.vectors * layout.vectors * layout.lanes * engine.index_quad
        vectors_per_group = ceil(made.group_cols / layout.lanes)
        group_indices = panel_indices // layout.vectors * vectors_per_group
        place = Place(
            row=row,
            col=b.index(group * made.group_cols + panel * (layout.vectors * layout.lanes)),
            x=row_bases(b, made.spec, self.nest.tile, group, row, rows),
            weights=0 if made.knobs.panel else b.index(self._weights_at(group, panel)),
            indices=b.index(group * group_indices + panel * panel_indices),
            vectors=vectors,
            cols=cols,
            fetch=self._next_panel(row, group, panel) if made.knobs.prefetch else (),
        )
        self.writer.tile(place)

    def _next_panel(self, row: Index, group: Index, panel: Index) -> tuple[Fetch, ...]:
        """The tile's share of the next panel of weights."""
        b, made, size = self.writer.b, self.made, width(self.packed.dtype)
        blocks = self.writer.runs.count * (made.plan.full + (made.plan.tail is not None))
        by_vector = self.writer.runs.count * made.stored.all_weight_vectors * made.layout.lanes * made.engine.quad
        lines = ceil(by_vector * made.layout.vectors * size / LINE / (blocks * self.nest.tiles))
        elements = lines * LINE // size
        start = self._weights_at(group, panel + 1) + row // self.nest.tile * (blocks * elements)
        return (Fetch(self.packed, b.index(start), elements),)

    def _weights_at(self, group: Index, panel: Index) -> Index:
        """First packed weight of a panel."""
        made, layout = self.made, self.made.layout
        by_vector = self.writer.runs.count * made.stored.all_weight_vectors * layout.lanes * made.engine.quad
        return group * (by_vector * ceil(made.group_cols / layout.lanes)) + panel * (by_vector * layout.vectors)
