"""Narrower sums inside integer contractions, where the target gains from them and the weights prove them exact."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.errors import InvalidInput
from bitwright.ir.graph import Graph, Level, Node
from bitwright.ir.partial_sums import Reach, safe_products
from bitwright.ir.target import Rate, in_bytes
from bitwright.ir.types import S8, S16, U8, DType
from bitwright.passes._layers import layer_of, selected
from bitwright.passes._pass import Context, Pass

Width = Literal["auto", "16", "32"]
_ANY_TARGET = (Rate(U8, S8, S16, 0.0, 2),)
"""What is tried when no target is given: the weights alone decide."""


@dataclass(frozen=True)
class LowerAccumulators(Pass):
    """Let kernels sum in s16 and add to s32 every so many products: as many as the weights prove to fit.

    ``every`` holds for any products of one output in any order, so for every kernel; a kernel may take more between
    two spills where it proves that for its own order. ``width``: ``auto`` narrows where the target declares it faster,
    ``16`` refuses with the reason where it cannot, ``32`` undoes it. Results stay the same, bit for bit.

    before:
        graph @g (%x: u8[1, 4]) -> (y = %y) level=integer {
          %w = constant {values=[7, -7, 100, 3]} : s8[1, 4]
          %y = int_linear(%x, %w) {x_zero=8} : s32[1, 1]
        }
    after:
        graph @g (%x: u8[1, 4]) -> (y = %y) level=integer {
          %w = constant {values=[7, -7, 100, 3]} : s8[1, 4]
          %y = int_linear(%x, %w) {x_zero=8, partial=s16, every=4} : s32[1, 1]
        }
    """

    name: ClassVar[str] = "lower-accumulators"
    takes: ClassVar[Level] = "integer"
    gives: ClassVar[Level] = "integer"
    width: Width = "auto"
    only: str = "*"
    except_: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        if str(self.width) not in get_args(Width):
            raise InvalidInput(f"{self.name}: width is one of {', '.join(get_args(Width))}, not {self.width!r}")
        return rewrite(graph, lambda rw, node: self._lower(rw, graph, node, context))[0]

    def _lower(self, rw: Rewriter, graph: Graph, node: Node, context: Context) -> bool | None:
        op = node.op
        if not isinstance(op, ops.IntLinear | ops.IntConv | ops.IntMatMul):
            return None
        if not selected(self.only, self.except_, graph, node):
            return None
        partial, every = None, 0
        if str(self.width) != "32":
            found = self._decide(graph, node, context)
            if isinstance(found, str):
                self._tell(graph, node, context, found)
            elif found is not None:
                partial, every = found
        if isinstance(op, ops.IntMatMul) or (op.partial, op.every) == (partial, every):
            return None
        rw.keep_as(node, replace(op, partial=partial, every=every), rw.of(*node.inputs))
        return True

    def _tell(self, graph: Graph, node: Node, context: Context, why: str) -> None:
        """A wish that cannot be granted is refused; where the choice was free, the report has the reason."""
        if str(self.width) == "auto":
            context.remark(self.name, layer_of(graph, node), sums=f"in s32: {why}")
        else:
            context.refuse(self.name, layer_of(graph, node), f"sums stay in s32: {why}", "see constrain-weights")

    def _decide(self, graph: Graph, node: Node, context: Context) -> tuple[DType, int] | str | None:
        """The format of partial sums and their length, why there is none, or None when nothing is to be said."""
        x, w = (graph.types[v] for v in node.inputs[:2])
        rates = context.target.rates if context.target else _ANY_TARGET
        held = in_bytes(x.dtype), in_bytes(w.dtype)
        rates = tuple(r for r in rates if (r.x, r.w) == held and r.acc.bits < node.type.dtype.bits)
        if not rates:
            label = context.target.name if context.target else "no target"
            return None if str(self.width) == "auto" else f"{label} is not faster for {x.dtype} x {w.dtype} with s16"
        weight = graph.constant(node.inputs[1])
        if not isinstance(weight, np.ndarray) or isinstance(node.op, ops.IntMatMul):
            return "the weights are computed at run time, so nothing is known of their sums"
        if isinstance(node.op, ops.IntConv) and node.op.groups == weight.shape[0] > 1 == weight.shape[1]:
            return "the sums of a depthwise convolution are too short to gain"
        rows = weight.reshape(len(weight), -1)
        most = max(x.dtype.hi, node.op.x_zero if isinstance(node.op, ops.IntConv) else 0)  # padding is the zero point
        reach = {acc: safe_products(rows, most, acc.bits) for acc in {r.acc for r in rates}}
        fitting = [r for r in rates if reach[r.acc].terms >= r.terms]
        if not fitting:
            return _too_long(reach)
        best = max(fitting, key=lambda r: (r.ops_per_second, r.terms))
        every = reach[best.acc].terms
        context.remark(self.name, layer_of(graph, node), sums=f"in {best.acc}", every=every)
        return best.acc, every


def _too_long(reach: dict[DType, Reach]) -> str:
    acc, (terms, pair) = max(reach.items(), key=lambda item: item[0].bits)
    if terms < 2:
        return f"a pair of products reaches {pair}, more than {acc} holds"
    return f"only {terms} products fit {acc}, too few to gain"
