"""Lay two-dimensional convolutional networks out channels last, so that kernels vectorise over channels."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bitwright.ir import ops
from bitwright.ir.graph import Graph, Node
from bitwright.passes._pass import Context, Pass
from bitwright.passes.lowering import _nhwc

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
_PLACE = {0: 0, 1: 3, 2: 1, 3: 2}  # where an NCHW axis stands in NHWC
_CONV: tuple[type[ops.Op], ...] = (ops.Conv, ops.IntConv, ops.SmallConv)
_POOL: tuple[type[ops.Op], ...] = (ops.MaxPool, ops.AvgPool)


@dataclass(frozen=True)
class ChannelsLast(Pass):
    """Run convolutions channels last; transposes appear only where a value enters or leaves that layout.

    before:
        graph @g (%x: f32[1, 4, 5, 5]) -> (y = %r) level=integer {
          %w = weight {ref="w"} : f32[8, 4, 3, 3]
          %c = conv(%x, %w) {padding=[1, 1, 1, 1]} : f32[1, 8, 5, 5]
          %r = relu(%c) : f32[1, 8, 5, 5]
        }
    after:
        graph @g (%x: f32[1, 4, 5, 5]) -> (y = %r) level=integer {
          %w = weight {ref="w"} : f32[8, 4, 3, 3]
          %x.last = transpose(%x) {perm=[0, 2, 3, 1]} : f32[1, 5, 5, 4]
          %c.last = conv(%x.last, %w) {padding=[1, 1, 1, 1], channels_last=true} : f32[1, 5, 5, 8]
          %r.last = relu(%c.last) : f32[1, 5, 5, 8]
          %r = transpose(%r.last) {perm=[0, 3, 1, 2]} : f32[1, 8, 5, 5]
        }
    """

    name = "channels-last"
    takes = "integer"
    gives = "integer"

    def run(self, graph: Graph, context: Context) -> Graph:
        rw = _Layout(graph)
        for node in graph.nodes:
            rw.visit(node)
        for out in graph.outputs:
            rw.plain(out)
        return rw.done()


class _Layout(_nhwc.Twins):
    """Keeps, beside the plain form of a value, its channels-last twin; each is made when first asked for."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.last: dict[str, str] = {}

    def plain(self, old: str) -> str:
        if old not in self.moved:
            node = self.graph.producers[old]
            self.free(node)
            self.moved[old] = self.emit(ops.Transpose(TO_FIRST), self.last[old], name=old, origin=node.origin)
        return self.moved[old]

    def twin(self, old: str) -> str:
        """The channels-last form of a rank-4 value."""
        if old not in self.last:
            node = self.graph.producers.get(old)
            if node is not None and isinstance(node.op, ops.Quantize) and node.op.axis is None:
                # transpose before quantizing: the two are one kernel then
                rest = [self.plain(x) for x in node.inputs[1:]]
                self.emit_last(node, node.op, self.twin(node.inputs[0]), *rest)
            else:
                self.last[old] = self.emit(ops.Transpose(TO_LAST), self.plain(old), name=f"{old}.last")
        return self.last[old]

    def emit_last(self, node: Node, op: ops.Op, *inputs: str) -> bool:
        self.last[node.output] = self.emit(op, *inputs, name=f"{node.output}.last", origin=node.origin)
        return True

    def visit(self, node: Node) -> None:
        if not self._convert(node):
            for x in node.inputs:
                self.plain(x)
            self.keep(node)

    def _convert(self, node: Node) -> bool:
        """Emit the node channels last if that is possible and of use."""
        op = node.op
        if isinstance(op, _CONV) and node.type.rank == 4 and not getattr(op, "channels_last", True):
            rest = [self.plain(x) for x in node.inputs[1:]]
            return self.emit_last(node, replace(op, channels_last=True), self.twin(node.inputs[0]), *rest)  # type: ignore[call-arg]
        if isinstance(op, ops.Transpose) and op.perm == TO_FIRST and node.inputs[0] not in self.last:
            self.last[node.output] = self.plain(node.inputs[0])
            return True
        if not any(x in self.last for x in node.inputs):
            return False
        if isinstance(op, ops.POINTWISE):
            return node.type.rank == 4 and self._pointwise(node)
        return self._structural(node, op)

    def _structural(self, node: Node, op: ops.Op) -> bool:
        x = node.inputs[0]
        if isinstance(op, ops.Transpose) and op.perm == TO_LAST:
            self.moved[node.output] = self.last[x]
            return True
        if isinstance(op, _POOL) and node.type.rank == 4 and not getattr(op, "channels_last", True):
            return self.emit_last(node, replace(op, channels_last=True), self.twin(x))  # type: ignore[call-arg]
        if isinstance(op, ops.Concat) and node.type.rank == 4:
            return self.emit_last(node, ops.Concat(_PLACE[op.axis % 4]), *(self.twin(i) for i in node.inputs))
        if isinstance(op, ops.Slice) and node.type.rank == 4:
            return self.emit_last(node, replace(op, axis=_PLACE[op.axis % 4]), self.twin(x))
        if isinstance(op, ops.Pad) and node.type.rank == 4:
            padding = tuple(op.padding[4 * half + axis] for half in (0, 1) for axis in TO_LAST)
            return self.emit_last(node, replace(op, padding=padding), self.twin(x))
        if (respelled := _nhwc.RESPELLED.get(type(op))) is not None:
            return respelled(self, node, op)
        if isinstance(op, ops.Reduce) and sorted(a % 4 for a in op.axes) == [2, 3]:
            return self._global(node, op)
        if isinstance(op, ops.Reshape) and self.graph.types[x].shape[2:] == (1, 1) and node.type.rank == 2:
            self.keep_as(node, op, [self.twin(x)], node.types)
            return True
        return False

    def _global(self, node: Node, op: ops.Reduce) -> bool:
        """A reduction over all space: rank 4 stays channels last, [N, C] is the same in both layouts."""
        inner = replace(op, axes=(1, 2))
        if op.keepdim:
            return self.emit_last(node, inner, self.twin(node.inputs[0]))
        self.keep_as(node, inner, [self.twin(node.inputs[0])], node.types)
        return True

    def _pointwise(self, node: Node) -> bool:
        """Every operand in channels-last form; operands of lower rank are lifted to rank 4 first."""
        op = node.op
        scales = isinstance(op, (ops.Quantize, ops.Dequantize, ops.Requantize))
        if scales and isinstance(axis := getattr(op, "axis", None), int):
            op = replace(op, axis=_PLACE[axis % 4])  # type: ignore[call-arg]
        inputs = [self.plain(x) if scales and i else self._operand(x, node.origin) for i, x in enumerate(node.inputs)]
        return self.emit_last(node, op, *inputs)

    def _operand(self, x: str, origin: str) -> str:
        t = self.graph.types[x]
        if t.rank == 4:
            return self.twin(x)
        if all(d == 1 for d in t.shape):
            return self.plain(x)
        lifted = self.emit(ops.Reshape((1,) * (4 - t.rank) + t.shape), self.plain(x), origin=origin)
        return self.emit(ops.Transpose(TO_LAST), lifted, origin=origin)
