"""Operands of contractions as small floats with a power of two of scale, for hardware that multiplies 8-bit floats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.small_float import format_of, round_small_float, small_float_range
from bitwright.ir.types import F32, DType, TensorType, parse_dtype
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of, selected, stem
from bitwright.passes._pass import Context, Pass
from bitwright.passes.precision._regions import Range
from bitwright.passes.precision._weight_writer import snr_db, why_not_small


@dataclass(frozen=True)
class QuantizeFloats(Pass):
    """Operands of float layers in the small floats ``x`` and ``w`` (that of x): f4m3 is E4M3, f5m2 is E5M2.

    Formats are f<e>m<m>[b<bias>]: no infinities, no subnormals; values are rounded half to even and, by a power of two
    for every tensor, scaled so that the largest one has a code. ``sums``, the format that sums will be held in
    (small-float-sums comes next), makes the scales such that twice the observed results fit it.

    before:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[2, 2]
          %y = linear(%x, %w) : f32[1, 2]
        }
    after:
        graph @g (%x: f32[1, 2]) -> (y = %y) level=graph {
          %x.scale = constant {values=[0.0078125]} : f32[]
          %x.q = quantize(%x, %x.scale) {dtype=f4m3} : f4m3[1, 2]
          %x.dq = dequantize(%x.q, %x.scale) : f32[1, 2]
          %fc.weight.scale = constant {values=[0.001953125]} : f32[]
          %fc.weight = weight {ref="fc.weight.1"} : f4m3[2, 2]
          %fc.weight.dq = dequantize(%fc.weight, %fc.weight.scale) : f32[2, 2]
          %y = linear(%x.dq, %fc.weight.dq) : f32[1, 2]
        }
    """

    name: ClassVar[str] = "quantize-floats"
    lossy: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("ranges",)
    x: str = "f4m3"
    w: str = ""
    sums: str = ""
    only: str = "*"
    except_: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        ranges = context.facts.get("ranges")
        if ranges is None:
            raise InvalidInput(
                "quantize-floats needs value ranges: run observe-ranges before it, with calibration data"
            )
        formats = small(self.x), small(self.w or self.x)
        writer = _Writer(formats, small(self.sums) if self.sums else None, ranges)

        def step(rw: Rewriter, node: Node) -> bool:
            if not isinstance(node.op, ops.Linear | ops.Conv | ops.ConvTranspose | ops.MatMul | ops.Attention):
                return False
            if not selected(self.only, self.except_, graph, node):
                return False
            name = layer_of(graph, node)
            if why := why_not_small(graph, node, ranges):
                context.refuse(self.name, name, why)
                return False
            left, right = writer.operands(rw, node)
            rw.keep_as(node, node.op, (left, right, *rw.of(*node.inputs[2:])), node.types)
            context.remark(self.name, name, **writer.told)
            return True

        return rewrite(graph, step)[0]


def small(name: str) -> DType:
    """A small float of at most 8 bits for operands, of any for sums; raises :class:`InvalidInput` for other formats."""
    found = parse_dtype(name)
    if not found.is_small_float:
        raise InvalidInput(f"{found} is no small float such as f4m3 (E4M3), f5m2 (E5M2) or f4m3b11")
    format_of(found)
    return found


class _Writer:
    """Writes codes and scales; what several layers read at one scale is written once."""

    def __init__(self, formats: tuple[DType, DType], sums: DType | None, ranges: Mapping[str, Range]) -> None:
        self.formats, self.ranges = formats, ranges
        self.most = small_float_range(*format_of(sums))[1] if sums is not None else math.inf
        self.made: dict[tuple[str, DType, float], str] = {}
        self.told: dict[str, float | str] = {}

    def operands(self, rw: Rewriter, node: Node) -> tuple[str, str]:
        """The dequantized operands of a contraction."""
        x, w = node.inputs[:2]
        (fx, fw), sizes = self.formats, [self._size(rw.graph, v) for v in (x, w)]
        # both near the root of the largest sum: neither loses all of its small values
        scales = [_scale(n, min(_top(f), math.sqrt(self.most))) for n, f in zip(sizes, (fx, fw), strict=True)]
        result = max(map(abs, self.ranges.get(node.output, (0.0,))))
        if math.isfinite(self.most) and math.isfinite(result):
            scales[1] = max(_scale(sizes[1], _top(fw)), _scale(result, self.most / 2) / scales[0])
        self.told = {"x_scale": scales[0], "w_scale": scales[1]}
        return self._coded(rw, x, fx, scales[0]), self._coded(rw, w, fw, scales[1])

    def _size(self, graph: Graph, value: str) -> float:
        constant = _constant(graph, value)
        return max(map(abs, self.ranges[value])) if constant is None else float(np.abs(constant).max(initial=0.0))

    def _coded(self, rw: Rewriter, value: str, dtype: DType, scale: float) -> str:
        key = (value, dtype, scale)
        if key not in self.made:
            constant, source = _constant(rw.graph, value), rw.graph.producers.get(value)
            origin = source.origin if source is not None else ""
            name = stem(source.op.ref) if source is not None and isinstance(source.op, ops.Weight) else value
            s = rw.constant(scale, TensorType(F32, ()), name=f"{name}.scale", origin=origin)
            if constant is None:
                q = rw.emit(ops.Quantize(dtype), *rw.of(value), s, name=f"{name}.q", origin=origin)
            else:
                codes = round_small_float(constant / np.float32(scale), *format_of(dtype), "nearest")
                error = np.square(codes.astype(np.float64) * scale - constant).sum()
                power = float(np.square(constant, dtype=np.float64).sum())
                self.told["weight_snr_db"] = round(snr_db(float(error) / max(power, 1e-300)), 1)
                q = rw.weight(name, codes, rw.graph.types[value].with_dtype(dtype), name=name, origin=origin)
            self.made[key] = rw.emit(ops.Dequantize(), q, s, name=f"{name}.dq", origin=origin)
        return self.made[key]


def _constant(graph: Graph, value: str) -> Array | None:
    found = graph.constant(value)
    return None if found is None else np.asarray(found)


def _top(dtype: DType) -> float:
    return small_float_range(*format_of(dtype))[1]


def _scale(largest: float, top: float) -> float:
    """The least power of two by which ``largest`` is divided to become at most ``top``."""
    return 2.0 ** math.ceil(math.log2(largest / top)) if largest > 0 else 1.0
