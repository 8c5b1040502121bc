"""y = x W^T and dx = dy W from one packed transposable 2:4 weight, on sparse tensor cores (``mma.sp``, from sm_80).

The weight is the sparse left operand, so a block computes a tile of the transposed result: 128 rows (outputs of W, or
inputs where it is read by columns) by 128 tokens. Read by rows, a lane's register is one word of the stored block. Read
by columns, its two values lie anywhere among the block's eight: a table of the 90 patterns says where.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx  # type: ignore[import-untyped]

from bitwright.codegen.cuda.transposable import DEPTH, ROWS, Product, column_places
from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.tir import Index, Pointer, Vec, const
from bitwright.ir.types import F16, F32, S32, U8, U16, U32

TILE_ROWS, TILE_TOKENS, THREADS = 128, 128, 256
_WARP_ROWS, _WARP_TOKENS = 32, 64
_OUT = TILE_ROWS + 8
"""Elements between two tokens of the staged result: 16-byte steps that meet no bank twice."""


def emit(p: Product, name: str) -> Any:
    """The kernel ``name(values, codes, metadata, places, x, [bias,] y)``.

    values u16 [outputs/8, inputs/4, 2, 4, 2]; codes u8 [outputs/8, inputs/4, 2]; metadata u32 of this direction; places
    u8 [90, 4] (:func:`column_places`); x u16 [tokens, depth]; bias f32 [rows]; y u16 [tokens, rows].
    """
    return _Writer(p, name).function()


class _Writer:
    def __init__(self, p: Product, name: str) -> None:
        grid = (-(-p.rows // TILE_ROWS), -(-p.tokens // TILE_TOKENS), 1)
        self.p, self.b = p, CudaBuilder(name, grid=grid, threads=THREADS)
        b = self.b
        blocks = p.outputs // 8 * (p.inputs // 4)
        self.values = b.param("values", U16, blocks * 16)
        self.codes = b.param("codes", U8, blocks * 2)
        self.meta = b.param("metadata", U32, -(-p.rows // ROWS) * p.steps * 32)
        self.places = b.param("places", U8, column_places().size)
        self.x = b.param("x", U16, p.tokens * p.depth)
        self.bias = b.param("bias", F32, p.rows) if p.bias else None
        self.y = b.param("y", U16, p.tokens * p.rows)
        self.s_values = b.shared(U16, p.stages * TILE_ROWS * DEPTH // 2)
        self.s_x = b.shared(U16, p.stages * TILE_TOKENS * DEPTH)
        self.s_meta = b.shared(U32, p.stages * TILE_ROWS // ROWS * 32)
        if p.by_columns:
            self.s_codes = b.shared(U8, p.stages * TILE_ROWS * DEPTH // 16)
            self.s_places = b.shared(U8, -(-column_places().size // 16) * 16)

    def function(self) -> Any:
        b, p = self.b, self.p
        if p.by_columns:
            with b.loop(column_places().size, b.thread, THREADS) as i:
                b.store(self.s_places, i, b.load(self.places, i))
        acc = b.local(F32, 64, "acc")
        for i in range(64):
            b.store(acc, i, const(0.0, F32))
        for stage in range(p.stages - 1):
            with b.when(stage < p.steps):
                self._fetch(stage, stage)
            b.call("bw_cp_async_commit")
        with b.loop(p.steps) as step:
            b.call(f"bw_cp_async_wait{p.stages - 2}")
            b.sync()
            ahead = step + (p.stages - 1)
            with b.when(tirx.LT(ahead, tirx.const(p.steps, "int32"))):
                self._fetch(ahead, ahead % p.stages)
            b.call("bw_cp_async_commit")
            self._multiply(step % p.stages, acc)
        b.call("bw_cp_async_wait0")
        b.sync()
        self._write(acc)
        return b.finish()

    # ---- global to shared memory
    def _fetch(self, step: Index, stage: Index) -> None:
        """The weights, metadata and activations of one turn, 16 bytes a copy; what lies outside is zeros."""
        b, p = self.b, self.p
        row0, token0 = b.block("x") * TILE_ROWS, b.block("y") * TILE_TOKENS
        octets, groups = (DEPTH // 8, TILE_ROWS // 4) if p.by_columns else (TILE_ROWS // 8, DEPTH // 4)
        first_octet = step * (DEPTH // 8) if p.by_columns else row0 // 8
        first_group = row0 // 4 if p.by_columns else step * (DEPTH // 4)
        for turn in range(octets * groups * 2 // THREADS):
            at = b.index(b.thread + turn * THREADS)
            octet, group = first_octet + at // (groups * 2), first_group + at // 2 % groups
            inside = self._inside(octet, p.outputs // 8, group, p.inputs // 4)
            source = self._clamped(octet, p.outputs // 8) * (p.inputs // 4) + self._clamped(group, p.inputs // 4)
            b.call(
                "bw_cp_async16",
                b.address(self.s_values, stage * (TILE_ROWS * DEPTH // 2) + at * 8),
                b.address(self.values, source * 16 + at % 2 * 8),
                inside,
            )
            if p.by_columns:  # two bytes of codes: too small for an asynchronous copy
                with b.when(tirx.EQ(at % 2, tirx.const(0, "int32"))):
                    to = stage * (TILE_ROWS * DEPTH // 16) + at
                    for half in range(2):
                        b.store(self.s_codes, to + half, b.load(self.codes, source * 2 + half))
        tiles = TILE_ROWS // ROWS
        with b.when(b.thread < tiles * 8):
            tile = self._clamped(row0 // ROWS + b.thread // 8, -(-p.rows // ROWS))
            b.call(
                "bw_cp_async16",
                b.address(self.s_meta, stage * (tiles * 32) + b.thread * 4),
                b.address(self.meta, (tile * p.steps + step) * 32 + b.thread % 8 * 4),
                16,
            )
        for turn in range(TILE_TOKENS * 8 // THREADS):
            at = b.index(b.thread + turn * THREADS)
            token, chunk = token0 + at // 8, step * 8 + at % 8
            inside = self._inside(token, p.tokens, chunk, p.depth // 8)
            source = self._clamped(token, p.tokens) * p.depth + self._clamped(chunk, p.depth // 8) * 8
            to = stage * (TILE_TOKENS * DEPTH) + at // 8 * DEPTH + (at % 8 ^ (at // 8 % 8)) * 8
            b.call("bw_cp_async16", b.address(self.s_x, to), b.address(self.x, source), inside)

    def _inside(self, a: Index, rows: int, c: Index, columns: int) -> Any:
        """16 where both indices lie inside, else 0."""
        both = tirx.And(tirx.LT(a, tirx.const(rows, "int32")), tirx.LT(c, tirx.const(columns, "int32")))
        return tirx.Select(both, tirx.const(16, "int32"), tirx.const(0, "int32"))

    def _clamped(self, index: Index, size: int) -> Index:
        return tirx.Min(index, tirx.const(size - 1, "int32"))

    # ---- products
    def _multiply(self, stage: Index, acc: Pointer) -> None:
        b = self.b
        row0, token0 = b.warp % 4 * _WARP_ROWS, b.warp // 4 * _WARP_TOKENS
        name = "bw_mma_sp_f16" if self.p.dtype == F16 else "bw_mma_sp_bf16"
        left, right, meta = b.local(U32, 8, "left"), b.local(U32, 4, "right"), b.local(U32, 2, "meta")
        for m in range(2):
            at = stage * (TILE_ROWS // ROWS * 32) + (row0 // ROWS + m) * 32 + b.lane
            b.store(meta, m, b.load(self.s_meta, at))
        for half in range(2):
            for m in range(2):
                self._left(stage, row0 + m * ROWS, half, left, m * 4)
            for n in range(_WARP_TOKENS // 8):
                token = b.index(token0 + n * 8 + b.lane % 8)
                chunk = (half * 4 + b.lane // 8) ^ (token % 8)
                at = stage * (TILE_TOKENS * DEPTH) + token * DEPTH + chunk * 8
                b.call("bw_ldmatrix4", b.address(right), b.address(self.s_x, at))
                for m in range(2):
                    b.call(
                        f"{name}_{half}", b.address(acc, (m * 8 + n) * 4), b.address(left, m * 4), b.address(right),
                        b.load(meta, m),
                    )  # fmt: skip

    def _left(self, stage: Index, row0: Index, half: int, left: Pointer, to: int) -> None:
        """The four registers of 16 rows and 32 elements of depth: rows g and g + 8, groups t and t + 4."""
        b, p = self.b, self.p
        words = b.view(self.s_values, U32)
        for i in range(4):
            group = half * 8 + b.lane % 4 + i // 2 * 4
            if not p.by_columns:
                octet = row0 // 8 + i % 2
                at = stage * (TILE_ROWS * DEPTH // 4) + (octet * (DEPTH // 4) + group) * 8 + b.lane // 4
                b.store(left, to + i, b.load(words, at))
                continue
            column = b.index(row0 + i % 2 * 8 + b.lane // 4)
            block = b.index((group // 2 * (TILE_ROWS // 4) + column // 4) * 2 + group % 2)
            code = b.load(self.s_codes, stage * (TILE_ROWS * DEPTH // 16) + block).cast(S32).expr
            place = b.let(b.load(self.s_places, code * 4 + column % 4).cast(S32))
            base = stage * (TILE_ROWS * DEPTH // 2) + block * 8
            pair = [b.load(self.s_values, base + (place >> s & 7).expr).cast(U32) for s in (0, 3)]
            b.store(left, to + i, pair[0] | pair[1] << 16)

    # ---- the result
    def _write(self, acc: Pointer) -> None:
        """Through shared memory, so that 16 consecutive bytes of a token go out at once."""
        b, p = self.b, self.p
        row0, token0 = b.warp % 4 * _WARP_ROWS, b.warp // 4 * _WARP_TOKENS
        staged = b.at(self.s_values, 0)
        for m in range(2):
            for n in range(_WARP_TOKENS // 8):
                for i in range(4):
                    row = row0 + m * ROWS + i // 2 * 8 + b.lane // 4
                    token = token0 + n * 8 + b.lane % 4 * 2 + i % 2
                    value = b.load(acc, (m * 8 + n) * 4 + i)
                    if self.bias is not None:
                        at = self._clamped(b.block("x") * TILE_ROWS + row, p.rows)
                        value = value + b.load(self.bias, at)
                    b.store(staged, token * _OUT + row, self._narrow(value))
        b.sync()
        for turn in range(TILE_TOKENS * TILE_ROWS // 8 // THREADS):
            at = b.index(b.thread + turn * THREADS)
            token, row = at // (TILE_ROWS // 8), at % (TILE_ROWS // 8) * 8
            whole_token, whole_row = b.block("y") * TILE_TOKENS + token, b.block("x") * TILE_ROWS + row
            inside = tirx.And(
                tirx.LT(whole_token, tirx.const(p.tokens, "int32")), tirx.LT(whole_row, tirx.const(p.rows, "int32"))
            )
            with b.when(inside):
                to = b.address(self.y, whole_token * p.rows + whole_row)
                b.call("bw_copy16", to, b.address(staged, token * _OUT + row))

    def _narrow(self, value: Vec) -> Vec:
        if self.p.dtype == F16:
            return value.cast(F16).bits(U16)
        bits = self.b.let(value.bits(U32))
        number = (bits & 0x7FFFFFFF).le(0x7F800000)
        return number.select(bits + ((bits >> 16) & 1) + 0x7FFF, bits | 0x400000).__rshift__(16).cast(U16)
