"""Weights of two values by table look-up: the four activations of a group give a table of their 16 partial sums.

A weight is ``low`` or ``low + gap``; its bit says which. Four bits of one output are an index into the table of their
group, and one byte shuffle looks up 32 outputs. Sums of looked-up bytes stay in 8 bits as long as the activations'
format proves that they fit, then in 16 bits (even and odd outputs apart), and are widened to 32 bits as seldom as that
allows. Activations above 63 are split into two halves of 4 bits with a table each. Weights are read once, an eighth of
their bytes. Method: bit-serial look-up tables (T-MAC, arXiv 2407.00088), here with exact sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from bitwright.codegen.instructions.x86 import VPSHUFB_256
from bitwright.codegen.tvm.contract_template import root_of
from bitwright.codegen.tvm.epilogue import PointwiseEpilogue
from bitwright.codegen.tvm.spelling import call
from bitwright.codegen.tvm.template import Arg, Config, Refused, Template
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Register, Vec, concat, const, constants
from bitwright.ir import ops
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target, in_bytes
from bitwright.ir.types import S16, S32, U8, U16
from bitwright.ir.weights import Array

TABLES = 2 << 20
"""Bytes of tables, which every block of outputs reads, up to which look-ups were measured to beat products."""
OUTPUTS = {1: 128, 2: 1024}
"""Outputs, by number of tables for a group, from which they make up for making the tables."""
GROUP, STEP, LANES = 4, 4, 8
"""Activations of a table, tables of a step, s32 lanes of a vector."""
_BYTE_OF = [2 * j + half for half in (0, 1) for j in range(16)]
"""The byte of a vector in which an output is, so that even bytes are the first 16 outputs and odd ones the rest."""


@dataclass(frozen=True)
class LutSpec:
    """``low``, ``low + gap``: the weights; ``parts``: tables by row and group, each of activations up to ``x_part``."""

    rows: int
    cols: int
    depth: int
    low: int
    gap: int
    x_part: int
    parts: int

    @property
    def steps(self) -> int:
        return ceil(self.depth / (GROUP * STEP))

    @property
    def tile_rows(self) -> int:
        """Rows of a tile: two tables of each group are in use at once."""
        return 1 if self.parts == 2 else min(self.rows, 2)

    @property
    def vectors(self) -> int:
        """Vectors of 32 outputs in a tile."""
        return 4 // (self.tile_rows * self.parts)

    @property
    def block(self) -> int:
        """Outputs of a task."""
        return 32 * self.vectors

    @property
    def tasks(self) -> int:
        return ceil(self.cols / self.block)

    @property
    def byte_sums(self) -> int:
        """Looked-up bytes whose sum fits a byte: 1, 2 or 4."""
        return next(n for n in (4, 2, 1) if n * GROUP * self.x_part <= U8.hi)

    @property
    def chunk(self) -> int:
        """Steps whose sums fit 16 bits."""
        return min(self.steps, U16.hi // (STEP * GROUP * self.x_part))

    @property
    def table_bytes(self) -> int:
        return self.rows * self.parts * self.steps * STEP * 16


@dataclass(frozen=True)
class LutConfig(Config):
    """The layer, the position of its weights among the body's inputs, and the zero point of its activations."""

    spec: LutSpec = None  # type: ignore[assignment]
    knobs: None = None
    weight: int = -1
    zero: int = 0

    def kernel_key(self) -> str:
        return repr(replace(self, reason="", zero=0))


