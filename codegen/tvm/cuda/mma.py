"""Linear layers, matrix products and convolutions on tensor cores by ``mma.sync``, dense and 2:4, epilogues fused.

The left operand of the instruction is the weights (2:4 exists on that side only), so y transposed is computed; sums
turn back into rows on their way through shared memory. See ``mma_spec`` for the cut, ``mma_emit`` for the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from bitwright.codegen.cuda.fragments import (
    compress,
    expand,
    fragments,
    from_fragments,
    is_2_4,
    metadata,
    padded,
    places_of,
)
from bitwright.codegen.tuning.space import Point, Space
from bitwright.codegen.tvm.cuda import mma_spec
from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.config import CudaConfig
from bitwright.codegen.tvm.cuda.mma_emit import Kernel, Pointers, Put
from bitwright.codegen.tvm.cuda.mma_spec import Product, Tile
from bitwright.codegen.tvm.cuda.products import product_of, root_of, rows_of, zero_of
from bitwright.codegen.tvm.cuda.read_back import layout_of, unpacked
from bitwright.codegen.tvm.cuda.store import RowEpilogue
from bitwright.codegen.tvm.generic_eval import memory, unflatten
from bitwright.codegen.tvm.template import Arg, Config, Refused, Template
from bitwright.codegen.tvm.tir import Builder, Index, Pointer, Vec, minimum
from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.ir.target import Target
from bitwright.ir.types import BF16, F32, NM, S32, U8, U32, DType
from bitwright.ir.weights import Array

PROCESSORS = {"sm_80": 108, "sm_90a": 132}
"""Multiprocessors of the devices that targets are named after (A100, H200)."""
PAYS = 1.05
_FEW = 32
"""So many outputs fill half of a sparse tile at most."""


@dataclass(frozen=True)
class MmaConfig(CudaConfig):
    """``product`` and ``tile`` of the kernel; ``weight``: the body's input that is packed, or -1; ``zero``: of x."""

    product: Product = None  # type: ignore[assignment]
    tile: Tile = None  # type: ignore[assignment]
    weight: int = -1
    zero: int = 0

    def kernel_key(self) -> str:
        return repr(replace(self, reason="", zero=int(self.zero != 0)))


