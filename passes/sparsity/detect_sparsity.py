"""Recognition of N:M patterns that weights already obey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bitwright.ir import ops
from bitwright.ir.build import Rewriter, rewrite
from bitwright.ir.graph import Graph, Node
from bitwright.ir.patterns import density
from bitwright.ir.types import NM, U8, Unstructured
from bitwright.ir.weights import Array
from bitwright.passes._layers import layer_of
from bitwright.passes._match import uniform
from bitwright.passes._pass import Context, Pass
from bitwright.passes.sparsity._recognize import recognize, unordered

WORTH_TELLING, WORTH_CONVERTING = 0.1, 0.3
"""Shares of zeros without a pattern from which the report names them, and names the pass that makes one."""


@dataclass(frozen=True)
class DetectSparsity(Pass):
    """Give weights that already obey an N:M pattern along the reduction axis the encoding that says so.

    The tightest of all keep:group with groups of 2 to 16, 32 and 64 elements, or 2 to 16 blocks of 4; with the
    outputs that share it (4, 16, 32, 64), or the remark that it holds along the outputs too. Zeros in no order get
    an encoding with the share that is kept, of elements or of blocks of 4, where the target has a kernel that gains
    from them; others are told as a density. Values stay as they are, those behind a dequantize too.

    before:
        graph @g (%x: f32[2, 4]) -> (y = %y) level=graph {
          %w = constant {values=[1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 0.0, 4.0]} : f32[2, 4]
          %y = linear(%x, %w) : f32[2, 2]
        }
    after:
        graph @g (%x: f32[2, 4]) -> (y = %y) level=graph {
          %w = weight {ref="w"} : f32[2, 4] nm<1:2, axis=1>
          %y = linear(%x, %w) : f32[2, 2]
        }
    """

    name: ClassVar[str] = "detect-sparsity"

    def run(self, graph: Graph, context: Context) -> Graph:
        found: dict[str, NM | Unstructured | None] = {}
        formats = (context.target.activation if context.target else U8,)
        for node in graph.nodes:
            weight = _weight(graph, node)
            if weight is None or weight.output in found or weight.type.encoding is not None:
                continue
            array: Array = graph.constant(weight.output)  # type: ignore[assignment]
            nonzero = density(array)
            encoding: NM | Unstructured | None = None
            if 0 < nonzero < 1:
                nm = recognize(array, _axis(node), nonzero, context.target, formats)
                encoding = unordered(array, _axis(node), nm, context.target, formats) or nm
            found[weight.output] = encoding
            if facts := _facts(encoding, nonzero):
                context.remark(self.name, layer_of(graph, node), **facts)

        def step(rw: Rewriter, node: Node) -> bool:
            if (encoding := found.get(node.output)) is None:
                return False
            t = node.type.with_encoding(encoding)
            if isinstance(node.op, ops.Weight):
                rw.keep_as(node, node.op, (), (t,))
            else:
                rw.free(node)
                rw.replace(node, rw.weight(node.output, rw.graph.constant(node.output), t, name=node.output))  # type: ignore[arg-type]
            return True

        return rewrite(graph, step)[0]


def _facts(nm: NM | Unstructured | None, nonzero: float) -> dict[str, Any]:
    """The remark of a layer; empty for one that is dense."""
    if isinstance(nm, Unstructured):
        blocks = {"block": nm.block} if nm.block > 1 else {}
        return {"pattern": "unstructured", "axis": nm.axis, "density": round(nonzero, 4), **blocks}
    if nm is not None:
        facts: dict[str, Any] = {"pattern": f"{nm.keep}:{nm.group}", "axis": nm.axis, "density": round(nonzero, 4)}
        facts |= {"block": nm.block} if nm.block > 1 else {}
        facts |= {"shared": nm.shared} if nm.shared > 1 else {}
        return facts | ({"transposable": True} if nm.transposable else {})
    if not 0 < nonzero <= 1 - WORTH_TELLING:
        return {}
    told = {"pattern": "unstructured", "density": round(nonzero, 4)}
    return told | ({"cure": "convert-unstructured"} if nonzero < 1 - WORTH_CONVERTING else {})


def _weight(graph: Graph, node: Node) -> Node | None:
    """The constant behind a contraction whose kernels know N:M, through a symmetric dequantize."""
    plain = isinstance(node.op, ops.Linear) or (isinstance(node.op, ops.Conv) and node.op.groups == 1)
    if not plain and not (isinstance(node.op, ops.MatMul) and graph.types[node.inputs[1]].rank == 2):
        return None
    source = graph.producers.get(node.inputs[1])
    if source is not None and isinstance(source.op, ops.Dequantize):
        if any(uniform(graph, zero) != 0 for zero in source.inputs[2:]):
            return None
        source = graph.producers.get(source.inputs[0])
    if source is None or not isinstance(source.op, (ops.Weight, ops.Constant)) or source.type.rank < 2:
        return None
    sharers = {type(u.op) for u in graph.users[source.output]}
    return source if len(sharers) == 1 else None


def _axis(node: Node) -> int:
    return 0 if isinstance(node.op, ops.MatMul) and not node.op.transpose_b else 1