class Lut(Template):
    """Linear layers with two-valued weights and few rows, on AVX2."""

    name = "lut"

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        root = root_of(body)
        if root is None or not isinstance(root.op, ops.IntLinear) or target.isa != "avx2":
            return Refused("no integer linear layer on AVX2")
        if root.op.partial != S16:
            return Refused("sums narrower than 32 bits are not asked for")
        position = {v.name: i for i, v in enumerate(body.inputs)}
        x, weight = body.types[root.inputs[0]], constants.get(root.inputs[1])
        rows = math.prod(x.static_shape[:-1])
        if weight is None or root.inputs[0] not in position or in_bytes(x.dtype) != U8:
            return Refused("needs constant weights and activations in u8 or less")
        values = np.unique(weight)
        if len(values) > 2:
            return Refused("weights have more than two values")
        epilogue = PointwiseEpilogue(body, root, target.isa)
        if why := epilogue.refusal():
            return Refused(f"epilogue: {why}")
        parts = 1 if x.dtype.hi <= U8.hi // GROUP else 2
        low, gap = int(values[0]), int(values[-1]) - int(values[0])
        spec = LutSpec(rows, len(weight), weight.shape[1], low, gap, x.dtype.hi if parts == 1 else 15, parts)
        operands = [Arg("input", position[root.inputs[0]]), Arg("packed", 0), Arg("packed", 1)]
        operands += [Arg("input", i) for i in epilogue.operands] + [Arg("output", 0)]
        if spec.table_bytes > TABLES:
            return Refused(
                f"{rows} rows take {spec.table_bytes} bytes of tables: look-ups were not measured beyond {TABLES}"
            )
        if spec.cols < OUTPUTS[parts]:
            return Refused(f"{spec.cols} outputs do not make up for making tables: products are faster")
        chosen = "1-bit weights by table look-up" if parts == 1 else "1-bit weights by two table look-ups"
        reason = (
            f"{chosen}; u8 sums of {spec.byte_sums * GROUP} terms, u16 sums spilled every {spec.chunk * STEP * GROUP} "
            "terms (proved from the format of the activations)"
        )
        return LutConfig(
            tasks=spec.tasks, scratch_bytes=spec.table_bytes + 64 * ceil(rows / 16) + 64, args=tuple(operands),
            isa=target.isa, mcpu=target.mcpu, reason=reason, spec=spec, weight=position[root.inputs[1]],
            zero=root.op.x_zero,
        )  # fmt: skip

    def pack(self, body: Graph, config: Config, constants: Mapping[str, Array]) -> list[Array]:
        assert isinstance(config, LutConfig)
        weight = constants[body.inputs[config.weight].name]
        spec = config.spec
        init = np.zeros(spec.tasks * spec.block, np.int64)
        init[: spec.cols] = -config.zero * weight.astype(np.int64).sum(1)
        return [_packed(spec, weight != spec.low), init.astype(np.int32)]

    def verify(self, body: Graph, config: Config, constants: Mapping[str, Array], packed: list[Array]) -> str:
        assert isinstance(config, LutConfig)
        same = np.array_equal(unpack(config.spec, packed[0]), constants[body.inputs[config.weight].name])
        return "" if same else "the packed bits do not unpack to the weights"

    def kernel_body(self, body: Graph) -> Graph:
        """The body without what is in packed constants."""
        root = root_of(body)
        assert root is not None
        assert isinstance(root.op, ops.IntLinear)
        plain = replace(root, op=replace(root.op, x_zero=0, every=0))
        return replace(body, nodes=tuple(plain if n is root else n for n in body.nodes))

    def emit(self, body: Graph, config: Config, symbol: str) -> object:
        assert isinstance(config, LutConfig)
        root = root_of(body)
        assert root is not None
        b, spec, epilogue = Builder(symbol), config.spec, PointwiseEpilogue(body, root, config.isa)
        x = b.param("x", U8, spec.rows * spec.depth)
        weights = b.param("weights", U8, spec.tasks * spec.steps * spec.block * STEP // 2)
        init = b.param("init", S32, spec.tasks * spec.block)
        pointers = {p.name: b.param(p.name, p.dtype, p.elements) for p in epilogue.params}
        scratch = b.scratch(config.scratch_bytes)
        sums = b.view(scratch, S32, spec.table_bytes)
        _tables(b, spec, x, scratch, sums)
        kernel = _Kernel(b, spec, scratch, sums, weights, init, epilogue, pointers)
        whole, rest = divmod(spec.cols, spec.block)
        with b.loop(b.end, b.begin, name="task") as task:
            with b.when(task < whole):
                kernel.rows(task, spec.block)
            if rest:
                with b.when(task == whole):
                    kernel.rows(task, rest)
        return b.finish()


def _packed(spec: LutSpec, bits: Array) -> Array:
    """``[block][step][pair of tables][vector][byte]``: two indices to a byte, the first table's in the low half."""
    full = np.zeros((spec.tasks * spec.block, spec.steps * STEP * GROUP), np.uint8)
    full[: spec.cols, : spec.depth] = bits
    index = (full.reshape(len(full), -1, GROUP) << np.arange(GROUP, dtype=np.uint8)).sum(-1).astype(np.uint8)
    index = index.reshape(spec.tasks, spec.vectors, 32, spec.steps, STEP // 2, 2)
    pairs = index[..., 0] | index[..., 1] << np.uint8(4)
    out = np.empty_like(pairs)
    out[:, :, _BYTE_OF] = pairs
    return np.ascontiguousarray(out.transpose(0, 3, 4, 1, 2)).reshape(-1)


def unpack(spec: LutSpec, packed: Array) -> Array:
    """The weights, s8 [outputs, inputs], from what :func:`_packed` made; another size is an :class:`InvalidInput`."""
    if packed.size != spec.tasks * spec.steps * spec.block * STEP // 2:
        raise InvalidInput(f"packed bits have {packed.size} bytes, which is not {spec.cols} outputs of {spec.depth}")
    out = packed.reshape(spec.tasks, spec.steps, STEP // 2, spec.vectors, 32).transpose(0, 3, 4, 1, 2)
    pairs = out[:, :, _BYTE_OF]
    index = np.stack([pairs & 15, pairs >> 4], -1).reshape(spec.tasks * spec.block, -1, 1)
    bits = (index >> np.arange(GROUP, dtype=np.uint8)) & 1
    bits = bits.reshape(spec.tasks * spec.block, -1)[: spec.cols, : spec.depth]
    return (spec.low + spec.gap * bits.astype(np.int16)).astype(np.int8)


def _tables(b: Builder, c: LutSpec, x: Pointer, tables: Pointer, sums: Pointer) -> None:
    """Every row's tables, and the sum of its activations. Bits of weights behind the end of a row are zero, so what
    its last tables hold of the bytes behind it is never looked up."""
    masks = [constants([255 * (i >> k & 1) for i in range(16)], U8) for k in range(GROUP)]
    whole, rest = divmod(c.depth, LANES)
    with b.loop(c.rows, name="row") as row:
        first = b.index(row * c.depth)
        with b.loop(c.steps * STEP, name="group") as group:
            values = [b.let(b.load(x, first + group * GROUP + k)) for k in range(GROUP)]
            for part in range(c.parts):
                table = const(0, U8, 16)
                for value, mask in zip(values, masks, strict=True):
                    piece = value if c.parts == 1 else value >> 4 if part else value & 15
                    table = table + (piece.spread(16) & mask)
                b.store(tables, ((row * c.parts + part) * (c.steps * STEP) + group) * 16, table)
        total = b.register(S32, LANES, const(0, S32, LANES), "total")
        with b.loop(whole, name="k") as k:
            total.set(total.get() + b.load(x, first + k * LANES, LANES).cast(S32))
        one = b.let(b.load(x, first).cast(S32) * 0)
        for k in range(rest):
            one = b.let(one + b.load(x, first + whole * LANES + k).cast(S32))
        lanes = b.let(total.get())
        for k in range(LANES):
            one = b.let(one + lanes.part(k, 1))
        b.store(sums, row, one)


@dataclass(frozen=True)
class _Kernel:
    b: Builder
    c: LutSpec
    tables: Pointer
    sums: Pointer
    weights: Pointer
    init: Pointer
    epilogue: PointwiseEpilogue
    pointers: Mapping[str, Pointer]

    def rows(self, task: Index, cols: int) -> None:
        """All rows of one block of outputs."""
        tile = self.c.tile_rows
        with self.b.loop(self.c.rows // tile, name="tile") as n:
            self._tile(task, self.b.index(n * tile), tile, cols)
        if rest := self.c.rows % tile:
            self._tile(task, self.c.rows - rest, rest, cols)

    def _tile(self, task: Index, row: Index, rows: int, cols: int) -> None:
        b, c = self.b, self.c
        col, base = b.index(task * c.block), b.index(task * (c.steps * c.block * STEP // 2))
        acc: list[list[Register]] = []
        for r in range(rows):
            share = b.let(b.load(self.sums, row + r) * c.low)
            starts = [b.load(self.init, col + q * LANES, LANES) + share for q in range(c.block // LANES)]
            acc.append([b.register(S32, LANES, start, "acc") for start in starts])
        whole, rest = divmod(c.steps, c.chunk)
        with b.loop(whole + (b.begin >> 31) if whole > 1 else whole, name="chunk") as n:
            self._chunk(row, base, b.index(n * c.chunk), c.chunk, acc)
        if rest:
            self._chunk(row, base, whole * c.chunk, rest, acc)
        for r, line in enumerate(acc):
            for q, register in enumerate(line):
                valid = min(LANES, cols - q * LANES)
                if valid > 0:
                    value = b.let(register.get())
                    self.epilogue.store(b, self.pointers, value, row + r, col + q * LANES, valid)

    def _chunk(self, row: Index, base: Index, first: Index, steps: int, acc: list[list[Register]]) -> None:
        """Steps whose 16-bit sums fit, then their share of the 32-bit ones."""
        b, c = self.b, self.c
        zero = const(0, U16, 16)
        shape = [(t, v) for t in range(len(acc) * c.parts) for v in range(c.vectors)]
        both = {at: b.register(U16, 16, zero, "both") for at in shape}  # even outputs + 256 times the odd ones
        odd = {at: b.register(U16, 16, zero, "odd") for at in shape}
        with b.loop(steps + (b.begin >> 31), name="k") as k:
            step = b.index(first + k)
            tables = [self._table_row(row, step, t) for t in range(len(acc) * c.parts)]
            for v in range(c.vectors):
                index = self._indices(b.index(base + step * (c.block * STEP // 2)), v)
                for t, row_tables in enumerate(tables):
                    found = [call(VPSHUFB_256, table, i).bits(U8) for table, i in zip(row_tables, index, strict=True)]
                    for g in range(0, STEP, c.byte_sums):
                        few = found[g]
                        for more in found[g + 1 : g + c.byte_sums]:
                            few = few + more
                        words = b.let(few).bits(U16)
                        both[t, v].set(both[t, v].get() + words)
                        odd[t, v].set(odd[t, v].get() + (words >> 8))
        for t, v in shape:
            r, part = divmod(t, c.parts)
            high = b.let(odd[t, v].get())
            low = b.let(both[t, v].get() - (high << 8))
            for q, words in enumerate((low.part(0, 8), low.part(8, 8), high.part(0, 8), high.part(8, 8))):
                register = acc[r][4 * v + q]
                register.set(register.get() + words.cast(S32) * (c.gap << 4 * part))

    def _table_row(self, row: Index, step: Index, t: int) -> list[Vec]:
        b, c = self.b, self.c
        at = ((row * c.parts + t) * (c.steps * STEP) + step * STEP) * 16
        loads = [b.let(b.load(self.tables, at + 16 * i, 16)) for i in range(STEP)]
        return [b.let(concat([one, one])) for one in loads]

    def _indices(self, at: Index, v: int) -> list[Vec]:
        """The table index of every output, for the tables of a step."""
        b, out = self.b, list[Vec]()
        for half in range(STEP // 2):
            pair = b.let(b.load(self.weights, at + (half * self.c.vectors + v) * 32, 32))
            out += [b.let(pair & 15), b.let((pair.bits(U16) >> 4).bits(U8) & 15)]
        return out
