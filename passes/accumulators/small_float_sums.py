"""Contractions whose products and sums are small floats: what an accelerator with such accumulators computes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Node
from bitwright.ir.small_float import format_of, small_float_range, sums_fit
from bitwright.ir.types import F64, DType, parse_dtype, small_float
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._pass import Context, Pass
from bitwright.passes.accumulators._codes import codes_of, sum_codes


@dataclass(frozen=True)
class SmallFloatSums(Pass):
    """Sum float layers in small floats: every product and every sum is rounded, in chunks of ``chunk`` terms.

    Formats are f<e>m<m>b<bias>: no infinities, no subnormals; below 2^-bias is zero, above the largest stays the
    largest. Of two formats one may be left out: the other one's, with the bias that lets chunks of random terms fit,
    b_acc = b_product - log2(chunk) / 2 (Blumenfeld et al., ICLR 2024). ``floor`` cuts the mantissa of the magnitude,
    ``nearest`` rounds half to even. Small floats of quantize-floats are multiplied as they are; scales and bias come
    behind the sums. Kernels emulate the sums bit for bit on any target, slowly: this pass is for seeing what such an
    accumulator does to a model.

    before:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[4, 8]
          %y = linear(%x, %w) : f32[2, 4]
        }
    after:
        graph @g (%x: f32[2, 8]) -> (y = %y) level=graph {
          %w = weight {ref="fc.weight"} : f32[4, 8]
          %y = small_linear(%x, %w) : f32[2, 4]
        }
    """

    name: ClassVar[str] = "small-float-sums"
    lossy: ClassVar[bool] = True
    acc: str = ""
    product: str = ""
    chunk: int = 16
    rounding: Literal["floor", "nearest"] = "floor"
    only: str = "*"
    except_: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        product, acc = formats(self.acc, self.product, self.chunk)
        if self.rounding not in ("floor", "nearest"):
            raise InvalidInput(f"rounding is floor or nearest, not {self.rounding!r}")
        sums = {"product": product, "acc": acc, "chunk": self.chunk, "rounding": self.rounding}

        def step(rw: Rewriter, node: Node) -> bool:
            wanted = isinstance(node.op, (*ops.CONTRACTION, ops.Attention)) and not isinstance(node.op, ops.SMALL_FLOAT)
            if not wanted or not selected(self.only, self.except_, graph, node):
                return False
            name = layer_of(graph, node)
            if why := _why_not(graph, node):
                context.refuse(self.name, name, why)
                return False
            left, right = (codes_of(rw, v) for v in node.inputs[:2])
            if left is not None and right is not None:
                sum_codes(rw, node, _with(node.op, sums), left, right)
            else:
                rw.keep_as(node, _with(node.op, sums), rw.of(*node.inputs))
            x, w = (graph.types[v] for v in node.inputs[:2])
            terms = math.prod(int(d) for d in w.shape[1:]) if isinstance(node.op, ops.Conv) else x.shape[-1]
            context.remark(self.name, name, terms=terms, **_endpoints("product", product), **_endpoints("acc", acc))
            return True

        return rewrite(graph, step)[0]


def formats(acc: str, product: str, chunk: int) -> tuple[DType, DType]:
    """The formats of products and of sums from their names, one or both of which may be empty.

    >>> [str(f) for f in formats("", "f4m7b12", 16)], [str(f) for f in formats("f5m6b14", "", 64)]
    (['f4m7b12', 'f4m7b10'], ['f5m6b17', 'f5m6b14'])
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise InvalidInput(f"chunk is a whole number of terms, at least 1, not {chunk!r}")
    apart = math.floor(math.log2(chunk) / 2 + 0.5)
    if not acc and not product:
        acc = "f4m7b10"
    named = parse_dtype(acc or product)
    e, m, b = format_of(named)
    other = small_float(e, m, b + apart if acc else b - apart)
    result = (parse_dtype(product) if product else other, named) if acc else (named, other)
    if not sums_fit(format_of(result[0]), format_of(result[1])):
        raise InvalidInput(
            f"f64 cannot hold sums of {result[0]} products in {result[1]} exactly enough: "
            "at most 24 mantissa bits and 52 between the exponents"
        )
    return result


def _endpoints(of: str, dtype: DType) -> dict[str, Any]:
    smallest, largest = small_float_range(*format_of(dtype))
    return {of: str(dtype), f"{of}_smallest": smallest, f"{of}_largest": largest}


def _with(op: ops.Op, sums: dict[str, Any]) -> ops.Op:
    """The operator with small-float sums in the place of one with wide ones."""
    if isinstance(op, ops.Linear):
        return ops.SmallLinear(**sums)
    if isinstance(op, ops.MatMul):
        return ops.SmallMatMul(**sums, transpose_b=op.transpose_b)
    assert isinstance(op, ops.Conv)
    same = {k: v for k, v in asdict(op).items() if k != "groups"}
    return replace(ops.SmallConv(**sums), **same)


def _why_not(graph: Graph, node: Node) -> str:
    """Why a contraction keeps its sums, or the empty string."""
    op, operands = node.op, [graph.types[v] for v in node.inputs[:2]]
    if any(not t.dtype.is_float for t in operands):
        return "an integer contraction: its sums are exact (lower-accumulators narrows them)"
    if any(t.dtype == F64 for t in operands):
        return "f64 operands: their products do not fit the f64 that emulates the sums"
    if isinstance(op, ops.Conv) and op.groups != 1:
        return f"a convolution of {op.groups} groups: only those of one group have small-float sums"
    if isinstance(op, ops.MatMul) and min(t.rank for t in operands) < 2:
        return "a product with a vector"
    return "" if isinstance(op, ops.Linear | ops.Conv | ops.MatMul) else f"{op.spelling} has no small-float sums"


__all__ = ["SmallFloatSums", "formats"]