class Mma(Template):
    """Contractions of f16, bf16 and 8-bit integers on tensor cores."""

    name: ClassVar[str] = "cuda_mma"
    apart: ClassVar[bool] = True
    """Whether metadata of 2:4 are an array of their own."""

    def configure(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Config | Refused:
        return self.at(body, constants, target, {})

    def at(self, body: Graph, constants: Mapping[str, Array], target: Target, point: Point) -> Config | Refused:
        found = product_of(body, constants)
        if isinstance(found, Refused):
            return found
        root, dense = found
        chosen = with_pattern(body, root, dense, constants, target, str(point.get("kernel", "")))
        if isinstance(chosen, Refused):
            return chosen
        p, kind = chosen
        shared, processors = target.l1_bytes, PROCESSORS.get(target.mcpu, 108)
        tile, why = mma_spec.default(p, processors, shared)
        if p.sparse and not point:
            other, plain = mma_spec.default(dense, processors, shared)
            times = (mma_spec.duration(t, q, processors, shared) for t, q in ((other, dense), (tile, p)))
            gain = next(times) / next(times)
            kind = f"2:4 weights, {gain:.2g}x over dense by counting"
            if gain < PAYS:
                p, tile, why, kind = dense, other, plain, "2:4 weights run dense: no gain by counting"
        if point:
            tile, why = mma_spec.tile_of(point), "as tuned"
            if fault := tile.fault(p, shared):
                return Refused(f"no kernel of this tile: {fault}")
        if max(tile.packed_bytes(p), tile.work_words(p)) >= 1 << 31:
            return Refused("more bytes of weights, or of sums of parts, than 32-bit indices reach")
        position = {v.name: i for i, v in enumerate(body.inputs)}
        zero = zero_of(root)
        count = 0 if p.left != "packed" else 1 + p.sparse + (zero != 0)
        args = [Arg("input", position[root.inputs[0]])]
        args += [Arg("packed", i) for i in range(count)] or [Arg("input", position[root.inputs[1]])]
        args += [Arg("input", position[x]) for x in others(body, root, p)]
        args += [Arg("output", i) for i in range(len(body.outputs))]
        weight = position[root.inputs[1]] if count else -1
        return replace(made(p, tile, target, args, weight, f"tensor cores, {kind}, {why}"), zero=zero)

    def space(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Space:
        config = self.configure(body, constants, target)
        if not isinstance(config, MmaConfig):
            return Space()
        p = config.product
        return Space(mma_spec.point_of(config.tile, p), mma_spec.knobs(), mma_spec.rules(p, target.l1_bytes))

    def pack(self, body: Graph, config: Config, constants: Mapping[str, Array]) -> list[Array]:
        """Fragments of w, metadata (2:4); where x has a zero point, -zero times the sums of w and 16 bytes of it."""
        assert isinstance(config, MmaConfig)
        if config.weight < 0:
            return []
        p, t = config.product, config.tile
        w = rows_of(contraction(body), constants[body.inputs[config.weight].name], p)
        wide = [padded(each, t.outs, t.turns(p) * t.depth // p.size) for each in w]
        out: list[Array] = []
        if p.sparse:
            parts = [compress(each) for each in wide]
            out.append(np.stack([fragments(_bytes(kept)) for kept, _ in parts]))
            out.append(np.stack([metadata(places, p.size) for _, places in parts]))
        else:
            out.append(np.stack([fragments(_bytes(each)) for each in wide]))
        return out + starts(config, w)

    def verify(self, body: Graph, config: Config, constants: Mapping[str, Array], packed: list[Array]) -> str:
        assert isinstance(config, MmaConfig)
        if config.weight < 0:
            return ""
        p = config.product
        w = rows_of(contraction(body), constants[body.inputs[config.weight].name], p)
        for i, each in enumerate(w):
            again = from_fragments(packed[0][i]).view(w.dtype)
            if p.sparse:
                again = expand(again, places_of(packed[1][i], p.size))
            if not np.array_equal(again[: each.shape[0], : each.shape[1]], each):
                return "the packed weights do not unpack to the weights"
            if again[each.shape[0] :].any() or again[:, each.shape[1] :].any():
                return "the packed weights have values where there are none"
        return ""

    def layout(self, body: Graph, config: Config) -> Mapping[str, Any]:
        return layout_of(contraction(body), config)

    def unpack(self, layout: Mapping[str, Any], packed: list[Array], shape: tuple[int, ...]) -> Array:
        return unpacked(layout, packed, shape)

    def emit(self, body: Graph, config: Config, symbol: str) -> object:
        assert isinstance(config, MmaConfig)
        p, root = config.product, contraction(body)
        b = self.builder(config, symbol)
        named: dict[str, Pointer] = {}

        def given(name: str) -> Pointer:
            v = next(v for v in body.inputs if v.name == name)
            named[name] = b.param(f"x{len(named)}", memory(v.type.dtype), v.type.size)
            return named[name]

        x = given(root.inputs[0])
        init = meta = None
        if p.left == "packed":
            w = b.param("w", F32 if p.element == "f32" else U8, 1 << 28)
            meta = b.param("meta", U8, 1 << 30) if p.sparse and self.apart else None
            init = b.param("init", S32, p.batch * p.outs + 8) if config.zero else None
        else:
            w = given(root.inputs[1])
        for name in others(body, root, p):
            given(name)
        outs = [b.param(f"y{i}", memory(body.types[o].dtype), body.types[o].size) for i, o in enumerate(body.outputs)]
        at = Pointers(x, w, meta)
        if init is not None and p.fill:
            at.filled = b.view(init, U8, -(-p.batch * p.outs // 4) * 16)
        if config.scratch_bytes:
            at.counters = b.param("counters", S32, config.scratch_bytes // 4)
            at.work = b.param("work", S32 if p.is_integer else F32, config.work_bytes // 4)
        epilogue = RowEpilogue(b, body, root, named, outs)
        bias = named.get(root.inputs[2]) if len(root.inputs) > 2 else None
        groups = isinstance(root.op, ops.Conv | ops.IntConv) and p.batch > 1
        lead = root.type.static_shape[:-1]

        def put(z: Index, row: Index, column: Index, values: list[Vec]) -> None:
            place = unflatten(row if groups or p.batch == 1 else b.index(z * p.rows + row), lead)
            first = b.index(z * p.outs) if groups else 0
            for pointer, base in ((init, z * p.outs), (bias, first)):
                if pointer is not None:
                    dtype = S32 if pointer is init else body.types[root.inputs[2]].dtype
                    more = [_element(b, pointer, base, column + k, p.outs, dtype) for k in range(len(values))]
                    values = [b.let(v + m) for v, m in zip(values, more, strict=True)]
            epilogue.store_row(
                place, b.index(first + column), values, b.index(first + p.outs), p.outs % len(values) == 0
            )

        self.write(b, config, at, put)
        return b.finish()

    def builder(self, config: MmaConfig, symbol: str) -> CudaBuilder:
        """The builder of a configuration's kernel."""
        return CudaBuilder(symbol, grid=config.grid, threads=config.threads)

    def write(self, b: CudaBuilder, config: MmaConfig, at: Pointers, put: Put) -> None:
        """The kernel itself; ``put`` writes four sums of a row."""
        Kernel(b, config.product, config.tile, at).emit(put)


def made(p: Product, tile: Tile, target: Target, args: Sequence[Arg], weight: int, reason: str) -> MmaConfig:
    """The configuration of a kernel of a tile; parts of a sum meet in the work memory."""
    tiles, parts, batch = tile.grid(p)
    split = parts > 1
    return MmaConfig(
        tasks=tiles * parts * batch, args=tuple(args), mcpu=target.mcpu, threads=tile.threads,
        grid=tile.grid(p), product=p, tile=tile, weight=weight, reason=reason,
        scratch_bytes=4 * tiles * batch if split else 0,
        work_bytes=4 * tile.work_words(p),
    )  # fmt: skip


def starts(config: MmaConfig, w: Array) -> list[Array]:
    """Where x has a zero point: -zero times the sums of w [batch, outs, k], and 16 bytes of it."""
    if not config.zero:
        return []
    init = (-config.zero * w.astype(np.int64).sum(2)).astype(np.int32).reshape(-1)
    fill = np.full(16, config.product.fill, np.uint8).view(np.int32)
    return [np.concatenate([init, np.zeros(-init.size % 4, np.int32), fill])]


def contraction(body: Graph) -> Node:
    """The contraction of a configured body."""
    root = root_of(body)
    assert root is not None
    return root


def others(body: Graph, root: Node, p: Product) -> list[str]:
    """Inputs beyond the operands: the bias, and what the epilogue reads (the operands too, if it reads them)."""
    read = [x for n in body.nodes if n is not root for x in n.inputs] + list(root.inputs[2:])
    given = {root.inputs[0]} | (set() if p.left == "packed" else {root.inputs[1]})
    return [v.name for v in body.inputs if v.name in read and v.name not in given]


def with_pattern(
    body: Graph, root: Node, p: Product, constants: Mapping[str, Array], target: Target, asked: str
) -> tuple[Product, str] | Refused:
    """The product with 2:4 weights where they are and it pays, and what became of it."""
    if p.left != "packed":
        return (p, "both operands from memory") if asked in ("", "dense") else Refused("2:4 needs constant weights")
    if asked == "dense":
        return p, "dense weights"
    obeys = all(is_2_4(each) for each in rows_of(root, constants[root.inputs[1]], p))
    gain = target.sparse_gain(body.types[root.inputs[0]].dtype, NM(2, 4, 1))
    if asked == "2:4" and not obeys:
        return Refused("the weights do not obey 2:4 in the order in which they are summed")
    if obeys and (asked or (gain >= PAYS and p.outs > _FEW)):
        return replace(p, sparse=True), f"2:4 weights, expected {gain:.2g}x over dense"
    if not obeys:
        return p, "dense weights"
    return p, f"2:4 weights run dense: {'too few outputs' if p.outs <= _FEW else 'no gain here'}"


def _bytes(words: Array) -> Array:
    return np.ascontiguousarray(words).view(np.uint8)


def _element(b: Builder, pointer: Pointer, base: Index, k: Index, size: int, dtype: DType) -> Vec:
    """An output's element of a vector, as sums are (s32 or f32); beyond the last output, the last one's."""
    v = b.load(pointer, base + (minimum(k, size - 1) if size % 4 else k))
    if dtype == BF16:
        return (v.cast(U32) << 16).bits(F32)
    return v.cast(F32) if dtype.is_float else v
