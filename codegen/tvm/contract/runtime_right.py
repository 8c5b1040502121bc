"""Matrix products whose right operand is a run-time value (attention): panels are packed into scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from bitwright.codegen.tvm.contract.emit import contraction
from bitwright.codegen.tvm.contract.epilogue import Epilogue
from bitwright.codegen.tvm.contract.nest import Nest, nest_of
from bitwright.codegen.tvm.contract.spec import ContractSpec, KernelFunc, Knobs, Matrix, runs_of
from bitwright.codegen.tvm.contract.tile import Place, Streams, TileWriter
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec, minimum, shuffle, width
from bitwright.ir.types import F32

DIRECT_TILES = 2
"""With so few tiles of rows, a right operand of layout [K, N] is read in place."""


def emit_runtime_right(spec: ContractSpec, knobs: Knobs, epilogue: Epilogue, name: str) -> KernelFunc:
    """``void name(begin, end, x, right, epilogue operands..., outputs..., [scratch])``."""
    g = spec.geometry
    assert isinstance(g, Matrix)
    made = contraction(spec, knobs)
    b = Builder(name)
    x = b.param("x", F32, spec.input_elements)
    right = b.param("right", F32, g.batch * g.depth * g.cols)
    pointers = {p.name: b.param(p.name, p.dtype, p.elements) for p in epilogue.params}
    nest, lanes = nest_of(g.rows, knobs), made.engine.lanes
    direct = spec.right == "kn" and nest.tiles <= DIRECT_TILES
    scratch, weights = 0, right
    if not direct:
        depth = ceil(g.depth / lanes) * lanes
        scratch = depth * made.layout.vectors * lanes * width(F32) + 64
        weights = b.view(b.scratch(scratch), F32)
    streams = Streams(x, weights, step=g.cols if direct else None)
    writer = TileWriter(b, made.engine, made.plan, runs_of(spec), streams, epilogue, pointers)
    panels = made.layout.panels(g.cols)
    product = _Product(b, g, writer, nest, right, None if direct else weights, spec.right == "nk")
    with b.loop(b.end, b.begin, name="task") as task:
        block = b.index(task % nest.blocks) if nest.blocks > 1 else 0
        outer = b.index(task // nest.blocks) if nest.blocks > 1 else task
        batch = b.index(outer // len(panels)) if g.batch > 1 else 0
        panel = b.index(outer % len(panels)) if len(panels) > 1 else 0
        whole = g.cols // (made.layout.vectors * lanes)
        if whole:
            with b.when(panel < whole):
                product.panel(batch, panel * made.layout.vectors * lanes, block, made.layout.vectors)
        if whole < len(panels):
            with b.when(panel == whole):
                product.panel(batch, panels[-1][0], block, panels[-1][1])
    return KernelFunc(b.finish(), name, g.batch * len(panels) * nest.blocks, scratch, b.param_names)


@dataclass(frozen=True)
class _Product:
    b: Builder
    g: Matrix
    writer: TileWriter
    nest: Nest
    right: Pointer
    packed: Pointer | None
    transposed: bool

    def panel(self, batch: Index, col: Index, block: Index, vectors: int) -> None:
        """Pack one panel of one product and run its tiles."""
        b, nest = self.b, self.nest
        base = b.index(batch * (self.g.depth * self.g.cols))
        col = b.index(col)
        if self.packed is not None:
            (self._pack_nk if self.transposed else self._pack_kn)(self.packed, base, col, vectors)
        weights = 0 if self.packed is not None else b.index(base + col)

        def tile(row: Index, rows: int) -> None:
            at = b.index((batch * self.g.rows + row) * self.g.depth)
            x = [at + i * self.g.depth for i in range(rows)]
            cols = self._cols(col, vectors)
            self.writer.tile(Place(b.index(batch * self.g.rows + row), col, x, weights, 0, vectors, cols))

        nest.emit(b, block, tile)

    def _cols(self, col: Index, vectors: int) -> int:
        """Valid columns of the panel: all of a whole one; the tail's number is static."""
        return self.g.cols - col if isinstance(col, int) else vectors * self.writer.engine.lanes

    def _pack_kn(self, packed: Pointer, base: Index, col: Index, vectors: int) -> None:
        b, lanes = self.b, self.writer.engine.lanes
        with b.loop(self.g.depth, name="k") as k:
            for j in range(vectors):
                row = b.load(self.right, base + k * self.g.cols + col + j * lanes, lanes)
                b.store(packed, (k * vectors + j) * lanes, row)

    def _pack_nk(self, packed: Pointer, base: Index, col: Index, vectors: int) -> None:
        """Transpose blocks of ``lanes`` columns by ``lanes`` k; columns past the end repeat the last one."""
        b, lanes, g = self.b, self.writer.engine.lanes, self.g
        with b.loop(vectors, name="j") as j:
            rows = [b.index(base + minimum(col + j * lanes + n, g.cols - 1) * g.depth) for n in range(lanes)]
            with b.loop(ceil(g.depth / lanes), name="kb") as kb:
                block = [b.let(b.load(self.right, at + kb * lanes, lanes)) for at in rows]
                for t, line in enumerate(transpose(block, b.let)):
                    b.store(packed, ((kb * lanes + t) * vectors + j) * lanes, line)


def transpose(rows: list[Vec], keep: Callable[[Vec], Vec]) -> list[Vec]:
    """Transpose a square of vectors by exchanging off-diagonal blocks of half the size each time."""
    n = len(rows)
    size = n // 2
    while size:
        for i in range(n):
            if not i & size:
                a, c = rows[i], rows[i + size]
                low = [lane if not lane & size else n + lane - size for lane in range(n)]
                high = [lane + size if not lane & size else n + lane for lane in range(n)]
                rows[i], rows[i + size] = keep(shuffle([a, c], low)), keep(shuffle([a, c], high))
        size //= 2
    return rows
