"""Linear layers, matrix products and convolutions on Hopper's warpgroup products (``wgmma``), dense and 2:4.

What is a product, which weights are 2:4 and what follows the sums is shared with ``mma``; the cut is in
``wgmma_spec``, the kernel in ``wgmma_emit``, the packed weights in ``wgmma_layout``. Only sm_90a has the instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bitwright.codegen.tuning.space import Point, Space
from bitwright.codegen.tvm.cuda import wgmma_layout, wgmma_spec
from bitwright.codegen.tvm.cuda.builder import CudaBuilder
from bitwright.codegen.tvm.cuda.mma import PAYS, Mma, MmaConfig, contraction, others, starts, with_pattern
from bitwright.codegen.tvm.cuda.mma_emit import Pointers, Put
from bitwright.codegen.tvm.cuda.mma_spec import Product
from bitwright.codegen.tvm.cuda.products import product_of, rows_of, zero_of
from bitwright.codegen.tvm.cuda.wgmma_emit import Kernel, builder
from bitwright.codegen.tvm.cuda.wgmma_spec import Cut
from bitwright.codegen.tvm.template import Arg, Config, Refused
from bitwright.ir.graph import Graph
from bitwright.ir.target import Target
from bitwright.ir.weights import Array

_FEATURE = "sm_90a"
_PIECE = 4
"""Bytes that an asynchronous copy has at least."""


@dataclass(frozen=True)
class WgmmaConfig(MmaConfig):
    """As :class:`MmaConfig`, with the ``cut`` in place of the tile."""

    cut: Cut = None  # type: ignore[assignment]


class Wgmma(Mma):
    """Contractions of f16, bf16 and 8-bit integers by warpgroups with asynchronous operands."""

    name: ClassVar[str] = "cuda_wgmma"
    apart: ClassVar[bool] = False

    def at(self, body: Graph, constants: Mapping[str, Array], target: Target, point: Point) -> Config | Refused:
        if _FEATURE not in target.features:
            return Refused(f"{target.name} has no wgmma ({_FEATURE} has)")
        found = product_of(body, constants)
        if isinstance(found, Refused):
            return found
        root, dense = found
        if why := _unsuited(dense):
            return Refused(why)
        chosen = with_pattern(body, root, dense, constants, target, str(point.get("kernel", "")))
        if isinstance(chosen, Refused):
            return chosen
        p, kind = chosen
        cut, told = wgmma_spec.default(p, target.l1_bytes)
        if p.sparse and not point:
            other, plain = wgmma_spec.default(dense, target.l1_bytes)
            gain = other.cycles(dense) / cut.cycles(p)
            kind = f"2:4 weights, {gain:.2f}x over dense by counting"
            if gain < PAYS:
                p, cut, told, kind = dense, other, plain, "2:4 weights run dense: no gain by counting"
        if point:
            cut, told = wgmma_spec.cut_of(point), "as tuned"
            if fault := cut.fault(p, target.l1_bytes):
                return Refused(f"no kernel of this cut: {fault}")
        position = {v.name: i for i, v in enumerate(body.inputs)}
        zero = zero_of(root)
        count = 0 if p.left != "packed" else 1 + (zero != 0)
        args = [Arg("input", position[root.inputs[0]])]
        args += [Arg("packed", i) for i in range(count)] or [Arg("input", position[root.inputs[1]])]
        args += [Arg("input", position[x]) for x in others(body, root, p)]
        args += [Arg("output", i) for i in range(len(body.outputs))]
        tasks = cut.tasks(p)
        split = cut.split > 1
        return WgmmaConfig(
            tasks=tasks, args=tuple(args), mcpu=target.mcpu, arch=90, threads=cut.threads, grid=(cut.grid(p), 1, 1),
            product=p, cut=cut, weight=position[root.inputs[1]] if count else -1, zero=zero,
            scratch_bytes=4 * tasks // cut.split * cut.consumers if split else 0,
            work_bytes=4 * tasks * cut.outs * cut.rows if split else 0,
            reason=f"wgmma, {kind}, {told}",
        )  # fmt: skip

    def space(self, body: Graph, constants: Mapping[str, Array], target: Target) -> Space:
        config = self.configure(body, constants, target)
        if not isinstance(config, WgmmaConfig):
            return Space()
        p = config.product
        rules = wgmma_spec.rules(p, target.l1_bytes)
        return Space(wgmma_spec.point_of(config.cut, p), wgmma_spec.knobs(), rules)

    def pack(self, body: Graph, config: Config, constants: Mapping[str, Array]) -> list[Array]:
        """Tiles of w in the order of stages (2:4: values, then metadata), and :func:`starts`."""
        assert isinstance(config, WgmmaConfig)
        if config.weight < 0:
            return []
        p = config.product
        w = rows_of(contraction(body), constants[body.inputs[config.weight].name], p)
        return [np.stack([wgmma_layout.pack(each, config.cut.outs, p.sparse) for each in w]), *starts(config, w)]

    def verify(self, body: Graph, config: Config, constants: Mapping[str, Array], packed: list[Array]) -> str:
        assert isinstance(config, WgmmaConfig)
        if config.weight < 0:
            return ""
        p, outs = config.product, config.cut.outs
        w = rows_of(contraction(body), constants[body.inputs[config.weight].name], p)
        whole = (config.cut.tiles(p)[0] * outs, config.cut.steps(p) * wgmma_layout.STEP // p.size)
        for i, each in enumerate(w):
            again = wgmma_layout.unpack(packed[0][i], outs, p.sparse, whole, each.dtype)
            if not np.array_equal(again[: each.shape[0], : each.shape[1]], each):
                return "the packed weights do not unpack to the weights"
            if again[each.shape[0] :].any() or again[:, each.shape[1] :].any():
                return "the packed weights have values where there are none"
        return ""

    def builder(self, config: MmaConfig, symbol: str) -> CudaBuilder:
        assert isinstance(config, WgmmaConfig)
        return builder(symbol, config.product, config.cut)

    def write(self, b: CudaBuilder, config: MmaConfig, at: Pointers, put: Put) -> None:
        assert isinstance(config, WgmmaConfig)
        Kernel(b, config.product, config.cut, at).emit(put)


def _unsuited(p: Product) -> str:
    """Why ``mma`` does this product better; the empty string if it does not."""
    if p.left == "columns":
        return "a computed operand that lies [k, outputs]: wgmma's tiles have k innermost"
    if min(x.piece(p.size) for x in (p.source, p.right) if x is not None) < _PIECE:
        return "rows are copied element by element, which mma does with all warps"
    if p.left == "packed" and p.batch * (p.outs + 256) * (p.bytes_of_k + wgmma_layout.STEP) >= 1 << 31:
        return "packed weights of 2 GiB or more, too large for 32-bit indices"
    if p.outs < wgmma_layout.ROWS // 2:
        return f"{p.outs} outputs leave most of a tile of {wgmma_layout.ROWS} empty"
    return ""
