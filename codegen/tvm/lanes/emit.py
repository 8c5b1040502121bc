"""The loop nest: a task brings a block of rows into lanes, sums up a block of outputs and writes them back as rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitwright.codegen.tvm.contract.epilogue import Epilogue
from bitwright.codegen.tvm.contract.padding import emit_padded, padded_elements
from bitwright.codegen.tvm.contract.spec import ContractSpec, Conv, KernelFunc, Matrix, image_of
from bitwright.codegen.tvm.epilogue import PointwiseEpilogue
from bitwright.codegen.tvm.lanes.ahead import Ahead
from bitwright.codegen.tvm.lanes.packing import OFFSET
from bitwright.codegen.tvm.lanes.products import Operand, Products, products_of
from bitwright.codegen.tvm.lanes.spec import WORD, LanesKnobs, Memory, Shape
from bitwright.codegen.tvm.lanes.transpose import rows_to_lanes, transposed
from bitwright.codegen.tvm.lanes.words import QUAD, Words, words_of
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Register, choose, const, either, minimum, scalar, width
from bitwright.ir.types import S32, S64, U16

LINE = 64
WIDE = 4
"""Vectors of outputs that are written together."""
UNROLLED = 4
"""Entries whose offsets are loaded together: loads limit kernels whose outputs share nothing."""
ANY = 1 << 30
"""The declared size of packed streams: code that does not depend on it serves more layers."""


def memory_of(shape: Shape, words: tuple[int, ...] | None = None) -> Memory:
    """The layout of the scratch memory; ``words``: as :func:`words_of` says."""
    kept = shape.blocks if keeps_lanes(shape) else 1
    outputs = -(-min(shape.knobs.outputs, shape.groups * shape.knobs.shared) // shape.vector) * shape.vector
    word = 0 if words is None else outputs // QUAD * shape.pitch // WORD
    sizes = [
        shape.rows,
        kept * min(shape.knobs.block, shape.units) * shape.pitch // WORD,
        outputs * shape.pitch // WORD,
        WIDE * shape.lanes * shape.lanes,
        word * (1 + len(words or ())),
    ]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // (LINE // WORD)) * (LINE // WORD))
    g, size = shape.spec.geometry, starts[-1] * WORD
    if isinstance(g, Conv) and image_of(g).copied:
        size += padded_elements(g, image_of(g)) * width(shape.spec.input_dtype)
    table, lanes, sums, tile, made, image = starts
    return Memory(table, lanes, sums, tile, made, word, image, size + LINE)


def keeps_lanes(shape: Shape) -> bool:
    """Whether all K blocks' activations stay in lanes: other blocks of outputs read them again (of a convolution they
    are made tap by tap)."""
    return shape.output_blocks > 1 or isinstance(shape.spec.geometry, Conv)


def emit(spec: ContractSpec, knobs: LanesKnobs, epilogue: Epilogue, name: str) -> KernelFunc:
    """The kernel ``void name(begin, end, x, weights, offsets, [spans], [init], operands..., out, scratch)``."""
    shape, b = Shape(spec, knobs), Builder(name)
    memory = memory_of(shape, words_of(epilogue))
    x = b.param("x", spec.input_dtype, spec.input_elements)
    weights = b.param("weights", spec.weight_dtype, ANY)
    offsets = b.param("offsets", U16, ANY)
    spans = b.param("spans", S32, ANY) if shape.pointers else None
    init = b.param("init", spec.acc_dtype, spec.cols) if spec.init else None
    pointers = {p.name: b.param(p.name, p.dtype, p.elements) for p in epilogue.params}
    scratch = b.scratch(memory.size)
    g = spec.geometry
    if isinstance(g, Conv) and image_of(g).copied:
        padded = b.view(scratch, spec.input_dtype, memory.image * WORD)
        first, last = _padded_rows(b, shape, g)
        emit_padded(b, g, image_of(g), x, padded, spec.pad_value, first, last)
        x = padded
    operands, sums = words_of(epilogue), b.view(scratch, S32)
    far = [n for n, p in pointers.items() if n == "out" or p.name in {f"e{i}" for i in operands or ()}]
    ahead = Ahead(b, shape, x, {n: pointers[n] for n in far})
    words = None
    if operands is not None and isinstance(epilogue, PointwiseEpilogue):
        words = Words(b, shape, memory, epilogue, operands, pointers, sums)
    writer = _Writer(
        b, shape, memory, products_of(spec, knobs), b.view(x, S32), b.view(weights, S32), offsets, spans, init,
        words, ahead, epilogue, pointers, sums,
    )  # fmt: skip
    with b.loop(b.end, b.begin, name="task") as task:
        writer.task(task)
    return KernelFunc(b.finish(), name, shape.row_blocks * shape.output_blocks, memory.size, b.param_names)


def _padded_rows(b: Builder, shape: Shape, g: Conv) -> tuple[Index, Index]:
    """The padded rows that tasks [begin, end) read."""
    (oh, ow), image = g.output, image_of(g)
    per = shape.output_blocks

    def padded_row(flat: Index) -> Index:
        return flat // (oh * ow) * image.height + flat % (oh * ow) // ow * g.stride[0]

    final = b.index(minimum(((b.end - 1) // per + 1) * shape.rows, shape.spec.rows) - 1)
    span = (g.kernel[0] - 1) * g.dilation[0] + 1
    return b.index(padded_row(b.begin // per * shape.rows)), b.index(padded_row(final) + span)


@dataclass(frozen=True)
class _Writer:
    b: Builder
    shape: Shape
    memory: Memory
    products: Products
    x: Pointer
    weights: Pointer
    offsets: Pointer
    spans: Pointer | None
    init: Pointer | None
    words: Words | None
    ahead: Ahead
    epilogue: Epilogue
    pointers: Mapping[str, Pointer]
    scratch: Pointer

    def task(self, task: Index) -> None:
        """One block of rows and one block of outputs."""
        b, shape = self.b, self.shape
        per = shape.output_blocks
        rows = b.index(task // per) if per > 1 else task
        part = b.index(task - rows * per) if per > 1 else 0
        fresh = either(part == 0, task == b.begin) if per > 1 else True
        whole, rest = divmod(shape.spec.rows, shape.rows)
        if whole:
            with b.when(rows < whole):
                self._rows(rows, part, fresh, shape.knobs.vectors)
        if rest:
            with b.when(rows == whole):
                self._rows(whole, part, fresh, -(-rest // shape.lanes))

    def _rows(self, rows: Index, part: Index, fresh: object, vectors: int) -> None:
        b, shape = self.b, self.shape
        row = b.index(rows * shape.rows)
        with b.when(fresh):
            self._table(row, vectors)
            if keeps_lanes(shape):
                self._all_lanes(vectors)
        last = shape.output_blocks - 1
        groups = b.index(choose(part == last, shape.last_groups, shape.per_block))
        entry: Index = 0
        if not shape.pointers:
            entry = b.index(part * (shape.per_block * shape.entries_per_group))
        first = b.index(part * shape.knobs.outputs)
        final = shape.blocks - 1
        if final:
            self._block(0, part, groups, entry, vectors, True, False)
        if final > 1:
            with b.loop(final, 1, name="block") as k:
                self._block(k, part, groups, entry, vectors, False, False)
        if self.words is not None and self.words.fused:
            self.words.fetch(row, first, part, vectors)
        self._block(final, part, groups, entry, vectors, final == 0, True, row)
        if self.words is None:
            self._finish(row, part, vectors)
            return
        if not self.words.fused:
            self.words.fetch(row, first, part, vectors)
            self.words.all(part, first, vectors)
        self.words.write(row, part, first, vectors)

    def _table(self, row: Index, vectors: int) -> None:
        """The first word of every row; rows past the end repeat the last one."""
        b, spec = self.b, self.shape.spec
        g = spec.geometry
        with b.loop(vectors * self.shape.lanes, name="row") as i:
            flat = b.index(minimum(row + i, spec.rows - 1))
            if isinstance(g, Matrix):
                base = flat * g.depth
            else:
                image, (oh, ow) = image_of(g), g.output
                n, y, x = flat // (oh * ow), flat % (oh * ow) // ow, flat % ow
                base = ((n * image.height + y * g.stride[0]) * image.width + x * g.stride[1]) * g.channels
            b.store(self.scratch, self.memory.table + i, scalar(base // self.shape.quad))

    def _all_lanes(self, vectors: int) -> None:
        """All activations of the rows."""
        g, quad = self.shape.spec.geometry, self.shape.quad
        if isinstance(g, Matrix):
            self._lanes(0, self.shape.units, vectors, 0)
            return
        image, per = image_of(g), g.channels // quad
        down, across = g.dilation[0] * image.width * per, g.dilation[1] * per
        with self.b.loop(g.kernel[0], name="ky") as ky, self.b.loop(g.kernel[1], name="kx") as kx:
            shift = self.b.index(ky * down + kx * across)
            self._lanes(shift, per, vectors, (ky * g.kernel[1] + kx) * per)

    def _lanes(self, shift: Index, units: int, vectors: int, to: Index) -> None:
        b, shape = self.b, self.shape
        pitch = shape.pitch // WORD
        place = b.index(self.memory.lanes + to * pitch)
        table = b.at(self.scratch, self.memory.table)
        rows_to_lanes(b, self.x, table, shift, units, vectors, self.scratch, place, pitch, shape.lanes)

    def _block(
        self, k: Index, part: Index, groups: Index, entry: Index, vectors: int, first: bool, final: bool, row: Index = 0
    ) -> None:
        """One K block of all groups of outputs. ``first`` and ``final``: whether it is that one; the final one may be
        shorter."""
        b, shape = self.b, self.shape
        size = 1 if final and shape.blocks > shape.full_blocks else 0
        units = shape.units - shape.full_blocks * shape.knobs.block if size else shape.knobs.block
        if keeps_lanes(shape):
            lanes = b.index(self.memory.lanes + k * (shape.knobs.block * shape.pitch // WORD))
        else:
            lanes = self.memory.lanes
            self._lanes(b.index(k * shape.knobs.block), units, vectors, 0)
        spans = b.index((part * shape.blocks + k) * shape.span_row)
        full = shape.knobs.counts[0] if shape.knobs.counts else 0
        at = b.index(entry + k * full * groups) if not shape.pointers else 0
        with b.loop(groups, name="group") as g:
            if self.spans is not None:
                start, end = (b.index(b.load(self.spans, spans + 2 * g + i).expr) for i in (0, 2))
                output = b.index(b.load(self.spans, spans + 2 * g + 1).expr)
            else:
                count = shape.knobs.counts[size] if shape.knobs.counts else 0
                start = b.index(at + g * count)
                output, end = g, start + count
            if final:
                self.ahead.group(g, row, part, b.index(part * shape.knobs.outputs))
            self._group(output, start, end, lanes, vectors, b.index(part * shape.knobs.outputs), first, final)

    def _group(
        self, group: Index, start: Index, end: Index, lanes: Index, vectors: int, part: Index, first: bool, final: bool
    ) -> None:
        """Add the entries of one group of the outputs from ``part`` on to its sums; the ``final`` ones may be made
        results at once."""
        b, shape = self.b, self.shape
        shared, step = shape.knobs.shared, shape.pitch // WORD
        sums = b.view(self.scratch, shape.acc)
        place = b.index(self.memory.sums + group * (shared * step))

        def where(o: int, r: int) -> Index:
            return place + o * step + r * shape.lanes

        acc: list[list[Register]] = []
        for o in range(shared):
            initial = const(0, shape.acc, shape.lanes)
            if first and self.init is not None:
                initial = b.let(b.load(self.init, part + group * shared + o).spread(shape.lanes))
            starts = [initial if first else b.load(sums, where(o, r), shape.lanes) for r in range(vectors)]
            acc.append([b.register(shape.acc, shape.lanes, v, "acc") for v in starts])
        whole = b.index((end - start) // UNROLLED) if shared == 1 else 0
        if shared == 1:
            with b.loop(whole, name="entries") as chunk:
                self._unrolled(acc[0], lanes, b.index(start + chunk * UNROLLED))
        with b.loop(end, b.index(start + whole * UNROLLED), name="entry") as e:
            offset = b.index(b.load(self.offsets, e).cast(S32).expr)
            self._products(acc, lanes, offset, e)
        if final and self.words is not None and self.words.fused:
            self.words.quad(group, part, acc)
            return
        for o, row in enumerate(acc):
            for r, register in enumerate(row):
                b.store(sums, where(o, r), register.get())

    def _unrolled(self, acc: list[Register], lanes: Index, entry: Index) -> None:
        """:data:`UNROLLED` entries of one output, whose offsets take one load and whose weights two."""
        b, shape = self.b, self.shape
        offsets = b.let(b.load(self.offsets, entry, UNROLLED).bits(S64))
        for i in range(UNROLLED):
            offset = b.index(((offsets >> (16 * i)) & 0xFFFF).cast(S32).expr)
            if i % 2 == 0:
                pair = b.let(b.load(self.weights, entry + i, 2).bits(S64))
            raw = (pair if i % 2 == 0 else pair >> 32).cast(S32)
            w = self.products.weight(b, b.let(raw), shape.lanes)
            for r, register in enumerate(acc):
                at = lanes + offset * (OFFSET // WORD) + r * shape.lanes
                a = self.products.activations(b, b.load(self.scratch, at, shape.lanes))
                register.set(self.products.mac(register.get(), a, w))

    def _products(self, acc: list[list[Register]], lanes: Index, offset: Index, entry: Index) -> None:
        b, shape, shared = self.b, self.shape, self.shape.knobs.shared

        def activations(r: int) -> Operand:
            at = lanes + offset * (OFFSET // WORD) + r * shape.lanes
            return self.products.activations(b, b.load(self.scratch, at, shape.lanes))

        def weight(o: int) -> Operand:
            return self.products.weight(b, b.load(self.weights, entry * shared + o), shape.lanes)

        if shared == 1:
            w = weight(0)
            for r, register in enumerate(acc[0]):
                register.set(self.products.mac(register.get(), activations(r), w))
            return
        held = [activations(r) for r in range(len(acc[0]))]
        for o, row in enumerate(acc):
            w = weight(o)
            for register, a in zip(row, held, strict=True):
                register.set(self.products.mac(register.get(), a, w))

    def _finish(self, row: Index, part: Index, vectors: int) -> None:
        """Turn the sums back into rows and hand them to the epilogue, :data:`WIDE` vectors of outputs at a time: a row
        is written in whole runs, since neighbouring rows may lie in different pages."""
        b, shape = self.b, self.shape
        cols, lanes, outputs = shape.spec.cols, shape.lanes, shape.knobs.outputs
        last, wide = shape.output_blocks - 1, WIDE * lanes
        full, rest = divmod(min(outputs, cols), wide)
        whole, tail = divmod(cols - last * outputs, wide)
        count = b.index(choose(part == last, whole, full))
        with b.loop(count, name="columns") as c:
            self._columns(row, part * outputs, b.index(c * wide), wide, vectors)
        if rest and last:
            with b.when(part < last):
                self._columns(row, part * outputs, full * wide, rest, vectors)
        if tail:
            with b.when(part == last):
                self._columns(row, last * outputs, whole * wide, tail, vectors)

    def _columns(self, row: Index, first: Index, col: Index, valid: int, vectors: int) -> None:
        """``valid`` outputs from ``col`` of the block that begins at ``first``."""
        b, shape, lanes = self.b, self.shape, self.shape.lanes
        sums, step, tile = b.view(self.scratch, shape.acc), shape.pitch // WORD, self.memory.tile
        count, wide = -(-valid // lanes), WIDE * lanes
        with b.loop(vectors, name="vector") as r:
            place = b.index(self.memory.sums + col * step + r * lanes)
            with b.loop(count, name="part") as p:
                at = b.index(place + p * (lanes * step))
                values = transposed(b, [b.let(b.load(sums, at + i * step, lanes)) for i in range(lanes)])
                for i, v in enumerate(values):
                    b.store(sums, tile + i * wide + p * lanes, v)
            base = b.index(row + r * lanes)
            with b.loop(minimum(lanes, shape.spec.rows - base), name="row") as i:
                line = b.index(tile + i * wide)
                values = [b.let(b.load(sums, line + p * lanes, lanes)) for p in range(count)]
                self.epilogue.store_row(b, self.pointers, values, b.index(base + i), first + col, valid)
